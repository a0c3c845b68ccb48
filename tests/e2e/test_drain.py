"""Everything is stopped in order while requests run, one process after the other and all at once: nothing is lost by an order."""

from __future__ import annotations

import asyncio
import json
import random
import signal
import socket
import stat
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import httpx
import pytest

from bench.faults.load import MODEL, Load
from inference_runtime.testing.cluster import Cluster
from inference_runtime.testing.history import History, Stream
from tests.e2e.kit import ECHO, Up, project, wait_for

#: Streams at any time, their tokens, and the seconds of each token: three seconds a stream.
STREAMS, TOKENS, PACE_S = 12, 150, 0.02
#: An engine waits for much less, so that whatever runs there is handed over.
SHORT_DRAIN = {"INFERENCE_ENGINE__DRAIN_TIMEOUT_S": "0.6", "INFERENCE_ENGINE__DRAIN_NOTICE_S": "0.2"}
#: Seconds that a process gets to end, on a machine that may be busy.
ENDS_WITHIN_S = 40.0


async def ended(cluster: Cluster, name: str) -> int | None:
    """Exit code of a process once it has ended."""
    process = cluster.local.processes[name]
    async with asyncio.timeout(ENDS_WITHIN_S):
        while process.running:  # noqa: ASYNC110 - it is another process
            await asyncio.sleep(0.02)
    return process.exit_code


@pytest.mark.timeout(300)
async def test_a_rolling_restart_of_everything_loses_no_request() -> None:
    """R05, R09: SIGTERM for each process in turn under streams that outlive an engine's patience. Every one ends with 0, every
    answer is whole and said once, and none fails; a client whose gateway is gone asks the other, as a load balancer does. The
    fault matrix does the same to a larger cluster under more load (R-05)."""
    async with Cluster(engines=2, gateways=2, lease_ttl_s=3, settings={"engine": SHORT_DRAIN}) as cluster:
        await cluster.apply({**ECHO, "name": MODEL, "replicas": 2, "runtime_config": {"pace_s": PACE_S}})
        await cluster.wait_serving(MODEL)
        load = Load(cluster, streams=STREAMS, tokens=TOKENS, rng=random.Random(7), elsewhere=True)
        async with load.running():
            await load.started()
            for name in [name for name in cluster.pids() if name != "etcd"]:
                cluster.kill(name, signal.SIGTERM)
                assert await ended(cluster, name) == 0, cluster.local.processes[name].ended_sentence()
                await cluster.restart(name)
                await cluster.wait_serving(MODEL)
        logs = "".join(p.read_text() for p in cluster.local.logs.glob("engine*.log"))
        assert "requests handed over" in logs, "no stream outlived an engine: nothing was tried"
        assert "stopped at once" not in logs
    assert [f"{a.record.name}: {a.outcome} {a.error}" for a in load.answers if a.outcome != "ended"] == []
    load.history.check()


async def test_usage_of_every_request_survives_a_restart_of_gateway_and_metrics() -> None:
    """B04: what a gateway has not sent when it is stopped it sends on the way out, also while the ledger changes hands."""
    async with Cluster(singletons=2, gateways=2, lease_ttl_s=3) as cluster:
        await cluster.apply({**ECHO, "name": MODEL, "runtime_config": {"pace_s": 0.005}})
        await cluster.wait_serving(MODEL)
        load = Load(cluster, streams=4, tokens=10, rng=random.Random(3), elsewhere=True)
        async with load.running():
            await load.started()
            for round_ in range(2):
                leader = await cluster.leader("metrics")
                gateway = cluster.local.of("gateway")[round_].spec.name
                for name in (leader, gateway):
                    cluster.kill(name, signal.SIGTERM)
                for name in (leader, gateway):
                    assert await ended(cluster, name) == 0
                    await cluster.restart(name)
        asked = sum(a.outcome == "ended" for a in load.answers)
        assert asked == len(load.answers) > 20
        async with cluster.client() as client, asyncio.timeout(30):
            while True:
                counted = {u.deployment: u for u in await client.usage()}.get(MODEL)
                if counted is not None and counted.requests + counted.errors + counted.cancelled >= asked:
                    break
                await asyncio.sleep(0.1)
        assert counted.requests == asked


@dataclass
class Reader:
    """A client that comes back with the last event it has, as every EventSource does."""

    record: Stream
    body: dict[str, object]
    last_id: str = ""
    told: str = ""

    async def read(self, client: httpx.AsyncClient, url: str, then: Callable[[], None] | None = None) -> None:
        """Ask, and read to the end of the connection; `then` is called once an event is there."""
        headers = {"last-event-id": self.last_id} if self.last_id else {}
        async with client.stream("POST", f"{url}/v1/chat/completions", json=self.body, headers=headers) as response:
            assert response.status_code == 200, await response.aread()
            async for line in response.aiter_lines():
                if line.startswith("id: "):
                    self.last_id = line[4:]
                elif line == "data: [DONE]":
                    self.record.end()
                elif line.startswith("data: "):
                    event = json.loads(line[6:])
                    self.told = self.told or event.get("error", {}).get("message", "")
                    for choice in event.get("choices", ()):
                        self.record.text(choice["delta"].get("content") or "")
                    if then is not None and self.record.words()[0]:
                        then()
                        then = None


async def test_a_stream_that_outlives_its_gateway_goes_on_at_another() -> None:
    """R09, R13: a gateway cannot wait for ever either. Its client is told so, comes back to the other one, and has every word
    once."""
    patience = {"INFERENCE_GATEWAY__DRAIN_TIMEOUT_S": "0.5", "INFERENCE_GATEWAY__DRAIN_NOTICE_S": "0.1"}
    async with Cluster(gateways=2, settings={"gateway": patience}, lease_ttl_s=3) as cluster:
        await cluster.apply({**ECHO, "name": MODEL, "runtime_config": {"pace_s": PACE_S}})
        await cluster.wait_serving(MODEL)
        first, second = cluster.local.http_urls
        history = History()
        record = history.begin("goes on", seed=5, tokens=TOKENS)
        asks = [{"role": "user", "content": "goes on"}]
        body = {"model": MODEL, "messages": asks, "seed": 5, "max_tokens": TOKENS, "stream": True}
        reader = Reader(record, body)
        async with httpx.AsyncClient(timeout=60) as client:
            await reader.read(client, first, then=lambda: cluster.kill("gateway", signal.SIGTERM))
            assert await ended(cluster, "gateway") == 0
            assert not record.ended
            await reader.read(client, second)
    assert "ask another" in reader.told
    history.check()


def test_an_engine_is_taken_out_of_service_and_put_back_by_name(tmp_path: Path) -> None:
    """`inferctl drain`: its replica moves to the other engine while requests are answered; `--undo` makes it ready again."""
    file = project(tmp_path / "project.toml", ECHO)
    with Up(tmp_path / "state", ["--engines", "2", "-f", str(file)]).start().wait_serving() as running:

        def table(kind: str) -> list[dict[str, Any]]:
            rows: list[dict[str, Any]] = json.loads(running.cli("get", kind, "-o", "json").stdout)
            return rows

        def replicas() -> list[dict[str, Any]]:
            return [row["replica"] for row in table("replicas")]

        def engine_of_echo() -> set[str]:
            return {r["engine_id"] for r in replicas() if r["state"] == "REPLICA_STATE_SERVING"}

        def state_of(engine: str) -> str:
            return next(str(e["state"]) for e in table("engines") if e["id"] == engine)

        (engine,) = engine_of_echo()
        drained = running.cli("drain", engine, "--wait")
        assert (drained.returncode, drained.stdout.splitlines()[-1]) == (0, f"engine {engine}: drained")
        assert state_of(engine) == "ENGINE_STATE_DRAINING"
        wait_for(lambda: len(engine_of_echo() - {engine}) == 1, "its replica serves elsewhere")
        assert running.cli("chat", "echo", "--once", "hello", "--max-tokens", "3").returncode == 0

        back = running.cli("drain", engine, "--undo")
        assert (back.returncode, back.stdout) == (0, f"engine {engine}: back in service\n")
        wait_for(lambda: state_of(engine) == "ENGINE_STATE_READY", "it is ready again")


def stream(running: Up) -> socket.socket:
    """A client in the middle of an answer that would take minutes."""
    body = json.dumps({"model": "echo", "messages": [{"role": "user", "content": "x"}], "max_tokens": 5000, "stream": True})
    client = socket.create_connection(("127.0.0.1", int(running.http.rpartition(":")[2])), timeout=30)
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(body)}"
    client.sendall(f"{head}\r\n\r\n{body}".encode())
    assert client.recv(1024)
    return client


def test_ctrl_c_does_not_wait_for_a_long_answer_and_tells_its_reader(tmp_path: Path) -> None:
    """Who presses Ctrl-C wants it to end: a second for what runs, an error for what does not end in it, no process is left."""
    file = project(tmp_path / "project.toml", {**ECHO, "runtime_config": {"pace_s": 0.05}})
    with Up(tmp_path / "state", ["-f", str(file)]).start().wait_serving() as running, stream(running) as client:
        begin = time.monotonic()
        code = running.interrupt()
        took_s = time.monotonic() - begin
        print(f"Ctrl-C under a stream took {took_s:.2f} s")
        said = b""
        while piece := client.recv(65536):
            said += piece

        assert code == 0
        assert b"this gateway shut down before the answer was complete" in said
        assert b"[DONE]" not in said
        log = (running.state_dir / "logs" / "gateway.log").read_text()
        assert logged_at(log, "requests cut off") - logged_at(log, ": draining") < 4.0, "the gateway waited for the answer"
        assert running.left_over() == []


def logged_at(log: str, words: str) -> float:
    """When a line was logged, seconds."""
    line = next(line for line in log.splitlines() if words in line)
    return datetime.fromisoformat(line.split(maxsplit=1)[0]).timestamp()


def test_logs_and_usage_are_for_their_owner_only(tmp_path: Path) -> None:
    """Nobody else on the machine reads who asked what, also where an earlier version left the door open."""
    file = project(tmp_path / "project.toml", ECHO)
    for folder in ("logs", "metrics"):
        (tmp_path / "state" / folder).mkdir(parents=True)
        (tmp_path / "state" / folder).chmod(0o755)
    with Up(tmp_path / "state", ["-f", str(file)]).start().wait_serving() as running:
        open_to_others = [
            path
            for folder in ("logs", "metrics", "etcd")
            for path in (running.state_dir / folder, *(running.state_dir / folder).rglob("*"))
            if stat.S_IMODE(path.stat().st_mode) & 0o077 and (path.is_dir() or folder != "etcd")
        ]
        assert (running.state_dir / "metrics").is_dir()
        assert (running.state_dir / "logs" / "gateway.log").is_file()
    assert open_to_others == []
