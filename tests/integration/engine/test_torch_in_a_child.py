"""The local engine in a child process: what a kill interrupts goes on with the tokens it would have had."""

from __future__ import annotations

import asyncio
import os
import signal

import pytest

from inference_runtime.generation import SamplingParams
from inference_runtime.runner import Isolation, RunnerConfig, RunnerInfo, StepOutput
from inference_runtime.stepping import StepReport
from services.engine.context import Context, OnStep
from services.engine.hosting import process_contexts
from services.engine.process_context import ProcessContext
from services.engine.spawner import Spawner
from services.engine.worker import Flight, Worker

pytest.importorskip("torch")

TOKENS = 60


class Owner:
    """Of one flight."""

    def __init__(self) -> None:
        self.ended = False

    def on_output(self, output: StepOutput) -> None:
        """The flight keeps the tokens."""
        assert output.error is None
        self.ended = output.finish_reason is not None

    def on_failure(self, err: Exception) -> None:
        """Not in this test."""
        raise AssertionError(err)


class Listener:
    """Wakes whoever waits."""

    def __init__(self) -> None:
        self.changed = asyncio.Event()
        self.infos: list[RunnerInfo] = []

    def on_ready(self, info: RunnerInfo) -> None:
        """A context works."""
        self.infos.append(info)
        self.changed.set()

    def on_down(self, err: Exception) -> None:
        """It died."""

    def on_report(self, report: StepReport) -> None:
        """A step."""
        self.changed.set()

    def on_out_of_memory(self, sequences: int) -> None:
        """Not here."""


async def answers(kill: bool) -> list[list[int]]:
    """Six sampled answers of the demo model; with a SIGKILL of the child once all of them have ten tokens."""
    lives = 2 if kill else 1
    spawner, listener, contexts = Spawner(), Listener(), list[ProcessContext]()
    make = process_contexts(spawner, "torch")

    def spawn(config: RunnerConfig, name: str, generation: int, on_step: OnStep) -> Context:
        context = make(config, name, generation, on_step)
        assert isinstance(context, ProcessContext)
        contexts.append(context)
        return context

    worker = Worker(spawn, RunnerConfig("demo", {"threads": 1}, max_batch=8), name="torch", listener=listener)
    flights = [
        Flight(i, [1, 5 + i, 9], SamplingParams(max_tokens=TOKENS, temperature=0.8, seed=i, ignore_eos=True), Owner())
        for i in range(6)
    ]
    running = asyncio.ensure_future(worker.run())
    try:
        async with asyncio.timeout(60):
            while not worker.ready:
                listener.changed.clear()
                await listener.changed.wait()
            for flight in flights:
                worker.launch(flight)
            while sum(len(f.generated) for f in flights) < len(flights) * TOKENS:
                if kill and min(len(f.generated) for f in flights) >= 10:
                    os.kill(contexts[0].pid, signal.SIGKILL)
                    kill = False
                listener.changed.clear()
                await listener.changed.wait()
    finally:
        running.cancel()
        await asyncio.wait([running])
        spawner.close()
    assert {info.isolation for info in listener.infos} == {Isolation.PROCESS}
    assert len(contexts) == len(listener.infos) == lives
    return [f.generated for f in flights]


async def test_sampled_answers_are_the_same_when_the_child_is_killed_in_the_middle() -> None:
    """Draws follow from seed and index, so a new child continues as the old one would have."""
    assert await answers(kill=True) == await answers(kill=False)
