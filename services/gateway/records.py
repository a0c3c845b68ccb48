"""What is kept of streams for clients that come back: bounded in number, bytes and time. Pure: the caller brings the time.

One store holds both the streams that ended here and the copies of other gateways' streams. `plan` decides how one goes on.
"""

from __future__ import annotations

import collections
from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from inference_runtime.errors import InferenceError
from inference_runtime.v1 import gateway_peer_service_pb2, generation_pb2
from inference_runtime.wire import duration, seconds
from services.gateway.position import Position, Seen

__all__ = ["NotResumable", "Plan", "Record", "RecordStore", "StreamNotFound", "choose", "plan"]

StreamEnd = gateway_peer_service_pb2.StreamEnd
StreamHeader = gateway_peer_service_pb2.StreamHeader
StreamRecord = gateway_peer_service_pb2.StreamRecord

#: What a client is told whose stream nobody has.
GONE = "no stream of yours has this id any more; send the request again, from the start"
#: What a record weighs besides its request and tokens, bytes.
OVERHEAD_BYTES = 1024


class StreamNotFound(InferenceError):
    """There is no such stream, or it is somebody else's, or it is too old. Which of these is not told."""

    reason = "STREAM_NOT_FOUND"
    http_status = 404
    http_type = "invalid_request_error"
    http_code = "stream_not_found"

    def __init__(self, message: str = GONE, *, retry_after_s: float | None = None, **metadata: str) -> None:
        super().__init__(message, retry_after_s=retry_after_s, **{"param": "Last-Event-ID", **metadata})


class NotResumable(InferenceError):
    """The stream is known and cannot be continued so that nothing in it is invented."""

    reason = "NOT_RESUMABLE"
    http_status = 409
    http_type = "invalid_request_error"
    http_code = "not_resumable"


class Record:
    """One stream. `header` and `now` are what they were when it was made; the rest grows.

    Args:
        header: What it is.
        now: Any clock that never goes back, seconds.
    """

    __slots__ = ("attachment", "began", "end", "extra_bytes", "header", "request_id", "revision", "tenant", "tokens", "touched")

    def __init__(self, header: StreamHeader, now: float) -> None:
        self.header = header.SerializeToString()
        self.request_id, self.tenant = header.request.request_id, header.request.tenant
        self.attachment = header.attachment
        self.tokens = array("I")
        self.revision = ""
        self.end: StreamEnd | None = None
        #: What is kept beside it, as long as it is kept. Set it before it is put into a store.
        self.extra_bytes = 0
        self.began = now - seconds(header.age)
        self.touched = now

    @property
    def size_bytes(self) -> int:
        """What it is counted as."""
        return OVERHEAD_BYTES + len(self.header) + 4 * len(self.tokens) + self.extra_bytes

    @property
    def rank(self) -> tuple[int, bool, int]:
        """The copy of a stream with the highest knows most."""
        return self.attachment, self.end is not None, len(self.tokens)

    def to_proto(self, now: float) -> StreamRecord:
        """As it travels."""
        record = StreamRecord(token_ids=self.tokens, revision=self.revision)
        record.header.MergeFromString(self.header)
        record.header.age.CopyFrom(duration(now - self.began))
        if self.end is not None:
            record.end.CopyFrom(self.end)
        return record

    @classmethod
    def from_proto(cls, proto: StreamRecord, now: float) -> Record:
        """As it arrived."""
        record = cls(proto.header, now)
        record.tokens.extend(proto.token_ids)
        record.revision = proto.revision
        record.end = proto.end if proto.HasField("end") else None
        return record


class RecordStore:
    """Records by request id, the one that was touched last at the end. What has no room any more takes the place of the oldest.

    Args:
        window_s: A record goes this long after it was touched.
        max_records: Records at most.
        max_bytes: Bytes at most, as records count themselves.
    """

    def __init__(self, window_s: float, max_records: int, max_bytes: int) -> None:
        self._window_s, self._max_records, self._max_bytes = window_s, max_records, max_bytes
        self._records: collections.OrderedDict[str, Record] = collections.OrderedDict()
        self.size_bytes = 0
        #: Records that were dropped before their time, for want of room.
        self.evicted = 0

    def __len__(self) -> int:
        return len(self._records)

    def __contains__(self, record: Record) -> bool:
        return self._records.get(record.request_id) is record

    def get(self, request_id: str, now: float) -> Record | None:
        """The record of a stream."""
        self.expire(now)
        return self._records.get(request_id)

    def put(self, record: Record, now: float) -> bool:
        """Keep a record. False where a copy that knows more is here already, or it alone is larger than the store."""
        known, size_bytes = self._records.get(record.request_id), record.size_bytes
        if (known is not None and known.rank > record.rank) or size_bytes > self._max_bytes:
            return False
        if known is not None:
            self.drop(record.request_id)
        self._records[record.request_id] = record
        self.size_bytes += size_bytes
        record.touched = now
        self._make_room(now)
        return True

    def grow(self, record: Record, tokens: Iterable[int], now: float) -> bool:
        """Add tokens to a record that is kept here. False when that was too much for the store: it is gone."""
        before = record.size_bytes
        record.tokens.extend(tokens)
        self.size_bytes += record.size_bytes - before
        record.touched = now
        self._records.move_to_end(record.request_id)
        self._make_room(now)
        return record in self

    def drop(self, request_id: str) -> None:
        """Keep it no longer."""
        record = self._records.pop(request_id, None)
        if record is not None:
            self.size_bytes -= record.size_bytes

    def expire(self, now: float) -> None:
        """Drop what is too old."""
        while self._records:
            oldest = next(iter(self._records.values()))
            if oldest.touched + self._window_s > now:
                return
            self.drop(oldest.request_id)

    def _make_room(self, now: float) -> None:
        self.expire(now)
        while self.size_bytes > self._max_bytes or len(self._records) > self._max_records:
            self.evicted += 1
            self.drop(next(iter(self._records)))


@dataclass(frozen=True, slots=True)
class Plan:
    """How a stream goes on for a client that has seen a part of it.

    Args:
        prefix: Tokens that the engine goes on behind.
        skip_to: Tokens up to this index are made again and not shown.
        seen: What of the end has been shown.
        over: Nothing is left to make: only the end is told.
    """

    prefix: Sequence[int]
    skip_to: int = -1
    seen: Seen = Seen.TOKENS
    over: bool = False


def plan(record: Record, position: Position, *, include_usage: bool, repeats: bool) -> Plan:
    """Decide it.

    Nothing is invented: tokens that the client has and nobody else knows come from its own event id, or from a runtime that makes
    the same ones again, or not at all.

    Args:
        record: What is known.
        position: What the client has.
        include_usage: It wants the counts at the end.
        repeats: The runtime makes the same tokens again for this request.

    Raises:
        NotResumable: With the reason.
    """
    tokens, index, seen = record.tokens, position.index, position.seen
    finished = record.end is not None and record.end.finish_reason != generation_pb2.FINISH_REASON_UNSPECIFIED
    if seen is not Seen.TOKENS:
        nothing_left = seen is Seen.DONE or (seen is Seen.END and not include_usage)
        if finished or nothing_left:
            return Plan(tokens, index, seen, over=True)
        if repeats and index >= 0:  # the last token once more, for what comes with it
            return Plan(tokens[:index], index, seen)
        raise NotResumable("the end of this stream is not known to any gateway that lives; its text is complete")
    shown = position.shown
    at = shown - len(position.tail)  # of the tail's first token
    overlap = tokens[at:shown]
    if list(position.tail[: len(overlap)]) != list(overlap):
        raise NotResumable("Last-Event-ID is not of this stream: it names tokens that are not in it")
    if shown <= len(tokens):
        return Plan(tokens[:shown])
    if at <= len(tokens):
        return Plan([*tokens[:at], *position.tail])
    if repeats:
        return Plan(tokens, index)
    raise NotResumable(
        f"the client has {shown} tokens of this stream, the gateways that live {len(tokens)}, and its runtime does not make the "
        "same ones twice; send the request again, from the start"
    )


def choose(
    records: Iterable[Record], position: Position, *, include_usage: bool, repeats: Callable[[Record], bool]
) -> tuple[Record, Plan]:
    """The copy to go on from, and how: the one that knows most, among those that agree with what the client has.

    Copies of one stream differ where gateways could not reach each other and each went on with it. The tokens that an id carries
    tell which of them its client was served by.

    Raises:
        NotResumable: None of them; the reason is that of the one that knows most.
    """
    refusal: NotResumable | None = None
    known = sorted(records, key=lambda record: record.rank, reverse=True)
    for record in known:
        try:
            way = plan(record, position, include_usage=include_usage, repeats=repeats(record))
        except NotResumable as err:
            refusal = refusal or err
        else:
            record.attachment = known[0].attachment  # whoever goes on now is the latest of all
            return record, way
    raise refusal or StreamNotFound
