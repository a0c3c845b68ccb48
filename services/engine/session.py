"""One gateway's session: many generations over one stream, and one message for each step that carries the chunks of all of them.

Chunks go into columns as they are made. While a message is being written, whatever is made meanwhile piles up and leaves as the
next message, so a slow link costs fewer, larger messages and never delays a step. What may pile up is bounded: a session whose
reader stalls beyond the bound is ended.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Protocol

from inference_runtime.errors import Backpressure, BadRequest, Draining, InferenceError
from inference_runtime.generation import TokenChunk
from inference_runtime.rpc import status_from_error
from inference_runtime.telemetry import get_logger
from inference_runtime.v1 import common_pb2, engine_service_pb2
from inference_runtime.wire import logprob_to_proto, usage_to_proto
from services.engine.stream import Outlet, Stream

__all__ = ["PROTOCOL_VERSION", "Session", "SessionHost", "chunk_detail", "error_detail"]

log = get_logger(__name__)

#: Least time between two frames of a session, seconds. The first after a pause leaves at once; steps that follow each other
#: faster than this share a frame. A message costs each side more than all its rows.
MESSAGE_SPACING_S = 0.002
#: Version of the session contract that this engine speaks.
PROTOCOL_VERSION = 1
#: Rows of one message at most. Keeps a message that follows a pause far below the size limit.
MAX_ROWS = 4096
#: A gateway hears of an admission with the next rows for it, and after this time at the latest, seconds: soon enough for a client
#: that leaves during a long prefill, and late enough to cost no message of its own where tokens flow.
ADMITTED_WITHIN_S = 0.05


class SessionHost(Protocol):
    """The engine behind a session."""

    engine: common_pb2.Engine

    @property
    def draining(self) -> bool:
        """It closes: its peers are to submit nothing more."""
        ...

    def submit(self, proto: engine_service_pb2.Submission, outlet: Outlet) -> Stream:
        """Admit a generation or raise a typed refusal."""
        ...


def chunk_detail(chunk: TokenChunk, row: int) -> engine_service_pb2.ChunkDetail:
    """What this chunk has besides tokens and text."""
    detail = engine_service_pb2.ChunkDetail(row=row)
    if chunk.finish_reason is not None:
        detail.finish_reason = chunk.finish_reason.value  # type: ignore[assignment]
        detail.stop_sequence = chunk.stop_sequence
    if chunk.usage is not None:
        detail.usage.CopyFrom(usage_to_proto(chunk.usage))
    if chunk.logprobs:
        detail.logprobs.extend(logprob_to_proto(p) for p in chunk.logprobs)
    return detail


def error_detail(err: InferenceError, row: int, stream: Stream | None = None) -> engine_service_pb2.ChunkDetail:
    """The end of a stream by an error, with the tokens that were counted until then."""
    usage = usage_to_proto(stream.choice.usage()) if stream is not None and stream.choice is not None else None
    return engine_service_pb2.ChunkDetail(row=row, error=status_from_error(err), usage=usage)


class _Columns:
    """Rows of one message in the making."""

    __slots__ = ("admitted_ids", "admitted_tokens", "counts", "details", "epochs", "indexes", "stream_ids", "texts", "token_ids")

    def __init__(self) -> None:
        self.stream_ids: list[int] = []
        self.epochs: list[int] = []
        self.indexes: list[int] = []
        self.counts: list[int] = []
        self.token_ids: list[int] = []
        self.texts: list[str] = []
        self.details: list[engine_service_pb2.ChunkDetail] = []
        self.admitted_ids: list[int] = []
        self.admitted_tokens: list[int] = []

    def frame(self) -> engine_service_pb2.SessionResponse:
        """The message. Columns that hold nothing but their default stay empty."""
        response = engine_service_pb2.SessionResponse()
        frame = response.frame
        frame.stream_ids.extend(self.stream_ids)
        frame.indexes.extend(self.indexes)
        frame.token_ids.extend(self.token_ids)
        if any(self.texts):
            frame.texts.extend(self.texts)
        if self.counts.count(1) != len(self.counts):
            frame.token_counts.extend(self.counts)
        if any(self.epochs):
            frame.epochs.extend(self.epochs)
        if self.details:
            frame.details.extend(self.details)
        if self.admitted_ids:
            frame.admitted_ids.extend(self.admitted_ids)
            frame.admitted_input_tokens.extend(self.admitted_tokens)
        return response


class Session:
    """One session, from hello to the end of its stream. An Outlet for all its generations.

    Args:
        host: The engine.
        max_waiting: Chunks that may wait for the reader.
    """

    def __init__(self, host: SessionHost, max_waiting: int) -> None:
        self._host, self._max_waiting = host, max_waiting
        self._page = min(MAX_ROWS, max_waiting)
        self._streams: dict[int, Stream] = {}
        self._first: deque[engine_service_pb2.SessionResponse] = deque()  # messages that go before all chunks
        self._full: deque[_Columns] = deque()
        self._columns = _Columns()
        self._wake = asyncio.Event()
        self._overrun = asyncio.Event()
        self._welcomed = self._finishing = False
        self._tell_admitted: asyncio.TimerHandle | None = None
        self.gateway_id = ""

    @property
    def waiting(self) -> int:
        """Chunks that wait for the reader."""
        return len(self._full) * self._page + len(self._columns.stream_ids)

    async def run(
        self,
        read: Callable[[], Awaitable[object]],
        write: Callable[[engine_service_pb2.SessionResponse], Awaitable[None]],
    ) -> None:
        """Serve until the peer ends the stream.

        Args:
            read: Gives the next message; anything else than a SessionRequest is the end.
            write: Sends a message; waits while the peer does not read. Raises RequestCancelled when the peer is gone.

        Raises:
            BadRequest: The first message has no hello.
            Backpressure: The peer did not read for too long.
            Draining: `finish` was called, and everything that waited is written.
            RequestCancelled: The peer is gone.

        On cancel, and at any other end: everything submitted is cancelled.
        """
        try:
            async with asyncio.TaskGroup() as group:
                writer = group.create_task(self._write(write))
                watchdog = group.create_task(self._watch_overrun())
                reader = group.create_task(self._read(read))
                await asyncio.wait([reader, writer], return_when=asyncio.FIRST_COMPLETED)
                for task in (reader, writer, watchdog):
                    task.cancel()
        except BaseExceptionGroup as group_of_errors:
            known = group_of_errors.subgroup(InferenceError)
            if known is None:
                raise
            raise known.exceptions[0] from None
        finally:
            if self._tell_admitted is not None:
                self._tell_admitted.cancel()
            streams = list(self._streams.values())
            self._streams.clear()
            for stream in streams:
                stream.cancel()
            if streams:
                log.info("session ended with running requests", gateway=self.gateway_id, cancelled=len(streams))

    def notify(self, draining: bool) -> None:
        """Tell the peer to submit nothing more, or again. One that has not said hello yet learns it from the welcome."""
        if not self._welcomed:
            return
        self._first.append(engine_service_pb2.SessionResponse(draining=draining, accepting=not draining))
        self._wake.set()

    def finish(self) -> None:
        """End it once everything that waits is written. What the peer has sent and nobody has read is not run: the end of the
        stream says that the engine drains, and the peer asks elsewhere."""
        self._finishing = True
        self._wake.set()

    # --- reading -----------------------------------------------------------------------------------------------------

    async def _read(self, read: Callable[[], Awaitable[object]]) -> None:
        message = await read()
        if not isinstance(message, engine_service_pb2.SessionRequest):
            return
        if not message.HasField("hello"):
            raise BadRequest("the first message of a session must carry a hello", param="hello")
        self.gateway_id = message.hello.gateway_id
        welcome = engine_service_pb2.SessionWelcome(
            engine_id=self._host.engine.id,
            boot_id=self._host.engine.boot_id,
            protocol_version=PROTOCOL_VERSION,
            answers_pings=True,
        )
        self._first.append(engine_service_pb2.SessionResponse(welcome=welcome, draining=self._host.draining))
        self._welcomed = True
        self._wake.set()
        while isinstance(message, engine_service_pb2.SessionRequest):
            self._handle(message)
            message = await read()

    def _handle(self, message: engine_service_pb2.SessionRequest) -> None:
        if message.ping:
            self._first.append(engine_service_pb2.SessionResponse(pong=message.ping))
            self._wake.set()
        for submission in message.submissions:
            self._submit(submission)
        for cancellation in message.cancellations:
            stream = self._streams.get(cancellation.stream_id)
            if stream is not None and stream.submission.epoch == cancellation.epoch:
                del self._streams[cancellation.stream_id]
                stream.cancel()
        for grant in message.credits:
            stream = self._streams.get(grant.stream_id)
            if stream is not None:
                stream.grant(grant.tokens)

    def _submit(self, proto: engine_service_pb2.Submission) -> None:
        stream_id = proto.stream_id
        try:
            if stream_id in self._streams:
                raise BadRequest(f"stream_id {stream_id} is in use in this session", param="stream_id")
            stream = self._host.submit(proto, self)
        except InferenceError as err:
            prefix = len(proto.generated_prefix[0].token_ids) if proto.generated_prefix else 0
            self._row(stream_id, proto.epoch, prefix, error_detail(err, len(self._columns.stream_ids)))
            return
        if not stream.ended:  # an answer that its prefix already holds is over before this line
            self._streams[stream_id] = stream

    # --- Outlet ------------------------------------------------------------------------------------------------------

    def admitted(self, stream: Stream, input_tokens: int) -> None:
        """Put the admission into the columns; it leaves with the next rows, or before long without."""
        self._columns.admitted_ids.append(stream.submission.stream_id)
        self._columns.admitted_tokens.append(input_tokens)
        if self._tell_admitted is None:
            self._tell_admitted = asyncio.get_running_loop().call_later(ADMITTED_WITHIN_S, self._tell)

    def _tell(self) -> None:
        self._tell_admitted = None
        if self._columns.admitted_ids:
            self._wake.set()

    def chunk(self, stream: Stream, chunk: TokenChunk) -> None:
        """Put a chunk into the columns."""
        submission = stream.submission
        columns = self._columns
        columns.stream_ids.append(submission.stream_id)
        columns.epochs.append(submission.epoch)
        columns.indexes.append(chunk.index)
        columns.counts.append(len(chunk.token_ids))
        columns.token_ids += chunk.token_ids
        columns.texts.append(chunk.text)
        if chunk.finish_reason is not None or chunk.logprobs:
            columns.details.append(chunk_detail(chunk, len(columns.stream_ids) - 1))
            if chunk.finish_reason is not None:
                self._streams.pop(submission.stream_id, None)
        self._added()

    def error(self, stream: Stream, err: InferenceError) -> None:
        """Put the end of a generation by an error into the columns."""
        submission = stream.submission
        self._streams.pop(submission.stream_id, None)
        detail = error_detail(err, len(self._columns.stream_ids), stream)
        self._row(submission.stream_id, submission.epoch, stream.index, detail)

    def _row(self, stream_id: int, epoch: int, index: int, detail: engine_service_pb2.ChunkDetail) -> None:
        """A row without tokens."""
        columns = self._columns
        columns.stream_ids.append(stream_id)
        columns.epochs.append(epoch)
        columns.indexes.append(index)
        columns.counts.append(0)
        columns.texts.append("")
        columns.details.append(detail)
        self._added()

    def _added(self) -> None:
        if len(self._columns.stream_ids) >= self._page:
            self._full.append(self._columns)
            self._columns = _Columns()
            if self.waiting >= self._max_waiting:
                self._overrun.set()
        self._wake.set()

    # --- writing -----------------------------------------------------------------------------------------------------

    async def _write(self, write: Callable[[engine_service_pb2.SessionResponse], Awaitable[None]]) -> None:
        loop = asyncio.get_running_loop()
        next_at = 0.0
        while True:
            await self._wake.wait()
            if (pause_s := next_at - loop.time()) > 0:
                await asyncio.sleep(pause_s)
            next_at = loop.time() + MESSAGE_SPACING_S
            self._wake.clear()
            while self._first:
                await write(self._first.popleft())
            while self._full:
                await write(self._full.popleft().frame())
            if self._columns.stream_ids or self._columns.admitted_ids:
                columns, self._columns = self._columns, _Columns()
                await write(columns.frame())
            if self._finishing and not (self._first or self.waiting):
                raise Draining("the engine shut down in order; continue elsewhere")

    async def _watch_overrun(self) -> None:
        await self._overrun.wait()
        log.warning("session ended: its reader stalls", gateway=self.gateway_id, waiting=self.waiting)
        raise Backpressure(f"the gateway did not read its session: {self.waiting} chunks waited; open a new one")
