"""What a child process for the context costs, and how fast it is replaced. `python -m bench.isolation`.

The scripted runtime, a thread and a process side by side. Per step at 256 sequences: CPU time of the event loop's thread
(reading, decoding, handing over) and wall time without a pace. Then SIGKILL of the child under 64 streams: death noticed, new
child ready, all streams moved on; and restarts in a row: growth of the parent, descriptors, threads. Every token is compared with
what the runtime must give. Limits are those that the project promises; a missed one is exit status 1.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import json
import os
import platform
import signal
import statistics
import threading
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import uvloop

from inference_runtime.generation import SamplingParams
from inference_runtime.runner import RunnerConfig, RunnerInfo, StepOutput, StepRequest
from inference_runtime.runners.scripted import RUNTIME, scripted_tokens
from inference_runtime.stepping import StepReport
from inference_runtime.supervision import RestartPolicy
from services.engine.context import Context, ContextFactory, OnStep
from services.engine.hosting import process_contexts, thread_contexts
from services.engine.process_context import ProcessContext
from services.engine.spawner import Spawner
from services.engine.worker import Flight, Worker

__all__ = ["main"]

OUT = Path(__file__).parent / "out"
SEQUENCES, STEPS = 256, 400
STREAMS, STREAM_TOKENS = 64, 400
#: What is promised: added per step on the parent's side, ms; death noticed, ms; moved after the new child is ready, ms; MiB.
LIMITS = {"added_per_step_ms": 0.3, "death_noticed_ms": 50.0, "moved_ms": 200.0, "rss_growth_mib": 5.0}


class Timed:
    """CPU time that one context takes on the event loop's thread for each step."""

    def __init__(self) -> None:
        self.done = asyncio.Event()
        self.spent_s = 0.0
        self.tokens: dict[int, list[int]] = {i: [] for i in range(1, SEQUENCES + 1)}

    def on_step(self, report: StepReport) -> None:
        """Keep the tokens: about what a worker does, and the same for both."""
        tokens = self.tokens
        for output in report.outputs:
            tokens[output.sequence_id] += output.token_ids
        if report.outputs[-1].finish_reason is not None:
            self.done.set()

    def check(self) -> None:
        """Every token of every sequence."""
        for sequence_id, tokens in self.tokens.items():
            expected = scripted_tokens((sequence_id,), 0, 0)
            assert tokens == [next(expected) for _ in range(STEPS)], f"sequence {sequence_id} is wrong"

    def timed(self, call: Callable[..., None]) -> Callable[..., None]:
        """The same call, its time counted."""

        def counted(*args: object) -> None:
            begin = time.thread_time()
            call(*args)
            self.spent_s += time.thread_time() - begin

        return counted


async def measure_steps(contexts: ContextFactory, pace_s: float) -> dict[str, float]:
    """One run: microseconds on the loop per step, and wall microseconds per step."""
    timed = Timed()
    context: Context = contexts(RunnerConfig("bench", {"pace_s": pace_s}, max_batch=SEQUENCES), "bench", 1, timed.on_step)
    if isinstance(context, ProcessContext):
        context.received = timed.timed(context.received)  # type: ignore[method-assign]
    else:
        context._steps._report = timed.timed(context._steps._report)  # type: ignore[attr-defined]
    try:
        await context.start()
        sampling = SamplingParams(max_tokens=STEPS, ignore_eos=True)
        begin = time.perf_counter()
        for i in range(1, SEQUENCES + 1):
            context.admit(StepRequest(i, (i,), sampling))
        await timed.done.wait()
        wall_s = time.perf_counter() - begin
    finally:
        await context.close()
    timed.check()
    return {"loop_us": timed.spent_s / STEPS * 1e6, "wall_us": wall_s / STEPS * 1e6}


# --- restarts --------------------------------------------------------------------------------------------------------


class Stream:
    """The owner of one flight."""

    def __init__(self) -> None:
        self.error: Exception | None = None
        self.ended = False

    def on_output(self, output: StepOutput) -> None:
        """Tokens are kept by the flight."""
        self.ended = self.ended or output.finish_reason is not None

    def on_failure(self, err: Exception) -> None:
        """It is lost."""
        self.error = err


class Engine:
    """A worker and the moments of its life."""

    def __init__(self, spawner: Spawner, pace_s: float) -> None:
        self.contexts: list[ProcessContext] = []
        self.ready_s = self.down_s = 0.0
        self.changed = asyncio.Event()
        make = process_contexts(spawner, RUNTIME.name)

        def contexts(config: RunnerConfig, name: str, generation: int, on_step: OnStep) -> Context:
            context = make(config, name, generation, on_step)
            assert isinstance(context, ProcessContext)
            self.contexts = [context]
            return context

        config = RunnerConfig("bench", {"pace_s": pace_s}, max_batch=STREAMS)
        policy = RestartPolicy(max_restarts=10**9, short_lives=10**9, backoff_s=())
        self.worker = Worker(contexts, config, name="bench", listener=self, policy=policy)

    def on_ready(self, info: RunnerInfo) -> None:
        """A child works."""
        self.ready_s = time.perf_counter()
        self.changed.set()

    def on_down(self, err: Exception) -> None:
        """It died."""
        self.down_s = time.perf_counter()
        self.changed.set()

    def on_report(self, report: StepReport) -> None:
        """A step."""
        self.changed.set()

    def on_out_of_memory(self, sequences: int) -> None:
        """Not here."""

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait for it."""
        async with asyncio.timeout(30):
            while not condition():
                self.changed.clear()
                await self.changed.wait()


@contextlib.asynccontextmanager
async def running(pace_s: float) -> AsyncIterator[Engine]:
    """An engine that works."""
    spawner = Spawner()
    engine = Engine(spawner, pace_s)
    task = asyncio.ensure_future(engine.worker.run())
    try:
        await engine.until(lambda: engine.worker.ready)
        yield engine
    finally:
        task.cancel()
        await asyncio.wait([task])
        spawner.close()


async def measure_kill() -> dict[str, float]:
    """SIGKILL under load: milliseconds until noticed, until the new child is ready, and from there until all streams moved on."""
    async with running(0.002) as engine:
        sampling = SamplingParams(max_tokens=STREAM_TOKENS, ignore_eos=True)
        flights = [Flight(i, (i,), sampling, Stream()) for i in range(1, STREAMS + 1)]
        for flight in flights:
            engine.worker.launch(flight)
        await engine.until(lambda: all(len(f.generated) > 5 for f in flights))
        begin, before = time.perf_counter(), engine.ready_s
        os.kill(engine.contexts[0].pid, signal.SIGKILL)
        await engine.until(lambda: engine.down_s > begin)
        stood = [len(f.generated) for f in flights]
        await engine.until(lambda: engine.ready_s > before)
        await engine.until(lambda: all(len(f.generated) > n for f, n in zip(flights, stood, strict=True)))
        moved_s = time.perf_counter()
        await engine.until(lambda: all(len(f.generated) == STREAM_TOKENS for f in flights))
        for flight in flights:
            expected = scripted_tokens((flight.sequence_id,), 0, 0)
            assert flight.generated == [next(expected) for _ in range(STREAM_TOKENS)], "a stream is not exact"
        return {
            "death_noticed_ms": (engine.down_s - begin) * 1e3,
            "ready_again_ms": (engine.ready_s - engine.down_s) * 1e3,
            "moved_ms": (moved_s - engine.ready_s) * 1e3,
        }


def rss_mib() -> float:
    """Resident memory of this process."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


async def measure_restarts(restarts: int) -> dict[str, float]:
    """Restarts in a row: MiB of growth, descriptors and threads more than before."""

    def counts() -> tuple[int, int]:
        return len(os.listdir("/proc/self/fd")), threading.active_count()

    async with running(0.0) as engine:

        async def once() -> None:
            before = engine.ready_s
            os.kill(engine.contexts[0].pid, signal.SIGKILL)
            await engine.until(lambda: engine.ready_s > before)

        for _ in range(5):
            await once()
        gc.collect()
        (fds, threads), rss = counts(), rss_mib()
        for _ in range(restarts):
            await once()
        gc.collect()
        after = counts()
        return {
            "restarts": restarts,
            "rss_growth_mib": rss_mib() - rss,
            "fds_more": after[0] - fds,
            "threads_more": after[1] - threads,
        }


async def run(restarts: int) -> dict[str, object]:
    """All of it."""
    spawner = Spawner()
    kinds = {"thread": thread_contexts(RUNTIME), "process": process_contexts(spawner, RUNTIME.name)}
    figures: dict[str, object] = {"machine": platform.processor() or platform.machine(), "cores": os.cpu_count()}
    loop_us: dict[str, float] = {}
    for kind, contexts in kinds.items():
        paced = [await measure_steps(contexts, 0.005) for _ in range(3)]
        flat_out = [await measure_steps(contexts, 0.0) for _ in range(3)]
        loop_us[kind] = statistics.median(r["loop_us"] for r in paced)
        figures[kind] = {
            "loop_cpu_us_per_step": round(loop_us[kind], 1),
            "wall_us_per_step_unpaced": round(statistics.median(r["wall_us"] for r in flat_out), 1),
        }
    spawner.close()
    figures["added_per_step_ms"] = round((loop_us["process"] - loop_us["thread"]) / 1e3, 4)
    kills = [await measure_kill() for _ in range(5)]
    figures |= {name: round(statistics.median(k[name] for k in kills), 2) for name in kills[0]}
    figures |= {name: round(value, 2) for name, value in (await measure_restarts(restarts)).items()}
    return figures


def main() -> int:
    """Print the figures, write bench/out/isolation.json, and say whether the limits hold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--restarts", type=int, default=50, help="restarts in a row")
    figures = uvloop.run(run(parser.parse_args().restarts))
    missed = [name for name, limit in LIMITS.items() if float(str(figures[name])) > limit]
    figures |= {"limits": LIMITS, "missed": missed}
    OUT.mkdir(exist_ok=True)
    (OUT / "isolation.json").write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(figures, indent=2))
    return 1 if missed or figures["fds_more"] or figures["threads_more"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
