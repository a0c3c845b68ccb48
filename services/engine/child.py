"""`python -m services.engine.child`: the process that owns a context, and nothing else.

Started by `process_context.py` with one socket. Three threads: the main one reads orders, one steps the runner, one sends a
heartbeat. It ends with its engine: the end of the socket ends it, and so does the kernel when the engine's spawner is gone.
"""

from __future__ import annotations

import ctypes
import faulthandler
import importlib
import logging
import os
import signal
import socket
import sys
import threading

from inference_runtime.errors import RuntimeNotInstalled, Unsupported
from inference_runtime.runner import LoadProgress, RunnerInfo, Runtime, load_runtime
from inference_runtime.stepping import StepCycle, StepReport
from inference_runtime.supervision import Fault
from inference_runtime.supervision.policy import EXIT_POISONED
from inference_runtime.telemetry import get_logger
from services.engine.frames import (
    Abort,
    Admit,
    BadFrame,
    Beat,
    Close,
    Died,
    FrameReader,
    FromParent,
    Loaded,
    Start,
    pack_frame,
    pack_step,
)

__all__ = ["main"]

log = get_logger(__name__)

#: Time between two heartbeats, seconds.
HEARTBEAT_S = 0.2
#: Exit status of a child whose engine is gone.
EXIT_ORPHANED = 71
#: Exit status of a child that its engine sent nonsense.
EXIT_BAD_FRAME = 72
#: What the kernel keeps of what the engine has not read yet, bytes. The child runs ahead of its engine by this much and no more.
SEND_BUFFER_BYTES = 64 * 1024
READ_BYTES = 256 * 1024
PR_SET_PDEATHSIG = 1


class ContextHost:
    """One context and its end of the socket.

    Args:
        sock: To the engine.
        start: What to load.
    """

    def __init__(self, sock: socket.socket, start: Start) -> None:
        self._sock, self._generation = sock, start.generation
        self._sending = threading.Lock()  # the step thread and the heartbeat write whole frames
        self._progress: LoadProgress | None = None
        self.cycle = StepCycle(
            lambda: resolve_runtime(start.runtime).make_runner(start.config),
            self,
            name=start.name,
            max_batch=start.config.max_batch,
            progress=self._note_progress,
        )
        self._stepping = threading.Thread(target=self._step, name="steps", daemon=True)
        self._beating = threading.Thread(target=self._beat, name="heartbeat", daemon=True)

    def start(self) -> None:
        """Start to load, and the heartbeat."""
        self._beating.start()
        self._stepping.start()

    def take(self, order: object) -> bool:
        """Carry out an order of the engine; False for the last one. Orders for another generation are dropped."""
        if isinstance(order, Admit) and order.generation == self._generation:
            self.cycle.admit(order.request)
        elif isinstance(order, Abort) and order.generation == self._generation:
            self.cycle.abort(order.sequence_id)
        elif isinstance(order, Close) and order.generation == self._generation:
            self.cycle.stop()
            self._stepping.join()
            return False
        return True

    def _step(self) -> None:
        self.cycle.run()

    def _note_progress(self, progress: LoadProgress) -> None:
        self._progress = progress

    def _send(self, data: bytes) -> None:
        try:
            with self._sending:
                self._sock.sendall(data)
        except OSError:
            os._exit(EXIT_ORPHANED)

    def _beat(self) -> None:
        cycle, pause = self.cycle, threading.Event()
        while True:
            progress, self._progress = self._progress, None
            self._send(pack_frame(Beat(self._generation, cycle.steps, cycle.orders, cycle.phase, progress)))
            pause.wait(HEARTBEAT_S)

    # --- StepSink, in the step thread --------------------------------------------------------------------------------

    def loaded(self, info: RunnerInfo) -> None:
        """Tell the engine."""
        self._send(pack_frame(Loaded(self._generation, info)))

    def stepped(self, report: StepReport) -> None:
        """Tell the engine. Blocks while it has not read what was sent before."""
        cycle = self.cycle
        self._send(pack_step(self._generation, cycle.steps, cycle.orders, cycle.phase, report))

    def died(self, err: Exception, fault: Fault) -> None:
        """Tell the engine and end at once: teardown would call a device that may hang or abort on every call."""
        log.error("context died", exc_info=err, fault=fault.sentence)
        self._send(pack_frame(Died(self._generation, fault)))
        _flush()
        os._exit(EXIT_POISONED)


def resolve_runtime(name: str) -> Runtime:
    """A registered runtime, or "module:attribute" for one that is not registered."""
    module, colon, attribute = name.partition(":")
    try:
        return load_runtime(name)
    except RuntimeNotInstalled:
        raise
    except Unsupported:
        if not colon:
            raise
    runtime: Runtime = getattr(importlib.import_module(module), attribute)
    return runtime


def die_with_parent(parent_pid: int) -> None:
    """Ask the kernel to kill this process with the thread that spawned it. The second belt: the first is the socket's end."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent_pid:  # it died before the kernel was asked
        os._exit(EXIT_ORPHANED)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        stream.flush()


def _ignore(number: int, frame: object) -> None:
    """A handler and not SIG_IGN, which programs that the runner starts would inherit."""


def main() -> None:
    """Arguments: descriptor of the socket, process id of the engine."""
    descriptor, parent_pid = int(sys.argv[1]), int(sys.argv[2])
    os.set_inheritable(descriptor, False)  # what the runner starts must not keep the engine's socket open
    die_with_parent(parent_pid)
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1, all_threads=True)  # the engine asks for the stacks before it kills a hung child
    for number in (signal.SIGINT, signal.SIGTERM):  # for the engine, which lets its requests end and then ends its children
        signal.signal(number, _ignore)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    sock = socket.socket(fileno=descriptor)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
    reader = FrameReader(FromParent)
    host: ContextHost | None = None
    while True:
        data = sock.recv(READ_BYTES)
        if not data:
            os._exit(EXIT_ORPHANED)
        try:
            for order in reader.feed(data):
                if host is None:
                    if not isinstance(order, Start):
                        raise BadFrame("the first frame is not a start")
                    host = ContextHost(sock, order)
                    host.start()
                elif not host.take(order):
                    _flush()
                    os._exit(0)  # the heartbeat still runs, and interpreter teardown has nothing to do that the kernel does not
        except BadFrame as err:
            log.error("frame of the engine cannot be read", error=str(err))
            _flush()
            os._exit(EXIT_BAD_FRAME)


if __name__ == "__main__":
    main()
