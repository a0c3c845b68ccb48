"""Real child processes: started in sessions of their own, stopped in time, gone when their parent is."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from inference_runtime.cli.processes import Port, Process, ProcessSpec, stop_all
from inference_runtime.errors import ServerError

WAIT_S = 10.0

#: Writes "ready", then a line for each SIGTERM; ends on the second, or on the first when asked to be polite.
STUBBORN = """
import signal, sys, time
heard = []
def on_term(*_):
    heard.append(1)
    print("heard", flush=True)
    if sys.argv[1] == "polite":
        sys.exit(0)
signal.signal(signal.SIGTERM, on_term)
print("ready", flush=True)
while True:
    time.sleep(0.05)
"""


def wait_for(condition: Callable[[], bool], what: str) -> None:
    """Poll a condition until it holds, for at most WAIT_S."""
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline, f"not within {WAIT_S:g} s: {what}"
        time.sleep(0.01)


def alive(pid: int) -> bool:
    """Whether a process runs; a zombie does not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Callable[..., Process]]:
    """Makes processes from Python source; none is left after the test."""
    made: list[Process] = []

    def one(source: str, *args: str, name: str = "child") -> Process:
        spec = ProcessSpec(
            name=name,
            service=name,
            argv=[sys.executable, "-c", source, *args],
            environment=dict(os.environ),
            address="127.0.0.1:1",
            door="127.0.0.1:1",
            log=tmp_path / f"{name}.log",
            what="a test",
        )
        made.append(Process(spec))
        return made[-1]

    yield one
    for process in made:
        process.kill()


def test_a_process_runs_in_a_session_of_its_own_and_writes_into_its_log(make: Callable[..., Process]) -> None:
    """Ctrl-C in the terminal reaches us alone; the pid is the program's own, not a launcher's."""
    process = make("import os; print(os.getpid(), os.getsid(0), os.getpgid(0), flush=True); import time; time.sleep(60)")
    process.start()
    wait_for(lambda: process.spec.log.read_text().endswith("\n"), "the child's line")

    assert process.spec.log.read_text().split() == [str(process.pid)] * 3
    assert process.running


def test_a_polite_process_ends_by_itself(make: Callable[..., Process]) -> None:
    """SIGTERM first, and nothing more for who obeys."""
    process = make(STUBBORN, "polite")
    process.start()
    wait_for(lambda: "ready" in process.spec.log.read_text(), "ready")

    stop_all([process], grace_s=WAIT_S)

    assert process.exit_code == 0
    assert process.spec.log.read_text().split() == ["ready", "heard"]


def test_a_stubborn_process_is_killed_after_its_grace(make: Callable[..., Process]) -> None:
    """Nobody holds the machine hostage."""
    process = make(STUBBORN, "stubborn")
    process.start()
    wait_for(lambda: "ready" in process.spec.log.read_text(), "ready")

    stop_all([process], grace_s=0.2)

    assert process.exit_code == -signal.SIGKILL
    assert "heard" in process.spec.log.read_text()


def test_a_second_wish_cuts_the_grace_short(make: Callable[..., Process]) -> None:
    """The second Ctrl-C means now."""
    process = make(STUBBORN, "stubborn")
    process.start()
    wait_for(lambda: "ready" in process.spec.log.read_text(), "ready")
    begin = time.monotonic()

    stop_all([process], grace_s=60, hurry=[True])

    assert process.exit_code == -signal.SIGKILL
    assert time.monotonic() - begin < WAIT_S


def test_a_frozen_process_still_hears_that_it_shall_stop(make: Callable[..., Process]) -> None:
    """A stopped process keeps SIGTERM pending: it is woken first."""
    process = make(STUBBORN, "polite")
    process.start()
    wait_for(lambda: "ready" in process.spec.log.read_text(), "ready")
    process.signal(signal.SIGSTOP)

    stop_all([process], grace_s=WAIT_S)

    assert process.exit_code == 0


def test_what_a_dead_process_started_ends_too(make: Callable[..., Process]) -> None:
    """A gateway that is killed leaves no worker behind."""
    source = "import subprocess, sys, time; p = subprocess.Popen(['sleep', '60']); print(p.pid, flush=True); time.sleep(60)"
    process = make(source)
    process.start()
    wait_for(lambda: process.spec.log.read_text().endswith("\n"), "the grandchild's pid")
    grandchild = int(process.spec.log.read_text())
    os.kill(process.pid, signal.SIGKILL)

    wait_for(lambda: not process.running, "the child's death")

    wait_for(lambda: not alive(grandchild), "the grandchild's death")


def test_children_die_with_a_parent_that_was_killed(tmp_path: Path) -> None:
    """SIGKILL for the parent leaves no process: the kernel ends the child."""
    parent = subprocess.Popen(
        [
            sys.executable,
            "-c",
            """
import os, sys, time
from pathlib import Path
from inference_runtime.cli.processes import Process, ProcessSpec
spec = ProcessSpec("c", "c", ["sleep", "60"], dict(os.environ), "", "", Path(sys.argv[1]), "")
process = Process(spec)
process.start()
while Path(f"/proc/{process.pid}/cmdline").read_bytes() != b"sleep\\0" + b"60\\0":
    time.sleep(0.01)
print(process.pid, flush=True)
time.sleep(60)
""",
            str(tmp_path / "c.log"),
        ],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert parent.stdout is not None
    with parent, parent.stdout:
        child = int(parent.stdout.readline())
        assert alive(child)

        parent.kill()
        parent.wait()

    wait_for(lambda: not alive(child), "the child's death")


def test_a_death_is_one_sentence_with_the_last_words_and_the_log(make: Callable[..., Process]) -> None:
    """A failing child at start is explained by its own sentence."""
    process = make("import sys; print('noise', flush=True); sys.exit('cannot listen on port 1: choose another')")
    process.start()
    wait_for(lambda: not process.running, "its end")

    sentence = process.ended_sentence()

    assert "child ended with exit code 1" in sentence
    assert "cannot listen on port 1: choose another" in sentence
    assert str(process.spec.log) in sentence
    assert "noise" not in sentence


@pytest.mark.parametrize(
    ("log", "words"),
    [
        ("noise\ninference-child: port taken\nmore noise", "inference-child: port taken"),
        ("trace\n  | TypeError: no\n  +------------------\nException ignored in: <f>\nRuntimeError: closed\n", "TypeError: no"),
        ("", ""),
    ],
    ids=["its own sentence", "an exception group", "silence"],
)
def test_the_explanation_is_the_sentence_and_not_the_noise_around_it(make: Callable[..., Process], log: str, words: str) -> None:
    """A person reads why, not what the interpreter mutters on its way down."""
    process = make("pass")
    process.spec.log.write_text(log)

    assert process.explanation() == words


def test_a_killed_process_is_said_to_be_killed(make: Callable[..., Process]) -> None:
    """The signal is named, not its number."""
    process = make("import time; time.sleep(60)")
    process.start()
    process.kill()

    assert "SIGKILL" in process.ended_sentence()


def test_a_program_that_does_not_exist_is_one_sentence(tmp_path: Path) -> None:
    """The launcher itself says what could not be started."""
    spec = ProcessSpec("x", "x", ["/no/such/program"], dict(os.environ), "", "", tmp_path / "x.log", "")
    process = Process(spec)
    process.start()
    wait_for(lambda: not process.running, "its end")

    assert "cannot start /no/such/program: No such file or directory" in process.ended_sentence()


def test_a_restart_continues_the_log(make: Callable[..., Process]) -> None:
    """What the first life wrote is still there; the pid is new."""
    process = make("import time; print('hello', flush=True); time.sleep(60)")
    process.start()
    wait_for(lambda: process.spec.log.read_text() == "hello\n", "the first line")
    first = process.pid
    process.kill()

    process.start()

    wait_for(lambda: process.spec.log.read_text() == "hello\nhello\n", "the second line")
    assert process.pid != first
    assert process.starts == 2


def test_a_port_stays_ours_until_its_owner_listens() -> None:
    """A reserved port is given to nobody else, and a server may listen on it, again and again."""
    port = Port("127.0.0.1")
    try:
        for _ in range(2):
            with socket.create_server((port.host, port.number)) as server:  # sets SO_REUSEADDR as our servers do
                with socket.create_connection((port.host, port.number), timeout=WAIT_S):
                    server.accept()[0].close()
    finally:
        port.close()


def test_a_taken_port_is_one_sentence() -> None:
    """Bad input: the address and the flag to change."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        number = server.getsockname()[1]

        with pytest.raises(ServerError, match=f"cannot listen on 127.0.0.1:{number}: the port is taken; choose another --port"):
            Port("127.0.0.1", number)
