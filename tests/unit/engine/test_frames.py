"""Frames between an engine and a context's child: what goes in comes out, and what is no frame is refused."""

from __future__ import annotations

import contextlib
import struct
import time

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from inference_runtime.errors import Backpressure, InferenceError, Internal, RateLimited
from inference_runtime.generation import FinishReason, SamplingParams, TokenLogprob, TopLogprob
from inference_runtime.runner import LoadProgress, RunnerConfig, StepOutput, StepRequest
from inference_runtime.stepping import StepPhase, StepReport
from inference_runtime.supervision import Fault, FaultPhase, Loss, Probe
from services.engine.frames import (
    MAX_FRAME_BYTES,
    Abort,
    Admit,
    BadFrame,
    Beat,
    Close,
    Died,
    FrameReader,
    FromChild,
    FromParent,
    Start,
    Step,
    pack_frame,
    pack_step,
    unpack_step,
)

TOKENS = st.integers(0, 2**31)
LOGPROB = st.builds(
    TokenLogprob,
    TOKENS,
    st.binary(max_size=4),
    st.floats(-100, 0),
    st.lists(st.builds(TopLogprob, TOKENS, st.binary(max_size=4), st.floats(-100, 0)), max_size=2).map(tuple),
)
OUTPUT = st.builds(
    StepOutput,
    st.integers(0, 2**53),
    st.lists(TOKENS, max_size=4).map(tuple),
    st.none() | st.sampled_from(FinishReason),
    st.lists(LOGPROB, max_size=2).map(tuple),
    st.integers(0, 1000),
)
REPORT = st.builds(
    StepReport,
    st.lists(OUTPUT, max_size=12),
    st.lists(st.integers(0, 2**53), max_size=3),
    st.floats(0, 1),
    st.floats(0, 100),
)


def through(report: StepReport) -> StepReport:
    """Packed and unpacked."""
    (frame,) = FrameReader(FromChild).feed(pack_step(1, 2, 3, StepPhase.STEPPING, report))
    assert isinstance(frame, Step)
    return unpack_step(frame)


@given(REPORT)
def test_a_step_comes_out_as_it_went_in(report: StepReport) -> None:
    """Columns lose nothing."""
    assert through(report) == report


def test_errors_of_a_sequence_keep_their_class_and_facts() -> None:
    """Foreign ones become Internal."""
    given_errors = [Backpressure("full", cause="x"), RateLimited("slow", retry_after_s=2.0), ZeroDivisionError("bug")]
    got = [
        o.error for o in through(StepReport([StepOutput(i, (), error=e) for i, e in enumerate(given_errors)], [], 0, 0)).outputs
    ]
    assert [type(e) for e in got] == [Backpressure, RateLimited, Internal]
    assert all(isinstance(e, InferenceError) for e in got)
    assert got[0].metadata == {"cause": "x"}  # type: ignore[union-attr]
    assert got[1].retry_after_s == 2.0  # type: ignore[union-attr]
    assert "ZeroDivisionError: bug" in str(got[2])


@given(st.binary(max_size=200), st.lists(st.integers(1, 7), min_size=1))
def test_frames_are_cut_out_wherever_the_bytes_are_split(tail: bytes, sizes: list[int]) -> None:
    """A stream has no borders."""
    asked = Admit(1, StepRequest(1, [1, 2], SamplingParams(max_tokens=3, seed=2**64 - 1, logit_bias={4: 1.5}), 0, [9], "salt"))
    frames: list[FromParent] = [
        Start(1, "scripted", RunnerConfig("m", {"a": [1, {"b": None}]}, (0, 1), 5, 6), "n"),
        asked,
        Abort(1, 1),
        Close(1),
    ]
    data = b"".join(pack_frame(f) for f in frames)
    reader, at, n = FrameReader(FromParent), 0, 0
    got: list[object] = []
    while at < len(data):
        size = sizes[n % len(sizes)]
        got += list(reader.feed(data[at : at + size]))
        at, n = at + size, n + 1
    assert got == frames
    with contextlib.suppress(BadFrame):  # whatever else comes, it is refused by this type
        list(reader.feed(tail))


def test_a_fault_keeps_its_structure() -> None:
    """Every part of it."""
    fault = Fault(("A", "B"), 710, "x", FaultPhase.LOAD, Probe.HUNG, -9, Loss.HANG, 2, True)
    (frame,) = FrameReader(FromChild).feed(pack_frame(Died(3, fault)))
    assert frame == Died(3, fault)
    beat = Beat(1, 2, 3, StepPhase.LOADING, LoadProgress(1, 2, "x"))
    assert list(FrameReader(FromChild).feed(pack_frame(beat))) == [beat]


@pytest.mark.parametrize(
    "data",
    [
        struct.pack(">I", MAX_FRAME_BYTES + 1),
        b"\x00\x00\x00\x01\xc1",
        b"\x00\x00\x00\x03abc",
        struct.pack(">I", 8) + msgspec.msgpack.encode(["no-kind"]),
        pack_frame(Close(1)),  # a frame of the other direction
    ],
)
def test_what_is_no_frame_is_refused(data: bytes) -> None:
    """Too large, not msgpack, not a frame, of an unknown kind, from the wrong side."""
    with pytest.raises(BadFrame):
        list(FrameReader(FromChild).feed(data))


def test_a_frame_that_is_too_large_is_not_sent() -> None:
    """The reader would take it for broken."""
    with pytest.raises(BadFrame):
        pack_frame(Admit(1, StepRequest(1, [70_000] * (MAX_FRAME_BYTES // 5 + 1), SamplingParams(max_tokens=1))))


@pytest.mark.parametrize(
    "frame",
    [
        Step(1, 1, 1, StepPhase.IDLE, 0, 0, [], [1, 2], [1]),
        Step(1, 1, 1, StepPhase.IDLE, 0, 0, [], [1], [1, 2], [3]),
        Step(1, 1, 1, StepPhase.IDLE, 0, 0, [], [1, 2], [1, 2], [3, -1]),
        Step(1, 1, 1, StepPhase.IDLE, 0, 0, [], [1, 2], [1], [1]),
    ],
)
def test_columns_that_disagree_are_refused(frame: Step) -> None:
    """Tokens never go to the wrong sequence."""
    with pytest.raises(BadFrame):
        unpack_step(frame)


def test_reading_a_step_of_256_sequences_costs_the_event_loop_little() -> None:
    """Promised are 0.3 ms; the best of many runs counts, since this machine has other work."""
    report = StepReport([StepOutput(i, (i + 1000,)) for i in range(256)], [], 0.5, 0.001)
    data = pack_step(1, 2, 3, StepPhase.STEPPING, report)
    reader, took = FrameReader(FromChild), []
    for _ in range(50):
        begin = time.thread_time()
        (frame,) = reader.feed(data)
        assert isinstance(frame, Step)
        unpack_step(frame)
        took.append(time.thread_time() - begin)
    assert min(took) <= 0.3e-3
