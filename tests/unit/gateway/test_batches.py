"""What leaves for an engine in one message."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from inference_runtime.v1 import engine_service_pb2
from services.gateway.sessions import BATCH_BYTES, encoded, messages

Submission = engine_service_pb2.Submission
SessionRequest = engine_service_pb2.SessionRequest


def submission(stream_id: int, size: int) -> engine_service_pb2.Submission:
    made = Submission(stream_id=stream_id)
    made.request.text = "x" * size
    return made


@given(st.lists(st.one_of(st.integers(0, 300), st.integers(16_000, 17_000)), max_size=5))
def test_encoded_submissions_end_to_end_are_one_message(sizes: list[int]) -> None:
    """At every length of a length."""
    waiting = [submission(at, size) for at, size in enumerate(sizes)]
    whole = b"".join(map(encoded, waiting))
    assert SessionRequest.FromString(whole) == SessionRequest(submissions=waiting)


def test_small_submissions_leave_together() -> None:
    (whole,) = messages([encoded(submission(i, 100)) for i in range(64)])
    assert len(SessionRequest.FromString(whole).submissions) == 64


def test_large_submissions_leave_apart_in_order_and_no_message_comes_near_the_limit() -> None:
    """Three bodies of legal size in one message would be more than gRPC takes, and end the stream for everyone on it."""
    sizes = [7 << 20, 10, 7 << 20, 7 << 20, 1 << 20, 10, 10]

    found = messages([encoded(submission(i, size)) for i, size in enumerate(sizes)])

    read = [SessionRequest.FromString(message).submissions for message in found]
    assert [s.stream_id for message in read for s in message] == list(range(len(sizes)))
    assert all(len(submissions) == 1 or len(message) <= BATCH_BYTES for message, submissions in zip(found, read, strict=True))


def test_one_large_submission_leaves_as_it_is() -> None:
    part = encoded(submission(1, 7 << 20))
    assert messages([part]) == [part]


def test_nothing_makes_no_message() -> None:
    assert messages([]) == []
