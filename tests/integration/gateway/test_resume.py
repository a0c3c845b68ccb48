"""Clients that come back to a stream: at the gateway that served it, and at another one that has only a copy."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import grpc
import httpx
import pytest

from inference_runtime.errors import BadRequest, ContextPoisoned, InferenceError
from inference_runtime.rpc import RpcServer, open_channel
from inference_runtime.secret import SecretStr
from inference_runtime.settings import TelemetrySettings
from inference_runtime.telemetry import Telemetry
from inference_runtime.v1 import engine_service_pb2, gateway_peer_service_pb2, gateway_peer_service_pb2_grpc
from services.gateway.http.errors import error_body
from services.gateway.peer_service import Copies
from services.gateway.records import RecordStore, StreamNotFound
from services.gateway.settings import ResumeSettings
from tests.integration.gateway.conftest import Gateway, start_gateway
from tests.integration.gateway.peer import DEADLINE_S, Peer, Row, deployment_route, error_row, last_row, peer, until

BODY = {"model": "demo", "messages": [{"role": "user", "content": "hi"}], "stream": True}
WITH_USAGE = BODY | {"stream_options": {"include_usage": True}}


class Answer:
    """A stream as an EventSource reads it, on a connection of its own."""

    def __init__(self, response: httpx.Response) -> None:
        self.response = response
        self._lines = response.aiter_lines()
        self.events: list[tuple[str, str]] = []
        self.comments: list[str] = []
        self.ended = False

    async def next(self) -> bool:
        """Read one event. False at the end, or where the connection breaks."""
        event_id = ""
        try:
            async for line in self._lines:
                if line.startswith("id: "):
                    event_id = line[4:]
                elif line.startswith(": "):
                    self.comments.append(line[2:])
                elif line.startswith("data: "):
                    self.events.append((event_id, line[6:]))
                    return True
        except httpx.RemoteProtocolError:
            return False
        self.ended = True
        return False

    async def until_text(self, text: str) -> str:
        """Read until this text is here. Returns the id of the event that brought it."""
        async with asyncio.timeout(DEADLINE_S):
            while self.text != text:
                assert await self.next(), f"the stream ended with {self.text!r}"
        return self.last_id

    async def rest(self) -> str:
        """Read to the end. Returns all text."""
        async with asyncio.timeout(DEADLINE_S):
            while await self.next():
                pass
        return self.text

    @property
    def last_id(self) -> str:
        """Id of the last event that had one."""
        return next(event_id for event_id, _ in reversed(self.events) if event_id)

    @property
    def places(self) -> list[str]:
        """Ids, without that of the request."""
        return [event_id.partition(":")[2] for event_id, _ in self.events]

    @property
    def documents(self) -> list[dict[str, Any]]:
        """The JSON of each event."""
        return [json.loads(data) for _, data in self.events if data != "[DONE]"]

    @property
    def text(self) -> str:
        """All text so far."""
        return "".join(c["delta"].get("content") or "" for d in self.documents for c in d.get("choices", []))

    @property
    def finish(self) -> list[str]:
        """Finish reasons that were told."""
        return [c["finish_reason"] for d in self.documents for c in d.get("choices", []) if c["finish_reason"]]

    @property
    def done(self) -> int:
        """How often [DONE] was told."""
        return [data for _, data in self.events].count("[DONE]")


@asynccontextmanager
async def stream(
    gateway: Gateway, last_id: str = "", body: dict[str, Any] = BODY, *, key: str = "", url: str = "/v1/chat/completions"
) -> AsyncIterator[Answer]:
    """Ask for a stream, or for the rest of one."""
    headers = {"last-event-id": last_id} if last_id else {}
    if key:
        headers["authorization"] = f"Bearer {key}"
    method, payload = ("POST", body) if url.endswith("completions") else ("GET", None)
    async with httpx.AsyncClient(base_url=gateway.url, timeout=10) as client:
        async with client.stream(method, url, json=payload, headers=headers) as response:
            yield Answer(response)


async def refusal(answer: Answer) -> tuple[int, dict[str, Any]]:
    """Status and error of an answer that is none."""
    return answer.response.status_code, json.loads(await answer.response.aread())["error"]


def route(engine: Peer, *, deterministic: bool = False, disconnected_s: float = 0.0) -> Any:
    """The routing table's line of `demo`."""
    replica = engine.replica("demo")
    replica.capabilities.deterministic = deterministic
    line = deployment_route(replica)
    line.disconnected_timeout.FromMilliseconds(int(disconnected_s * 1000))
    return line


def prefix(submission: engine_service_pb2.Submission) -> list[int]:
    """The tokens that a submission goes on behind."""
    return [token for part in submission.generated_prefix for token in part.token_ids]


@asynccontextmanager
async def gateways(
    *engines: Peer, deterministic: bool = False, acquainted: bool = True, **overrides: Any
) -> AsyncIterator[list[Gateway]]:
    """Gateways that know each other, each with an engine of its own, all of one revision."""
    async with AsyncExitStack() as stack:
        all_of_them = [await stack.enter_async_context(start_gateway(**overrides)) for _ in engines]
        for gateway, engine in zip(all_of_them, engines, strict=True):
            gateway.worker.peers.own.address = gateway.worker.rpc.address
            await gateway.route(route(engine, deterministic=deterministic))
        for gateway in all_of_them if acquainted else ():
            gateway.worker.peers.apply(other.worker.peers.own for other in all_of_them)
        yield all_of_them


@pytest.fixture
async def other() -> AsyncIterator[Peer]:
    """The engine of the other gateway."""
    async with peer("engine-2") as servicer:
        yield servicer


async def copied(gateway: Gateway, tokens: int) -> None:
    """Wait until another gateway has so many tokens of the one stream of this one."""
    requests = gateway.worker.live.requests
    await until(lambda: any(getattr(r, "copied", -1) >= tokens for r in requests), f"a copy of {tokens} tokens")


def records(gateway: Gateway) -> int:
    """Streams that it keeps."""
    return len(gateway.worker.resumer.store)


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
        await until(lambda: records(here) == 1, "its own record")
        await until(lambda: records(here) == 0 and records(there) == 0, "both to be forgotten")
        for gateway in (here, there):
            async with stream(gateway, last_id) as answer:
                assert (await refusal(answer))[0] == 404


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


# --- two gateways --------------------------------------------------------------------------------------------------------


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


async def test_no_event_is_shown_before_another_gateway_knows_of_the_stream(engine: Peer, other: Peer) -> None:
    """Else a client could hold an id that nobody has ever heard of."""
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
    """The first event waits a tenth of a second for its copy, and no longer."""
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


class Keeper(gateway_peer_service_pb2_grpc.GatewayPeerServiceServicer):
    """A gateway that only keeps copies, and only while it is told to."""

    def __init__(self) -> None:
        self.store = RecordStore(60, 100, 1 << 20)
        self.takes = asyncio.Event()
        self.takes.set()
        self.gateway = gateway_peer_service_pb2.Gateway(id="keeper", hostname="another machine")
        self._copies = Copies(self.store)

    async def Replicate(self, request: gateway_peer_service_pb2.ReplicateRequest, context: object) -> object:
        """Keep copies, in time or not."""
        await self.takes.wait()
        return gateway_peer_service_pb2.ReplicateResponse(refused=self._copies.take(request, time.monotonic()))

    async def TakeStream(self, request: gateway_peer_service_pb2.TakeStreamRequest, context: object) -> object:
        """Hand one over."""
        record = self.store.get(request.request_id, time.monotonic())
        return gateway_peer_service_pb2.TakeStreamResponse(record=record.to_proto(time.monotonic()) if record else None)


@asynccontextmanager
async def keeper() -> AsyncIterator[Keeper]:
    """One that listens on loopback and says that it is on another machine, so that it is asked first."""
    telemetry = Telemetry("keeper", TelemetrySettings())
    server, servicer = RpcServer("127.0.0.1", 0, telemetry), Keeper()
    register = gateway_peer_service_pb2_grpc.add_GatewayPeerServiceServicer_to_server
    server.add(register, servicer, "inference_runtime.v1.GatewayPeerService")
    servicer.gateway.address = await server.start()
    try:
        yield servicer
    finally:
        await server.stop(0)
        telemetry.close()


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


async def test_a_whole_answer_and_several_choices_are_cancelled_when_their_client_leaves(gateway: Gateway, engine: Peer) -> None:
    """There is nothing to come back to: no event of theirs was seen, or no id says what was."""
    await gateway.route(route(engine, disconnected_s=30))
    asking = asyncio.create_task(gateway.chat())
    s = await engine.submission()
    asking.cancel()
    await engine.cancelled(s)


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
