"""What a context's child process and its engine say to each other: typed frames, length-prefixed msgpack, never pickle.

A frame is its length (4 bytes, big-endian) and one tagged array. Every frame carries the generation of the context it belongs
to. Outputs of a step travel in columns: one frame for each step, whatever the number of sequences.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Iterable, Iterator
from itertools import accumulate, repeat
from struct import Struct

import msgspec

from inference_runtime.errors import InferenceError, Internal, error_class
from inference_runtime.generation import FinishReason, TokenLogprob
from inference_runtime.runner import LoadProgress, RunnerConfig, RunnerInfo, StepOutput, StepRequest
from inference_runtime.stepping import StepPhase, StepReport
from inference_runtime.supervision import Fault

__all__ = [
    "MAX_FRAME_BYTES",
    "Abort",
    "Admit",
    "BadFrame",
    "Beat",
    "Close",
    "Died",
    "FrameReader",
    "FromChild",
    "FromParent",
    "Loaded",
    "Start",
    "Step",
    "pack_frame",
    "pack_step",
    "unpack_step",
]

#: Largest frame. A peer that announces more is broken, and would make the reader keep it all.
MAX_FRAME_BYTES = 16 * 1024 * 1024

_LENGTH = Struct(">I")


class BadFrame(Exception):
    """The peer sent something that is no frame, or a frame was too large to send."""


# --- from the engine -------------------------------------------------------------------------------------------------


class Start(msgspec.Struct, tag="start", array_like=True, frozen=True):
    """The first frame: load this. `runtime` is a registered name, or "module:attribute" of one that is not registered."""

    generation: int
    runtime: str
    config: RunnerConfig
    name: str


class Admit(msgspec.Struct, tag="admit", array_like=True, frozen=True):
    """Order a sequence in."""

    generation: int
    request: StepRequest


class Abort(msgspec.Struct, tag="abort", array_like=True, frozen=True):
    """Order a sequence out."""

    generation: int
    sequence_id: int


class Close(msgspec.Struct, tag="close", array_like=True, frozen=True):
    """Release the device and exit."""

    generation: int


FromParent = Start | Admit | Abort | Close

# --- from the child --------------------------------------------------------------------------------------------------


class Loaded(msgspec.Struct, tag="loaded", array_like=True, frozen=True):
    """The runner takes sequences."""

    generation: int
    info: RunnerInfo


class Beat(msgspec.Struct, tag="beat", array_like=True, frozen=True):
    """A heartbeat: steps done, orders carried out, what it does, how far loading is."""

    generation: int
    steps: int
    orders: int
    phase: StepPhase
    progress: LoadProgress | None = None


class WireError(msgspec.Struct, array_like=True, frozen=True):
    """An error of one sequence, rebuilt from its REASON."""

    reason: str
    message: str
    retry_after_s: float | None
    metadata: dict[str, str]


class Detail(msgspec.Struct, array_like=True, frozen=True):
    """What few rows of a step have."""

    row: int
    finish_reason: FinishReason | None = None
    cached_tokens: int = 0
    logprobs: tuple[TokenLogprob, ...] = ()
    error: WireError | None = None


class Step(msgspec.Struct, tag="step", array_like=True, frozen=True):
    """One step, in columns: row i is sequence_ids[i] with its next `counts[i]` tokens (one each where `counts` is empty)."""

    generation: int
    steps: int
    orders: int
    phase: StepPhase
    duration_s: float
    kv_use: float
    aborted: list[int]
    sequence_ids: list[int]
    token_ids: list[int]
    counts: list[int] = []
    details: list[Detail] = []


class Died(msgspec.Struct, tag="died", array_like=True, frozen=True):
    """The context is over. The child exits next."""

    generation: int
    fault: Fault


FromChild = Loaded | Beat | Step | Died

# --- bytes -----------------------------------------------------------------------------------------------------------

_encoder = msgspec.msgpack.Encoder()


def pack_frame(frame: FromParent | FromChild) -> bytes:
    """The bytes of a frame. Raises BadFrame when it is larger than a frame may be."""
    body = _encoder.encode(frame)
    if len(body) > MAX_FRAME_BYTES:
        raise BadFrame(f"a frame of {len(body)} bytes is larger than {MAX_FRAME_BYTES}")
    return _LENGTH.pack(len(body)) + body


class FrameReader:
    """Cuts a stream of bytes into frames.

    Args:
        kinds: Union of the frames that may come.
    """

    def __init__(self, kinds: object) -> None:
        self._decoder: msgspec.msgpack.Decoder[object] = msgspec.msgpack.Decoder(kinds)
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[object]:
        """The frames that are complete with these bytes. Raises BadFrame."""
        buffer = self._buffer
        buffer += data
        start = 0
        while len(buffer) - start >= _LENGTH.size:
            (size,) = _LENGTH.unpack_from(buffer, start)
            if size > MAX_FRAME_BYTES:
                raise BadFrame(f"a frame of {size} bytes is announced; the limit is {MAX_FRAME_BYTES}")
            end = start + _LENGTH.size + size
            if len(buffer) < end:
                break
            body = bytes(buffer[start + _LENGTH.size : end])
            start = end
            try:
                frame = self._decoder.decode(body)
            except msgspec.DecodeError as err:
                raise BadFrame(f"a frame cannot be read: {err}") from err
            yield frame
        del buffer[:start]


# --- steps -----------------------------------------------------------------------------------------------------------


def pack_step(generation: int, steps: int, orders: int, phase: StepPhase, report: StepReport) -> bytes:
    """The frame of a step."""
    outputs = report.outputs
    tokens: list[int] = []
    counts: list[int] = []
    details: list[Detail] = []
    even = True
    for row, output in enumerate(outputs):
        ids = output.token_ids
        if len(ids) != 1:
            even = False
        tokens += ids
        counts.append(len(ids))
        if output.finish_reason is not None or output.error is not None or output.logprobs or output.cached_tokens:
            error = None if output.error is None else _wire_error(output.error)
            details.append(Detail(row, output.finish_reason, output.cached_tokens, output.logprobs, error))
    ids_column = [o.sequence_id for o in outputs]
    return pack_frame(
        Step(
            generation,
            steps,
            orders,
            phase,
            report.duration_s,
            report.kv_use,
            list(report.aborted),
            ids_column,
            tokens,
            [] if even else counts,
            details,
        )
    )


def unpack_step(frame: Step) -> StepReport:
    """The report a frame was made from. Raises BadFrame when its columns disagree."""
    rows, tokens = len(frame.sequence_ids), frame.token_ids
    outputs: list[StepOutput]
    if not frame.counts:
        if len(tokens) != rows:
            raise BadFrame("a step's columns differ in length")
        outputs = _rows(frame.sequence_ids, zip(tokens, strict=False))
    else:
        if len(frame.counts) != rows or sum(frame.counts) != len(tokens) or min(frame.counts) < 0:
            raise BadFrame("a step's columns differ in length")
        ends = accumulate(frame.counts)
        outputs = _rows(frame.sequence_ids, (tuple(tokens[e - n : e]) for e, n in zip(ends, frame.counts, strict=True)))
    for d in frame.details:
        if not 0 <= d.row < rows:
            raise BadFrame("a step has a detail without a row")
        outputs[d.row] = dataclasses.replace(
            outputs[d.row],
            finish_reason=d.finish_reason,
            cached_tokens=d.cached_tokens,
            logprobs=d.logprobs,
            error=None if d.error is None else _error(d.error),
        )
    return StepReport(outputs, frame.aborted, frame.kv_use, frame.duration_s)


_SLOTS = [vars(StepOutput)[field.name].__set__ for field in dataclasses.fields(StepOutput)]


def _rows(sequence_ids: list[int], token_ids: Iterable[tuple[int, ...]]) -> list[StepOutput]:
    """StepOutputs with nothing but tokens, made a column at a time.

    The same as calling the class for each row, in a third of the time: this is most of what a step costs the event loop.
    """
    rows = list(map(StepOutput.__new__, repeat(StepOutput, len(sequence_ids))))
    columns: tuple[Iterable[object], ...] = (sequence_ids, token_ids, repeat(None), repeat(()), repeat(0), repeat(None))
    for put, column in zip(_SLOTS, columns, strict=True):
        deque(map(put, rows, column), maxlen=0)
    return rows


def _wire_error(err: Exception) -> WireError:
    if isinstance(err, InferenceError):
        return WireError(err.reason, err.message, err.retry_after_s, dict(err.metadata))
    return WireError(Internal.reason, f"{type(err).__name__}: {err}", None, {})


def _error(wire: WireError) -> InferenceError:
    return error_class(wire.reason)(wire.message, retry_after_s=wire.retry_after_s, **wire.metadata)
