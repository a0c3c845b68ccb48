"""The server builder: health, reflection, typed errors, spans and an ordered stop, the same for every service.

A servicer raises our exceptions; `_Boundary` turns them into status with details. Nothing else stands between gRPC and a
servicer.
"""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from grpc_status import rpc_status

from inference_runtime.errors import ErrorCode, InferenceError, ServerError
from inference_runtime.rpc.channel import PRESETS
from inference_runtime.rpc.status import status_from_error
from inference_runtime.telemetry import Telemetry, get_logger

__all__ = ["RpcServer"]

log = get_logger(__name__)

#: Concurrent HTTP/2 streams of one connection. A gateway holds one session; a thin client may hold one stream per request.
MAX_CONCURRENT_STREAMS = 1024
#: Largest metadata of a call.
MAX_METADATA_BYTES = 16 << 10

#: grpc's handler objects carry untyped callables; Any stops at this module.
_Handler = Any


class _Boundary(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]
    """Turns exceptions of a servicer into status, and gives each call a span."""

    def __init__(self, telemetry: Telemetry) -> None:
        self._telemetry = telemetry

    async def intercept_service(
        self, continuation: Callable[[grpc.HandlerCallDetails], Awaitable[_Handler]], details: grpc.HandlerCallDetails
    ) -> _Handler:
        handler = await continuation(details)
        if handler is None or details.method.startswith("/grpc."):
            return handler
        method: str = details.method
        metadata = {k: v for k, v in details.invocation_metadata if isinstance(v, str)}
        if handler.response_streaming:
            inner = handler.stream_stream if handler.request_streaming else handler.unary_stream

            async def stream(request: Any, context: Any) -> Any:
                with self._telemetry.rpc_span(method, metadata):
                    try:
                        outcome = inner(request, context)
                        if inspect.isasyncgen(outcome):
                            try:
                                async for response in outcome:
                                    yield response
                            finally:
                                await outcome.aclose()
                        else:
                            await outcome
                    except Exception as err:  # noqa: BLE001 - the boundary: whatever a servicer raises becomes a status here
                        await _abort(context, method, err)

            make = grpc.stream_stream_rpc_method_handler if handler.request_streaming else grpc.unary_stream_rpc_method_handler
            return make(stream, handler.request_deserializer, handler.response_serializer)
        inner = handler.stream_unary if handler.request_streaming else handler.unary_unary

        async def unary(request: Any, context: Any) -> Any:
            with self._telemetry.rpc_span(method, metadata):
                try:
                    return await inner(request, context)
                except Exception as err:  # noqa: BLE001 - as above
                    await _abort(context, method, err)

        make = grpc.stream_unary_rpc_method_handler if handler.request_streaming else grpc.unary_unary_rpc_method_handler
        return make(unary, handler.request_deserializer, handler.response_serializer)


async def _abort(context: Any, method: str, err: Exception) -> None:
    """End the call with the status of `err`. Does not return."""
    if isinstance(err, grpc.aio.AbortError):
        raise err
    if isinstance(err, InferenceError) and err.grpc_code is not ErrorCode.INTERNAL:
        log.debug("call refused", method=method, reason=err.reason, message=err.message)
    else:
        log.error("call failed", method=method, exc_info=err)
    await context.abort_with_status(rpc_status.to_status(status_from_error(err)))


class RpcServer:
    """One gRPC server: `add` services, `start`, `set_serving`, `stop`.

    Args:
        host: Address to bind.
        port: Port to bind; 0 picks a free one.
        telemetry: Where spans go.
    """

    def __init__(self, host: str, port: int, telemetry: Telemetry) -> None:
        self._host, self._port, self._telemetry = host, port, telemetry
        self._server: grpc.aio.Server | None = None  # made by start: one that never ran complains when it is collected
        self._health: Any = health.aio.HealthServicer()  # type: ignore[attr-defined]
        self._services: list[tuple[Callable[[Any, Any], None], object]] = [
            (health_pb2_grpc.add_HealthServicer_to_server, self._health)
        ]
        self._names = [reflection.SERVICE_NAME, health.SERVICE_NAME]
        self.address = ""

    def add(self, register: Callable[[Any, Any], None], servicer: object, name: str) -> None:
        """Add a service.

        Args:
            register: The generated `add_…Servicer_to_server`.
            servicer: The implementation.
            name: Full name, for health and reflection, e.g. "inference_runtime.v1.EngineService".
        """
        self._services.append((register, servicer))
        self._names.append(name)

    async def start(self) -> str:
        """Bind and serve (health: NOT_SERVING until `set_serving(True)`). Returns host:port as bound.

        Raises:
            ServerError: The port is taken.
        """
        server = grpc.aio.server(
            interceptors=[_Boundary(self._telemetry)],
            options=[
                *PRESETS,
                ("grpc.http2.max_concurrent_streams", MAX_CONCURRENT_STREAMS),
                ("grpc.max_metadata_size", MAX_METADATA_BYTES),
                ("grpc.so_reuseport", 0),
            ],
        )
        for register, servicer in self._services:
            register(servicer, server)
        reflection.enable_server_reflection(self._names, server)
        try:
            port = server.add_insecure_port(f"{self._host}:{self._port}")
        except RuntimeError as err:
            await server.stop(None)
            raise ServerError(f"cannot listen on {self._host}:{self._port}: the port is taken; choose another rpc.port") from err
        await server.start()
        self._server = server
        await self.set_serving(False)
        self.address = f"{self._host}:{port}"
        return self.address

    async def set_serving(self, serving: bool) -> None:
        """Set what the health service answers, for the server as a whole and for each service."""
        state = health_pb2.HealthCheckResponse.SERVING if serving else health_pb2.HealthCheckResponse.NOT_SERVING
        for name in ["", *self._names[2:]]:
            await self._health.set(name, state)

    async def stop(self, grace_s: float) -> None:
        """Stop taking calls, send clients elsewhere (GOAWAY), let running calls end within `grace_s` seconds, then cancel them.

        May be called again while it waits: the shorter time counts.
        """
        await self._health.enter_graceful_shutdown()
        if self._server is not None:
            await self._server.stop(grace_s)
