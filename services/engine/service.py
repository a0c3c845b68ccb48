"""EngineService: translates between the wire and the engine, and delegates."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

import grpc

from inference_runtime.errors import InferenceError, RequestCancelled
from inference_runtime.generation import TokenChunk
from inference_runtime.rpc import remaining_s
from inference_runtime.telemetry import Gauge, get_logger
from inference_runtime.v1 import engine_service_pb2, engine_service_pb2_grpc
from services.engine.replicas import Replicas
from services.engine.session import Session, chunk_detail
from services.engine.stream import Stream

if TYPE_CHECKING:
    Context = grpc.aio.ServicerContext[object, object]

__all__ = ["EngineService"]

log = get_logger(__name__)

#: Tokens that the reader of an Execute call may be behind what was written for it. Beyond them the stream keeps what comes, and
#: is cut off when that is too much or takes too long.
EXECUTE_CREDITS = 256
#: Seconds between two looks whether sessions have ended.
END_CHECK_S = 0.01


class _Pipe:
    """An Outlet that one reader drains. Bounded by the stream's credit: it holds EXECUTE_CREDITS tokens at most."""

    def __init__(self) -> None:
        self._items: deque[TokenChunk | InferenceError] = deque()
        self._wake = asyncio.Event()

    def admitted(self, stream: Stream, input_tokens: int) -> None:
        """The reader learns it from the usage at the end."""

    def chunk(self, stream: Stream, chunk: TokenChunk) -> None:
        """Keep a chunk for the reader."""
        self._items.append(chunk)
        self._wake.set()

    def error(self, stream: Stream, err: InferenceError) -> None:
        """Keep the error for the reader."""
        self._items.append(err)
        self._wake.set()

    async def next(self) -> TokenChunk:
        """The next chunk. Raises the error that ended the stream."""
        while not self._items:
            self._wake.clear()
            await self._wake.wait()
        item = self._items.popleft()
        if isinstance(item, InferenceError):
            raise item
        return item


class EngineService(engine_service_pb2_grpc.EngineServiceServicer):
    """The servicer.

    Args:
        replicas: What the engine hosts.
        session_buffer_chunks: Chunks that may wait for the reader of one session.
        sessions: Gauge of open sessions.
        opened: Set once sessions are welcomed; None: from the beginning. Before that nothing is known that could be run.
    """

    def __init__(
        self, replicas: Replicas, session_buffer_chunks: int, sessions: Gauge, opened: asyncio.Event | None = None
    ) -> None:
        self._replicas, self._buffer, self._opened = replicas, session_buffer_chunks, opened
        #: Open sessions.
        self.sessions: set[Session] = set()
        self._gauge = sessions
        replicas.callers = lambda: len(self.sessions)
        replicas.on_draining.append(self._notify)

    async def Execute(
        self, request: engine_service_pb2.ExecuteRequest, context: Context
    ) -> AsyncIterator[engine_service_pb2.ExecuteResponse]:
        """Run one generation."""
        submission = engine_service_pb2.Submission()
        submission.CopyFrom(request.submission)
        submission.credits = EXECUTE_CREDITS  # granted again as gRPC takes the chunks
        left_s = remaining_s(context)
        if left_s is not None and not submission.HasField("time_left"):
            submission.time_left.FromNanoseconds(int(left_s * 1e9))
        pipe = _Pipe()
        stream = self._replicas.submit(submission, pipe)
        try:
            finished = False
            while not finished:
                chunk = await pipe.next()
                finished = chunk.finish_reason is not None
                response = engine_service_pb2.ExecuteResponse(
                    epoch=submission.epoch,
                    choice=chunk.choice,
                    index=chunk.index,
                    token_ids=chunk.token_ids,
                    text=chunk.text,
                    context_generation=stream.context_generation,
                )
                if finished or chunk.logprobs:
                    response.detail.CopyFrom(chunk_detail(chunk, 0))
                yield response
                stream.grant(len(chunk.token_ids))
        finally:
            stream.cancel()

    async def Session(self, request_iterator: object, context: Context) -> None:
        """Carry many generations."""
        session = Session(self._replicas, self._buffer)

        async def write(response: engine_service_pb2.SessionResponse) -> None:
            try:
                await context.write(response)
            except grpc.aio.BaseError as err:  # what grpc raises in a write when the call is gone
                raise RequestCancelled("the gateway left") from err

        self.sessions.add(session)
        self._gauge.set(len(self.sessions))
        try:
            if self._opened is not None:
                await self._opened.wait()
            await session.run(context.read, write)
        except RequestCancelled:
            log.info("session ended: its gateway left", gateway=session.gateway_id)
        finally:
            self.sessions.discard(session)
            self._gauge.set(len(self.sessions))

    async def GetEngine(
        self, request: engine_service_pb2.GetEngineRequest, context: object
    ) -> engine_service_pb2.GetEngineResponse:
        """Describe the engine."""
        return engine_service_pb2.GetEngineResponse(
            engine=self._replicas.engine, replicas=self._replicas.describe(), loads=self._replicas.loads()
        )

    async def RebuildReplica(
        self, request: engine_service_pb2.RebuildReplicaRequest, context: object
    ) -> engine_service_pb2.RebuildReplicaResponse:
        """Replace a replica's context, and answer once the new one serves."""
        generation = await self._replicas.rebuild(request.replica_id)
        return engine_service_pb2.RebuildReplicaResponse(context_generation=generation)

    async def ResetReplica(
        self, request: engine_service_pb2.ResetReplicaRequest, context: object
    ) -> engine_service_pb2.ResetReplicaResponse:
        """Arm a replica again that gave up."""
        self._replicas.reset(request.replica_id)
        return engine_service_pb2.ResetReplicaResponse()

    async def DrainEngine(
        self, request: engine_service_pb2.DrainEngineRequest, context: object
    ) -> engine_service_pb2.DrainEngineResponse:
        """Take the engine out of service, or put it back."""
        log.info("an operator asks", undo=request.undo)
        if request.undo:
            self._replicas.open()
        else:
            self._replicas.close()
        return engine_service_pb2.DrainEngineResponse(requests=self._replicas.requests)

    def _notify(self, draining: bool) -> None:
        for session in self.sessions:
            session.notify(draining)

    async def end_sessions(self, timeout_s: float) -> None:
        """End every session once what waits for its gateway is written; give up on those that do not read it in time."""
        for session in self.sessions:
            session.finish()
        try:
            async with asyncio.timeout(timeout_s):
                while self.sessions:  # noqa: ASYNC110 - the sessions belong to grpc's tasks
                    await asyncio.sleep(END_CHECK_S)
        except TimeoutError:
            log.warning("sessions cut off: their gateways do not read", sessions=len(self.sessions))
