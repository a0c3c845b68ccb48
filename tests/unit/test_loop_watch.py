"""A blocked event loop is seen by the process itself, once for each time, with how long it was (§4.5, trap 20)."""

from __future__ import annotations

import asyncio
import time

import pytest

from inference_runtime.telemetry import MetricSet
from inference_runtime.telemetry.loop import LoopWatch, watched


def times_blocked(metrics: MetricSet) -> tuple[float, float]:
    """How often, and for how long in all, seconds."""
    series = metrics.histogram("inference_loop_blocked_seconds").values.get((), [0.0])
    return sum(series[:-1]), series[-1]


async def test_a_blocked_loop_is_one_line_and_one_observation(caplog: pytest.LogCaptureFixture) -> None:
    """Half a second of somebody's work on the loop."""
    metrics = MetricSet()

    async def body() -> str:
        await asyncio.sleep(0)
        time.sleep(0.5)  # noqa: ASYNC251 - this is the fault
        async with asyncio.timeout(5.0):
            while not times_blocked(metrics)[0]:  # noqa: ASYNC110 - the watch has no event, and needs none
                await asyncio.sleep(0.01)
        return "done"

    assert await watched(metrics, body()) == "done"
    count, seconds = times_blocked(metrics)
    assert count >= 1
    assert 0.35 <= seconds < 5.0
    (line, *_) = [r for r in caplog.records if r.message == "event loop was blocked"]
    assert line.levelname == "WARNING"
    assert 0.35 <= line.__dict__["fields"]["blocked_s"] < 5.0


async def test_a_loop_that_turns_is_not_reported_and_a_stopped_watch_leaves_nothing() -> None:
    """The limit is far above what a busy machine does to a loop that does nothing."""
    metrics = MetricSet()
    watch = LoopWatch(metrics, blocked_s=5.0)
    watch.start()
    await asyncio.sleep(0.35)
    watch.stop()
    watch.stop()
    assert times_blocked(metrics) == (0.0, 0.0)
