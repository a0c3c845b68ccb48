"""`inferctl` as a person runs it: real commands, real processes, and what they leave behind."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

ROOT = Path(__file__).resolve().parents[2]
INFERCTL = str(Path(sys.executable).with_name("inferctl"))
#: Seconds that a cluster gets to serve or to stop on a machine that may be busy.
PATIENCE_S = 60.0

#: Deterministic words at once, without torch.
ECHO = {"name": "echo", "model": "scripted", "runtime": "scripted"}


def wait_for(condition: Callable[[], bool], what: str, timeout_s: float = PATIENCE_S) -> None:
    """Poll until a condition holds."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout_s:g} s: {what}"
        time.sleep(0.02)


def alive(pid: int) -> bool:
    """Whether a process runs. A zombie does not, once its last thread has ended too: before that nobody can reap it."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return False
    return fields[0] != "Z" or int(fields[17]) > 1


def descendants_marked(mark: str) -> list[int]:
    """Every process whose environment or command line holds `mark`."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                text = (entry / "cmdline").read_bytes() + (entry / "environ").read_bytes()
            except OSError:
                continue
            if mark.encode() in text and alive(int(entry.name)):
                found.append(int(entry.name))
    return found


def inferctl(
    *args: str, env: Mapping[str, str] | None = None, cwd: Path | None = None, stdin: str = ""
) -> subprocess.CompletedProcess[str]:
    """Run a command to its end."""
    return subprocess.run(
        [INFERCTL, *args],
        input=stdin,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S * 2,
        env={**os.environ, **(env or {})},
        cwd=cwd,
        check=False,
    )


@dataclass
class Up:
    """One `inferctl up` in the background. A context manager: afterwards nothing of it runs."""

    state_dir: Path
    args: Sequence[str] = ()
    env: Mapping[str, str] = field(default_factory=dict)
    process: subprocess.Popen[str] | None = None
    started_at: float = 0.0
    served_after_s: float = 0.0

    @property
    def ready_file(self) -> Path:
        """Where it says that it serves."""
        return self.state_dir / "ready.json"

    @property
    def output_file(self) -> Path:
        """What it prints."""
        return self.state_dir / "output.txt"

    def start(self) -> Self:
        """Start it and return at once."""
        self.state_dir.mkdir(parents=True, exist_ok=True)
        command = [INFERCTL, "up", "--port", "0", "--state-dir", str(self.state_dir), "--ready-file", str(self.ready_file)]
        with self.output_file.open("ab") as out:
            self.process = subprocess.Popen(
                [*command, *self.args],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                text=True,
                env={**os.environ, "INFERENCE_E2E_MARK": self.mark, **self.env},
            )
        self.started_at = time.monotonic()
        return self

    @property
    def mark(self) -> str:
        """Stands in the environment of everything it starts."""
        return f"mark:{self.state_dir}"

    def wait_serving(self) -> Self:
        """Return once the ready file is there."""
        assert self.process is not None
        process = self.process
        wait_for(lambda: self.ready_file.exists() or process.poll() is not None, f"serving\n{self.output()}")
        assert process.poll() is None, self.output() + self.logs()
        self.served_after_s = time.monotonic() - self.started_at
        return self

    @property
    def ready(self) -> dict[str, Any]:
        """The ready file."""
        document: dict[str, Any] = json.loads(self.ready_file.read_text())
        return document

    @property
    def http(self) -> str:
        """Base URL."""
        return str(self.ready["http"])

    @property
    def pids(self) -> dict[str, int]:
        """Process ids by name, as of now."""
        pids: dict[str, int] = self.ready["pids"]
        return pids

    def output(self) -> str:
        """What it printed so far."""
        return self.output_file.read_text() if self.output_file.exists() else ""

    def logs(self) -> str:
        """The end of every log."""
        return "\n".join(f"--- {p.name}\n{p.read_text()[-2000:]}" for p in sorted((self.state_dir / "logs").glob("*.log")))

    def cli(self, *args: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
        """Another command that speaks to this cluster."""
        return inferctl(*args, "--state-dir", str(self.state_dir), stdin=stdin)

    def wait_end(self) -> int:
        """Exit code once it has ended."""
        assert self.process is not None
        return self.process.wait(PATIENCE_S)

    def interrupt(self, number: int = signal.SIGINT) -> int:
        """Send a signal, wait for the end, return the exit code."""
        assert self.process is not None
        self.process.send_signal(number)
        return self.wait_end()

    def left_over(self) -> list[int]:
        """Processes of this cluster that still run."""
        return [pid for pid in descendants_marked(self.mark) if pid != os.getpid()]

    def __enter__(self) -> Self:
        return self if self.process is not None else self.start()

    def __exit__(self, *_: object) -> None:
        assert self.process is not None
        if self.process.poll() is None:
            self.interrupt()
        for pid in self.left_over():
            os.kill(pid, signal.SIGKILL)


def project(path: Path, *deployments: Mapping[str, Any]) -> Path:
    """Write a project file."""

    def value(x: object) -> str:
        if isinstance(x, dict):
            return "{ " + ", ".join(f"{k} = {value(v)}" for k, v in x.items()) + " }"
        return json.dumps(x)

    tables = ["\n".join(["[[deployment]]", *(f"{k} = {value(v)}" for k, v in d.items())]) for d in deployments]
    path.write_text("\n\n".join(tables) + "\n", encoding="utf-8")
    return path


def readme_block(language: str) -> str:
    """The first code block of this language in the README."""
    found = re.search(rf"```{language}\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.DOTALL)
    assert found, f"README.md has no {language} block"
    return found.group(1)
