"""A gateway that is told to stop, and one whose engines are: no request is lost, and no client pays for an order."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import httpx
import psutil
import pytest

from inference_runtime.errors import Draining
from inference_runtime.rpc import error_from_rpc, open_channel
from inference_runtime.testing.etcd import EtcdProcess
from inference_runtime.v1 import engine_service_pb2, gateway_service_pb2, gateway_service_pb2_grpc
from services.gateway.allowance import MAX_HAND_OVERS
from tests.integration.gateway.conftest import Start
from tests.integration.gateway.peer import Row, deployment_route, error_row, last_row, peer, until
from tests.integration.gateway.test_faults import text_of, whichever_has_it
from tests.integration.gateway.test_grpc_door import ask, error_of
from tests.integration.gateway.test_http_wire import BODY, STREAM, ended, post, read_answer
from tests.integration.gateway.test_process import Process, get, workers_of
from tests.integration.gateway.test_process import until as wait_until

CLOSES = Draining("the engine closed before the answer was complete")
#: Nothing may be repeated, and nothing moved.
NO_BUDGET: dict[str, Any] = {
    "max_retries": 0,
    "max_resumptions": 0,
    "retry_floor": 0,
    "retry_share": 0,
    "move_floor": 0,
    "moves_per_request": 0,
}


# --- engines that drain ------------------------------------------------------------------------------------------------


async def test_a_hand_over_is_free(start: Start) -> None:
    """R09: an answer that is handed over more often than engines may die under it, with no budget at all, is the answer of an
    undisturbed one; and the replicas stay in good standing."""
    async with peer("a") as a, peer("b") as b, start(limits=NO_BUDGET) as gateway:
        await gateway.route(deployment_route(a.replica("demo"), b.replica("demo")))
        asking = asyncio.create_task(gateway.chat(stream=True))
        words = 6
        for word in range(words + 1):
            here = await until(lambda: next((p for p in (a, b) if p.submissions), None), "its turn")
            s = here.submissions.pop()
            assert [list(p.token_ids) for p in s.generated_prefix] == ([list(range(word))] if word else [])
            if word < words:
                here.send(Row(s, word, [word], f"{word} "), error_row(s, CLOSES, word + 1))
            else:
                here.send(last_row(s, word, [word], "end"))
        assert text_of(await asking) == "0 1 2 3 4 5 end"
        assert gateway.worker.table.well(0.0)


async def test_a_refusal_by_an_engine_that_drains_is_free(start: Start) -> None:
    """A late arrival that is refused is a request of the next engine, as if it had never been at the first."""
    async with peer("a") as a, peer("b") as b, start(limits=NO_BUDGET) as gateway:
        await gateway.route(deployment_route(a.replica("demo"), b.replica("demo")))
        asking = asyncio.create_task(gateway.chat())
        first = await whichever_has_it(a, b)
        first.send(error_row(first.submissions[0], CLOSES))
        other = b if first is a else a
        other.send(last_row(await other.submission(), 0, [1], "ok"))
        assert (await asking).json()["choices"][0]["message"]["content"] == "ok"


async def test_engines_that_say_so_without_end_are_not_asked_without_end(start: Start) -> None:
    """A bound on what is free: a fault must not circle for ever."""
    async with peer("a") as a, start() as gateway:
        replicas = [a.replica("demo") for _ in range(20)]
        for number, replica in enumerate(replicas):
            replica.id = f"demo-{number}"
        await gateway.route(deployment_route(*replicas))
        asking = asyncio.create_task(gateway.chat(stream=True))
        for attempt in range(1 + MAX_HAND_OVERS):
            a.send(error_row(await a.submission(attempt + 1), CLOSES))
        assert "closed before" in (await asking).text
        assert len(a.submissions) == 1 + MAX_HAND_OVERS


async def test_a_session_that_its_engine_ends_in_order_costs_nothing(start: Start) -> None:
    """What was on its way to an engine that closed is a request of the next one."""
    async with peer("a") as a, peer("b") as b, start(limits=NO_BUDGET) as gateway:
        await gateway.route(deployment_route(a.replica("demo"), b.replica("demo")))
        asking = asyncio.create_task(gateway.chat())
        first = await whichever_has_it(a, b)
        first.cut(CLOSES)
        other = b if first is a else a
        other.send(last_row(await other.submission(), 0, [1], "ok"))
        assert (await asking).json()["choices"][0]["message"]["content"] == "ok"


async def test_an_engine_that_is_put_back_into_service_gets_requests_again(start: Start) -> None:
    """An operator drains an engine and thinks better of it: its sessions are told, and nothing is opened anew."""
    async with peer("a") as a, start() as gateway:
        await gateway.route(deployment_route(a.replica("demo")))
        a.send_raw(engine_service_pb2.SessionResponse(draining=True))
        await until(lambda: not gateway.worker.table.ready, "draining noticed")
        asking = asyncio.create_task(gateway.chat())
        a.send_raw(engine_service_pb2.SessionResponse(accepting=True))
        a.send(last_row(await a.submission(), 0, [1], "ok"))
        assert (await asking).status_code == 200
        assert a.sessions == 1


async def test_an_engine_that_drains_already_when_the_session_opens_gets_nothing(start: Start) -> None:
    """A gateway that starts in the middle of a drain reads it in the welcome."""
    async with peer("a") as a, peer("b") as b, start() as gateway:
        a.draining = True
        await gateway.route(deployment_route(a.replica("demo")), wait=False)
        await until(lambda: a.sessions == 1, "the session")
        await gateway.route(deployment_route(a.replica("demo"), b.replica("demo")), wait=False)
        await until(lambda: gateway.worker.table.ready, "the other engine")
        for number in range(8):
            asking = asyncio.create_task(gateway.chat())
            b.send(last_row(await b.submission(number + 1), 0, [1], "ok"))
            assert (await asking).status_code == 200
        assert not a.submissions


# --- a gateway that drains ---------------------------------------------------------------------------------------------


async def test_while_the_notice_lasts_readyz_says_503_and_everybody_is_served(start: Start) -> None:
    """A load balancer needs a moment to look elsewhere: until then nothing is refused, and no connection is kept."""
    async with peer("a") as a, start(drain_notice_s=0.6, drain_timeout_s=10) as gateway:
        await gateway.route(deployment_route(a.replica("demo")))
        kept = await gateway.connect()
        kept[1].write(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
        assert (await read_answer(kept[0]))[0] == 200
        draining = asyncio.create_task(gateway.worker.drain())
        await until(lambda: gateway.worker.live.draining, "draining")
        assert (await gateway.client.get("/readyz")).status_code == 503
        new = await gateway.connect()
        for at, (reader, writer) in enumerate((kept, new)):
            writer.write(post(BODY))
            a.send(last_row(await a.submission(at + 1), 0, [1], "ok"))
            status, headers, _ = await read_answer(reader)
            assert (status, headers[b"connection"]) == (200, b"close")
            assert await ended(reader)
        async with asyncio.timeout(8):
            await draining
        with pytest.raises(OSError):
            await gateway.connect()


async def test_after_the_notice_idle_connections_go_streams_end_and_nobody_new_gets_in(start: Start) -> None:
    """A stream that runs is the last thing of its connection, and says so when it has not begun yet."""
    async with peer("a") as a, start(drain_notice_s=0, drain_timeout_s=10) as gateway:
        await gateway.route(deployment_route(a.replica("demo")))
        idle = await gateway.connect()
        idle[1].write(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
        assert (await read_answer(idle[0]))[0] == 200
        streaming = asyncio.create_task(gateway.chat(stream=True))
        s = await a.submission()
        draining = asyncio.create_task(gateway.worker.drain())
        await until(lambda: gateway.worker.live.draining, "draining")
        assert await ended(idle[0])
        with pytest.raises(OSError):
            await gateway.connect()
        a.send(Row(s, 0, [1], "a"), last_row(s, 1, [2], "b"))
        answer = await streaming
        assert text_of(answer) == "ab"
        async with asyncio.timeout(8):
            await draining


async def test_a_client_that_has_just_connected_gets_its_answer(start: Start) -> None:
    """The kernel says yes to a client before we see it: closing the door on it would be a reset and a lost request."""
    async with peer("a") as a, start(drain_notice_s=0, drain_timeout_s=10) as gateway:
        await gateway.route(deployment_route(a.replica("demo")))
        host, port = gateway.address.rsplit(":", 1)
        clients = [socket.create_connection((host, int(port))) for _ in range(8)]  # blocking: the loop sees none of them yet
        draining = asyncio.create_task(gateway.worker.drain())
        pairs = [await asyncio.open_connection(sock=client) for client in clients]
        for _, writer in pairs:
            writer.write(post(BODY))
        await until(lambda: len(a.submissions) == len(clients), "all of them are asked")
        a.send(*(last_row(s, 0, [1], "ok") for s in a.submissions))
        for reader, writer in pairs:
            status, headers, _ = await read_answer(reader)
            assert (status, headers[b"connection"]) == (200, b"close")
            writer.close()
        async with asyncio.timeout(8):
            await draining


async def test_a_connection_without_a_request_does_not_hold_up_the_end(start: Start) -> None:
    """Load balancers open connections ahead of time."""
    async with start(drain_notice_s=0, drain_timeout_s=60) as gateway:
        silent = await gateway.connect()
        await until(lambda: gateway.worker.http.connections, "the connection")
        async with asyncio.timeout(10):
            await gateway.worker.drain()
        assert await ended(silent[0])


async def test_what_outlives_the_time_out_ends_with_an_error_and_not_with_a_torn_answer(start: Start) -> None:
    """Both doors: the client is told to ask another gateway, the engine is told to stop."""
    async with peer("a") as a, start(drain_notice_s=0, drain_timeout_s=0.3) as gateway:
        await gateway.route(deployment_route(a.replica("demo")))
        reader, writer = await gateway.connect()
        writer.write(post(STREAM))
        streamed = await a.submission()
        whole = asyncio.create_task(gateway.chat())
        await a.submission(2)
        async with open_channel(gateway.worker.rpc.address) as channel:
            stub = gateway_service_pb2_grpc.GatewayServiceStub(channel)  # type: ignore[no-untyped-call]
            call = stub.Generate(ask())
            await a.submission(3)
            a.send(Row(streamed, 0, [1], "a"))
            async with asyncio.timeout(8):
                await gateway.worker.drain()
            assert isinstance(await error_of(call), Draining)
        async with asyncio.timeout(8):
            text = (await reader.read()).decode()
        assert '"a"' in text
        last = [line for line in text.splitlines() if line.startswith("data: ")][-1]
        assert "ask another one" in json.loads(last[6:])["error"]["message"]
        assert (await whole).status_code == 503
        await until(lambda: len(a.cancellations) == 3, "the engine is told")


async def test_grpc_clients_are_sent_elsewhere_and_their_calls_go_on(start: Start) -> None:
    """GOAWAY after the notice: a call that runs ends well, the next one is not sent here."""
    async with peer("a") as a, start(drain_notice_s=0, drain_timeout_s=20) as gateway:
        await gateway.route(deployment_route(a.replica("demo")))
        async with open_channel(gateway.worker.rpc.address) as channel:
            stub = gateway_service_pb2_grpc.GatewayServiceStub(channel)  # type: ignore[no-untyped-call]
            call = stub.Generate(ask())
            s = await a.submission()
            draining = asyncio.create_task(gateway.worker.drain())

            async def refused() -> bool:
                try:
                    await stub.ListModels(gateway_service_pb2.ListModelsRequest(), timeout=2)
                except grpc.aio.AioRpcError as err:
                    return error_from_rpc(err).reason in {"NETWORK_ERROR", "SERVER_ERROR"}
                return False

            async with asyncio.timeout(8):
                while not await refused():  # noqa: ASYNC110 - the channel learns it from the network
                    await asyncio.sleep(0.01)
            a.send(last_row(s, 0, [1], "ok"))
            assert [c.text async for c in call] == ["ok"]
            async with asyncio.timeout(8):
                await draining


# --- processes ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def etcd() -> Iterator[str]:
    """A real etcd."""
    with EtcdProcess(fsync=False) as running:
        yield running.endpoint


def test_help_shows_every_flag() -> None:
    """What a program takes, it says."""
    said = subprocess.run([sys.executable, "-m", "services.gateway", "--help"], capture_output=True, text=True, check=True).stdout
    assert "--workers N" in said
    assert "--config FILE" in said


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize(("second", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_second_signal_is_now(tmp_path: Path, etcd: str, workers: int, second: int, status: int) -> None:
    """No notice, no drain, a status that is not 0, and no worker is left."""
    settings = {"DRAIN_TIMEOUT_S": "60", "DRAIN_NOTICE_S": "60"}
    gateway = Process(tmp_path, "--workers", str(workers), ETCD__ENDPOINTS=etcd, **settings)
    address = gateway.addresses()["http"]
    children = workers_of(gateway.popen.pid)
    gateway.popen.send_signal(signal.SIGTERM)
    wait_until(lambda: get(address, "/readyz") == 503, "the notice")
    gateway.popen.send_signal(second)
    assert gateway.end()[0] == status
    wait_until(lambda: not any(psutil.pid_exists(pid) for pid in children), "the end of the workers")


def test_a_gateway_ends_in_order_while_etcd_is_away(tmp_path: Path) -> None:
    """R10: it lives on what it knows, and dies without being told that it may."""
    with EtcdProcess(fsync=False) as mine:
        gateway = Process(tmp_path, ETCD__ENDPOINTS=mine.endpoint, DRAIN_NOTICE_S="0.1")
        gateway.addresses()
        mine.kill()
        gateway.popen.send_signal(signal.SIGTERM)
        status, said = gateway.end()
    assert status == 0
    assert "Traceback" not in said


def test_a_signal_for_the_whole_group_of_processes_drains_every_worker(tmp_path: Path, etcd: str) -> None:
    """Ctrl-C in a terminal, and systemd, signal parent and workers alike: for a worker that is one signal and not two."""
    gateway = Process(tmp_path, "--workers", "2", ETCD__ENDPOINTS=etcd, DRAIN_NOTICE_S="0.5")
    gateway.addresses()
    group = [*workers_of(gateway.popen.pid), gateway.popen.pid]
    for number in (signal.SIGINT, signal.SIGTERM):
        for pid in group[: -1 if number == signal.SIGTERM else None]:
            os.kill(pid, number)
    status, said = gateway.end()
    assert status == 0
    assert "stopped at once" not in said


def test_a_worker_that_is_stopped_alone_leaves_the_port_to_its_siblings(tmp_path: Path, etcd: str) -> None:
    """SO_REUSEPORT: under a stream of new connections none is refused or reset while one worker drains and is replaced."""
    gateway = Process(tmp_path, "--workers", "2", ETCD__ENDPOINTS=etcd, DRAIN_NOTICE_S="0.3")
    address = gateway.addresses()["http"]
    wait_until(lambda: len(workers_of(gateway.popen.pid)) == 2, "two workers")
    victim = min(workers_of(gateway.popen.pid))
    os.kill(victim, signal.SIGTERM)
    asked = 0
    with httpx.Client(base_url=f"http://{address}", headers={"connection": "close"}, timeout=10) as client:

        def served() -> bool:
            nonlocal asked
            for _ in range(20):
                assert client.get("/healthz").status_code == 200
                asked += 1
            return len(w := workers_of(gateway.popen.pid)) == 2 and victim not in w

        wait_until(served, "a new worker")
    assert asked >= 20
    gateway.popen.send_signal(signal.SIGTERM)
    status, said = gateway.end()
    assert status == 0
    assert "Traceback" not in said
