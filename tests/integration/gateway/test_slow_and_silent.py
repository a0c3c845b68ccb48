"""Replicas that answer nothing, or nothing further (R-03, O01): who gets the next request, and what becomes of theirs."""

from __future__ import annotations

import asyncio
import json
import time

import pytest

from services.gateway.ejection import Standing
from tests.integration.gateway.conftest import Gateway, Start
from tests.integration.gateway.peer import Peer, Row, deployment_route, last_row, peer, until


async def on(gateway: Gateway, wanted: Peer, other: Peer) -> asyncio.Task[object]:
    """A whole answer that was asked of `wanted`. What is asked of the other on the way there is answered."""
    while True:
        asking: asyncio.Task[object] = asyncio.create_task(gateway.chat())
        seen = len(wanted.submissions), len(other.submissions)
        await until(lambda: (len(wanted.submissions), len(other.submissions)) != seen, "a submission")  # noqa: B023
        if len(wanted.submissions) > seen[0]:
            return asking
        other.send(last_row(other.submissions[-1], 0, [1], "elsewhere"))
        await asking


async def test_r_03_what_a_silent_replica_was_asked_is_asked_of_another_before_its_session_is_dead(start: Start) -> None:
    """Nobody waits for the session's death, which takes four seconds; late tokens of the silent one are nobody's."""
    async with peer("a") as a, peer("b") as b, start() as gateway:
        await gateway.route(deployment_route(a.replica("demo"), b.replica("demo")))
        a.hears = False
        began = time.monotonic()
        asking = await on(gateway, a, b)
        old = a.submissions[-1]
        count = len(b.submissions)
        moved = await b.submission(count + 1)
        assert time.monotonic() - began < 4
        assert (moved.epoch, moved.request.request_id) == (1, old.request.request_id)
        assert not moved.generated_prefix
        assert (await gateway.client.get("/readyz")).json()["shunned"] == {"silent": ["demo-on-a"]}
        a.send(Row(old, 0, [9], "late "))  # the first word after its silence
        b.send(last_row(moved, 0, [1], "in time"))
        assert (await asking).json()["choices"][0]["message"]["content"] == "in time"  # type: ignore[attr-defined]
        await a.cancelled(old)
        assert gateway.metric('inference_frames_dropped_total{cause="unknown_stream"}') == 1
        await until(lambda: not gateway.worker.table.shunned(), "the end of the silence")


async def test_r_03_new_requests_avoid_a_silent_replica(start: Start) -> None:
    async with peer("a") as a, peer("b") as b, start() as gateway:
        await gateway.route(deployment_route(a.replica("demo"), b.replica("demo")))
        a.hears = False
        first = await on(gateway, a, b)
        await until(gateway.worker.table.shunned, "silence noticed")
        before = len(a.submissions)
        asking = [asyncio.create_task(gateway.chat()) for _ in range(20)]
        await until(lambda: len({s.request.request_id for s in b.submissions}) >= 21, "all of them")
        for submission in b.submissions:
            b.send(last_row(submission, 0, [1], "ok"))
        assert {r.status_code for r in await asyncio.gather(*asking)} == {200}
        assert len(a.submissions) == before
        await first


@pytest.mark.parametrize(
    "limits", [{"max_retries": 0}, {"moves_per_request": 0.0, "move_floor": 0}], ids=["no attempt left", "no move left"]
)
async def test_what_may_not_be_moved_waits_and_does_not_fail(start: Start, limits: dict[str, float]) -> None:
    """Leaving a silent replica is a favour within the budgets: where it is not allowed, the request stays where it is."""
    async with peer("a") as a, peer("b") as b, start(limits=limits) as gateway:
        await gateway.route(deployment_route(a.replica("demo")))
        a.hears = False
        asking = asyncio.create_task(gateway.chat())
        s = await a.submission()
        await gateway.route(deployment_route(a.replica("demo"), b.replica("demo")))
        await until(gateway.worker.table.shunned, "silence noticed")
        line = gateway.worker.table.targets["demo-on-a"].link
        seen = line.silence
        await until(lambda: line.silence > seen + 2, "more sweeps")
        a.send(last_row(s, 0, [1], "in the end"))
        assert (await asking).json()["choices"][0]["message"]["content"] == "in the end"
        assert not b.submissions


async def test_a_replica_that_is_silent_and_the_only_one_keeps_its_requests(start: Start) -> None:
    async with peer("a") as a, start() as gateway:
        await gateway.route(deployment_route(a.replica("demo")))
        a.hears = False
        asking = asyncio.create_task(gateway.chat())
        s = await a.submission()
        await until(gateway.worker.table.shunned, "silence noticed")
        another = asyncio.create_task(gateway.chat())
        t = await a.submission(2)
        a.send(last_row(s, 0, [1], "one"), last_row(t, 0, [1], "two"))
        assert [(await r).json()["choices"][0]["message"]["content"] for r in (asking, another)] == ["one", "two"]
        assert (s.epoch, t.epoch, len(a.submissions)) == (0, 0, 2)


async def test_a_stream_that_has_begun_waits_for_its_replica(start: Start) -> None:
    """A short silence is no death: what was computed there is not computed again."""
    async with peer("a") as a, peer("b") as b, start() as gateway:
        await gateway.route(deployment_route(a.replica("demo")))
        asking = asyncio.create_task(gateway.chat(stream=True))
        s = await a.submission()
        a.send(Row(s, 0, [1], "one "))
        await gateway.route(deployment_route(a.replica("demo"), b.replica("demo")))
        a.hears = False
        await until(gateway.worker.table.shunned, "silence noticed")
        a.send(last_row(s, 1, [2], "two"))
        assert "two" in (await asking).text
        assert not b.submissions


async def test_an_engine_that_works_in_silence_is_asked_and_one_without_work_is_not(start: Start) -> None:
    """A long prefill sends nothing for seconds: pings tell it from a process that stands still."""
    async with peer("a") as a, peer("b") as b, start() as gateway:
        await gateway.route(deployment_route(a.replica("demo"), b.replica("demo")))
        asking = asyncio.create_task(gateway.chat())
        await until(lambda: a.submissions or b.submissions, "the submission")
        busy, idle = (a, b) if a.submissions else (b, a)
        await until(lambda: busy.pings >= 3, "pings")
        assert not gateway.worker.table.shunned()
        assert idle.pings == 0
        busy.send(last_row(busy.submissions[0], 0, [1], "done"))
        assert (await asking).status_code == 200


async def test_r_06_what_waits_for_a_replica_that_is_put_aside_is_asked_of_another(start: Start) -> None:
    """Its step does not end, or takes far too long: the engine answers pings, and its peers show that it is not the load."""
    async with peer("a") as a, peer("b") as b, start() as gateway:
        await gateway.route(deployment_route(a.replica("demo"), b.replica("demo")))
        asking = await on(gateway, a, b)
        count = len(b.submissions)
        table = gateway.worker.table
        for second in range(6):  # of other answers, which stand still there and go on at the peer
            for target, tokens in (("demo-on-a", 0), ("demo-on-b", 50)):
                for answer in (-1, -2):
                    table.targets[target].pace.went_on(answer, 1.0, tokens)
            table._review(time.monotonic() + second)
        assert table.targets["demo-on-a"].trust.standing is Standing.OUT
        moved = await b.submission(count + 1)
        assert (moved.epoch, moved.request.request_id) == (1, a.submissions[-1].request.request_id)
        b.send(last_row(moved, 0, [1], "here"))
        assert (await asking).json()["choices"][0]["message"]["content"] == "here"  # type: ignore[attr-defined]
        await a.cancelled(a.submissions[-1])
        assert (await gateway.client.get("/readyz")).json()["shunned"] == {"slow": ["demo-on-a"]}


@pytest.mark.parametrize("resume", [True, False])
async def test_o01_a_stream_that_stands_still_goes_on_elsewhere_or_ends_in_a_typed_error(start: Start, resume: bool) -> None:
    """From one chunk to the next, as the deployment allows. The replica answers pings: only its step does not end."""
    async with peer("a") as a, peer("b") as b, start() as gateway:
        line = deployment_route(a.replica("demo", resume=resume))
        line.next_chunk_timeout.FromMilliseconds(300)
        await gateway.route(line)
        asking = asyncio.create_task(gateway.chat(stream=True))
        s = await a.submission()
        a.send(Row(s, 0, [1], "one "))
        line.replicas.append(b.replica("demo", resume=resume))
        await gateway.route(line)
        if resume:
            t = await b.submission()
            assert [list(p.token_ids) for p in t.generated_prefix] == [[1]]
            b.send(last_row(t, 1, [2], "two"))
            assert "[DONE]" in (await asking).text
            assert gateway.metric('inference_resumptions_total{deployment="demo",outcome="resumed"}') == 1
        else:
            text = (await asking).text
            assert "[DONE]" not in text
            assert json.loads(text.strip().split("\n\n")[-1][6:])["error"]["code"] == "timeout"
        await a.cancelled(s)


async def test_o01_where_nobody_else_is_the_time_out_is_told(start: Start) -> None:
    async with peer("a") as a, start() as gateway:
        line = deployment_route(a.replica("demo"))
        line.next_chunk_timeout.FromMilliseconds(300)
        await gateway.route(line)
        asking = asyncio.create_task(gateway.chat(stream=True))
        a.send(Row(await a.submission(), 0, [1], "one "))
        assert '"code":"timeout"' in (await asking).text
        assert gateway.metric('inference_requests_total{deployment="demo",outcome="TIMEOUT"}') == 1


async def test_o01_a_stream_waits_for_a_replica_whose_context_is_being_replaced_where_there_is_no_other(start: Start) -> None:
    """Loading a model takes longer than a token may. The replica is out of the table meanwhile, and its streams are not lost."""
    async with peer("a") as a, start() as gateway:
        line = deployment_route(a.replica("demo"))
        line.next_chunk_timeout.FromMilliseconds(300)
        await gateway.route(line)
        asking = asyncio.create_task(gateway.chat(stream=True))
        s = await a.submission()
        a.send(Row(s, 0, [1], "one "))
        del line.replicas[:]
        await gateway.route(line)
        (request,) = gateway.worker.live.requests
        overdue_since = time.monotonic() + 0.3
        await until(lambda: request.ended or time.monotonic() > overdue_since + 0.75, "three sweeps while it is late")
        a.send(last_row(s, 1, [2], "two"))
        text = (await asking).text
        assert "two" in text
        assert "[DONE]" in text


async def test_o01_an_answer_that_is_sent_whole_comes_in_lumps_and_gets_the_longer_time(start: Start) -> None:
    async with peer("a") as a, start() as gateway:
        line = deployment_route(a.replica("demo"))
        line.next_chunk_timeout.FromMilliseconds(100)
        await gateway.route(line)
        asking = asyncio.create_task(gateway.chat())
        s = await a.submission()
        a.send(Row(s, 0, [1, 2], "one two "))
        await until(lambda: a.pings >= 2, "half a second")
        a.send(last_row(s, 2, [3], "three"))
        assert (await asking).json()["choices"][0]["message"]["content"] == "one two three"
