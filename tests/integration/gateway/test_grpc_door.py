"""The gRPC door: the same requests as HTTP's."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import grpc
import pytest

from inference_runtime.errors import Backpressure, DeploymentNotFound, InferenceError, Timeout, Unauthorized
from inference_runtime.generation import ChatPrompt, GenerationRequest, Message, Role, TextPart
from inference_runtime.rpc import error_from_rpc, open_channel
from inference_runtime.v1 import gateway_service_pb2, gateway_service_pb2_grpc
from inference_runtime.wire import duration, request_to_proto
from tests.integration.gateway.conftest import Gateway, Start
from tests.integration.gateway.peer import Peer, Row, deployment_route, error_row, last_row, peer

PROMPT = ChatPrompt((Message(Role.USER, (TextPart("hi"),)),))


@pytest.fixture
async def stub(gateway: Gateway) -> AsyncIterator[gateway_service_pb2_grpc.GatewayServiceStub]:
    """A stub on the gateway's gRPC door."""
    channel = open_channel(gateway.worker.rpc.address)
    yield gateway_service_pb2_grpc.GatewayServiceStub(channel)  # type: ignore[no-untyped-call]
    await channel.close(None)


def ask(deployment: str = "demo", timeout_s: float | None = None) -> gateway_service_pb2.GenerateRequest:
    request = gateway_service_pb2.GenerateRequest(request=request_to_proto(GenerationRequest("", deployment, PROMPT)))
    if timeout_s is not None:
        request.timeout.CopyFrom(duration(timeout_s))
    return request


async def error_of(call: object) -> InferenceError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async with asyncio.timeout(5):
            async for _ in call:  # type: ignore[attr-defined]
                pass
    return error_from_rpc(caught.value)


async def test_a_generation_streams_its_chunks(
    stub: gateway_service_pb2_grpc.GatewayServiceStub, gateway: Gateway, engine: Peer
) -> None:
    call = stub.Generate(ask())
    s = await engine.submission()
    engine.send(Row(s, 0, [1], "a"), last_row(s, 1, [2, 3], "bc"))
    chunks = [c async for c in call]
    assert [(c.index, list(c.token_ids), c.text) for c in chunks] == [(0, [1], "a"), (1, [2, 3], "bc")]
    assert {c.request_id for c in chunks} == {s.request.request_id}
    assert chunks[-1].detail.usage.output_tokens == 3
    assert not gateway.worker.live.requests


async def test_cancelling_the_call_stops_the_engine(
    stub: gateway_service_pb2_grpc.GatewayServiceStub, gateway: Gateway, engine: Peer
) -> None:
    call = stub.Generate(ask())
    s = await engine.submission()
    engine.send(Row(s, 0, [1], "a"))
    await call.read()
    call.cancel()
    await engine.cancelled(s)


async def test_errors_keep_their_type(stub: gateway_service_pb2_grpc.GatewayServiceStub, gateway: Gateway, engine: Peer) -> None:
    assert isinstance(await error_of(stub.Generate(ask("other"))), DeploymentNotFound)
    call = stub.Generate(ask())
    engine.send(error_row(await engine.submission(), Backpressure("full", retry_after_s=2)))
    error = await error_of(call)
    assert isinstance(error, Backpressure)
    assert error.retry_after_s == 2


async def test_the_callers_time_limit_holds(
    stub: gateway_service_pb2_grpc.GatewayServiceStub, gateway: Gateway, engine: Peer
) -> None:
    call = stub.Generate(ask(timeout_s=0.5))
    s = await engine.submission()
    assert s.time_left.ToMilliseconds() <= 500
    assert isinstance(await error_of(call), Timeout)
    await engine.cancelled(s)


async def test_a_stream_that_breaks_goes_on_here_too(start: Start) -> None:
    async with peer("a") as a, start() as gateway:
        await gateway.route(deployment_route(a.replica("demo")))
        channel = open_channel(gateway.worker.rpc.address)
        call = gateway_service_pb2_grpc.GatewayServiceStub(channel).Generate(ask())  # type: ignore[no-untyped-call]
        s = await a.submission()
        a.send(Row(s, 0, [1], "a"))
        assert (await call.read()).text == "a"
        a.cut(Backpressure("cut"))
        t = await a.submission(2)
        a.send(last_row(t, 1, [2], "b"))
        rest = await call.read()
        assert (rest.index, rest.text) == (1, "b")
        assert not isinstance(await call.read(), gateway_service_pb2.GenerateResponse)
        assert ("x-inference-resumed", "1") in tuple(await call.trailing_metadata())
        await channel.close(None)


async def test_models_are_listed(stub: gateway_service_pb2_grpc.GatewayServiceStub, gateway: Gateway) -> None:
    answer = await stub.ListModels(gateway_service_pb2.ListModelsRequest())
    assert [(m.id, m.runtime, m.ready_replicas, m.max_context_tokens) for m in answer.models] == [("demo", "scripted", 1, 4096)]


async def test_a_gateway_with_keys_wants_one_here_too(start: Start) -> None:
    async with start(api_keys=["sesame"]) as gateway:
        channel = open_channel(gateway.worker.rpc.address)
        stub = gateway_service_pb2_grpc.GatewayServiceStub(channel)  # type: ignore[no-untyped-call]
        assert isinstance(await error_of(stub.Generate(ask())), Unauthorized)
        answer = await stub.ListModels(gateway_service_pb2.ListModelsRequest(), metadata=(("authorization", "Bearer sesame"),))
        assert not answer.models
        await channel.close(None)
