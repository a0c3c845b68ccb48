"""Processes of one machine's cluster: started, watched, restarted, stopped. No gRPC and no event loop here.

`inferctl up` and `testing.Cluster` share it. A process is described by a `ProcessSpec`; `Process` is one such process through its
restarts. Every child runs in a session of its own, so that a terminal's Ctrl-C reaches the parent alone and the order of stopping
is ours, and dies with its parent even when that is killed.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from inference_runtime.errors import ServerError

__all__ = ["Port", "Process", "ProcessSpec", "RestartPolicy", "stop_all"]

LAUNCHER = Path(__file__).with_name("launch.py")
#: Seconds between two looks at a process that is to end.
POLL_S = 0.02
#: How Python begins what it says of errors in finalizers.
IGNORED = "Exception ignored in"
#: How much of a log's end is searched for the sentence that explains a death.
LOG_TAIL_BYTES = 16 << 10


class Port:
    """A TCP port that stays ours between the starts of the process that listens on it.

    The socket is bound and never listens: nobody else is given the port, and a server that sets SO_REUSEADDR (all of ours do,
    and etcd) may listen on it.

    Raises:
        ServerError: The port is taken.
    """

    def __init__(self, host: str, port: int = 0, *, flag: str = "--port") -> None:
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            self._socket.bind((host, port))
        except OSError as err:
            self._socket.close()
            why = "the port is taken" if err.errno == 98 else (err.strerror or str(err)).lower()
            raise ServerError(f"cannot listen on {host}:{port}: {why}; choose another {flag}") from err
        self.host, self.number = host, int(self._socket.getsockname()[1])

    @property
    def address(self) -> str:
        """host:port."""
        return f"{self.host}:{self.number}"

    def close(self) -> None:
        """Give the port back."""
        self._socket.close()


@dataclass(frozen=True, slots=True)
class ProcessSpec:
    """How one process is started.

    Args:
        name: Unique in its cluster: "engine", "engine-2".
        service: What it is an instance of: "engine".
        argv: Program and arguments.
        environment: The whole environment.
        address: host:port of its gRPC server (etcd: of its clients' door).
        door: Address that people care about.
        log: File that takes its stdout and stderr.
        what: What it is, in a few words, for people.
    """

    name: str
    service: str
    argv: Sequence[str]
    environment: Mapping[str, str]
    address: str
    door: str
    log: Path
    what: str


@dataclass(slots=True)
class RestartPolicy:
    """When a process that died is started again: with growing pauses, and not for ever.

    Args:
        limit: Restarts within `window_s` before it is given up.
        window_s: Seconds that a restart counts.
        first_pause_s: Pause before the first restart; it doubles with each one that still counts.
    """

    limit: int = 3
    window_s: float = 60.0
    first_pause_s: float = 0.1
    _restarts: list[float] = field(default_factory=list)

    def pause_s(self, now: float) -> float | None:
        """The pause before the next restart, counted from `now` on; None when it is to be given up."""
        self._restarts = [t for t in self._restarts if now - t < self.window_s]
        if len(self._restarts) >= self.limit:
            return None
        self._restarts.append(now)
        return float(self.first_pause_s * 2 ** (len(self._restarts) - 1))


class Process:
    """One process through its restarts. Not thread-safe: one owner."""

    def __init__(self, spec: ProcessSpec) -> None:
        self.spec = spec
        self.starts = 0
        self._popen: subprocess.Popen[bytes] | None = None
        self._swept = False

    @property
    def pid(self) -> int:
        """Process id of the present life, 0 before the first."""
        return self._popen.pid if self._popen is not None else 0

    @property
    def exit_code(self) -> int | None:
        """Exit code of the present life (negative: the signal that ended it); None while it runs.

        The first look after its end also ends what it started and left behind.
        """
        if self._popen is None:
            return None
        code = self._popen.poll()
        if code is not None and not self._swept:
            self._swept = True  # once: later its id may belong to others
            self._kill_group()
        return code

    @property
    def running(self) -> bool:
        """Whether it was started and has not ended."""
        return self._popen is not None and self.exit_code is None

    def start(self) -> None:
        """Start it; its log is begun anew by the first start and continued by the others.

        Call it from a thread that lives as long as this program, see `launch.py`.
        """
        if self.running:
            raise RuntimeError(f"{self.spec.name} runs already")
        with open(self.spec.log, "ab" if self.starts else "wb", opener=_private) as log:
            # The console of the launched program is its log; -I and -S keep the launcher's own start at a few milliseconds.
            self._popen = subprocess.Popen(
                [sys.executable, "-I", "-S", str(LAUNCHER), str(os.getpid()), *self.spec.argv],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=dict(self.spec.environment),
                start_new_session=True,
            )
        self.starts += 1
        self._swept = False

    def signal(self, number: int) -> None:
        """Send a signal to the process. Content when it is gone."""
        if self._popen is not None:
            self._popen.send_signal(number)

    def kill(self) -> None:
        """SIGKILL for the process and whatever it started, and wait until it is gone."""
        if self._popen is not None and self.running:
            self._kill_group()
            self._popen.wait()

    def _kill_group(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)

    def explanation(self) -> str:
        """The sentence that its log ends with, for an error message; "" when the log is silent."""
        try:
            data = self.spec.log.read_bytes()[-LOG_TAIL_BYTES:]
        except OSError:
            return ""
        # What the interpreter says while it goes down is noise; frames of exception groups are drawn with | and +.
        lines = [line.strip(" |+-") for line in data.decode(errors="replace").split(IGNORED)[0].splitlines()]
        said = [line for line in lines if line.startswith(f"inference-{self.spec.service.replace('_', '-')}: ")]
        return next(reversed(said or [line for line in lines if line]), "")

    def ended_sentence(self) -> str:
        """One sentence: how it ended, its last words, where its log is."""
        code = self.exit_code
        how = "is gone" if code is None else f"ended with exit code {code}"
        if code is not None and code < 0:
            how = f"was ended by {signal.Signals(-code).name}"
        words = self.explanation()
        return f"{self.spec.name} {how}{': ' + words if words else ''} (log: {self.spec.log})"


def _private(path: str, flags: int) -> int:
    """Opens a file that only this user can read, if it is new."""
    return os.open(path, flags, 0o600)


def stop_all(processes: Iterable[Process], grace_s: float, hurry: list[bool] | None = None) -> None:
    """End these processes together: SIGTERM, `grace_s` seconds, SIGKILL. Blocks until all are gone.

    Args:
        processes: May hold some that ended already.
        grace_s: Seconds that they get to end by themselves.
        hurry: Becomes non-empty (from a signal handler) when nobody wants to wait any more.
    """
    group = list(processes)
    for process in group:
        process.signal(signal.SIGCONT)  # a stopped process would keep its SIGTERM until it goes on
        process.signal(signal.SIGTERM)
    deadline = time.monotonic() + grace_s
    while any(p.running for p in group) and time.monotonic() < deadline and not hurry:
        time.sleep(POLL_S)
    for process in group:
        process.kill()
