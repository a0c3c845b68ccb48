"""Clients that come back to a stream at another gateway than the one that served it, which has only a copy, or asks."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack

import grpc
import pytest

from inference_runtime.rpc import open_channel
from inference_runtime.secret import SecretStr
from inference_runtime.v1 import gateway_peer_service_pb2, gateway_peer_service_pb2_grpc
from services.gateway.http.errors import error_body
from services.gateway.records import StreamNotFound
from services.gateway.settings import ResumeSettings
from tests.integration.gateway.conftest import Gateway
from tests.integration.gateway.peer import Peer, Row, last_row, peer, until
from tests.integration.gateway.streams import BODY, copied, gateways, keeper, prefix, records, refusal, route, stream


@pytest.fixture
async def other() -> AsyncIterator[Peer]:
    """The engine of the other gateway."""
    async with peer("engine-2") as servicer:
        yield servicer


async def test_a_live_stream_moves_to_the_gateway_where_its_client_comes_back(engine: Peer, other: Peer) -> None:
    """Its first gateway need not be dead: a load balancer sends a cut client anywhere. Nobody serves it twice."""
    async with gateways(engine, other) as (here, there), AsyncExitStack() as stack:
        opening = asyncio.create_task(stack.enter_async_context(stream(here)))
        s = await engine.submission()
        engine.send(Row(s, 0, [7], "one "))
        first = await opening
        last_id = await first.until_text("one ")
        opening = asyncio.create_task(stack.enter_async_context(stream(there, last_id)))
        t = await other.submission()
        await engine.cancelled(s)
        assert prefix(t) == [7]
        engine.send(Row(s, 1, [9], "never "))
        other.send(Row(t, 1, [8], "two "))
        second = await opening
        await second.until_text("two ")
        await first.rest()
        assert (first.text, first.ended) == ("one ", False), "the old connection is cut, not ended"
        other.send(last_row(t, 2, [9], "three"))
        assert await second.rest() == "two three"
        assert not here.worker.live.requests


async def test_no_event_is_shown_before_another_gateway_knows_of_the_stream(
    engine: Peer, other: Peer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a client could hold an id that nobody has ever heard of."""
    monkeypatch.setattr("services.gateway.resume.GATE_S", 5.0)  # on a busy machine a copy may take longer than it is waited for
    async with gateways(engine, other) as (here, there), AsyncExitStack() as stack:
        for number in range(10):
            opening = asyncio.create_task(stack.enter_async_context(stream(here)))
            s = await engine.submission(number + 1)
            engine.send(Row(s, 0, [7], "one "))
            answer = await opening
            await answer.next()
            assert there.worker.resumer.store.get(answer.response.headers["x-request-id"], 0.0) is not None


async def test_tokens_that_no_other_gateway_has_come_back_with_the_client(engine: Peer, other: Peer) -> None:
    """A runtime that would draw other tokens goes on exactly, too: the ids carry what the copy lacks."""
    async with keeper() as hand, gateways(engine, other, acquainted=False) as (here, there), AsyncExitStack() as stack:
        here.worker.peers.apply([hand.gateway])
        opening = asyncio.create_task(stack.enter_async_context(stream(here)))
        s = await engine.submission()
        engine.send(Row(s, 0, [7], "0 "))
        first = await opening
        await first.until_text("0 ")
        await copied(here, 1)
        hand.takes.clear()
        engine.send(*(Row(s, k, [k + 100], f"{k} ") for k in range(1, 6)))
        last_id = await first.until_text("0 1 2 3 4 5 ")
        assert last_id.endswith(":5:[101,102,103,104,105]")
        there.worker.peers.apply([hand.gateway])  # the gateway that served it cannot be asked
        opening = asyncio.create_task(stack.enter_async_context(stream(there, last_id)))
        t = await other.submission()
        assert prefix(t) == [7, 101, 102, 103, 104, 105]
        other.send(last_row(t, 6, [9], "end"))
        assert await (await opening).rest() == "end"


async def test_a_gateway_that_does_not_answer_holds_no_stream_up(engine: Peer) -> None:
    """The first event waits for its copy for a moment, and no longer."""
    async with keeper() as hand, gateways(engine) as (here,), AsyncExitStack() as stack:
        here.worker.peers.apply([hand.gateway])
        hand.takes.clear()
        opening = asyncio.create_task(stack.enter_async_context(stream(here)))
        s = await engine.submission()
        engine.send(Row(s, 0, [7], "one "))
        assert await (await opening).until_text("one ")
        assert [getattr(request, "copied", -1) for request in here.worker.live.requests] == [0], "the copy has not arrived"


async def test_copies_go_elsewhere_when_their_keeper_is_lost(engine: Peer, other: Peer) -> None:
    """Whole, from the first token on; then the loss of the gateway itself is survived again."""
    async with gateways(engine, other, acquainted=False) as (here, there), AsyncExitStack() as stack:
        async with keeper() as hand:
            here.worker.peers.apply([hand.gateway, there.worker.peers.own])
            opening = asyncio.create_task(stack.enter_async_context(stream(here)))
            s = await engine.submission()
            engine.send(Row(s, 0, [7], "one "))
            first = await opening
            await first.until_text("one ")
            await copied(here, 1)
            assert (len(hand.store), records(there)) == (1, 0)
        engine.send(Row(s, 1, [8], "two "))
        request_id = s.request.request_id
        store = there.worker.resumer.store
        await until(lambda: (r := store.get(request_id, 0.0)) is not None and list(r.tokens) == [7, 8], "the copy")
        engine.send(last_row(s, 2, [9], "three"))
        assert await first.rest() == "one two three"
        await until(lambda: (r := store.get(request_id, 0.0)) is not None and r.end is not None, "its end")


async def test_only_gateways_may_speak_to_gateways(gateway: Gateway) -> None:
    """The public gRPC door has the same port: without the key of the gateway that is called nothing is told or taken."""
    channel = open_channel(gateway.worker.rpc.address)
    stub = gateway_peer_service_pb2_grpc.GatewayPeerServiceStub(channel)  # type: ignore[no-untyped-call]
    try:
        for metadata in ((), (("x-peer-key", ""),), (("x-peer-key", "0" * 32),)):
            for call in (
                stub.Replicate(gateway_peer_service_pb2.ReplicateRequest(), metadata=metadata),
                stub.TakeStream(gateway_peer_service_pb2.TakeStreamRequest(request_id="0" * 32), metadata=metadata),
            ):
                with pytest.raises(grpc.aio.AioRpcError) as refused:
                    await call
                assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED
    finally:
        await channel.close(None)


async def test_a_stream_of_somebody_else_is_not_found_in_the_same_words_and_goes_on(engine: Peer, other: Peer) -> None:
    """A foreign id tells nothing, at either gateway, and takes nothing away from its owner."""
    keys = [SecretStr("alpha"), SecretStr("beta")]
    async with gateways(engine, other, api_keys=keys) as (here, there), AsyncExitStack() as stack:
        opening = asyncio.create_task(stack.enter_async_context(stream(here, key="alpha")))
        s = await engine.submission()
        engine.send(Row(s, 0, [7], "one "))
        mine = await opening
        last_id = await mine.until_text("one ")
        await copied(here, 1)
        unknown = json.loads(error_body(StreamNotFound()))["error"]
        for gateway in (here, there):
            for url in ("/v1/chat/completions", f"/v1/streams/{last_id.partition(':')[0]}"):
                async with stream(gateway, last_id, key="beta", url=url) as foreign:
                    assert await refusal(foreign) == (404, unknown)
            async with stream(gateway, last_id, url=url) as anonymous:
                assert (await refusal(anonymous))[0] == 401
        engine.send(last_row(s, 1, [8], "two"))
        assert await mine.rest() == "one two"
        assert mine.done == 1


async def test_a_stream_is_forgotten_when_its_time_is_over(engine: Peer, other: Peer) -> None:
    """TTL: both what a gateway served itself and what it keeps for another one."""
    async with gateways(engine, other, resume=ResumeSettings(window_s=0.4)) as (here, there):
        async with AsyncExitStack() as stack:
            opening = asyncio.create_task(stack.enter_async_context(stream(here)))
            s = await engine.submission()
            engine.send(Row(s, 0, [7], "one "))
            last_id = await (await opening).until_text("one ")
            await copied(here, 1)
        await engine.cancelled(s)
        await until(lambda: records(here) == 0 and records(there) == 0, "both to be forgotten")
        for gateway in (here, there):
            async with stream(gateway, last_id) as answer:
                assert (await refusal(answer))[0] == 404


async def test_a_kept_stream_moves_too(engine: Peer, other: Peer) -> None:
    """What is kept here is of no use to a client that comes back elsewhere: it goes on there, behind its last event."""
    async with gateways(engine, other) as (here, there):
        await here.route(route(engine, disconnected_s=30))
        async with AsyncExitStack() as stack:
            opening = asyncio.create_task(stack.enter_async_context(stream(here)))
            s = await engine.submission()
            engine.send(Row(s, 0, [7], "one "))
            last_id = await (await opening).until_text("one ")
        await until(lambda: not here.worker.http.connections, "the client to be gone")
        async with AsyncExitStack() as stack:
            opening = asyncio.create_task(stack.enter_async_context(stream(there, last_id)))
            t = await other.submission()
            await engine.cancelled(s)
            other.send(last_row(t, 1, [8], "two"))
            assert await (await opening).rest() == "two"


@pytest.mark.parametrize("deterministic", [True, False])
async def test_tokens_that_nobody_brings_are_made_again_or_the_client_is_told(
    engine: Peer, other: Peer, deterministic: bool
) -> None:
    """A client that sends a bare index, behind which the copy is: only a runtime that repeats itself can go on."""
    body = BODY | {"seed": 3}
    async with gateways(engine, other, deterministic=deterministic) as (here, there), AsyncExitStack() as stack:
        opening = asyncio.create_task(stack.enter_async_context(stream(here, body=body)))
        s = await engine.submission()
        engine.send(Row(s, 0, [7], "0 "))
        first = await opening
        last_id = await first.until_text("0 ")
        await copied(here, 1)
        there.worker.peers.apply([])
        bare = f"{last_id.partition(':')[0]}:2"
        opening = asyncio.create_task(stack.enter_async_context(stream(there, bare, body)))
        if not deterministic:
            status, error = await refusal(await opening)
            assert (status, error["code"]) == (409, "not_resumable")
            return
        t = await other.submission()
        assert prefix(t) == [7]
        other.send(Row(t, 1, [8], "1 "), Row(t, 2, [9], "2 "), Row(t, 3, [10], "3 "))
        other.send(last_row(t, 4, [11], "4"))
        assert await (await opening).rest() == "3 4", "what the client has is made again and not shown again"
