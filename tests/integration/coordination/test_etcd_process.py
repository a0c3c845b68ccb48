"""EtcdProcess keeps its promises: healthy when started, the same data after a crash, and none left behind."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from inference_runtime.coordination import EtcdClient
from inference_runtime.errors import RuntimeNotInstalled, ServerError
from inference_runtime.testing.etcd import EtcdProcess, find_etcd


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    stat = Path(f"/proc/{pid}/stat")  # a zombie that nobody waits for yet is not alive
    return not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] != "Z"


def state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


async def test_data_and_endpoint_survive_a_crash(etcd: EtcdProcess) -> None:
    endpoint, pid = etcd.endpoint, etcd.pid
    async with EtcdClient([endpoint]) as client:
        await client.put("/a", b"1")
        etcd.kill()
        assert not etcd.running
        assert not alive(pid)
        etcd.restart()

        assert etcd.endpoint == endpoint
        found = await client.get("/a")
        assert found is not None


def test_a_paused_server_stands_still_and_goes_on(etcd: EtcdProcess) -> None:
    etcd.pause()
    assert state(etcd.pid) == "T"
    etcd.resume()
    assert state(etcd.pid) != "T"
    etcd.wait_healthy()


def test_stopping_removes_the_process_and_its_temporary_folder() -> None:
    with EtcdProcess(fsync=False) as etcd:
        pid, folder = etcd.pid, etcd.data_dir
        etcd.pause()  # even when it is frozen

    assert not alive(pid)
    assert not folder.exists()
    etcd.stop()  # twice is once


def test_a_folder_of_the_callers_stays(tmp_path: Path) -> None:
    with EtcdProcess(tmp_path / "data", fsync=False):
        pass

    assert (tmp_path / "data" / "member").is_dir()


def test_settings_of_another_etcd_in_the_environment_do_not_leak_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ETCD_NAME", "production")
    monkeypatch.setenv("ETCD_ENABLE_V2", "nonsense")

    with EtcdProcess(fsync=False) as etcd:
        assert etcd.running


def test_a_port_that_was_asked_for_and_is_taken_is_an_error_with_etcds_own_words() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        etcd = EtcdProcess(fsync=False, client_port=taken.getsockname()[1])
        with pytest.raises(ServerError, match="address already in use"):
            etcd.start()
        etcd.stop()


def test_a_missing_executable_says_how_to_get_one(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RuntimeNotInstalled, match="/nowhere/etcd"):
        find_etcd("/nowhere/etcd")
    monkeypatch.setenv("ETCD_BIN", find_etcd())
    assert find_etcd() == os.environ["ETCD_BIN"]


def test_no_etcd_outlives_an_owner_that_was_killed() -> None:
    """Started from a thread that has ended, too: a parent-death signal would have fired there and then."""
    script = (
        "import sys, threading\n"
        "from inference_runtime.testing.etcd import EtcdProcess\n"
        "etcd = EtcdProcess(fsync=False)\n"
        "thread = threading.Thread(target=etcd.start); thread.start(); thread.join()\n"
        "print(etcd.pid, etcd.data_dir, etcd.running, flush=True)\n"
        "sys.stdin.read()\n"
    )
    owner = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None
    assert owner.stdin is not None
    pid, folder, running = owner.stdout.readline().split()
    assert running == "True"
    assert alive(int(pid))

    owner.send_signal(signal.SIGKILL)
    owner.wait()

    deadline = time.monotonic() + 10
    while alive(int(pid)):
        assert time.monotonic() < deadline, "etcd outlived its owner"
        time.sleep(0.01)
    owner.stdin.close()
    owner.stdout.close()
    subprocess.run(["rm", "-rf", folder], check=True)
