"""`inferctl up`: what it tells, what it costs, how it heals, and that nothing is left of it."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from inference_runtime.testing.etcd import EtcdProcess
from tests.e2e.kit import ECHO, ROOT, Up, alive, inferctl, project, wait_for

SERVICES = {"etcd", "coordinator", "deployment_manager", "metrics", "engine", "gateway"}
#: Serving within 10 s of the start is the promise on a free machine; a shared one gets this much.
SERVES_WITHIN_S = 30.0
RSS_LIMIT_MB = 90


def scripted(tmp_path: Path, **settings: object) -> Path:
    """A project with one deployment that needs no torch."""
    return project(tmp_path / "project.toml", {**ECHO, **settings})


def test_the_ready_file_names_addresses_that_answer_and_processes_that_run(up: Up) -> None:
    """For scripts: http, grpc, etcd, pids by service, once everything serves."""
    ready = up.ready

    assert set(ready) == {"http", "grpc", "etcd", "pids"}
    assert set(ready["pids"]) == SERVICES
    assert all(alive(pid) for pid in ready["pids"].values())
    with urllib.request.urlopen(f"{ready['http']}/readyz", timeout=10) as response:
        assert response.status == 200
    for key in ("grpc", "etcd"):
        host, _, port = ready[key].rpartition(":")
        socket.create_connection((host, int(port)), timeout=10).close()


def test_each_service_is_a_process_of_its_own(up: Up) -> None:
    """Five services and etcd, six processes, each running its own module."""
    commands = {name: Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0") for name, pid in up.pids.items()}

    assert len(set(up.pids.values())) == 6
    for name in SERVICES - {"etcd"}:
        assert f"services.{name}" in commands[name]
    assert commands["etcd"][0].endswith("etcd")


def test_it_serves_soon(up: Up) -> None:
    """`inferctl up` serves within 10 s of its start once installed; the figure is printed, the bound is for busy machines."""
    print(f"inferctl up served after {up.served_after_s:.2f} s")

    assert up.served_after_s < SERVES_WITHIN_S


def test_the_control_plane_and_the_gateway_are_small_and_without_torch(up: Up) -> None:
    """RSS of gateway, coordinator, manager, metrics at most 90 MB each; none has libtorch mapped. The engine of a torch
    deployment does, so the check can fail."""
    sizes, torch_in = {}, set()
    for name, pid in up.pids.items():
        status = Path(f"/proc/{pid}/status").read_text()
        sizes[name] = int(status.split("VmRSS:")[1].split()[0]) // 1024
        if "libtorch" in Path(f"/proc/{pid}/maps").read_text():
            torch_in.add(name)
    print(f"RSS in MB: {sizes}")

    small = {"gateway", "coordinator", "deployment_manager", "metrics"}
    assert {name: mb for name, mb in sizes.items() if name in small and mb > RSS_LIMIT_MB} == {}
    assert torch_in == {"engine"}


def test_it_prints_addresses_a_curl_line_that_works_and_a_line_for_each_process(up: Up) -> None:
    """What a person sees: the printed curl line is run as printed, by a shell."""
    text = up.output()
    curl = next(line.split("try", 1)[1].strip() for line in text.splitlines() if line.strip().startswith("try"))
    answer = subprocess.run(["sh", "-c", curl], capture_output=True, text=True, timeout=60, check=True)

    assert "inference-runtime is one supervised runtime" in json.loads(answer.stdout)["choices"][0]["message"]["content"]
    assert up.http in text
    for name, pid in up.pids.items():
        assert any(line.split()[:2] == [name, str(pid)] for line in text.splitlines()), name


def test_ctrl_c_stops_everything_in_order_and_leaves_no_process(tmp_path: Path) -> None:
    """Ctrl-C: gateway, engine, manager, coordinator, metrics, etcd; no process, no ready file, and the ports are free."""
    with Up(tmp_path / "state", ["-f", str(scripted(tmp_path))]).start().wait_serving() as running:
        ready = running.ready
        assert set(running.left_over()) >= set(ready["pids"].values())

        code = running.interrupt()

        assert code == 0
        assert running.left_over() == []
        assert not running.ready_file.exists()
        assert inferctl("get", "leaders", "--state-dir", str(running.state_dir)).returncode == 2
        for address in (ready["http"].removeprefix("http://"), ready["grpc"], ready["etcd"]):
            host, _, port = address.rpartition(":")
            socket.create_server((host, int(port))).close()
        assert "Traceback" not in running.output() + running.logs()


def test_a_process_that_dies_is_started_again_and_the_ready_file_says_so(tmp_path: Path) -> None:
    """Supervision: engine, gateway and etcd are killed; each comes back on its address, and requests are answered again."""
    with Up(tmp_path / "state", ["-f", str(scripted(tmp_path))]).start().wait_serving() as running:
        before = running.ready
        for name in ("engine", "gateway", "etcd"):
            pid = running.pids[name]
            os.kill(pid, signal.SIGKILL)
            wait_for(lambda name=name, pid=pid: running.pids[name] != pid, f"{name} again")  # type: ignore[misc]

        def answers() -> bool:
            return running.cli("chat", "echo", "--once", "hi", "--max-tokens", "4").returncode == 0

        wait_for(answers, "an answer")
        after = running.ready

        assert {k: after[k] for k in ("http", "grpc", "etcd")} == {k: before[k] for k in ("http", "grpc", "etcd")}
        assert {name for name in SERVICES if after["pids"][name] != before["pids"][name]} == {"engine", "gateway", "etcd"}
        assert running.interrupt() == 0
        assert running.left_over() == []


def test_killing_up_itself_leaves_no_process_and_the_next_one_finds_the_deployments(tmp_path: Path) -> None:
    """SIGKILL for the parent: the children die too. The next start is not held up by the dead leaders' leases, and what was
    applied is still there."""
    extra = project(tmp_path / "extra.toml", {**ECHO, "name": "kept"})
    state = tmp_path / "state"
    with Up(state, ["-f", str(scripted(tmp_path))]).start().wait_serving() as first:
        assert first.cli("apply", "--wait", "-f", str(extra)).returncode == 0
        assert first.process is not None
        first.process.kill()
        first.process.wait()
        wait_for(lambda: first.left_over() == [], "the children's end")
        first.ready_file.unlink()

    with Up(state, ["-f", str(scripted(tmp_path))]).start().wait_serving() as second:
        print(f"served {second.served_after_s:.2f} s after a crash")

        def names() -> set[str]:
            return {d["spec"]["name"] for d in json.loads(second.cli("get", "deployments", "-o", "json").stdout)}

        assert names() == {"echo", "kept"}
        wait_for(lambda: second.cli("chat", "kept", "--once", "x", "--max-tokens", "1").returncode == 0, "the kept deployment")
        assert second.served_after_s < SERVES_WITHIN_S


def test_a_signal_while_starting_leaves_no_process(tmp_path: Path) -> None:
    """SIGTERM before anything serves: nothing is left, and that is not a failure."""
    running = Up(tmp_path / "state", ["-f", str(scripted(tmp_path))]).start()
    with_logs = running.state_dir / "logs"
    wait_for(lambda: (with_logs / "gateway.log").exists(), "the first processes")

    assert running.interrupt(signal.SIGTERM) == 0
    assert running.left_over() == []
    assert not running.ready_file.exists()


def test_a_process_that_dies_again_and_again_is_given_up_with_one_sentence(tmp_path: Path) -> None:
    """Supervision has an end: the fourth death within a minute stops everything, with the name and the log of the culprit."""
    with Up(tmp_path / "state", ["-f", str(scripted(tmp_path))]).start().wait_serving() as running:
        for _ in range(3):
            pid = running.pids["metrics"]
            os.kill(pid, signal.SIGKILL)
            wait_for(lambda pid=pid: running.pids["metrics"] != pid, "metrics again")  # type: ignore[misc]
        os.kill(running.pids["metrics"], signal.SIGKILL)

        assert running.wait_end() == 1
        last = running.output().strip().splitlines()[-1]
        assert last.startswith("inferctl: gave up: metrics ended 4 times within 60 s")
        assert "metrics.log" in last
        assert running.left_over() == []


def test_a_second_ctrl_c_means_now(tmp_path: Path) -> None:
    """The first Ctrl-C lets a running answer end (a second); the second does not wait. Two workers leave nothing either."""
    file = scripted(tmp_path, runtime_config={"pace_s": 0.05})
    with Up(tmp_path / "state", ["--workers", "2", "-f", str(file)]).start().wait_serving() as running:
        body = json.dumps({"model": "echo", "messages": [{"role": "user", "content": "x"}], "max_tokens": 5000, "stream": True})
        with socket.create_connection(("127.0.0.1", int(running.http.rpartition(":")[2])), timeout=30) as client:
            head = (
                f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(body)}"
            )
            client.sendall(f"{head}\r\n\r\n{body}".encode())
            assert client.recv(1024)
            assert running.process is not None
            running.process.send_signal(signal.SIGINT)
            wait_for(lambda: "stopping" in running.output(), "the first Ctrl-C to be heard")
            begin = time.monotonic()

            code = running.interrupt()

        assert code == 0
        assert time.monotonic() - begin < 3.0
        assert running.left_over() == []


# --- what is wrong is one sentence, an exit code, and no process -----------------------------------------------------


def assert_one_sentence(running: Up, code: int, *words: str) -> None:
    """It ended with this code, said one thing, and left nothing."""
    assert running.wait_end() == code, running.output()
    lines = running.output().strip().splitlines()
    assert len(lines) == 1, running.output()
    assert lines[0].startswith("inferctl: ")
    for word in words:
        assert word in lines[0]
    assert running.left_over() == []
    assert not running.ready_file.exists()


def test_a_taken_port_is_one_sentence(tmp_path: Path) -> None:
    """Bad input: the port and the flag."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        running = Up(tmp_path / "state", ["--port", str(port)]).start()

        assert_one_sentence(running, 1, str(port), "taken", "--port")


def test_an_unreachable_etcd_is_one_sentence(tmp_path: Path) -> None:
    """Bad input: the endpoint is named."""
    running = Up(tmp_path / "state", ["--etcd", "127.0.0.1:1", "-f", str(scripted(tmp_path))]).start()

    assert_one_sentence(running, 1, "127.0.0.1:1", "etcd")


def test_a_missing_checkpoint_is_one_sentence(tmp_path: Path) -> None:
    """Bad input: the deployment and the path."""
    pytest.importorskip("torch")
    file = project(tmp_path / "project.toml", {"name": "big", "model": "/no/such/weights", "runtime": "torch"})
    running = Up(tmp_path / "state", ["-f", str(file)]).start()

    assert_one_sentence(running, running.wait_end(), "big", "/no/such/weights")
    assert running.wait_end() in {1, 2}


def test_trap_34_an_unknown_key_in_the_project_file_is_one_sentence_before_anything_starts(tmp_path: Path) -> None:
    """Trap 34: a budget that is not enforced is refused, not ignored."""
    file = scripted(tmp_path, max_spend_per_hour=5.0)
    running = Up(tmp_path / "state", ["-f", str(file)]).start()

    assert_one_sentence(running, 2, "max_spend_per_hour", str(file))
    assert not (running.state_dir / "logs").exists()


def test_a_bad_settings_key_of_a_service_is_shown_with_its_sentence(tmp_path: Path) -> None:
    """A child that cannot start is explained by its own words: the key, the suggestion, where its log is."""
    running = Up(tmp_path / "state", ["-f", str(scripted(tmp_path))], {"INFERENCE_ENGINE__DRAIN_TIMEOUT": "1"}).start()

    assert_one_sentence(running, 1, "INFERENCE_ENGINE__DRAIN_TIMEOUT", "'drain_timeout_s'", "engine.log")


def test_a_second_up_on_the_same_state_directory_is_one_sentence(up: Up, tmp_path: Path) -> None:
    """Two clusters on one etcd data directory would destroy it."""
    other = inferctl("up", "--port", "0", "--state-dir", str(up.state_dir), "--ready-file", str(tmp_path / "r.json"))

    assert other.returncode == 1
    assert "another inferctl up" in other.stderr
    assert up.ready["pids"]


def test_it_runs_on_an_etcd_that_is_already_there(tmp_path: Path) -> None:
    """--etcd: none is started, and the one that was given is still there afterwards."""
    with EtcdProcess(fsync=False) as etcd:
        options = ["--etcd", etcd.endpoint, "--engines", "2", "-f", str(scripted(tmp_path, replicas=2))]
        with Up(tmp_path / "state", options).start().wait_serving() as running:
            assert set(running.pids) == (SERVICES | {"engine-2"}) - {"etcd"}
            assert running.ready["etcd"] == etcd.endpoint
            assert running.interrupt() == 0
            assert running.left_over() == []
        assert etcd.running


@pytest.mark.parametrize("service", sorted(SERVICES - {"etcd"}))
@pytest.mark.parametrize(
    ("key", "value", "code", "words"),
    [
        ("ETCD__ENDPOINTS", "127.0.0.1:1", 1, "127.0.0.1:1"),
        ("RPC__PRT", "1", 2, "'port'"),
        ("RPC__PORT", "99999", 2, "rpc.port"),
    ],
    ids=["no etcd", "unknown key", "wrong value"],
)
def test_each_service_says_what_is_wrong_in_one_sentence(service: str, key: str, value: str, code: int, words: str) -> None:
    """Deploy independently: an unreachable etcd, an unknown key and a wrong value, for each of the five commands."""
    prefix = f"INFERENCE_{service.upper()}__"
    environment = {**os.environ, f"{prefix}ETCD__ENDPOINTS": "127.0.0.1:1", f"{prefix}{key}": value}
    if service == "gateway":
        environment["INFERENCE_GATEWAY__HTTP__PORT"] = "0"
    run = subprocess.run(
        [str(Path(sys.executable).with_name(f"inference-{service.replace('_', '-')}"))],
        capture_output=True,
        text=True,
        timeout=60,
        env=environment,
        cwd=ROOT,
        check=False,
    )
    said = [line for line in run.stderr.splitlines() if line.startswith(f"inference-{service.replace('_', '-')}: ")]

    assert run.returncode == code, run.stderr
    assert len(said) == 1, run.stderr
    assert words in said[0]
    assert "Traceback" not in run.stderr
