"""`inference-gateway` as a process: what it says when it cannot start, how it ends, several workers on one port."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import grpc
import pytest

from inference_runtime.testing.etcd import EtcdProcess
from inference_runtime.v1 import gateway_service_pb2, gateway_service_pb2_grpc

T = TypeVar("T")

DEADLINE_S = 20.0


def until(condition: Callable[[], T | None], what: str) -> T:
    """The first true value of a condition; fails the test when it does not come in time."""
    stop_at = time.monotonic() + DEADLINE_S
    while time.monotonic() < stop_at:
        if value := condition():
            return value
        time.sleep(0.02)
    pytest.fail(f"{what} did not come in {DEADLINE_S:g} s")


class Process:
    """A gateway process."""

    def __init__(self, folder: Path, *args: str, **settings: str) -> None:
        self.ready = folder / "ready.json"
        environment = {key: value for key, value in os.environ.items() if not key.startswith("INFERENCE_")}
        given = {"HTTP__PORT": "0", "READY_FILE": str(self.ready), **settings}
        environment |= {f"INFERENCE_GATEWAY__{key}": value for key, value in given.items()}
        environment["TMPDIR"] = str(folder)  # a parent that is killed leaves its folder
        self.popen = subprocess.Popen(
            [sys.executable, "-P", "-m", "services.gateway", *args], env=environment, stderr=subprocess.PIPE, text=True
        )

    def addresses(self) -> dict[str, str]:
        """Where it listens, once it does."""

        def read() -> dict[str, str] | None:
            assert self.popen.poll() is None, self.popen.stderr.read() if self.popen.stderr else ""
            return json.loads(self.ready.read_text()) if self.ready.exists() else None

        return until(read, "the ready file")

    def end(self) -> tuple[int, str]:
        """Exit status and what it said."""
        try:
            _, said = self.popen.communicate(timeout=DEADLINE_S)
        except subprocess.TimeoutExpired:
            self.popen.kill()
            _, said = self.popen.communicate()
            pytest.fail(f"the gateway did not end: {said}")
        return self.popen.returncode, said


def get(address: str, path: str) -> int:
    """Status of GET, 0 when nobody answers."""
    try:
        with urllib.request.urlopen(f"http://{address}{path}", timeout=2) as response:
            return int(response.status)
    except urllib.error.HTTPError as err:
        err.close()
        return err.code
    except OSError:
        return 0


@pytest.fixture(scope="module")
def etcd() -> Iterator[str]:
    """A real etcd."""
    with EtcdProcess(fsync=False) as running:
        yield running.endpoint


def test_a_wrong_key_is_one_sentence_and_status_2(tmp_path: Path) -> None:
    config = tmp_path / "gateway.toml"
    config.write_text("[http]\nporrt = 1\n")
    status, said = Process(tmp_path, "--config", str(config)).end()
    assert status == 2
    assert said.count("\n") == 1
    assert "porrt" in said
    assert "'port'" in said


def test_standing_open_to_the_network_is_refused(tmp_path: Path) -> None:
    status, said = Process(tmp_path, HTTP__HOST="0.0.0.0").end()
    assert status == 2
    assert said.count("\n") == 1
    assert "api_keys" in said


def test_a_taken_port_is_one_sentence(tmp_path: Path, etcd: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        status, said = Process(tmp_path, HTTP__PORT=str(port), ETCD__ENDPOINTS=etcd).end()
    assert status == 1
    assert said.count("\n") == 1
    assert str(port) in said
    assert "taken" in said


def test_an_unreachable_etcd_is_one_sentence(tmp_path: Path) -> None:
    status, said = Process(tmp_path, ETCD__ENDPOINTS="127.0.0.1:1").end()
    assert status == 1
    assert "127.0.0.1:1" in said
    assert "Traceback" not in said


def test_a_gateway_says_where_it_listens_and_ends_in_order(tmp_path: Path, etcd: str) -> None:
    gateway = Process(tmp_path, ETCD__ENDPOINTS=etcd)
    addresses = gateway.addresses()
    assert get(addresses["http"], "/healthz") == 200
    assert get(addresses["http"], "/readyz") == 503
    assert addresses["grpc"].startswith("127.0.0.1:")
    gateway.popen.send_signal(signal.SIGTERM)
    status, said = gateway.end()
    assert status == 0
    assert "Traceback" not in said
    assert get(addresses["http"], "/healthz") == 0


def workers_of(parent: int) -> set[int]:
    """Process ids of a parent's workers."""
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(parent)], capture_output=True, text=True)
    return {int(pid) for pid in found.stdout.split()}


def scrape(address: str) -> str:
    """What stands at /metrics."""
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=5) as response:
        return str(response.read().decode())


def test_one_scrape_shows_all_workers_at_both_ports(tmp_path: Path, etcd: str) -> None:
    """Whichever worker is asked, it tells of the other one too. The port for Prometheus is the parent's, since no two workers can
    have it."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    gateway = Process(tmp_path, "--workers", "2", ETCD__ENDPOINTS=etcd, TELEMETRY__PROMETHEUS_PORT=str(port))
    addresses = gateway.addresses()
    with grpc.insecure_channel(addresses["grpc"]) as channel:  # of the first worker alone
        stub = gateway_service_pb2_grpc.GatewayServiceStub(channel)  # type: ignore[no-untyped-call]
        for _ in range(3):
            stub.ListModels(gateway_service_pb2.ListModelsRequest(), timeout=5)
    counted = 'inference_rpc_seconds_count{method="/inference_runtime.v1.GatewayService/ListModels"} 3\n'
    for place in (addresses["http"], f"127.0.0.1:{port}"):
        until(lambda: all(counted in scrape(place) for _ in range(10)), f"the sum at {place}")  # noqa: B023
    gateway.popen.send_signal(signal.SIGTERM)
    status, said = gateway.end()
    assert (status, "Traceback" in said) == (0, False)


def test_workers_share_a_port_are_replaced_when_they_die_and_end_with_their_parent(tmp_path: Path, etcd: str) -> None:
    gateway = Process(tmp_path, "--workers", "2", ETCD__ENDPOINTS=etcd)
    address = gateway.addresses()["http"]
    until(lambda: len(workers_of(gateway.popen.pid)) == 2, "two workers")
    victim = min(workers_of(gateway.popen.pid))
    os.kill(victim, signal.SIGKILL)
    until(lambda: len(w := workers_of(gateway.popen.pid)) == 2 and victim not in w, "a new worker")
    until(lambda: all(get(address, "/healthz") == 200 for _ in range(10)), "every worker answers")
    others = workers_of(gateway.popen.pid)
    gateway.popen.kill()  # not even the parent's death leaves one behind
    gateway.end()
    until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in others), "the end of the workers")
    assert get(address, "/healthz") == 0
