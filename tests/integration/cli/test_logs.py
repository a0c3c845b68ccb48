"""`inferctl logs` as it is typed, over the state directory of an `up`."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

INFERCTL = str(Path(sys.executable).with_name("inferctl"))


@pytest.fixture
def state(tmp_path: Path) -> Path:
    folder = tmp_path / "logs"
    folder.mkdir()
    (folder / "etcd.log").write_text("e1\ne2\n")
    (folder / "gateway.log").write_text("g1\ng2\ng3\n")
    (folder / "gateway-2.log").write_text("h1\nhalf")
    return tmp_path


def logs(state: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [INFERCTL, "logs", *words, "--state-dir", str(state)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_the_last_lines_of_all_carry_their_process(state: Path) -> None:
    assert logs(state, "-n", "1").stdout.splitlines() == ["etcd: e2", "gateway-2: h1", "gateway: g3"]


def test_one_process_and_one_service_are_told_apart(state: Path) -> None:
    assert logs(state, "etcd").stdout.splitlines() == ["e1", "e2"]
    assert logs(state, "gateway-2").stdout.splitlines() == ["h1"]
    assert logs(state, "gateway", "-n", "1").stdout.splitlines() == ["gateway-2: h1", "gateway: g3"]


def test_what_has_no_log_is_one_sentence(state: Path, tmp_path: Path) -> None:
    for done in (logs(state, "engine"), logs(tmp_path / "nowhere")):
        assert done.returncode == 2
        assert len(done.stderr.splitlines()) == 1


def test_following_goes_on_with_whole_lines_also_after_the_log_began_anew(state: Path) -> None:
    path = state / "logs" / "gateway-2.log"
    command = [INFERCTL, "logs", "gateway-2", "-f", "--state-dir", str(state)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as running:
        assert running.stdout is not None
        try:
            assert running.stdout.readline() == "h1\n"
            with path.open("a") as file:
                file.write(" and whole\n")
            assert running.stdout.readline() == "half and whole\n"
            path.write_text("new\n")
            assert running.stdout.readline() == "new\n"
            running.send_signal(signal.SIGINT)
            assert running.wait(30) == 130
        finally:
            running.kill()
