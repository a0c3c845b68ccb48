"""A real device-side assert ends a process; its streams go on in the next one, and the memory comes back (R05, trap 12).

What the whole design of process isolation rests on is shown here on a real device, so that it is shown again with each new torch.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import shutil
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable

import pytest

from inference_runtime.generation import SamplingParams
from inference_runtime.runner import Isolation, RunnerConfig, RunnerInfo, StepOutput
from inference_runtime.stepping import StepReport
from services.engine.hosting import process_contexts
from services.engine.spawner import Spawner
from services.engine.worker import Flight, Worker
from tests.gpu.poison import BALLAST_MIB, KILLER, PATH, expected

STREAMS, TOKENS = 64, 200
#: Loading CUDA and torch takes seconds, twice.
WAIT_S = 90.0


def cuda_devices() -> int:
    """Devices of this machine, found without touching them in this process."""
    smi = shutil.which("nvidia-smi")
    if smi is None:
        return 0
    listed = subprocess.run([smi, "-L"], capture_output=True, text=True, check=False)
    return listed.stdout.count("GPU ") if listed.returncode == 0 else 0


HAS_TORCH = importlib.util.find_spec("torch") is not None
needs_torch = pytest.mark.skipif(not HAS_TORCH, reason="torch is not installed")
needs_cuda = pytest.mark.skipif(
    not HAS_TORCH or cuda_devices() == 0, reason="NO CUDA DEVICE: healing a real device-side assert is not shown here"
)


class Owner:
    """Of one flight."""

    def __init__(self) -> None:
        self.ended = False
        self.error: Exception | None = None

    def on_output(self, output: StepOutput) -> None:
        """The flight keeps the tokens."""
        self.error = output.error
        self.ended = output.finish_reason is not None or output.error is not None

    def on_failure(self, err: Exception) -> None:
        """It is lost."""
        self.error, self.ended = err, True


class Story:
    """A worker and what happened to it."""

    def __init__(self, spawner: Spawner, accelerators: tuple[int, ...]) -> None:
        self.down: list[str] = []
        self.info: RunnerInfo | None = None
        self._changed = asyncio.Event()
        config = RunnerConfig("poison", {}, accelerators, max_batch=STREAMS)
        self.worker = Worker(process_contexts(spawner, PATH, accelerators), config, name="poison", listener=self)
        self.flights: list[Flight] = []

    def on_ready(self, info: RunnerInfo) -> None:
        """A context works."""
        self.info = info
        self._changed.set()

    def on_down(self, err: Exception) -> None:
        """A context died."""
        self.down.append(str(err))
        self._changed.set()

    def on_report(self, report: StepReport) -> None:
        """A step."""
        self._changed.set()

    def on_out_of_memory(self, sequences: int) -> None:
        """Not here."""

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait for it."""
        async with asyncio.timeout(WAIT_S):
            while not condition():
                self._changed.clear()
                await self._changed.wait()

    async def run(self, *prompts: list[int]) -> None:
        """Run these to their end."""
        sampling = SamplingParams(max_tokens=TOKENS)
        self.flights = [Flight(i, prompt, sampling, Owner()) for i, prompt in enumerate(prompts)]
        for flight in self.flights:
            self.worker.launch(flight)
        await self.until(lambda: all(isinstance(f.owner, Owner) and f.owner.ended for f in self.flights))

    def check(self) -> None:
        """Every token of every stream."""
        for flight in self.flights:
            assert isinstance(flight.owner, Owner)
            assert flight.owner.error is None
            assert flight.generated == expected(flight.prompt_token_ids, TOKENS)


@contextlib.asynccontextmanager
async def running(accelerators: tuple[int, ...]) -> AsyncIterator[Story]:
    """A worker whose first context is ready."""
    spawner = Spawner()
    story = Story(spawner, accelerators)
    task = asyncio.ensure_future(story.worker.run())
    try:
        await story.until(lambda: story.worker.ready)
        yield story
    finally:
        task.cancel()
        await asyncio.wait([task])
        spawner.close()


def memory_used_mib() -> int:
    """Of device 0, by everybody."""
    query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits", "-i", "0"]
    return int(subprocess.run(query, capture_output=True, text=True, check=True).stdout)


@needs_torch
async def test_the_test_runtime_answers_exactly_on_the_cpu() -> None:
    """What the next test compares with is right."""
    async with running(()) as story:
        await story.run(*([i, i + 1] for i in range(8)))
        story.check()
        assert story.info is not None
        assert story.info.isolation is Isolation.PROCESS


@pytest.mark.gpu
@needs_cuda
@pytest.mark.timeout(300)
async def test_trap_12_a_device_side_assert_under_load_is_healed_by_a_new_child(capsys: pytest.CaptureFixture[str]) -> None:
    """64 streams and one killer prompt: one death, every stream exact, the memory back."""
    before_mib = memory_used_mib()
    async with running((0,)) as story:
        loaded_mib = memory_used_mib()
        assert loaded_mib >= before_mib + BALLAST_MIB
        begin = time.perf_counter()
        await story.run(*([i, i + 1] for i in range(STREAMS - 1)), [KILLER, 1])
        took_s = time.perf_counter() - begin
        story.check()
        assert (len(story.down), story.worker.restarts) == (1, 1)
        assert "710" in story.down[0] or "CUDA error" in story.down[0]
        healed_mib = memory_used_mib()
        assert healed_mib <= loaded_mib + BALLAST_MIB // 2  # the dead child's share is not there any more
    after_mib = memory_used_mib()
    assert after_mib <= before_mib + BALLAST_MIB // 2
    with capsys.disabled():
        print(f"\npoison: {story.down[0]}; healed and finished in {took_s:.1f} s; MiB {before_mib} {healed_mib} {after_mib}")


STUCK = """
import threading, torch
table = torch.zeros(4, device="cuda")
try:
    table[torch.tensor([10**9], device="cuda")]
    torch.cuda.synchronize()
except RuntimeError as err:
    print("code", getattr(err, "error_code", None))
def again():
    try:
        print("healed", (torch.ones(4, device="cuda") + 1).sum().item())
    except RuntimeError:
        print("still poisoned")
thread = threading.Thread(target=again)
thread.start()
thread.join()
import os, sys
sys.stdout.flush()
os._exit(0)
"""


@pytest.mark.gpu
@needs_cuda
@pytest.mark.timeout(180)
def test_a_new_thread_does_not_heal_a_device_side_assert() -> None:
    """Why a process: should this test fail with a later torch, thread isolation is enough there."""
    told = subprocess.run([sys.executable, "-c", STUCK], capture_output=True, text=True, check=False).stdout.split("\n")
    assert told[0].startswith("code")
    assert told[1] == "still poisoned"
