"""What breaks between gateway and engine, and what the client sees of it: nothing, or an honest error."""

from __future__ import annotations

import asyncio
import json

import httpx
import pytest

from inference_runtime.errors import Backpressure, BadRequest, ContextLengthExceeded, ContextPoisoned, EngineLost, InferenceError
from inference_runtime.v1 import engine_service_pb2, generation_pb2
from tests.integration.gateway.conftest import Gateway, Start
from tests.integration.gateway.peer import Peer, Row, deployment_route, error_row, last_row, peer, until


def text_of(response: httpx.Response) -> str:
    """The text of a stream; fails when it is not a proper one."""
    data = [line[6:] for line in response.text.split("\n") if line.startswith("data: ")]
    assert data[-1] == "[DONE]", response.text
    return "".join(c["delta"].get("content") or "" for d in data[:-1] for c in json.loads(d)["choices"])


async def whichever_has_it(*peers: Peer) -> Peer:
    """The peer that got the first submission."""
    return await until(lambda: next((p for p in peers if p.submissions), None), "a submission")


async def test_duplicates_and_old_epochs_never_reach_the_client(gateway: Gateway, engine: Peer) -> None:
    asking = asyncio.create_task(gateway.chat(stream=True))
    s = await engine.submission()
    engine.send(Row(s, 0, [1], "a"))
    engine.send(Row(s, 0, [1], "a"), Row(s, 1, [2], "b"))
    engine.send(Row(s, 1, [9], "x", epoch=s.epoch), Row(s, 1, [2], "b"))
    engine.send(last_row(s, 2, [3], "c"))
    assert text_of(await asking) == "abc"
    assert gateway.metric('inference_frames_dropped_total{cause="duplicate"}') == 3


async def test_several_chunks_of_one_request_in_a_frame_arrive_whole(gateway: Gateway, engine: Peer) -> None:
    asking = asyncio.create_task(gateway.chat(stream=True))
    s = await engine.submission()
    engine.send(Row(s, 0, [1], "a"), Row(s, 1, [2], "b"), Row(s, 2, [3], "c"), last_row(s, 3, [4], "d"))
    assert text_of(await asking) == "abcd"


async def test_a_frame_without_optional_columns_means_their_defaults(gateway: Gateway, engine: Peer) -> None:
    asking = asyncio.create_task(gateway.chat(stream=True))
    s = await engine.submission()
    response = engine_service_pb2.SessionResponse()
    response.frame.stream_ids.append(s.stream_id)
    response.frame.indexes.append(0)
    response.frame.token_ids.append(5)
    engine.send_raw(response)
    engine.send(last_row(s, 1, [], "tail"))
    assert text_of(await asking) == "tail"


async def test_a_gap_gives_the_attempt_up_and_goes_on_elsewhere(start: Start) -> None:
    async with peer("a") as a, peer("b") as b, start() as gateway:
        await gateway.route(deployment_route(a.replica("demo"), b.replica("demo")))
        asking = asyncio.create_task(gateway.chat(stream=True))
        first = await whichever_has_it(a, b)
        other = b if first is a else a
        s = await first.submission()
        first.send(Row(s, 0, [1], "a"))
        first.send(Row(s, 2, [3], "c"))
        t = await other.submission()
        await first.cancelled(s)
        assert t.epoch == s.epoch + 1
        assert [list(p.token_ids) for p in t.generated_prefix] == [[1]]
        assert t.revision == "r1"
        other.send(Row(t, 1, [2], "b"), last_row(t, 2, [3], "c"))
        assert text_of(await asking) == "abc"
        assert gateway.metric('inference_frames_dropped_total{cause="gap"}') == 1


@pytest.mark.parametrize("how", ["stream cut", "context poisoned"])
async def test_a_stream_that_breaks_goes_on_behind_its_last_token(start: Start, how: str) -> None:
    """The client sees every token once: the journal's tokens go along, and the text continues where it stopped."""
    async with peer("a") as a, peer("b") as b, start() as gateway:
        await gateway.route(deployment_route(a.replica("demo"), b.replica("demo")))
        asking = asyncio.create_task(gateway.chat(stream=True, stream_options={"include_usage": True}))
        first = await whichever_has_it(a, b)
        other = b if first is a else a
        s = await first.submission()
        first.send(Row(s, 0, [1], "one "), Row(s, 1, [2], "two "))
        first.send(Row(s, 2, [3, 4], "three "))
        if how == "stream cut":
            first.cut(EngineLost("gone"))
        else:
            first.send(error_row(s, ContextPoisoned("the context is being replaced"), 4))
        t = await other.submission()
        assert [list(p.token_ids) for p in t.generated_prefix] == [[1, 2, 3, 4]]
        assert t.request.request_id == s.request.request_id
        other.send(Row(t, 4, [5], "four "))
        other.send(last_row(t, 5, [6], "five"))
        response = await asking
        assert text_of(response) == "one two three four five"
        usage = json.loads(response.text.split("\n\n")[-3].partition("data: ")[2])["usage"]
        assert usage["completion_tokens"] == 6
        assert response.text.index("three") < response.text.index(": resumed 1\n") < response.text.index("four")
        # After an event with an id, OpenAI's SDK takes every empty line for the end of an event, and wants data in it.
        assert all("data: " in event for event in response.text.removesuffix("\n\n").split("\n\n"))
        assert gateway.metric('inference_resumptions_total{deployment="demo",outcome="resumed"}') == 1


async def test_the_count_of_context_deaths_travels_with_a_stream(start: Start) -> None:
    """PP-1: who goes on with it must know that it may be what killed the contexts it was on."""
    async with peer("a") as a, peer("b") as b, start() as gateway:
        await gateway.route(deployment_route(a.replica("demo"), b.replica("demo")))
        asking = asyncio.create_task(gateway.chat(stream=True))
        first = await whichever_has_it(a, b)
        other = b if first is a else a
        s = await first.submission()
        assert s.context_deaths == 0
        first.send(Row(s, 0, [1], "a"), error_row(s, ContextPoisoned("the replica failed", context_deaths="2"), 1))
        t = await other.submission()
        assert t.context_deaths == 2
        other.send(last_row(t, 1, [2], "b"))
        assert text_of(await asking) == "ab"


async def test_a_whole_answer_that_went_on_elsewhere_says_so(start: Start) -> None:
    async with peer("a") as a, start() as gateway:
        await gateway.route(deployment_route(a.replica("demo")))
        asking = asyncio.create_task(gateway.chat())
        for attempt in range(2):
            s = await a.submission(attempt + 1)
            a.send(Row(s, attempt, [attempt], f"{attempt} "), error_row(s, ContextPoisoned("again"), attempt + 1))
        t = await a.submission(3)
        a.send(last_row(t, 2, [9], "end"))
        response = await asking
        assert response.headers["x-inference-resumed"] == "2"
        assert response.json()["choices"][0]["message"]["content"] == "0 1 end"
        undisturbed = asyncio.create_task(gateway.chat())
        a.send(last_row(await a.submission(4), 0, [1], "ok"))
        assert "x-inference-resumed" not in (await undisturbed).headers


async def test_the_trailer_of_a_stream_tells_of_its_resumptions(start: Start) -> None:
    async with peer("a") as a, start() as gateway:
        await gateway.route(deployment_route(a.replica("demo")))
        reader, writer = await gateway.connect()
        body = b'{"model":"demo","stream":true,"messages":[{"role":"user","content":"hi"}]}'
        head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body)
        async with asyncio.timeout(5):
            for round_, trailer in ((0, b"x-inference-resumed: 1\r\n"), (1, b"")):
                writer.write(head + body)
                s = await a.submission(1 + 2 * round_)
                if trailer:
                    a.send(Row(s, 0, [1], "one"), error_row(s, ContextPoisoned("poisoned"), 1))
                    s = await a.submission(2)
                    a.send(last_row(s, 1, [2], "two"))
                else:
                    a.send(last_row(s, 0, [1], "whole"))
                assert b"trailer: x-inference-resumed\r\n" in await reader.readuntil(b"\r\n\r\n")
                assert (await reader.readuntil(b"\r\n0\r\n")).endswith(b"data: [DONE]\n\n\r\n0\r\n")
                assert await reader.readuntil(b"\r\n") == (trailer or b"\r\n")
                if trailer:
                    assert await reader.readuntil(b"\r\n") == b"\r\n"


async def test_a_stream_goes_on_only_with_the_same_revision(start: Start) -> None:
    async with peer("a") as a, peer("b") as b, start(limits={"route_wait_s": 0.3}) as gateway:
        await gateway.route(deployment_route(a.replica("demo")))
        asking = asyncio.create_task(gateway.chat(stream=True))
        s = await a.submission()
        a.send(Row(s, 0, [1], "one"))
        await until(lambda: gateway.worker.live.requests and next(iter(gateway.worker.live.requests)).first_at, "first token")
        await gateway.route(deployment_route(a.replica("demo"), b.replica("demo", revision="r2")))
        a.send(error_row(s, ContextPoisoned("poisoned"), 1))
        t = await a.submission(2)  # the same replica again, since no other of its revision exists
        assert [list(p.token_ids) for p in t.generated_prefix] == [[1]]
        a.send(last_row(t, 1, [2], " two"))
        assert text_of(await asking) == "one two"
        assert not b.submissions


async def test_what_cannot_be_resumed_ends_in_an_error_event_without_done(start: Start) -> None:
    async with peer("a") as a, peer("b") as b, start() as gateway:
        await gateway.route(deployment_route(a.replica("demo", resume=False), b.replica("demo", resume=False)))
        asking = asyncio.create_task(gateway.chat(stream=True))
        first = await whichever_has_it(a, b)
        s = await first.submission()
        first.send(Row(s, 0, [1], "one"))
        first.send(error_row(s, ContextPoisoned("the context is being replaced"), 1))
        response = await asking
        assert response.status_code == 200
        assert "[DONE]" not in response.text
        last = json.loads(response.text.strip().split("\n\n")[-1][6:])
        assert last["error"]["type"] == "service_unavailable"


async def test_a_stream_is_resumed_at_most_twice(start: Start) -> None:
    async with peer("a") as a, start() as gateway:
        await gateway.route(deployment_route(a.replica("demo")))
        asking = asyncio.create_task(gateway.chat(stream=True))
        for attempt in range(3):
            s = await a.submission(attempt + 1)
            assert s.epoch == attempt
            a.send(Row(s, attempt, [attempt], f"{attempt} "))
            a.send(error_row(s, ContextPoisoned("again"), attempt + 1))
        response = await asking
        assert "[DONE]" not in response.text
        assert "0 " in response.text
        assert "2 " in response.text
        assert len(a.submissions) == 3
        assert gateway.metric('inference_resumptions_total{deployment="demo",outcome="failed"}') == 1


async def test_a_storm_of_refusals_ends_at_the_budget(start: Start) -> None:
    """Ten requests that a full replica refuses: the floor and a tenth of them are tried elsewhere, the others fail at once."""
    async with peer("a") as a, peer("b") as b, start(limits={"retry_floor": 2}) as gateway:
        await gateway.route(deployment_route(a.replica("demo")))
        asking = [asyncio.create_task(gateway.chat()) for _ in range(10)]
        await a.submission(10)
        await gateway.route(deployment_route(a.replica("demo"), b.replica("demo")))
        a.send(*(error_row(s, Backpressure("full")) for s in a.submissions))
        await b.submission(3)
        b.send(*(last_row(s, 0, [1], "ok") for s in b.submissions))
        answers = await asyncio.gather(*asking)
        refused = [r for r in answers if r.status_code == 429]
        assert sorted(r.status_code for r in answers) == [200] * 3 + [429] * 7
        assert {r.json()["error"]["code"] for r in refused} == {"retry_budget_exhausted"}
        assert {r.headers["retry-after"] for r in refused} == {"1"}
        assert gateway.metric('inference_retries_total{deployment="demo",kind="retry"}') == 3
        assert gateway.metric('inference_retries_total{deployment="demo",kind="move"}') == 0


async def test_a_death_moves_everything_and_endless_deaths_do_not(start: Start) -> None:
    """One death costs one move per stream; beyond the allowance the error says that no attempt was made."""
    async with peer("a") as a, start(limits={"moves_per_request": 1.0, "move_floor": 0}) as gateway:
        await gateway.route(deployment_route(a.replica("demo")))
        asking = [asyncio.create_task(gateway.chat(stream=True)) for _ in range(8)]
        await a.submission(8)
        first = a.submissions[:8]
        a.send(*(Row(s, 0, [1], "one ") for s in first))
        a.send(*(error_row(s, ContextPoisoned("poisoned"), 1) for s in first))
        await a.submission(16)
        second = a.submissions[8:]
        a.send(*(last_row(s, 1, [2], "two") for s in second[:4]))
        a.send(*(error_row(s, ContextPoisoned("poisoned"), 1) for s in second[4:]))
        bodies = [(await task).text for task in asking]
        whole = [b for b in bodies if "[DONE]" in b]
        torn = [b for b in bodies if "[DONE]" not in b]
        assert (len(whole), len(torn)) == (4, 4)
        assert all("two" in b for b in whole)
        assert all('"retry_budget_exhausted"' in b for b in torn)
        assert len(a.submissions) == 16
        assert gateway.metric('inference_retries_total{deployment="demo",kind="move"}') == 8


async def test_a_refusal_before_the_first_chunk_is_tried_elsewhere(start: Start) -> None:
    async with peer("a") as a, peer("b") as b, start() as gateway:
        await gateway.route(deployment_route(a.replica("demo"), b.replica("demo")))
        asking = asyncio.create_task(gateway.chat())
        first = await whichever_has_it(a, b)
        other = b if first is a else a
        s = await first.submission()
        first.send(error_row(s, Backpressure("full", retry_after_s=1)))
        t = await other.submission()
        assert t.epoch == 1
        assert not t.generated_prefix
        other.send(last_row(t, 0, [1], "ok"))
        assert (await asking).json()["choices"][0]["message"]["content"] == "ok"


async def test_a_whole_answer_that_breaks_starts_over_where_nobody_can_go_on(start: Start) -> None:
    """Nothing of it was shown, so another revision may begin from nothing; no text of the first attempt is left in it."""
    async with peer("a") as a, peer("b") as b, start() as gateway:
        await gateway.route(deployment_route(a.replica("demo")))
        asking = asyncio.create_task(gateway.chat())
        s = await a.submission()
        a.send(Row(s, 0, [1, 2], "left over "))
        await until(lambda: gateway.worker.live.requests and next(iter(gateway.worker.live.requests)).first_at, "first token")
        await gateway.route(deployment_route(b.replica("demo", revision="r2")))
        a.send(error_row(s, ContextPoisoned("poisoned"), 2))
        t = await b.submission()
        assert not t.generated_prefix
        b.send(Row(t, 0, [7], "fresh "), last_row(t, 1, [8], "text"))
        assert (await asking).json()["choices"][0]["message"]["content"] == "fresh text"


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (ContextLengthExceeded("5000 tokens, 4096 fit", param="messages"), 400, "context_length_exceeded"),
        (BadRequest("no", param="stop"), 400, None),
        (Backpressure("full", retry_after_s=3), 429, "overloaded"),
    ],
)
async def test_an_engines_refusal_keeps_its_type(
    gateway: Gateway, engine: Peer, error: InferenceError, status: int, code: str | None
) -> None:
    asking = asyncio.create_task(gateway.chat(stream=True))
    engine.send(error_row(await engine.submission(), error))
    response = await asking
    assert response.status_code == status
    body = response.json()["error"]
    assert (body["code"], body["message"], body["param"]) == (code, error.message, error.param)
    assert response.headers.get("retry-after") == ("3" if status == 429 else None)
    assert len(response.headers["x-request-id"]) == 32


async def test_requests_wait_for_a_replica_and_go_when_one_comes(start: Start) -> None:
    async with peer("a") as a, start() as gateway:
        await gateway.route(deployment_route(name="demo"), wait=False)
        asking = asyncio.create_task(gateway.chat())
        await until(lambda: gateway.worker.live.waiting, "a waiting request")
        await gateway.route(deployment_route(a.replica("demo")), wait=False)
        a_submission = await a.submission()
        a.send(last_row(a_submission, 0, [1], "ok"))
        assert (await asking).status_code == 200


async def test_a_deployment_without_replicas_is_503_and_an_unknown_one_404(start: Start) -> None:
    async with start(limits={"route_wait_s": 0.2}) as gateway:
        assert (await gateway.chat()).status_code == 503  # no table at all
        await gateway.route(deployment_route(name="demo"))
        response = await gateway.chat()
        assert response.status_code == 503
        assert response.headers["retry-after"] == "1"
        response = await gateway.chat("other")
        assert response.status_code == 404
        assert response.json()["error"]["code"] == "model_not_found"
        assert response.json()["error"]["param"] == "model"
        assert "demo" in response.json()["error"]["message"]


async def test_a_request_that_gets_no_token_in_time_is_504_and_stops_the_engine(start: Start) -> None:
    async with peer("a") as a, start() as gateway:
        line = deployment_route(a.replica("demo"))
        line.first_chunk_timeout.FromMilliseconds(300)
        await gateway.route(line)
        asking = asyncio.create_task(gateway.chat())
        s = await a.submission()
        response = await asking
        assert response.status_code == 504
        await a.cancelled(s)


async def test_submissions_of_one_turn_leave_as_one_message(gateway: Gateway, engine: Peer) -> None:
    asking = [asyncio.create_task(gateway.chat()) for _ in range(32)]
    await engine.submission(32)
    assert len(engine.messages) < 32
    ids = [s.stream_id for s in engine.submissions]
    assert len(set(ids)) == 32
    engine.send(*(last_row(s, 0, [1], s.request.request_id) for s in engine.submissions))
    answers = [a.json() for a in await asyncio.gather(*asking)]
    assert all(a["id"] == "chatcmpl-" + a["choices"][0]["message"]["content"] for a in answers)


async def test_an_engine_that_drains_gets_nothing_new_and_finishes_what_it_has(start: Start) -> None:
    async with peer("a") as a, peer("b") as b, start() as gateway:
        await gateway.route(deployment_route(a.replica("demo")))
        asking = asyncio.create_task(gateway.chat())
        s = await a.submission()
        a.send_raw(engine_service_pb2.SessionResponse(draining=True))
        await until(lambda: not gateway.worker.table.ready, "draining noticed")
        await gateway.route(deployment_route(a.replica("demo"), b.replica("demo")), wait=False)
        more = [asyncio.create_task(gateway.chat()) for _ in range(8)]
        await b.submission(8)
        assert len(a.submissions) == 1
        a.send(last_row(s, 0, [1], "old"))
        b.send(*(last_row(x, 0, [1], "new") for x in b.submissions))
        assert (await asking).json()["choices"][0]["message"]["content"] == "old"
        assert {r.json()["choices"][0]["message"]["content"] for r in await asyncio.gather(*more)} == {"new"}


async def test_finish_reasons_have_openais_names(gateway: Gateway, engine: Peer) -> None:
    for number, (reason, name) in enumerate(
        [
            (generation_pb2.FINISH_REASON_STOP, "stop"),
            (generation_pb2.FINISH_REASON_LENGTH, "length"),
            (generation_pb2.FINISH_REASON_CONTENT_FILTER, "content_filter"),
        ]
    ):
        asking = asyncio.create_task(gateway.chat())
        s = await engine.submission(number + 1)
        engine.send(last_row(s, 0, [1], "x", finish=reason))
        assert (await asking).json()["choices"][0]["finish_reason"] == name
