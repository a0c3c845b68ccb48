"""`inferctl get, apply, delete, chat` against a running cluster, as a person and as a script use them."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from inference_runtime.testing.scripted import expected_text, user_says
from tests.e2e.kit import ECHO, INFERCTL, Up, inferctl, project


@pytest.mark.parametrize(
    ("kind", "columns", "entries"),
    [
        ("deployments", ["NAME", "STATE", "READY", "RUNTIME"], ["demo", "echo", "serving", "1/1", "torch", "scripted"]),
        ("engines", ["ID", "ADDRESS", "PID", "STATE"], ["ready"]),
        ("replicas", ["DEPLOYMENT", "ENGINE", "STATE", "RUNNING", "QUEUED"], ["demo", "echo", "serving"]),
        ("coordinator", ["TERM", "ENGINES", "GATEWAYS", "ROUTES", "LACKS"], ["nothing"]),
        ("leaders", ["ROLE", "ADDRESS", "PID", "TERM"], ["coordinator", "deployment_manager", "metrics"]),
    ],
)
def test_get_shows_a_table_and_the_same_as_json(up: Up, kind: str, columns: list[str], entries: list[str]) -> None:
    """X01: tables for people, JSON for scripts."""
    shown, as_json = up.cli("get", kind), up.cli("get", kind, "-o", "json")

    assert shown.returncode == 0, shown.stderr
    head, *rows = shown.stdout.splitlines()
    assert set(columns) <= set(head.split())
    assert set(entries) <= set(" ".join(rows).split())
    assert len(json.loads(as_json.stdout)) == len(rows)


def test_get_leaders_names_the_processes_of_the_ready_file(up: Up) -> None:
    """Trap 7: the singletons really lead, through etcd: the leaders are these processes."""
    leaders = {entry["role"]: int(entry["pid"]) for entry in json.loads(up.cli("get", "leaders", "-o", "json").stdout)}

    assert leaders == {role: up.pids[role] for role in ("coordinator", "deployment_manager", "metrics")}


def test_a_deployment_is_applied_changed_and_deleted(up: Up, tmp_path: Path) -> None:
    """R04: apply is idempotent, a change raises the generation, deletion removes it from the gateway."""
    file = project(tmp_path / "p.toml", {**ECHO, "name": "temporary"})
    bigger = project(tmp_path / "q.toml", {**ECHO, "name": "temporary", "replicas": 2})

    first = up.cli("apply", "--wait", "-f", str(file))
    again = up.cli("apply", "-f", str(file))
    changed = up.cli("apply", "--wait", "-f", str(bigger))
    asked = up.cli("chat", "temporary", "--once", "x", "--max-tokens", "2")
    deleted = up.cli("delete", "temporary")
    deadline = time.monotonic() + 30
    while "temporary" in up.cli("get", "deployments").stdout:
        assert time.monotonic() < deadline, "the deployment is still there"
    while (refused := up.cli("chat", "temporary", "--once", "x")).returncode == 0:
        assert time.monotonic() < deadline, "the gateway still answers"

    assert "temporary: applied, generation 1" in first.stdout
    assert "temporary: serving" in first.stdout
    assert "temporary: unchanged" in again.stdout
    assert "temporary: applied, generation 2" in changed.stdout
    assert asked.stdout == expected_text(user_says("x"), n=2) + "\n"
    assert deleted.stdout == "deployment temporary: deleted\n"
    assert "temporary" in refused.stderr
    assert len(refused.stderr.strip().splitlines()) == 1


def test_chat_once_prints_the_answer_and_nothing_else(up: Up) -> None:
    """For scripts: the answer on stdout, exit code 0."""
    asked = up.cli("chat", "echo", "--once", "hello", "--seed", "7", "--max-tokens", "12")

    assert (asked.returncode, asked.stderr) == (0, "")
    assert asked.stdout == expected_text(user_says("hello"), seed=7, n=12) + "\n"


def test_chat_reads_questions_from_a_pipe(up: Up) -> None:
    """Line by line, with the conversation so far; the end of the input ends it."""
    talked = up.cli("chat", "demo", "--temperature", "0", stdin="What is etcd?\n\nWhat is etcd?\n")

    lines = talked.stdout.splitlines()
    assert talked.returncode == 0
    assert len(lines) == 2
    assert lines[0].startswith("etcd is")


class Terminal:
    """A command on a pseudo-terminal, for what only a terminal does."""

    def __init__(self, *args: str) -> None:
        self._master, slave = pty.openpty()
        self.process = subprocess.Popen([INFERCTL, *args], stdin=slave, stdout=slave, stderr=slave, start_new_session=True)
        os.close(slave)
        self._seen = ""

    def read_until(self, text: str) -> str:
        """What it wrote, up to and with `text`."""
        deadline = time.monotonic() + 30
        while text not in self._seen:
            assert time.monotonic() < deadline, self._seen
            try:
                self._seen += os.read(self._master, 4096).decode(errors="replace")
            except OSError:  # the other end is gone
                assert text in self._seen, self._seen
        before, _, self._seen = self._seen.partition(text)
        return before + text

    def type(self, text: str) -> None:
        """Press keys."""
        os.write(self._master, text.encode())

    def close(self) -> None:
        """End it."""
        self.process.kill()
        self.process.wait()
        os.close(self._master)


@pytest.fixture
def terminal(up: Up) -> Iterator[Terminal]:
    """A conversation with a deployment that takes 20 ms for each word."""
    made = Terminal("chat", "slow", "--state-dir", str(up.state_dir), "--max-tokens", "2000")
    yield made
    made.close()


def test_ctrl_c_stops_an_answer_and_ctrl_d_leaves(up: Up, terminal: Terminal) -> None:
    """In the terminal: words come as they are made; Ctrl-C stops the answer, not the program; Ctrl-D leaves with code 0."""
    terminal.read_until("> ")
    terminal.type("hello\n")
    terminal.read_until("word")
    os.killpg(terminal.process.pid, 2)
    terminal.read_until("…")
    terminal.read_until("> ")
    terminal.type("again\n")
    terminal.read_until("word")
    os.killpg(terminal.process.pid, 2)
    terminal.read_until("> ")
    terminal.type("\x04")

    assert terminal.process.wait(30) == 0


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["chat", "nobody", "--once", "x"], "nobody"),
        (["delete", "nobody"], "nobody"),
        (["drain", "nobody"], "nobody"),
        (["apply", "-f", "/no/such/file.toml"], "/no/such/file.toml"),
        (["get", "deployments", "--etcd", "127.0.0.1:1"], "127.0.0.1:1"),
        (["chat", "echo", "--once", "x", "--http", "127.0.0.1:1"], "127.0.0.1:1"),
        (["chat", "echo", "--once", "x", "--etcd", "127.0.0.1:1"], "--http"),
    ],
)
def test_what_goes_wrong_is_one_sentence(up: Up, args: list[str], words: str) -> None:
    """Bad input on the command line: one sentence on stderr, exit code 1 or 2, no traceback."""
    run = up.cli(*args)

    assert run.returncode in {1, 2}
    assert run.stdout == ""
    assert len(run.stderr.strip().splitlines()) == 1, run.stderr
    assert run.stderr.startswith("inferctl: ")
    assert words in run.stderr


@pytest.mark.parametrize("args", [["get", "everything"], ["up", "--port", "99999"], ["up", "--engines", "0"], ["fly"], ["chat"]])
def test_a_wrong_command_line_is_a_usage_message(args: list[str]) -> None:
    """Click's own usage errors keep exit code 2."""
    run = inferctl(*args)

    assert run.returncode == 2
    assert "Traceback" not in run.stderr


def test_without_a_cluster_the_way_out_is_said(tmp_path: Path) -> None:
    """In a folder where nothing runs."""
    run = inferctl("get", "deployments", cwd=tmp_path, env={"HOME": str(tmp_path)})

    assert run.returncode == 2
    assert "inferctl up" in run.stderr


def test_help_names_every_command() -> None:
    """X01: what there is."""
    run = inferctl("--help")

    assert run.returncode == 0
    assert all(command in run.stdout for command in ("up", "get", "apply", "delete", "drain", "chat"))
