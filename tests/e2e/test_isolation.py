"""A context in a child of a real engine process: killed, hung, and ended with its engine (R05, trap 12)."""

from __future__ import annotations

import asyncio
import signal

import openai
import psutil
import pytest

from inference_runtime.testing.cluster import Cluster
from inference_runtime.testing.history import History
from tests.e2e.kit import alive, wait_for

pytestmark = pytest.mark.e2e

SPEC = {
    "name": "child",
    "model": "scripted",
    "runtime": "scripted",
    "runtime_config": {"pace_s": 0.01},
    "isolation": "process",
}
TOKENS = 100


def contexts(engine_pid: int) -> list[psutil.Process]:
    """The children of an engine that hold a context."""
    return [p for p in psutil.Process(engine_pid).children() if "services.engine.child" in p.cmdline()]


async def stream(client: openai.AsyncOpenAI, history: History, number: int, begun: asyncio.Event) -> None:
    """One answer, recorded. `begun` is set at its tenth piece."""
    text, pieces = f"stream {number}", 0
    record = history.begin(text, seed=number, tokens=TOKENS, name=text)
    answer = await client.chat.completions.create(
        model="child", messages=[{"role": "user", "content": text}], seed=number, max_tokens=TOKENS, stream=True
    )
    async for chunk in answer:
        for choice in chunk.choices:
            record.text(choice.delta.content or "")
            pieces += 1
            if pieces == 10:
                begun.set()
    record.end()


async def test_trap_12_clients_notice_nothing_of_a_killed_context_and_an_engine_leaves_none_behind() -> None:
    """SIGKILL of the child under eight streams; then SIGTERM of the engine, and at last SIGKILL of the next one."""
    async with Cluster() as cluster:
        await cluster.apply(SPEC)
        await cluster.wait_serving("child")
        engine = cluster.pids()["engine"]
        (first,) = contexts(engine)
        assert first.environ()["CUDA_VISIBLE_DEVICES"] == ""
        history = History()
        async with openai.AsyncOpenAI(base_url=f"{cluster.http}/v1", api_key="unused", max_retries=0) as client:
            async with asyncio.TaskGroup() as group:
                begun = [asyncio.Event() for _ in range(8)]
                for number, event in enumerate(begun):
                    group.create_task(stream(client, history, number, event))
                for event in begun:
                    await event.wait()
                first.kill()
        history.check()
        assert all(s.ended for s in history.streams)
        (second,) = contexts(engine)
        assert second.pid != first.pid
        cluster.kill("engine", signal.SIGTERM)
        await asyncio.to_thread(wait_for, lambda: not alive(engine), "the engine ends")
        assert not second.is_running(), "the context outlived its engine's orderly end"
        await cluster.restart("engine")
        await cluster.wait_serving("child")
        (third,) = contexts(cluster.pids()["engine"])
        cluster.kill("engine")
        await asyncio.to_thread(wait_for, lambda: not alive(third.pid), "the context ends with its engine", 5.0)
