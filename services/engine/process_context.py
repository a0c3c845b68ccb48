"""A context in a child process, seen from the engine: the only kind whose device errors a restart can heal.

The child owns device, weights and step loop (`child.py`); here are its socket, its death, its hangs and its output. Everything
runs on the event loop. The engine's process imports no device library.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import signal
from collections import deque
from dataclasses import replace
from typing import IO, cast

from inference_runtime.errors import BadRequest
from inference_runtime.runner import Isolation, LoadProgress, RunnerConfig, RunnerInfo, StepRequest
from inference_runtime.stepping import StepPhase, mailbox_capacity, mailbox_full
from inference_runtime.supervision import ContextFault, Fault, FaultPhase, Loss
from inference_runtime.telemetry import get_logger
from services.engine.context import OnStep
from services.engine.devices import Devices, NoDevices, oom_kills
from services.engine.frames import (
    Abort,
    Admit,
    BadFrame,
    Beat,
    Close,
    Died,
    FrameReader,
    FromChild,
    Loaded,
    Start,
    Step,
    pack_frame,
    unpack_step,
)
from services.engine.spawner import Spawned, Spawner

__all__ = ["ProcessContext"]

log = get_logger(__name__)

#: Time without a step after which a stepping child hangs, seconds; more for one whose steps are slow.
HANG_S = 30.0
#: A step that takes this many times the 99th percentile hangs, if that is more than HANG_S.
HANG_STEPS = 10.0
#: A loading child may be silent for this many times HANG_S: imports and compilers can hold its interpreter for long.
LOADING_PATIENCE = 10.0
#: Steps that the percentile is taken of.
STEPS_REMEMBERED = 256
#: Time between two looks at the clock, as a part of the hang limit, and at most, seconds.
CHECK_PART, CHECK_S = 0.1, 1.0
#: Time a hung child gets to write its stacks, seconds.
DUMP_S = 0.5
#: Time between the end of the socket and the end of the process, after which the process is killed, seconds.
EXIT_GRACE_S = 1.0
#: Time that what a dead child sent gets to arrive, seconds. It is in the kernel already.
LAST_BYTES_S = 0.2
#: Time a child gets to close its runner, seconds.
CLOSE_TIMEOUT_S = 10.0
#: One whose present step has taken this long already, seconds, gets this long, seconds: it closes after the step, if ever.
SILENT_S, SILENT_CLOSE_S = 2.0, 0.5
#: Time a killed process gets to vanish, seconds. Only a driver that holds it in the kernel can take so long.
REAP_TIMEOUT_S = 30.0
#: Lines of output that are kept for the report of a hang, and the longest one, characters.
LINES_KEPT, LINE_CHARS = 200, 2000


class ProcessContext:
    """One life in a child process. The same face as ThreadContext.

    Args:
        spawner: Starts the child.
        runtime: Registered name, or "module:attribute", of the runtime. The child resolves it.
        config: What the runner is configured with. Its accelerators are indexes of what this process may see.
        generation: Number of the life.
        name: For logs.
        on_step: Hears of each step. Not called after `close`.
        devices: What holds the child's memory.
        hang_s: Least time without a step that is taken for a hang, seconds.
    """

    def __init__(
        self,
        spawner: Spawner,
        runtime: str,
        config: RunnerConfig,
        *,
        generation: int,
        name: str,
        on_step: OnStep,
        devices: Devices | None = None,
        hang_s: float = HANG_S,
    ) -> None:
        self._loop = loop = asyncio.get_running_loop()
        self._spawner, self._runtime, self._config = spawner, runtime, config
        self._generation, self._name, self._deliver = generation, name, on_step
        self._devices, self._hang_s = devices or NoDevices(), hang_s
        self._loaded: asyncio.Future[RunnerInfo] = loop.create_future()
        self._died: asyncio.Future[Fault] = loop.create_future()
        self._gone = asyncio.Event()  # the process is reaped
        self._cut = asyncio.Event()  # nothing more comes from the socket
        self._spawning: asyncio.Future[Spawned] | None = None
        self._child: Spawned | None = None
        self._link = _Link(self)
        self._output = _Output(name)
        self._piped = self._closed = False
        self._oom_kills = 0
        self._sent = self._carried_out = 0  # orders
        self._phase, self._steps = StepPhase.LOADING, 0
        self._durations: deque[float] = deque(maxlen=STEPS_REMEMBERED)
        self._heard_s = self._moved_s = self._checked_s = loop.time()
        self._timer: asyncio.TimerHandle | None = None
        self.progress = LoadProgress(0, 0, "starting")

    # --- life --------------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Start the child and load the model. Raises ContextFault."""
        self._devices.note_use()
        self._oom_kills = oom_kills()
        self._spawning = self._spawner.spawn(self._config.accelerators)
        child = self._child = await asyncio.shield(self._spawning)
        loop = self._loop
        loop.add_reader(child.pidfd, self._exited)
        self._piped = True
        await loop.connect_read_pipe(lambda: self._output, cast("IO[bytes]", os.fdopen(child.output, "rb", 0)))
        await loop.create_unix_connection(lambda: self._link, sock=child.sock)
        # Inside the child, the devices it may see are numbered from 0.
        config = replace(self._config, accelerators=tuple(range(len(self._config.accelerators))))
        self._link.write(pack_frame(Start(self._generation, self._runtime, config, self._name)))
        self._heard_s = self._moved_s = self._checked_s = loop.time()
        self._check()
        either: list[asyncio.Future[RunnerInfo] | asyncio.Future[Fault]] = [self._loaded, self._died]
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        if not self._loaded.done():
            raise await self._fault()

    @property
    def info(self) -> RunnerInfo:
        """What was loaded. Valid after `start`."""
        return self._loaded.result()

    @property
    def steps(self) -> int:
        """Steps made so far, as the last heartbeat says."""
        return self._steps

    @property
    def pid(self) -> int:
        """Of the child; 0 before it has one."""
        return self._child.process.pid if self._child is not None else 0

    async def died(self) -> Exception:
        """Wait for the death of the child, or of the context in it."""
        await asyncio.wait([self._died])
        return await self._fault()

    async def _fault(self) -> ContextFault:
        return ContextFault(replace(self._died.result(), nvml_action=await self._devices.recovery_action()))

    async def close(self) -> None:
        """End the child and its whole tree, and wait until its memory is back. Idempotent."""
        self._closed = True
        if self._timer is not None:
            self._timer.cancel()
        if self._spawning is None:
            return
        try:
            child = await self._spawning
        except OSError:
            return  # there never was one
        if self._child is None:  # cancelled while it was being started
            self._child = child
            self._loop.add_reader(child.pidfd, self._exited)
        if self._loaded.done() and not self._died.done() and not self._cut.is_set():  # one that still loads would not read it
            self._link.write(pack_frame(Close(self._generation)))
            still = self._phase is StepPhase.STEPPING and self._loop.time() - self._moved_s > SILENT_S
            await _within(SILENT_CLOSE_S if still else CLOSE_TIMEOUT_S, self._gone)
        if not self._gone.is_set():
            self._kill()
            if not await _within(REAP_TIMEOUT_S, self._gone):
                log.error("killed child does not end", replica=self._name, pid=child.process.pid)
        if self._piped:
            await _within(LAST_BYTES_S, self._output.ended)
            self._output.close()
        else:
            os.close(child.output)
        self._link.close()
        child.sock.close()
        if self._timer is not None:
            self._timer.cancel()
        if self._config.accelerators and not await self._devices.released(child.process.pid):
            log.error("device memory is not back", replica=self._name, pid=child.process.pid)

    # --- orders ------------------------------------------------------------------------------------------------------

    def admit(self, request: StepRequest) -> None:
        """Order a sequence in.

        Raises:
            Backpressure: The child has too many orders waiting.
            BadRequest: The prompt is too large for a frame.
        """
        if self._sent - self._carried_out >= mailbox_capacity(self._config.max_batch):
            raise mailbox_full()
        try:
            self._order(pack_frame(Admit(self._generation, request)))
        except BadFrame as err:
            raise BadRequest("the prompt is too large for one request", param="messages") from err

    def abort(self, sequence_id: int) -> None:
        """Order a sequence out before the next step."""
        self._order(pack_frame(Abort(self._generation, sequence_id)))

    def _order(self, data: bytes) -> None:
        self._sent += 1
        self._link.write(data)

    # --- what the child says -----------------------------------------------------------------------------------------

    def received(self, data: bytes) -> None:
        """Bytes of the child."""
        self._heard_s = self._loop.time()
        try:
            for frame in self._link.reader.feed(data):
                self._take(frame)
        except BadFrame as err:
            log.error("frame of a context cannot be read", replica=self._name, error=str(err))
            self._die(Fault(phase=self._fault_phase(), loss=Loss.FRAME))
            self._kill()

    def _take(self, frame: object) -> None:
        assert isinstance(frame, FromChild)
        if frame.generation != self._generation or self._died.done():
            return
        if isinstance(frame, Step):
            report = unpack_step(frame)
            self._note(frame.steps, frame.orders, frame.phase)
            self._durations.append(frame.duration_s)
            if not self._closed:
                self._deliver(report)
        elif isinstance(frame, Beat):
            self._note(frame.steps, frame.orders, frame.phase)
            self.progress = frame.progress or self.progress
        elif isinstance(frame, Loaded):
            self._phase, self._moved_s = StepPhase.IDLE, self._heard_s
            if not self._loaded.done():
                self._loaded.set_result(replace(frame.info, isolation=Isolation.PROCESS))
        else:
            assert isinstance(frame, Died)
            self._die(frame.fault)

    def _note(self, steps: int, orders: int, phase: StepPhase) -> None:
        if steps != self._steps or phase is not StepPhase.STEPPING:
            self._steps, self._moved_s = steps, self._heard_s
        self._carried_out, self._phase = orders, phase

    def cut(self) -> None:
        """The child's end of the socket is closed."""
        self._cut.set()
        if self._gone.is_set():
            self._report_exit()
        else:
            self._later(EXIT_GRACE_S, self._kill)

    # --- death -------------------------------------------------------------------------------------------------------

    def _exited(self) -> None:
        """The process is over: kill what it left behind, reap it, and take what it sent last."""
        child = self._child
        assert child is not None
        self._loop.remove_reader(child.pidfd)
        self._kill()  # before it is reaped: until then nobody else can have its number
        child.process.wait()
        os.close(child.pidfd)
        self._gone.set()
        if self._cut.is_set() or self._link.idle:
            self._report_exit()
        else:
            self._later(LAST_BYTES_S, self._report_exit)

    def _report_exit(self) -> None:
        assert self._child is not None
        status = self._child.process.returncode
        killed_for_memory = status == -signal.SIGKILL and oom_kills() > self._oom_kills
        lost = status is not None and status < 0 and not killed_for_memory
        self._die(
            Fault(
                phase=self._fault_phase(),
                exit_status=status,
                loss=Loss.EOF if lost else Loss.NONE,
                oom_killed=killed_for_memory,
            )
        )

    def _fault_phase(self) -> FaultPhase:
        return FaultPhase.STEP if self._loaded.done() else FaultPhase.LOAD

    def _die(self, fault: Fault) -> None:
        if not self._died.done():
            self._died.set_result(fault)

    def _kill(self) -> None:
        """SIGKILL to the child and to everything it started."""
        if self._child is not None and not self._gone.is_set():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._child.process.pid, signal.SIGKILL)

    # --- hangs -------------------------------------------------------------------------------------------------------

    def _check(self) -> None:
        """Look at the clock: does the child breathe, and do its steps go on?"""
        if self._died.done() or self._closed:
            return
        now, period = self._loop.time(), min(CHECK_S, self._hang_s * CHECK_PART)
        if now - self._checked_s > 2 * period + 0.1:  # this loop was away itself: what came meanwhile is not read yet
            self._heard_s = self._moved_s = now
        self._checked_s = now
        limit = self._hang_limit()
        heard_until = self._heard_s + limit * (LOADING_PATIENCE if self._phase is StepPhase.LOADING else 1.0)
        moved_until = self._moved_s + limit if self._phase is StepPhase.STEPPING else math.inf
        if now >= heard_until:
            self._end_hang(Loss.HEARTBEAT)
        elif now >= moved_until:
            self._end_hang(Loss.HANG)
        else:
            self._later(min(period, heard_until - now, moved_until - now), self._check)

    def _hang_limit(self) -> float:
        if not self._durations:
            return self._hang_s
        ordered = sorted(self._durations)
        return max(self._hang_s, HANG_STEPS * ordered[int(0.99 * (len(ordered) - 1))])

    def _end_hang(self, loss: Loss) -> None:
        """Have the child write its stacks, then kill it."""
        assert self._child is not None
        self._output.lines.clear()
        os.kill(self._child.process.pid, signal.SIGUSR1)
        self._later(DUMP_S, self._kill_hung, loss)

    def _kill_hung(self, loss: Loss) -> None:
        log.error("context hangs and is killed", replica=self._name, pid=self.pid, loss=loss.value, steps=self._steps)
        self._output.report("stack of the hung context")
        self._die(Fault(phase=self._fault_phase(), loss=loss))
        self._kill()

    def _later(self, delay_s: float, call: object, *args: object) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._loop.call_later(delay_s, call, *args)  # type: ignore[arg-type]


async def _within(limit_s: float, event: asyncio.Event) -> bool:
    try:
        async with asyncio.timeout(limit_s):
            await event.wait()
    except TimeoutError:
        return False
    return True


class _Link(asyncio.Protocol):
    """The engine's end of the socket."""

    def __init__(self, context: ProcessContext) -> None:
        self._context = context
        self._transport: asyncio.Transport | None = None
        self.reader = FrameReader(FromChild)

    @property
    def idle(self) -> bool:
        """Whether there is no socket to read from."""
        return self._transport is None

    def write(self, data: bytes) -> None:
        """Send. What a dead child does not take any more is dropped."""
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(data)

    def close(self) -> None:
        """Close the socket."""
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """asyncio's."""
        self._transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        """asyncio's."""
        self._context.received(data)

    def connection_lost(self, exc: Exception | None) -> None:
        """asyncio's."""
        self._context.cut()


class _Output(asyncio.Protocol):
    """What the child writes to stdout and stderr: into the engine's log, line by line."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._rest = b""
        self._transport: asyncio.BaseTransport | None = None
        #: Set when nothing more comes.
        self.ended = asyncio.Event()
        #: The last lines.
        self.lines: deque[str] = deque(maxlen=LINES_KEPT)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """asyncio's."""
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        """asyncio's."""
        *lines, rest = (self._rest + data).split(b"\n")
        for line in lines:
            self._log(line)
        self._rest = rest[-LINE_CHARS:]

    def connection_lost(self, exc: Exception | None) -> None:
        """asyncio's."""
        if self._rest:
            self._log(self._rest)
        self.ended.set()

    def close(self) -> None:
        """Read no more."""
        if self._transport is not None:
            self._transport.close()

    def report(self, message: str) -> None:
        """Log the last lines as one event."""
        log.error(message, replica=self._name, stack="\n".join(self.lines))

    def _log(self, line: bytes) -> None:
        text = line[:LINE_CHARS].decode(errors="replace").rstrip()
        if text:
            self.lines.append(text)
            log.info("output of the context", replica=self._name, line=text)
