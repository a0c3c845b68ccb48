"""GatewayService: the gRPC door. Translates and delegates to the same requests that the HTTP door uses."""

from __future__ import annotations

import asyncio
import collections
from collections.abc import AsyncIterator, Sequence
from typing import TYPE_CHECKING

from inference_runtime.errors import Backpressure, BadRequest, InferenceError
from inference_runtime.rpc import remaining_s
from inference_runtime.v1 import engine_service_pb2, gateway_service_pb2, gateway_service_pb2_grpc
from inference_runtime.wire import request_from_proto, seconds
from services.gateway.auth import KeyRing
from services.gateway.live import LiveRequests, new_id
from services.gateway.needs import needs_of
from services.gateway.routes import RouteTable

if TYPE_CHECKING:
    import grpc

    from services.gateway.choices import Choices
    from services.gateway.request import Request

    Context = grpc.aio.ServicerContext[object, object]

__all__ = ["GatewayService"]

GenerateResponse = gateway_service_pb2.GenerateResponse
ChunkDetail = engine_service_pb2.ChunkDetail

#: Chunks that may wait for a caller before it is cut off.
MAX_UNREAD_CHUNKS = 8192
#: Trailing metadata of an answer that went on from another attempt: how often.
RESUMED = "x-inference-resumed"
#: Longest request id that a caller may bring.
MAX_ID_CHARS = 128


class _Call:
    """Keeps chunks for the one call that reads them. Bounded: a caller that stops reading loses its request."""

    def __init__(self, request_id: str, deployment: str, choices: int) -> None:
        self.request_id, self.deployment = request_id, deployment
        self._choices = self._open = choices
        self._chunks: collections.deque[GenerateResponse] = collections.deque()
        self._wake = asyncio.Event()
        self._error: InferenceError | None = None
        self.request: Request | Choices  # set by the servicer before anything is delivered

    def add(self, response: GenerateResponse) -> None:
        """Keep a chunk."""
        self._chunks.append(response)
        self._wake.set()
        if len(self._chunks) > MAX_UNREAD_CHUNKS:
            self.request.abandon(Backpressure(f"the caller left {MAX_UNREAD_CHUNKS} chunks unread"))

    def end_choice(self, response: GenerateResponse) -> None:
        """Keep the last chunk of a choice. The last one of all carries the counts of the whole request."""
        self._open -= 1
        if self._open:
            response.detail.ClearField("usage")
        elif self._choices > 1:
            request, usage = self.request, response.detail.usage
            usage.input_tokens, usage.output_tokens = request.input_tokens, request.output_tokens
            usage.reasoning_tokens, usage.cached_input_tokens = request.reasoning_tokens, request.cached_input_tokens
        self.add(response)

    def fail(self, error: InferenceError) -> None:
        """The call ends with this, after what is kept."""
        self._error = error
        self._wake.set()

    async def chunks(self) -> AsyncIterator[GenerateResponse]:
        """The chunks, to the end. Raises the error that ended them."""
        while True:
            while self._chunks:
                yield self._chunks.popleft()
            if self._error is not None:
                raise self._error
            if not self._open:
                return
            self._wake.clear()
            await self._wake.wait()


class _CallSink:
    """One choice of a call's answer."""

    def __init__(self, call: _Call, choice: int) -> None:
        self._call, self._choice = call, choice

    def token(self, index: int, token: int, text: str) -> None:
        """See `Sink`."""
        call = self._call
        call.add(
            GenerateResponse(
                request_id=call.request_id,
                choice=self._choice,
                index=index,
                token_ids=(token,),
                text=text,
                deployment=call.deployment,
            )
        )

    def chunk(self, index: int, tokens: Sequence[int], text: str, detail: ChunkDetail | None, done: bool) -> None:
        """See `Sink`."""
        call = self._call
        response = GenerateResponse(
            request_id=call.request_id, choice=self._choice, index=index, token_ids=tokens, text=text, deployment=call.deployment
        )
        if detail is not None:
            response.detail.CopyFrom(detail)
            response.detail.row = 0
        if done:
            call.end_choice(response)
        else:
            call.add(response)

    def fail(self, error: InferenceError) -> None:
        """See `Sink`."""
        self._call.fail(error)

    def hold(self) -> None:
        """Chunks wait in a queue anyway."""

    def release(self) -> None:
        """Chunks wait in a queue anyway."""

    def keep_alive(self) -> None:
        """gRPC keeps its own connections alive."""

    def resumed(self, count: int) -> None:
        """Trailing metadata tells, at the end."""


class GatewayService(gateway_service_pb2_grpc.GatewayServiceServicer):
    """The servicer."""

    def __init__(self, live: LiveRequests, table: RouteTable, keys: KeyRing) -> None:
        self._live, self._table, self._keys = live, table, keys

    async def Generate(
        self, request: gateway_service_pb2.GenerateRequest, context: Context
    ) -> AsyncIterator[gateway_service_pb2.GenerateResponse]:
        """Run one generation."""
        tenant = self._authenticate(context)
        request_from_proto(request.request)  # checks it
        if len(request.request.request_id) > MAX_ID_CHARS:
            raise BadRequest(f"request_id has more than {MAX_ID_CHARS} characters", param="request_id")
        submission = engine_service_pb2.Submission(request=request.request)
        generation = submission.request
        generation.request_id = generation.request_id or new_id()
        if tenant:
            generation.tenant = tenant
        left_s = remaining_s(context)
        limit_s = float("inf") if left_s is None else left_s
        if request.HasField("timeout"):
            limit_s = min(limit_s, seconds(request.timeout))
        metadata = {key: value for key, value in context.invocation_metadata() or () if isinstance(value, str)}
        choices = generation.sampling.n or 1
        call = _Call(generation.request_id, generation.deployment, choices)
        sinks = [_CallSink(call, number) for number in range(choices)]
        live = call.request = self._live.begin_choices(
            submission,
            sinks,
            shows_at_once=True,
            needs=needs_of(generation.sampling),
            idempotent=generation.idempotent if generation.HasField("idempotent") else True,
            traceparent=metadata.get("traceparent", ""),
            time_limit_s=limit_s,
        )
        try:
            live.begin()
            async for response in call.chunks():
                yield response
            if live.resumptions:
                context.set_trailing_metadata(((RESUMED, str(live.resumptions)),))
        finally:
            live.cancel()

    async def ListModels(
        self, request: gateway_service_pb2.ListModelsRequest, context: Context
    ) -> gateway_service_pb2.ListModelsResponse:
        """Name the deployments."""
        self._authenticate(context)
        models = [
            gateway_service_pb2.Model(
                id=route.deployment,
                runtime=route.runtime,
                max_context_tokens=route.max_context_tokens,
                ready_replicas=sum(target.usable for target in route.targets),
            )
            for route in sorted(self._table.routes.values(), key=lambda r: r.deployment)
        ]
        return gateway_service_pb2.ListModelsResponse(models=models)

    def _authenticate(self, context: Context) -> str:
        """Whose call it is. Raises Unauthorized."""
        if self._keys.open:
            return ""
        metadata = {key: value for key, value in context.invocation_metadata() or () if isinstance(value, str)}
        return self._keys.check(metadata.get("authorization", "").encode(), metadata.get("x-api-key", "").encode())
