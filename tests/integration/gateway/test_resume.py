"""Clients that come back to a stream at the gateway that served it."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack

import pytest

from inference_runtime.errors import BadRequest, ContextPoisoned, InferenceError
from services.gateway.settings import ResumeSettings
from tests.integration.gateway.conftest import Gateway, start_gateway
from tests.integration.gateway.peer import Peer, Row, error_row, last_row, until
from tests.integration.gateway.streams import BODY, WITH_USAGE, prefix, records, refusal, route, stream

# --- ids -----------------------------------------------------------------------------------------------------------------


async def test_every_event_has_an_id_and_the_text_of_token_k_has_id_k(gateway: Gateway, engine: Peer) -> None:
    """Half a character makes no event; what makes it whole carries the id of the token that did."""
    async with AsyncExitStack() as stack:
        opening = asyncio.create_task(stack.enter_async_context(stream(gateway, body=WITH_USAGE)))
        s = await engine.submission()
        engine.send(Row(s, 0, [7], "a"))
        engine.send(Row(s, 1, [8], ""), Row(s, 2, [9], "é"))
        engine.send(Row(s, 3, [10, 11], "bc"))
        engine.send(last_row(s, 5, [12], "d"))
        answer = await opening
        assert await answer.rest() == "aébcd"
        assert answer.places == ["-1", "0", "2", "4", "5:last", "5:end", "5:done", "5:done"]
        assert answer.events[-1][1] == "[DONE]"
        assert {event_id.partition(":")[0] for event_id, _ in answer.events} == {answer.response.headers["x-request-id"]}


# --- one gateway ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("url", ["/v1/chat/completions", "/v1/streams/{id}"])
async def test_a_client_whose_connection_was_cut_goes_on_behind_its_last_event(gateway: Gateway, engine: Peer, url: str) -> None:
    """The default policy: the engine stops when the client leaves, and goes on behind its last token when it comes back."""
    async with AsyncExitStack() as stack:
        opening = asyncio.create_task(stack.enter_async_context(stream(gateway, body=WITH_USAGE)))
        s = await engine.submission()
        engine.send(Row(s, 0, [7], "one "), Row(s, 1, [8], "two "))
        first = await opening
        last_id = await first.until_text("one two ")
    await engine.cancelled(s)
    async with AsyncExitStack() as stack:
        path = url.format(id=last_id.partition(":")[0])
        opening = asyncio.create_task(stack.enter_async_context(stream(gateway, last_id, WITH_USAGE, url=path)))
        t = await engine.submission(2)
        assert (prefix(t), t.revision, t.request) == ([7, 8], "r1", s.request)
        engine.send(Row(t, 2, [9], "three "), last_row(t, 3, [10], "four"))
        second = await opening
        assert await second.rest() == "three four"
        assert second.places == ["2", "3:last", "3:end", "3:done", "3:done"], "the opening is not told twice"
        assert second.documents[0]["created"] == first.documents[0]["created"]
        assert {d["id"] for d in second.documents} == {d["id"] for d in first.documents}
        assert second.documents[-1]["usage"]["completion_tokens"] == 4
        assert second.response.headers["x-request-id"] == last_id.partition(":")[0]
    assert gateway.metric('inference_tokens_out_total{deployment="demo"}') == 4, "no token is counted twice"
    assert gateway.metric('inference_stream_returns_total{outcome="resumed"}') == 1


async def test_a_client_that_saw_less_than_was_generated_gets_the_rest_from_where_it_stood(
    gateway: Gateway, engine: Peer
) -> None:
    """What was on its way when the connection broke was not seen: it is made again, behind what was."""
    async with AsyncExitStack() as stack:
        opening = asyncio.create_task(stack.enter_async_context(stream(gateway)))
        s = await engine.submission()
        engine.send(*(Row(s, k, [k + 1], f"{k} ") for k in range(5)))
        first = await opening
        await first.until_text("0 1 2 3 4 ")
    await engine.cancelled(s)
    second_id = next(event_id for event_id, data in first.events if '"1 "' in data)
    async with AsyncExitStack() as stack:
        opening = asyncio.create_task(stack.enter_async_context(stream(gateway, second_id)))
        t = await engine.submission(2)
        assert prefix(t) == [1, 2]
        engine.send(last_row(t, 2, [9], "end"))
        assert await (await opening).rest() == "end"


async def test_a_client_that_had_the_whole_text_is_only_told_the_end(gateway: Gateway, engine: Peer) -> None:
    """An answer that is complete costs no engine anything."""
    async with AsyncExitStack() as stack:
        opening = asyncio.create_task(stack.enter_async_context(stream(gateway, body=WITH_USAGE)))
        s = await engine.submission()
        engine.send(Row(s, 0, [7], "one "), last_row(s, 1, [8], "two"))
        first = await opening
        await first.rest()
    ids = {event_id.rpartition(":")[2]: event_id for event_id, _ in first.events}
    for seen, finish, usage, places in (
        ("last", ["stop"], True, ["1:end", "1:done", "1:done"]),
        ("end", [], True, ["1:done", "1:done"]),
        ("done", [], False, ["1:done"]),
    ):
        async with stream(gateway, ids[seen], WITH_USAGE) as again:
            assert await again.rest() == ""
            assert (again.finish, again.places, again.done) == (finish, places, 1)
            assert bool(again.documents and again.documents[-1]["usage"]) is usage
    assert len(engine.submissions) == 1


async def test_a_stream_that_ended_in_an_error_that_passes_can_be_gone_on_with(gateway: Gateway, engine: Peer) -> None:
    """The error event has no id: the client stands where its last token left it. A wrong request stays wrong."""
    cases: tuple[tuple[InferenceError, int], ...] = (
        (ContextPoisoned("the context is being replaced"), 200),
        (BadRequest("no"), 404),
    )
    for error, status in cases:
        count = len(engine.submissions)
        async with AsyncExitStack() as stack:
            opening = asyncio.create_task(stack.enter_async_context(stream(gateway)))
            s = await engine.submission(count + 1)
            engine.send(Row(s, 0, [7], "one "))
            first = await opening
            last_id = await first.until_text("one ")
            for attempt in range(3 if status == 200 else 1):
                s = await engine.submission(count + 1 + attempt)
                engine.send(error_row(s, error, 1))
            await first.rest()
            assert "error" in first.documents[-1]
            assert first.events[-1][0] == ""
        async with AsyncExitStack() as stack:
            opening = asyncio.create_task(stack.enter_async_context(stream(gateway, last_id)))
            if status == 200:
                t = await engine.submission(count + 4)
                assert prefix(t) == [7]
                engine.send(last_row(t, 1, [8], "two"))
            second = await opening
            assert second.response.status_code == status
            if status == 200:
                assert await second.rest() == "two"


# --- what is refused -----------------------------------------------------------------------------------------------------


async def test_what_is_not_there_is_not_found_and_what_is_wrong_is_named(gateway: Gateway, engine: Peer) -> None:
    async with AsyncExitStack() as stack:
        opening = asyncio.create_task(stack.enter_async_context(stream(gateway)))
        s = await engine.submission()
        engine.send(Row(s, 0, [7], "one "))
        last_id = await (await opening).until_text("one ")
    cases = [
        ("0" * 32 + ":3", BODY, "", 404, "stream_not_found"),
        ("7", BODY, "", 400, "invalid_event_id"),
        (last_id, BODY | {"temperature": 0.5}, "", 400, "other_request"),
        (last_id, BODY | {"stream_options": {"include_usage": True}}, "", 400, "other_request"),
        (last_id, BODY | {"stream": False}, "", 400, None),
        ("", BODY, f"/v1/streams/{'0' * 32}", 404, "stream_not_found"),
        ("", BODY, "/v1/streams/7", 400, "invalid_event_id"),
        (last_id, BODY, f"/v1/streams/{'0' * 32}", 400, "invalid_event_id"),
        (f"{last_id.partition(':')[0]}:0:[9]", BODY, "", 409, "not_resumable"),
        (f"{last_id.partition(':')[0]}:70", BODY, "", 409, "not_resumable"),
    ]
    for sent, body, url, status, code in cases:
        async with stream(gateway, sent, body, url=url or "/v1/chat/completions") as answer:
            seen, error = await refusal(answer)
            assert (seen, error["code"]) == (status, code), (sent, error)
    assert len(engine.submissions) == 1, "none of these cost an engine anything"
    response = await gateway.client.request("HEAD", f"/v1/streams/{'0' * 32}")
    assert response.status_code == 405


async def test_a_gateway_that_does_not_know_the_others_yet_does_not_say_that_nobody_has_a_stream(gateway: Gateway) -> None:
    """It started while etcd is away. Asking elsewhere helps, so it says 503, and 404 once it knows whom to ask."""
    gateway.worker.peers.complete = False
    seen = []
    for _ in range(2):
        async with stream(gateway, "0" * 32 + ":3", BODY) as answer:
            seen.append((await refusal(answer))[0])
        gateway.worker.peers.apply([])

    assert seen == [503, 404]


async def test_where_it_is_switched_off_nobody_comes_back(engine: Peer) -> None:
    async with start_gateway(resume=ResumeSettings(window_s=0)) as gateway:
        await gateway.route(route(engine))
        async with AsyncExitStack() as stack:
            opening = asyncio.create_task(stack.enter_async_context(stream(gateway)))
            s = await engine.submission()
            engine.send(Row(s, 0, [7], "one "))
            last_id = await (await opening).until_text("one ")
        await engine.cancelled(s)
        assert records(gateway) == 0
        async with stream(gateway, last_id) as answer:
            assert (await refusal(answer))[0] == 403


async def test_the_number_of_streams_that_are_kept_is_bounded(engine: Peer) -> None:
    """The oldest go; a client of theirs is told so."""
    async with start_gateway(resume=ResumeSettings(max_streams=3)) as gateway:
        await gateway.route(route(engine))
        ids = []
        for number in range(5):
            asking = asyncio.create_task(gateway.chat(stream=True))
            s = await engine.submission(number + 1)
            engine.send(last_row(s, 0, [7], "one"))
            ids.append((await asking).headers["x-request-id"])
        assert records(gateway) == 3
        for number, request_id in enumerate(ids):
            async with stream(gateway, f"{request_id}:0:last") as answer:
                assert answer.response.status_code == (404 if number < 2 else 200)


# --- clients that are away for a while -----------------------------------------------------------------------------------


async def test_a_deployment_may_keep_a_stream_going_while_its_client_is_away(gateway: Gateway, engine: Peer) -> None:
    """Policy keep: the engine notices nothing, and the client gets what it missed, piece by piece, then what comes."""
    await gateway.route(route(engine, disconnected_s=30))
    async with AsyncExitStack() as stack:
        opening = asyncio.create_task(stack.enter_async_context(stream(gateway, body=WITH_USAGE)))
        s = await engine.submission()
        engine.send(Row(s, 0, [7], "one "), Row(s, 1, [8], "two "))
        first = await opening
        await first.until_text("one two ")
    one_id = next(event_id for event_id, data in first.events if '"one "' in data)
    await until(lambda: not gateway.worker.http.connections, "the client to be gone")
    engine.send(Row(s, 2, [9], "three "))
    async with AsyncExitStack() as stack:
        second = await stack.enter_async_context(stream(gateway, one_id, WITH_USAGE))
        await second.until_text("two three ")
        engine.send(Row(s, 3, [10, 11], "four "), last_row(s, 5, [12], "five"))
        assert await second.rest() == "two three four five"
        assert second.places == ["1", "2", "4", "5:last", "5:end", "5:done", "5:done"]
        assert second.documents[-1]["usage"]["completion_tokens"] == 6
    assert (len(engine.submissions), engine.cancellations) == (1, [])
    assert gateway.metric('inference_stream_returns_total{outcome="kept"}') == 1


async def test_a_kept_stream_that_ended_meanwhile_is_told_to_its_end(gateway: Gateway, engine: Peer) -> None:
    await gateway.route(route(engine, disconnected_s=30))
    async with AsyncExitStack() as stack:
        opening = asyncio.create_task(stack.enter_async_context(stream(gateway)))
        s = await engine.submission()
        engine.send(Row(s, 0, [7], "one "))
        last_id = await (await opening).until_text("one ")
    await until(lambda: not gateway.worker.http.connections, "the client to be gone")
    engine.send(Row(s, 1, [8], "two "), last_row(s, 2, [9], "three"))
    await until(lambda: not gateway.worker.live.requests, "the end")
    for _ in range(2):  # a client may lose its connection again
        async with stream(gateway, last_id) as second:
            assert await second.rest() == "two three"
            assert (second.finish, second.done) == (["stop"], 1)
    assert len(engine.submissions) == 1


async def test_a_kept_stream_is_cancelled_when_its_client_stays_away(gateway: Gateway, engine: Peer) -> None:
    await gateway.route(route(engine, disconnected_s=0.3))
    async with AsyncExitStack() as stack:
        opening = asyncio.create_task(stack.enter_async_context(stream(gateway)))
        s = await engine.submission()
        engine.send(Row(s, 0, [7], "one "))
        last_id = await (await opening).until_text("one ")
    await until(lambda: not gateway.worker.http.connections, "the client to be gone")
    assert not engine.cancellations
    await engine.cancelled(s)
    async with AsyncExitStack() as stack:
        opening = asyncio.create_task(stack.enter_async_context(stream(gateway, last_id)))
        t = await engine.submission(2)
        assert prefix(t) == [7], "it can still be gone on with, as any other"
        engine.send(last_row(t, 1, [8], "two"))
        assert await (await opening).rest() == "two"


async def test_a_whole_answer_is_cancelled_when_its_client_leaves(gateway: Gateway, engine: Peer) -> None:
    """There is nothing to come back to: no event of it was seen."""
    await gateway.route(route(engine, disconnected_s=30))
    asking = asyncio.create_task(gateway.chat())
    s = await engine.submission()
    asking.cancel()
    await engine.cancelled(s)
