"""Traps of retries: what they double, and what they wait for."""

from __future__ import annotations

import asyncio
import time

from inference_runtime.errors import ContextPoisoned, EngineLost
from tests.integration.gateway.conftest import Start
from tests.integration.gateway.peer import Row, deployment_route, error_row, last_row, peer, until
from tests.integration.gateway.test_faults import text_of, whichever_has_it

A_DAY_S = 86_400.0


async def test_trap_16_an_attempt_after_a_break_in_mid_stream_doubles_no_text(start: Start) -> None:
    """Trap 16: the second attempt continues behind what was shown; what it sends of it all the same is dropped."""
    async with peer("a") as a, peer("b") as b, start() as gateway:
        await gateway.route(deployment_route(a.replica("demo"), b.replica("demo")))
        asking = asyncio.create_task(gateway.chat(stream=True))
        first = await whichever_has_it(a, b)
        other = b if first is a else a
        s = await first.submission()
        first.send(Row(s, 0, [1], "one "), Row(s, 1, [2], "two "))
        first.cut(EngineLost("gone"))
        t = await other.submission()
        assert [list(p.token_ids) for p in t.generated_prefix] == [[1, 2]]
        other.send(Row(t, 0, [1], "one "), Row(t, 1, [2], "two "), Row(t, 2, [3], "three "), last_row(t, 3, [4], "four"))
        assert text_of(await asking) == "one two three four"
        assert gateway.metric('inference_frames_dropped_total{cause="duplicate"}') == 2


async def test_trap_17_a_huge_retry_after_is_not_waited_for(start: Start) -> None:
    """Trap 17: an engine that names a day keeps a request no longer than the gateway waits for any replica."""
    async with peer("a") as a, start(limits={"route_wait_s": 0.5}) as gateway:
        await gateway.route(deployment_route(a.replica("demo")))
        began = time.monotonic()
        asking = asyncio.create_task(gateway.chat())
        a.send(error_row(await a.submission(), ContextPoisoned("being replaced", retry_after_s=A_DAY_S), 0))
        response = await asking
        assert response.status_code == 503
        assert time.monotonic() - began < 10
        assert not gateway.worker.live.requests


async def test_trap_17_a_client_that_leaves_meanwhile_is_noticed_at_once(start: Start) -> None:
    """Trap 17: not at the next token, of which there is none."""
    async with peer("a") as a, start(limits={"route_wait_s": A_DAY_S}) as gateway:
        await gateway.route(deployment_route(a.replica("demo")))
        asking = asyncio.create_task(gateway.chat())
        a.send(error_row(await a.submission(), ContextPoisoned("being replaced", retry_after_s=A_DAY_S), 0))
        await until(lambda: gateway.worker.live.waiting, "a request that waits")
        asking.cancel()
        await until(lambda: not gateway.worker.live.requests, "nobody")
        assert not gateway.worker.live.waiting
