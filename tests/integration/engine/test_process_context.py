"""One context in a child process: its life, its ends, and what the engine learns of each (trap 12)."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import psutil
import pytest

from inference_runtime.errors import Backpressure, BadRequest
from inference_runtime.generation import SamplingParams
from inference_runtime.runner import Isolation, RunnerConfig, StepRequest
from inference_runtime.runners.scripted import scripted_tokens
from inference_runtime.stepping import StepPhase, StepReport
from inference_runtime.supervision import ContextFault, Directive, Fault, FaultPhase, Loss, Probe, decide
from services.engine import process_context
from services.engine.child import EXIT_BAD_FRAME, EXIT_ORPHANED
from services.engine.frames import MAX_FRAME_BYTES, Admit, Beat, Close, FrameReader, FromChild, Loaded, Start, Step, pack_frame
from services.engine.process_context import ProcessContext
from services.engine.spawner import Spawner
from tests.integration.engine.kit import until
from tests.integration.engine.runtimes import PATH

MISBEHAVING = f"{PATH}MISBEHAVING"


class Life:
    """A context and what it reported."""

    def __init__(self, spawner: Spawner, runtime: str, model: str, hang_s: float, **options: object) -> None:
        self.reports: list[StepReport] = []
        self.context = ProcessContext(
            spawner,
            runtime,
            RunnerConfig(model, options, max_batch=8),
            generation=7,
            name=model,
            on_step=self.reports.append,
            hang_s=hang_s,
        )

    def admit(self, sequence_id: int = 1, tokens: int = 100_000, prompt: tuple[int, ...] = (1, 2)) -> None:
        """A sequence."""
        self.context.admit(StepRequest(sequence_id, prompt, SamplingParams(max_tokens=tokens, ignore_eos=True)))

    def tokens(self, sequence_id: int = 1) -> list[int]:
        """What came for it."""
        return [t for r in self.reports for o in r.outputs if o.sequence_id == sequence_id for t in o.token_ids]

    async def fault(self) -> Fault:
        """How it ended."""
        async with asyncio.timeout(20):
            death = await self.context.died()
        assert isinstance(death, ContextFault)
        return death.fault


@contextlib.asynccontextmanager
async def life(
    model: str = "m", *, runtime: str = "scripted", hang_s: float = 30.0, start: bool = True, **options: object
) -> AsyncIterator[Life]:
    """A started context, closed at the end."""
    spawner = Spawner()
    made = Life(spawner, runtime, model, hang_s, **options)
    try:
        if start:
            await made.context.start()
        yield made
    finally:
        await made.context.close()
        assert made.context.pid == 0 or not psutil.pid_exists(made.context.pid)
        spawner.close()


def fields(caplog: pytest.LogCaptureFixture, name: str) -> list[str]:
    """The values of one field, in order."""
    found = (getattr(record, "fields", {}) for record in caplog.records)
    return [str(f[name]) for f in found if name in f]


async def test_steps_come_from_another_process_and_are_exact() -> None:
    """Refusals, ends, aborts and several sequences travel in the columns of one frame for each step."""
    async with life(fail_admit=4, tokens_per_step=3) as subject:
        assert subject.context.info.isolation is Isolation.PROCESS
        assert subject.context.pid not in (0, os.getpid())
        for i in (1, 2, 3, 4):
            subject.admit(i, tokens=10 * i, prompt=(i,))
        await until(lambda: len(subject.tokens(3)) == 30, "all tokens are there")
        for i in (1, 2, 3):
            expected = scripted_tokens((i,), 0, 0)
            assert subject.tokens(i) == [next(expected) for _ in range(10 * i)]
        errors = [o.error for r in subject.reports for o in r.outputs if o.sequence_id == 4]
        assert [getattr(e, "reason", "") for e in errors] == ["SERVER_ERROR"]
        ends = {o.sequence_id: o.finish_reason for r in subject.reports for o in r.outputs if o.finish_reason}
        assert sorted(ends) == [1, 2, 3]


async def test_an_aborted_sequence_is_gone_and_reported() -> None:
    """Nothing of it comes after the report."""
    async with life(pace_s=0.002) as subject:
        subject.admit(1)
        await until(lambda: len(subject.tokens()) > 3, "it runs")
        subject.context.abort(1)
        await until(lambda: any(1 in r.aborted for r in subject.reports), "it is reported")
        at = next(n for n, r in enumerate(subject.reports) if 1 in r.aborted)
        assert all(o.sequence_id != 1 for r in subject.reports[at:] for o in r.outputs)


async def test_a_killed_child_is_noticed_within_50_ms() -> None:
    """By its pidfd, not by waiting for a heartbeat."""
    noticed = []
    for _ in range(3):
        async with life(pace_s=0.002) as subject:
            subject.admit()
            await until(lambda: len(subject.tokens()) > 3, "it runs")
            begin = time.perf_counter()
            os.kill(subject.context.pid, signal.SIGKILL)
            fault = await subject.fault()
            noticed.append(time.perf_counter() - begin)
            assert (fault.exit_status, fault.loss, fault.phase) == (-9, Loss.EOF, FaultPhase.STEP)
            assert decide(fault).directive is Directive.RESTART
    assert min(noticed) < 0.05, noticed


@pytest.mark.parametrize(
    ("model", "options", "check"),
    [
        ("poison", {"poison_at_token": 5}, lambda f: "ContextPoisoned" in f.names),
        ("sticky", {"sticky_at_token": 5}, lambda f: (f.error_code, f.probe) == (710, Probe.FAILED)),
        ("segfaults", {}, lambda f: f.exit_status == -11),
        ("garbage", {}, lambda f: f.loss is Loss.FRAME),
        ("announces-too-much", {}, lambda f: f.loss is Loss.FRAME),
        ("probe-fails", {}, lambda f: (f.names[0], f.error_code, f.probe) == ("DeviceError", 999, Probe.FAILED)),
        ("probe-hangs", {}, lambda f: (f.error_code, f.probe) == (999, Probe.HUNG)),
    ],
)
async def test_trap_12_a_fault_in_the_child_crosses_as_structure_and_restarts(
    model: str, options: dict[str, object], check: Callable[[Fault], bool]
) -> None:
    """Class names, code, probe and exit status: never a text."""
    async with life(model, runtime=MISBEHAVING, **options) as subject:  # type: ignore[arg-type]
        subject.admit()
        fault = await subject.fault()
        assert check(fault), fault
        assert fault.phase is FaultPhase.STEP
        assert decide(fault).directive is Directive.RESTART


async def test_a_device_error_whose_probe_is_well_fails_its_step_and_no_more() -> None:
    """The same child goes on."""
    async with life("probe-well", runtime=MISBEHAVING) as subject:
        subject.admit(1)
        await until(lambda: any(o.error for r in subject.reports for o in r.outputs), "the batch fails")
        subject.admit(2, tokens=5)
        await until(lambda: len(subject.tokens(2)) == 5, "the next one is answered")


async def test_faults_of_loading_say_so() -> None:
    """Configuration is not tried again; an exit without a word is, once."""
    async with life(load_fails=True, start=False) as subject:
        with pytest.raises(ContextFault, match="load_fails") as caught:
            await subject.context.start()
        assert caught.value.fault.phase is FaultPhase.LOAD
        assert decide(caught.value.fault).directive is Directive.STOP
    async with life("exits-at-load", runtime=MISBEHAVING, start=False) as subject:
        with pytest.raises(ContextFault, match="exited 3") as caught:
            await subject.context.start()
        assert decide(caught.value.fault).directive is Directive.ESCALATE
    async with life(runtime="surely.not:THERE", start=False) as subject:
        with pytest.raises(ContextFault, match="ModuleNotFoundError"):
            await subject.context.start()


async def test_a_step_that_does_not_end_is_a_hang_and_its_stack_is_kept(caplog: pytest.LogCaptureFixture) -> None:
    """The stacks of all threads are in the log before the child is killed."""
    with caplog.at_level(logging.INFO, "services.engine"):
        async with life(hang_s=0.5, pace_s=0.002, hang_at_step=5) as subject:
            subject.admit()
            fault = await subject.fault()
            assert fault.loss is Loss.HANG
            assert len(subject.tokens()) == 4
    stack = fields(caplog, "stack")[-1]
    assert "scripted.py" in stack
    assert "in step" in stack
    assert "child.py" in stack


async def test_a_frozen_child_is_a_hang_too() -> None:
    """No heartbeat: nothing in it runs."""
    async with life(hang_s=0.5) as subject:
        os.kill(subject.context.pid, signal.SIGSTOP)
        assert (await subject.fault()).loss is Loss.HEARTBEAT


async def test_slow_steps_are_no_hang_and_neither_is_silence() -> None:
    """The limit is ten times the 99th percentile; a child without work may rest for ever."""
    async with life(hang_s=0.2, pace_s=0.15) as subject:
        subject.admit(1, tokens=4)
        await until(lambda: len(subject.tokens()) == 4, "four slow steps")
        subject.admit(2, tokens=1)
        await until(lambda: len(subject.tokens(2)) == 1, "it lives")
    async with life(hang_s=0.2, pace_s=0.001) as subject:
        idle_until = time.monotonic() + 0.6
        await until(lambda: time.monotonic() > idle_until, "time passes")
        subject.admit(1, tokens=1)
        await until(lambda: len(subject.tokens(1)) == 1, "it lives")


async def test_a_pause_of_the_engine_is_no_hang_of_the_child() -> None:
    """What came meanwhile is read before anybody is judged; the child waits for its reader meanwhile."""
    async with life(hang_s=0.3, pace_s=0.0001) as subject:
        subject.admit(1, tokens=30_000)
        await until(lambda: len(subject.tokens()) > 3, "it runs")
        time.sleep(1.0)  # noqa: ASYNC251 - this is the pause
        seen = len(subject.tokens())
        await until(lambda: len(subject.tokens()) > seen, "it goes on")
        expected = scripted_tokens((1, 2), 0, 0)
        assert subject.tokens() == [next(expected) for _ in subject.tokens()]


async def test_frames_of_another_generation_are_dropped() -> None:
    """What an earlier life still says does not count."""
    async with life() as subject:
        old = pack_frame(Step(6, 1, 0, StepPhase.STEPPING, 0.1, 0.0, [], [1], [999]))
        subject.context.received(old)
        assert subject.reports == []
        subject.admit(1, tokens=3)
        await until(lambda: len(subject.tokens()) == 3, "the present one counts")


async def test_too_many_orders_and_too_large_ones_are_refused() -> None:
    """Trap 9: the mailbox of a child that loads is bounded; a frame is too."""
    async with life(start=False, load_s=1.0) as subject:
        starting = asyncio.ensure_future(subject.context.start())
        await until(lambda: subject.context.progress.phase == "reading the script", "it loads")
        with pytest.raises(Backpressure):
            for i in range(100):
                subject.admit(i, tokens=1)
        await starting
        await until(lambda: len(subject.reports) > 0, "the orders are carried out")
        subject.admit(1000, tokens=1)
        with pytest.raises(BadRequest, match="too large"):
            subject.admit(1001, prompt=(70_000,) * (MAX_FRAME_BYTES // 5 + 1))


async def test_close_ends_the_whole_tree(caplog: pytest.LogCaptureFixture) -> None:
    """Peers leave workers behind that hold the device."""
    with caplog.at_level(logging.INFO, "services.engine"):
        async with life("leaves-a-process", runtime=MISBEHAVING) as subject:
            await until(lambda: any("grandchild" in line for line in fields(caplog, "line")), "it says so in our log")
            pid = int(next(line for line in fields(caplog, "line") if "grandchild" in line).split()[1])
            assert psutil.pid_exists(pid)
            assert subject.context.pid
    await until(lambda: not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE, "it is gone")


async def test_progress_of_loading_is_seen() -> None:
    """It travels with the heartbeat."""
    async with life("reports", runtime=MISBEHAVING, load_s=0.5, start=False) as subject:
        starting = asyncio.ensure_future(subject.context.start())
        await until(lambda: subject.context.progress.phase != "starting", "progress is seen")
        await starting


async def test_a_start_that_is_cancelled_leaves_nothing() -> None:
    """At any moment of it."""
    spawner = Spawner()
    for delay_s in (0.0, 0.002, 0.02, 0.2):
        subject = Life(spawner, "scripted", "m", 30.0, load_s=5.0)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(delay_s):
                await subject.context.start()
        await subject.context.close()
        assert subject.context.pid == 0 or not psutil.pid_exists(subject.context.pid)
    assert [c for c in psutil.Process().children() if "services.engine.child" in c.cmdline()] == []
    spawner.close()


# --- the child alone -------------------------------------------------------------------------------------------------


def child(sock: socket.socket) -> subprocess.Popen[bytes]:
    """A child whose engine is this test."""
    command = [sys.executable, "-m", "services.engine.child", str(sock.fileno()), str(os.getpid())]
    return subprocess.Popen(command, pass_fds=(sock.fileno(),), stderr=subprocess.DEVNULL)


def test_a_child_ends_when_its_engine_is_gone() -> None:
    """The end of the socket is enough."""
    ours, theirs = socket.socketpair()
    process = child(theirs)
    theirs.close()
    ours.close()
    assert process.wait(10) == EXIT_ORPHANED


def test_a_child_ends_when_its_engine_sends_nonsense() -> None:
    """It cannot know what else it misunderstood."""
    ours, theirs = socket.socketpair()
    process = child(theirs)
    theirs.close()
    ours.sendall(b"\x00\x00\x00\x03abc")
    assert process.wait(10) == EXIT_BAD_FRAME
    ours.close()


def test_a_child_beats_five_times_a_second_and_drops_orders_of_another_generation() -> None:
    """Phase and counters travel with the beat; an order of an earlier life is not carried out."""
    ours, theirs = socket.socketpair()
    process = child(theirs)
    theirs.close()
    request = StepRequest(1, [1], SamplingParams(max_tokens=3))
    ours.sendall(pack_frame(Start(5, "scripted", RunnerConfig("m"), "m")) + pack_frame(Admit(4, request)))
    reader, frames = FrameReader(FromChild), list[object]()

    def read_until(enough: Callable[[], bool]) -> None:
        ours.settimeout(10)
        while not enough():
            frames.extend(reader.feed(ours.recv(65_536)))

    def beats() -> list[Beat]:
        return [f for f in frames if isinstance(f, Beat) and f.phase is StepPhase.IDLE]

    read_until(lambda: any(isinstance(f, Loaded) for f in frames) and len(beats()) >= 1)
    begin = time.monotonic()
    first = len(beats())
    read_until(lambda: len(beats()) >= first + 5)
    assert 0.7 < time.monotonic() - begin < 3.0
    assert (beats()[-1].orders, beats()[-1].steps) == (0, 0)
    ours.sendall(pack_frame(Admit(5, request)))
    read_until(lambda: len([f for f in frames if isinstance(f, Step)]) == 3)
    ours.sendall(pack_frame(Close(5)))
    assert process.wait(10) == 0
    ours.close()


ENGINE = """
import asyncio, sys
from inference_runtime.runner import RunnerConfig
from services.engine.process_context import ProcessContext
from services.engine.spawner import Spawner
async def main():
    context = ProcessContext(Spawner(), "scripted", RunnerConfig("m"), generation=1, name="m", on_step=print)
    await context.start()
    print(context.pid, flush=True)
    await asyncio.sleep(600)
asyncio.run(main())
"""


@pytest.mark.parametrize("freeze", [False, True])
def test_a_child_dies_with_its_engine(freeze: bool) -> None:
    """SIGKILL of the engine; also where the child cannot read its socket any more, which is what the second belt is for."""
    engine = subprocess.Popen([sys.executable, "-c", ENGINE], stdout=subprocess.PIPE)
    assert engine.stdout is not None
    process = psutil.Process(int(engine.stdout.readline()))
    if freeze:
        process.suspend()
    engine.kill()
    engine.wait()
    engine.stdout.close()
    gone, _ = psutil.wait_procs([process], timeout=10)
    assert gone or process.status() == psutil.STATUS_ZOMBIE


def test_a_folder_called_services_where_the_engine_was_started_is_not_the_engines(tmp_path: Path) -> None:
    """A console script does not look into the working folder, and its child does not either."""
    (tmp_path / "services").mkdir()
    (tmp_path / "services" / "__init__.py").write_text("raise SystemExit('not ours')")
    engine = subprocess.Popen([sys.executable, "-P", "-c", ENGINE], stdout=subprocess.PIPE, cwd=tmp_path)
    assert engine.stdout is not None
    assert int(engine.stdout.readline()) > 0
    engine.kill()
    engine.wait()
    engine.stdout.close()


def test_the_constants_of_a_hang_are_those_that_are_promised() -> None:
    """max(30 s, 10 x p99)."""
    assert (process_context.HANG_S, process_context.HANG_STEPS) == (30.0, 10.0)
