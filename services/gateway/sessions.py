"""One Session stream for each engine: everything for an engine leaves on it, every chunk comes back on it.

What came up in one turn of the loop leaves as one message. A frame is read by columns and handed on row by row, without an object
per token. When a stream dies, every request on it is told in the same turn.
"""

from __future__ import annotations

import asyncio
import itertools
import random
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Protocol

import grpc

from inference_runtime.errors import Draining, EngineLost, InferenceError, Internal
from inference_runtime.rpc import error_from_rpc, open_channel
from inference_runtime.telemetry import MetricSet, get_logger
from inference_runtime.v1 import engine_service_pb2
from services.gateway.silence import Ear

__all__ = ["PROTOCOL_VERSION", "Receiver", "Session", "SessionPool", "encoded", "messages"]

log = get_logger(__name__)

#: Version of the Session contract that this gateway speaks.
PROTOCOL_VERSION = 1
#: An engine that does not welcome a session within this time is not there, seconds.
WELCOME_TIMEOUT_S = 5.0
#: Pauses between two tries to open a session, seconds.
FIRST_PAUSE_S = 0.05
LONGEST_PAUSE_S = 1.0

#: Least time between two messages to one engine, seconds. The first after a pause leaves at once; under load, what comes up
#: within this time of the last message leaves together. A busy engine takes it at its next step, which is no sooner.
MESSAGE_SPACING_S = 0.002
#: Submissions of one message, bytes together. One body may have 8 MiB and a message 16: three that leave together would end the
#: stream for everyone on it.
BATCH_BYTES = 2 << 20

#: `SessionRequest.submissions` on the wire: its tag, before the length and the bytes of each.
SUBMISSIONS_TAG = engine_service_pb2.SessionRequest(submissions=[{}]).SerializeToString()[:1]
_BYTES = [bytes((value,)) for value in range(256)]
METHOD = "/inference_runtime.v1.EngineService/Session"

Submission = engine_service_pb2.Submission
ChunkDetail = engine_service_pb2.ChunkDetail
SessionResponse = engine_service_pb2.SessionResponse


class Receiver(Protocol):
    """A request, as a session sees it."""

    def on_admitted(self, input_tokens: int) -> None:
        """The engine took it, and knows the length of its prompt."""
        ...

    def on_token(self, epoch: int, index: int, token: int, text: str) -> None:
        """One token, and nothing else."""
        ...

    def on_chunk(self, epoch: int, index: int, tokens: Sequence[int], text: str, detail: ChunkDetail | None) -> None:
        """Any other chunk."""
        ...

    def on_lost(self, error: InferenceError) -> None:
        """The stream is gone, and what it carried with it."""
        ...

    def hold(self) -> None:
        """Several chunks follow at once."""
        ...

    def release(self) -> None:
        """That was all of them."""
        ...


class Session:
    """The stream to one engine. `run` keeps it open; `submit` and `cancel` only note what goes out next."""

    def __init__(self, engine_id: str, address: str, gateway_id: str, on_up: Callable[[], None], metrics: MetricSet) -> None:
        self.engine_id, self.address = engine_id, address
        self._hello = engine_service_pb2.SessionHello(gateway_id=gateway_id, protocol_version=PROTOCOL_VERSION)
        self._on_up = on_up
        self._open = metrics.gauge("inference_sessions")
        self._dropped = metrics.counter("inference_frames_dropped_total", "cause")
        self._streams: dict[int, Receiver] = {}
        self._submissions: list[bytes] = []
        self._cancellations: list[engine_service_pb2.Cancellation] = []
        self._wake = asyncio.Event()
        self._ids = itertools.count(1)
        #: It takes submissions. False before it is open and while its engine drains.
        self.up = False
        self._connected = False
        #: No longer in the routing table: ends when its last request does.
        self.retired = False
        self._ear = Ear()
        self._answers_pings = False
        self._ping_due = False
        self._pings = itertools.count(1)

    @property
    def idle(self) -> bool:
        """Nothing runs on it."""
        return not self._streams

    @property
    def silent(self) -> bool:
        """Its engine answers nothing at present, though it was asked to."""
        return self._ear.silent

    @property
    def silence(self) -> int:
        """Quarters of a second for which a ping has not been answered."""
        return self._ear.silence

    def listen(self) -> None:
        """Take notice of what was heard lately. Called by the sweeper."""
        if not (self._connected and self._answers_pings):
            return
        was_silent = self._ear.silent
        if self._ear.sweep(expecting=bool(self._streams)):
            self._ping_due = True
            self._wake.set()
        elif self._ear.silent != was_silent:
            log.warning("engine silent" if self._ear.silent else "engine heard again", engine=self.engine_id)

    def submit(self, submission: Submission, receiver: Receiver) -> int:
        """Send a submission with the next message. Returns the stream id it got."""
        stream_id = submission.stream_id = next(self._ids)
        self._streams[stream_id] = receiver
        self._submissions.append(encoded(submission))
        self._wake.set()
        return stream_id

    def cancel(self, stream_id: int, epoch: int) -> None:
        """Stop a generation; nothing of it is delivered any more. Harmless for one that is over."""
        if self._streams.pop(stream_id, None) is not None and self._connected:
            self._cancellations.append(engine_service_pb2.Cancellation(stream_id=stream_id, epoch=epoch))
            self._wake.set()

    def forget(self, stream_id: int) -> None:
        """The generation is over."""
        self._streams.pop(stream_id, None)

    async def run(self) -> None:
        """Keep the stream open until retired and idle, or cancelled. Requests on a stream that breaks are told at once."""
        pause_s = FIRST_PAUSE_S
        error: InferenceError = EngineLost(f"the session to engine {self.engine_id} was given up")
        try:
            while not self.retired:
                try:
                    await self._live()
                    error = EngineLost(f"engine {self.engine_id} closed its stream")
                except Draining as err:
                    error = err  # in order: it was told before, and whatever is still here costs nobody anything
                except InferenceError as err:
                    error = EngineLost(f"engine {self.engine_id} at {self.address} cannot be reached: {err.message}")
                pause_s = FIRST_PAUSE_S if self._end(error) else min(pause_s * 2, LONGEST_PAUSE_S)
                if not self.retired:
                    await asyncio.sleep(pause_s * random.uniform(0.5, 1.0))
        finally:
            self._end(error)  # also when cancelled: nobody may wait on a stream that is no more

    async def _live(self) -> None:
        """One life of the stream. Raises the reason for its end."""
        channel = open_channel(self.address)
        try:
            async with asyncio.TaskGroup() as tasks:
                # Bytes out: a submission is encoded once, as it is handed in, and a message is those bytes end to end.
                session = channel.stream_stream(METHOD, None, SessionResponse.FromString)
                await self._converse(session(None), tasks)
        except ExceptionGroup as group:
            cause = group.exceptions[0]
            if isinstance(cause, grpc.aio.AioRpcError):
                raise error_from_rpc(cause) from cause
            if isinstance(cause, asyncio.InvalidStateError):  # a write to a stream that has just ended
                raise EngineLost("the stream ended") from cause
            raise cause from None
        finally:
            await channel.close(None)

    async def _converse(self, call: grpc.aio.StreamStreamCall, tasks: asyncio.TaskGroup) -> None:  # type: ignore[type-arg]
        try:
            async with asyncio.timeout(WELCOME_TIMEOUT_S):
                await call.write(engine_service_pb2.SessionRequest(hello=self._hello).SerializeToString())
                first = await call.read()
        except TimeoutError as err:
            raise EngineLost("no welcome in time") from err
        if not isinstance(first, SessionResponse) or not first.HasField("welcome"):
            raise EngineLost("its first message was no welcome")
        self._answers_pings = first.welcome.answers_pings
        self._begin(takes=not first.draining)
        writer = tasks.create_task(self._write(call))
        while isinstance(message := await call.read(), SessionResponse):
            self._ear.heard = True
            if message.HasField("frame"):
                self._dispatch(message.frame)
            if message.draining:
                self.up = False
            elif message.accepting:
                self.up = True
                self._on_up()
        writer.cancel()

    async def _write(self, call: grpc.aio.StreamStreamCall) -> None:  # type: ignore[type-arg]
        loop = asyncio.get_running_loop()
        next_at = 0.0
        while True:
            await self._wake.wait()
            if (pause_s := next_at - loop.time()) > 0:
                await asyncio.sleep(pause_s)
            next_at = loop.time() + MESSAGE_SPACING_S
            self._wake.clear()
            submissions, self._submissions = self._submissions, []
            cancellations, self._cancellations = self._cancellations, []
            if cancellations or self._ping_due:
                ping, self._ping_due = next(self._pings) if self._ping_due else 0, False
                others = engine_service_pb2.SessionRequest(cancellations=cancellations, ping=ping)
                submissions.append(others.SerializeToString())
            for message in messages(submissions):
                await call.write(message)

    def _begin(self, *, takes: bool) -> None:
        self.up, self._connected = takes, True
        self._open.inc()
        log.info("session open", engine=self.engine_id, address=self.address)
        self._on_up()

    def _end(self, error: InferenceError) -> bool:
        """Tell every request on the stream. Returns whether it had been open."""
        was_open, self.up, self._connected = self._connected, False, False
        self._ear.reset()
        self._ping_due = False
        if was_open:
            self._open.inc(by=-1)
            say = log.info if isinstance(error, Draining) else log.warning
            say("session lost", engine=self.engine_id, requests=len(self._streams), why=error.message)
        streams, self._streams = self._streams, {}
        self._submissions.clear()
        self._cancellations.clear()
        for receiver in streams.values():
            receiver.on_lost(error)
        return was_open

    # --- frames ------------------------------------------------------------------------------------------------------------

    def _dispatch(self, frame: engine_service_pb2.ChunkFrame) -> None:
        """Hand the rows of a frame to their requests."""
        if frame.admitted_ids:
            for stream_id, input_tokens in zip(frame.admitted_ids, frame.admitted_input_tokens, strict=True):
                if (admitted := self._streams.get(stream_id)) is not None:
                    admitted.on_admitted(input_tokens)
        ids = list(frame.stream_ids)
        if len(ids) > 1 and len(set(ids)) != len(ids):
            held = [r for stream_id, n in Counter(ids).items() if n > 1 and (r := self._streams.get(stream_id)) is not None]
            for receiver in held:
                receiver.hold()
            self._deliver(ids, frame)
            for receiver in held:
                receiver.release()
        else:
            self._deliver(ids, frame)

    def _deliver(self, ids: list[int], frame: engine_service_pb2.ChunkFrame) -> None:
        get = self._streams.get
        indexes: Sequence[int] = frame.indexes or (0,) * len(ids)
        texts: Sequence[str] = frame.texts or ("",) * len(ids)
        epochs: Sequence[int] = frame.epochs or (0,) * len(ids)
        unknown = 0
        if not frame.details and not frame.token_counts:
            for stream_id, epoch, index, token, text in zip(ids, epochs, indexes, frame.token_ids, texts, strict=True):
                receiver = get(stream_id)
                if receiver is None:
                    unknown += 1
                else:
                    try:
                        receiver.on_token(epoch, index, token, text)
                    except Exception as err:  # noqa: BLE001 - one request's fault must not take the others of the stream with it
                        self._fault(stream_id, receiver, err)
        else:
            tokens = list(frame.token_ids)
            counts: Sequence[int] = frame.token_counts or (1,) * len(ids)
            details = {detail.row: detail for detail in frame.details}
            start = 0
            for row, (stream_id, epoch, index, text, count) in enumerate(zip(ids, epochs, indexes, texts, counts, strict=True)):
                at, start = start, start + count
                receiver = get(stream_id)
                if receiver is None:
                    unknown += 1
                    continue
                detail = details.get(row)
                try:
                    if detail is None and count == 1:
                        receiver.on_token(epoch, index, tokens[at], text)
                    else:
                        receiver.on_chunk(epoch, index, tokens[at:start], text, detail)
                except Exception as err:  # noqa: BLE001 - as above
                    self._fault(stream_id, receiver, err)
        if unknown:
            self._dropped.inc("unknown_stream", by=unknown)

    def _fault(self, stream_id: int, receiver: Receiver, err: Exception) -> None:
        log.error("request failed by a fault of ours", exc_info=err, stream_id=stream_id)
        self._streams.pop(stream_id, None)
        receiver.on_lost(Internal(str(err)))


def encoded(submission: Submission) -> bytes:
    """A submission as a message of its own. Such messages put end to end are one message with all of them."""
    body = submission.SerializeToString()
    size, length = len(body), b""
    while size > 127:
        length += _BYTES[size & 127 | 128]
        size >>= 7
    return SUBMISSIONS_TAG + length + _BYTES[size] + body


def messages(parts: list[bytes]) -> list[bytes]:
    """Parts put together to as few messages as may be, in order. Nearly always that is one."""
    whole = b"".join(parts)
    if len(whole) <= BATCH_BYTES or len(parts) == 1:
        return [whole] if whole else []
    found: list[bytes] = []
    begin = size = 0
    for at, part in enumerate(parts):
        if size and size + len(part) > BATCH_BYTES:
            found.append(b"".join(parts[begin:at]))
            begin, size = at, 0
        size += len(part)
    return [*found, b"".join(parts[begin:])]


class SessionPool:
    """The sessions of one worker, by (engine id, address)."""

    def __init__(self, gateway_id: str, on_up: Callable[[], None], metrics: MetricSet) -> None:
        self._gateway_id, self._on_up, self._metrics = gateway_id, on_up, metrics
        self._sessions: dict[tuple[str, str], Session] = {}
        self._starting: asyncio.Queue[Session] = asyncio.Queue()

    def link_to(self, engine_id: str, address: str) -> Session:
        """The session to an engine, opened if there is none."""
        session = self._sessions.get((engine_id, address))
        if session is None or session.retired:
            session = self._sessions[engine_id, address] = Session(
                engine_id, address, self._gateway_id, self._on_up, self._metrics
            )
            self._starting.put_nowait(session)
        return session

    def keep(self, engines: set[tuple[str, str]]) -> None:
        """Let go of sessions to engines that are in no route any more, once nothing runs on them."""
        for key, session in list(self._sessions.items()):
            if key not in engines and session.idle:
                session.retired, session.up = True, False
                del self._sessions[key]

    async def run(self) -> None:
        """Run every session until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            running: dict[Session, asyncio.Task[None]] = {}
            while True:
                try:
                    async with asyncio.timeout(1.0):
                        session = await self._starting.get()
                    running[session] = tasks.create_task(session.run(), name=f"session {session.engine_id}")
                except TimeoutError:
                    for session, task in list(running.items()):
                        if session.retired:
                            task.cancel()
                        if task.done():
                            del running[session]
