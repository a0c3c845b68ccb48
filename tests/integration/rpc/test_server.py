"""The server every service is built on, over real sockets: health, reflection, errors, deadlines, ordered stop."""

from __future__ import annotations

import asyncio
import gc
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from inference_runtime import errors
from inference_runtime.rpc import RpcServer, error_from_rpc, open_channel, remaining_s
from inference_runtime.rpc.status import INTERNAL_TEXT
from inference_runtime.settings import TelemetrySettings
from inference_runtime.telemetry import Telemetry
from inference_runtime.v1 import gateway_service_pb2 as pb
from inference_runtime.v1 import gateway_service_pb2_grpc as pb_grpc

SERVICE = "inference_runtime.v1.GatewayService"
WAIT_S = 10.0

Context = grpc.aio.ServicerContext[object, object]


class Gateway(pb_grpc.GatewayServiceServicer):
    """A servicer that does what the request's id says."""

    def __init__(self) -> None:
        self.fault: Exception | None = None
        self.left_s: float | None = None
        self.ended = asyncio.Event()
        self.release = asyncio.Event()

    async def ListModels(self, request: pb.ListModelsRequest, context: Context) -> pb.ListModelsResponse:
        """One model, or the fault."""
        self.left_s = remaining_s(context)
        if self.fault is not None:
            raise self.fault
        return pb.ListModelsResponse(models=[pb.Model(id="demo")])

    async def Generate(self, request: pb.GenerateRequest, context: Context) -> AsyncIterator[pb.GenerateResponse]:
        """Two chunks, then the fault, or waiting for `release`."""
        try:
            for index in range(2):
                yield pb.GenerateResponse(index=index, text="x")
            if self.fault is not None:
                raise self.fault
            await self.release.wait()
        finally:
            self.ended.set()


def stub_of(channel: grpc.aio.Channel) -> Any:
    """The generated client; generated code has no types."""
    return pb_grpc.GatewayServiceStub(channel)  # type: ignore[no-untyped-call]


@asynccontextmanager
async def serving(servicer: Gateway) -> AsyncIterator[tuple[RpcServer, grpc.aio.Channel]]:
    """A server with this servicer and a channel to it."""
    server = RpcServer("127.0.0.1", 0, Telemetry("test", TelemetrySettings()))
    server.add(pb_grpc.add_GatewayServiceServicer_to_server, servicer, SERVICE)
    address = await server.start()
    async with open_channel(address) as channel:
        yield server, channel
    await server.stop(0)


ERRORS = [
    errors.DeploymentNotFound("no deployment is called 'x'", param="model"),
    errors.Backpressure("queue full", retry_after_s=0.5),
    errors.NotLeader("the coordinator leads elsewhere", role="coordinator", address="10.0.0.1:1"),
    errors.ContextLengthExceeded("9 tokens do not fit into 4", tokens="9", max_tokens="4"),
    errors.RuntimeNotInstalled("pip install 'inference-runtime[torch]'", runtime="torch"),
]


@pytest.mark.parametrize("fault", ERRORS, ids=lambda e: type(e).__name__)
async def test_a_unary_call_gives_the_servicers_exception_back(fault: errors.InferenceError) -> None:
    """Typed errors cross the wire: class, sentence, delay, metadata."""
    servicer = Gateway()
    servicer.fault = fault
    async with serving(servicer) as (_, channel):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub_of(channel).ListModels(pb.ListModelsRequest(), timeout=WAIT_S)

    back = error_from_rpc(caught.value)
    assert caught.value.code().value[0] == fault.grpc_code.value
    assert type(back) is type(fault)
    assert (back.message, back.retry_after_s, back.metadata) == (fault.message, fault.retry_after_s, fault.metadata)


@pytest.mark.parametrize("fault", ERRORS, ids=lambda e: type(e).__name__)
async def test_a_stream_that_fails_keeps_what_came_before_and_ends_in_the_servicers_exception(
    fault: errors.InferenceError,
) -> None:
    """Mid-stream failure is a typed error after the chunks that were sent, never a quiet end."""
    servicer = Gateway()
    servicer.fault = fault
    seen = []
    async with serving(servicer) as (_, channel):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            async for chunk in stub_of(channel).Generate(pb.GenerateRequest(), timeout=WAIT_S):
                seen.append(chunk.index)

    back = error_from_rpc(caught.value)
    assert seen == [0, 1]
    assert (type(back), back.message) == (type(fault), fault.message)


@pytest.mark.parametrize("streaming", [False, True], ids=["unary", "stream"])
async def test_our_own_fault_is_internal_and_its_text_stays_here(streaming: bool, caplog: pytest.LogCaptureFixture) -> None:
    """E17: the client reads that we failed; the log holds why."""
    servicer = Gateway()
    servicer.fault = ValueError("secret detail")
    async with serving(servicer) as (_, channel):
        stub = stub_of(channel)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            if streaming:
                async for _ in stub.Generate(pb.GenerateRequest(), timeout=WAIT_S):
                    pass
            else:
                await stub.ListModels(pb.ListModelsRequest(), timeout=WAIT_S)

    assert (caught.value.code(), caught.value.details()) == (grpc.StatusCode.INTERNAL, INTERNAL_TEXT)
    assert "secret detail" in caplog.text


async def test_health_says_serving_only_once_it_is_told() -> None:
    """R01: not serving until the service says so, for the server and for each service; then watchers hear the change."""
    async with serving(Gateway()) as (server, channel):
        stub = health_pb2_grpc.HealthStub(channel)

        async def states() -> list[int]:
            asked = [health_pb2.HealthCheckRequest(service=name) for name in ("", SERVICE)]
            return [(await stub.Check(request, timeout=WAIT_S)).status for request in asked]

        before = await states()
        await server.set_serving(True)
        during = await states()
        await server.set_serving(False)
        after = await states()

    serving_, not_serving = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING
    assert (before, during, after) == ([not_serving] * 2, [serving_] * 2, [not_serving] * 2)


async def test_reflection_lists_the_services() -> None:
    """Health and reflection on every server: grpcurl works without protos."""
    async with serving(Gateway()) as (_, channel):
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        call = stub.ServerReflectionInfo(iter([reflection_pb2.ServerReflectionRequest(list_services="")]), timeout=WAIT_S)
        names = [s.name async for response in call for s in response.list_services_response.service]

    assert {SERVICE, "grpc.health.v1.Health", "grpc.reflection.v1alpha.ServerReflection"} <= set(names)


async def test_a_method_nobody_serves_is_unsupported() -> None:
    """A newer peer may call what we do not have: it gets a class of ours."""
    async with serving(Gateway()) as (_, channel):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await channel.unary_unary("/inference_runtime.v1.GatewayService/Invented", bytes, bytes)(b"", timeout=WAIT_S)

    assert isinstance(error_from_rpc(caught.value), errors.Unsupported)


async def test_a_taken_port_is_one_sentence() -> None:
    """Bad input: the address and the key to change, no stack of C++."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        server = RpcServer("127.0.0.1", port, Telemetry("test", TelemetrySettings()))

        with pytest.raises(errors.ServerError) as caught:
            await server.start()
        await server.stop(0)
        del server
        gc.collect()  # grpc ends a server that never started when it is collected, on a loop that must still run

    assert f"127.0.0.1:{port}" in caught.value.message
    assert "rpc.port" in caught.value.message
    assert "\n" not in caught.value.message


async def test_the_callers_deadline_is_known() -> None:
    """A servicer sees the time that is left, and None when the caller set none."""
    servicer = Gateway()
    async with serving(servicer) as (_, channel):
        stub = stub_of(channel)
        await stub.ListModels(pb.ListModelsRequest(), timeout=5)
        with_deadline = servicer.left_s
        await stub.ListModels(pb.ListModelsRequest())
        without = servicer.left_s

    assert with_deadline is not None
    assert 4 < with_deadline <= 5
    assert without is None


async def test_an_address_where_nobody_listens_is_a_network_error() -> None:
    """E04: an unreachable peer is a class of ours, found before the deadline."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    async with open_channel(address) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub_of(channel).ListModels(pb.ListModelsRequest(), timeout=WAIT_S)

    assert isinstance(error_from_rpc(caught.value), errors.NetworkError)


async def test_a_client_that_leaves_ends_the_servicers_stream() -> None:
    """A cancelled stream runs the servicer's `finally` at once."""
    servicer = Gateway()
    async with serving(servicer) as (_, channel):
        call = stub_of(channel).Generate(pb.GenerateRequest())
        assert (await call.read()).index == 0
        call.cancel()
        async with asyncio.timeout(WAIT_S):
            await servicer.ended.wait()


async def test_stop_lets_a_running_call_end_within_its_grace() -> None:
    """Ordered stop: nothing new, what runs may end, health says not serving."""
    servicer = Gateway()
    async with serving(servicer) as (server, channel):
        call = stub_of(channel).Generate(pb.GenerateRequest(), timeout=WAIT_S)
        seen = [(await call.read()).index, (await call.read()).index]
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(server.stop(WAIT_S))
            servicer.release.set()
            rest = await call.read()

    assert (seen, rest) == ([0, 1], grpc.aio.EOF)  # type: ignore[attr-defined]
    assert await call.code() == grpc.StatusCode.OK
