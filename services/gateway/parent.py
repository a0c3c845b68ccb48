"""The parent of several workers: one port, N processes that share it, dead ones replaced.

The kernel spreads connections over the workers (SO_REUSEPORT). A worker knows that its parent is gone by the end of a pipe.
"""

from __future__ import annotations

import asyncio
import functools
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from inference_runtime.errors import ServerError
from inference_runtime.settings import environment
from inference_runtime.telemetry import get_logger, setup_telemetry
from services.gateway.http.server import listen
from services.gateway.metric_share import SUFFIX, text_of_all
from services.gateway.settings import GatewaySettings
from services.gateway.worker import write_ready_file

__all__ = ["parent_gone", "run_workers"]

log = get_logger(__name__)

CHECK_S = 0.05
START_TIMEOUT_S = 30.0
#: A worker that dies earlier than this after its start is replaced only after this long, so that a fault does not spin.
SHORT_LIFE_S = 1.0
#: What workers get on top of the drain before they are killed, seconds.
GRACE_S = 10.0


async def parent_gone(parent_fd: int, stop: asyncio.Event) -> None:
    """Set `stop` when the pipe from the parent ends. Returns at once for a process without one."""
    if parent_fd < 0:
        return
    gone = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.add_reader(parent_fd, gone.set)
    try:
        await gone.wait()
    finally:
        loop.remove_reader(parent_fd)
    stop.set()


class _Parent:
    def __init__(self, settings: GatewaySettings, argv: Sequence[str], folder: Path) -> None:
        self._settings, self._argv, self._folder = settings, argv, folder
        # Bound and never listening: it keeps the port ours while no worker lives, and makes port 0 one port for all.
        self._sock = listen(settings.http.host, settings.http.port, shared=True)
        self._port = self._sock.getsockname()[1]
        self._pipe, self._hold = os.pipe()
        self._workers: dict[int, tuple[subprocess.Popen[bytes], float]] = {}
        #: The signals that were heard: the first one stops in order, the second one at once.
        self.signals: list[int] = []

    @property
    def stopping(self) -> bool:
        """Somebody asked for the end."""
        return bool(self.signals)

    def _start(self, number: int) -> None:
        ready = self._folder / f"{number}.json"
        ready.unlink(missing_ok=True)
        own = {
            "WORKERS": "1",
            "PARENT_FD": str(self._pipe),
            "READY_FILE": str(ready),
            "HTTP__PORT": str(self._port),
            # One gRPC port cannot be shared: the first worker has the one that was set, the others take free ones.
            "RPC__PORT": str(self._settings.rpc.port if number == 0 else 0),
            "METRICS_FILE": str(self._folder / f"{number}{SUFFIX}"),
            "TELEMETRY__PROMETHEUS_PORT": "-1",  # the parent answers there, for all of them
        }
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "services.gateway", *self._argv],
            env={**environment(), **{f"INFERENCE_GATEWAY__{key}": value for key, value in own.items()}},
            pass_fds=(self._pipe,),
        )
        self._workers[number] = process, time.monotonic()

    def _addresses(self, number: int) -> dict[str, str] | None:
        try:
            found: dict[str, str] = json.loads((self._folder / f"{number}.json").read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        return found

    def start(self) -> None:
        """Start every worker and wait until all serve. Raises ServerError when one does not."""
        for number in range(self._settings.workers):
            self._start(number)
        until = time.monotonic() + START_TIMEOUT_S
        while not self.stopping and any(self._addresses(n) is None for n in self._workers):
            for number, (process, _) in self._workers.items():
                if process.poll() is not None:
                    raise ServerError(f"worker {number} of the gateway ended while starting, with status {process.returncode}")
            if time.monotonic() > until:
                raise ServerError(f"not every worker of the gateway was ready after {START_TIMEOUT_S:g} s")
            time.sleep(CHECK_S)
        first = self._addresses(0)
        if first is not None and not self.stopping:
            log.info("serving", workers=self._settings.workers, **first)
            if self._settings.ready_file:
                write_ready_file(self._settings.ready_file, first["http"], first["grpc"])

    def watch(self) -> None:
        """Replace workers that die, until told to stop."""
        while not self.stopping:
            time.sleep(CHECK_S)
            for number, (process, started) in list(self._workers.items()):
                if process.poll() is not None and time.monotonic() - started > SHORT_LIFE_S and not self.stopping:
                    say = log.error if process.returncode else log.info  # one that was told to go drains, and ends with 0
                    say("gateway worker ended and is replaced", worker=number, status=process.returncode)
                    self._start(number)

    def stop(self) -> None:
        """End every worker in order, then by force; at once after a second signal.

        The pipe tells them and no signal does: whoever stops a whole group of processes has signalled them already, and their
        second signal would mean "now".
        """
        os.close(self._hold)
        os.close(self._pipe)
        self._sock.close()
        for number, (process, _) in self._workers.items():
            if self._addresses(number) is None:  # it never served, and need not begin
                process.terminate()
        workers = [process for process, _ in self._workers.values()]
        until = time.monotonic() + self._settings.drain_timeout_s + GRACE_S
        while any(w.poll() is None for w in workers) and time.monotonic() < until and len(self.signals) < 2:
            time.sleep(CHECK_S)
        for worker in workers:
            worker.kill()
            worker.wait()


def run_workers(settings: GatewaySettings, argv: Sequence[str]) -> None:
    """Run `settings.workers` processes until SIGTERM or SIGINT. A second signal kills them and exits with 128 + its number.

    Raises:
        ServerError: A port is taken, or a worker does not start.
    """
    telemetry = setup_telemetry("gateway", settings.telemetry.model_copy(update={"otlp_endpoint": ""}))
    with tempfile.TemporaryDirectory(prefix="inference-gateway-") as folder:
        telemetry.render = functools.partial(text_of_all, Path(folder))
        parent = _Parent(settings, argv, Path(folder))

        def stop(signum: int, frame: object) -> None:
            parent.signals.append(signum)

        for signum in (signal.SIGTERM, signal.SIGINT):
            signal.signal(signum, stop)
        try:
            parent.start()
            parent.watch()
        finally:
            parent.stop()
            telemetry.close()
    if len(parent.signals) > 1:
        sys.exit(128 + parent.signals[-1])
