"""What leaves for an engine in one message."""

from __future__ import annotations

from inference_runtime.v1 import engine_service_pb2
from services.gateway.sessions import BATCH_BYTES, _batches

Submission = engine_service_pb2.Submission


def submission(stream_id: int, size: int) -> engine_service_pb2.Submission:
    made = Submission(stream_id=stream_id)
    made.request.text = "x" * size
    return made


def test_small_submissions_leave_together() -> None:
    waiting = [submission(i, 100) for i in range(64)]
    assert _batches(waiting) == []
    assert len(waiting) == 64


def test_large_submissions_leave_apart_in_order_and_no_message_comes_near_the_limit() -> None:
    """Three bodies of legal size in one message would be more than gRPC takes, and end the stream for everyone on it."""
    sizes = [7 << 20, 10, 7 << 20, 7 << 20, 1 << 20, 10, 10]
    waiting = [submission(i, size) for i, size in enumerate(sizes)]

    messages = [*_batches(waiting), waiting]

    assert [s.stream_id for message in messages for s in message] == list(range(len(sizes)))
    assert all(len(m) == 1 or sum(s.ByteSize() for s in m) <= BATCH_BYTES for m in messages)


def test_one_large_submission_leaves_as_it_is() -> None:
    waiting = [submission(1, 7 << 20)]
    assert _batches(waiting) == []
