"""The error tree: what each class tells each hop, and that nothing is lost on a wire."""

from __future__ import annotations

import grpc
import pytest
from google.protobuf import any_pb2
from google.rpc import code_pb2, error_details_pb2, status_pb2

from inference_runtime import errors
from inference_runtime.errors import InferenceError, Retry
from inference_runtime.rpc import error_from_status, status_from_error
from inference_runtime.rpc.status import DOMAIN, INTERNAL_TEXT

# id, class, gRPC code, HTTP status, whether and where trying again helps, whether it counts for a breaker
TABLE: list[tuple[str, type[InferenceError], str, int, Retry, bool]] = [
    ("E01", errors.RateLimited, "RESOURCE_EXHAUSTED", 429, Retry.AFTER_DELAY, False),
    ("E02", errors.ServerError, "UNAVAILABLE", 502, Retry.ELSEWHERE, True),
    ("E03", errors.Timeout, "DEADLINE_EXCEEDED", 504, Retry.ELSEWHERE, True),
    ("E04", errors.NetworkError, "UNAVAILABLE", 502, Retry.ELSEWHERE, True),
    ("E05", errors.ContentFiltered, "FAILED_PRECONDITION", 400, Retry.NEVER, False),
    ("E06", errors.ContextLengthExceeded, "INVALID_ARGUMENT", 400, Retry.NEVER, False),
    ("E07", errors.BadRequest, "INVALID_ARGUMENT", 400, Retry.NEVER, False),
    ("E08", errors.Unauthorized, "UNAUTHENTICATED", 401, Retry.AFTER_REBUILD, False),
    ("E09", errors.Forbidden, "PERMISSION_DENIED", 403, Retry.NEVER, False),
    ("E10", errors.Backpressure, "RESOURCE_EXHAUSTED", 429, Retry.ELSEWHERE, False),
    ("E11", errors.BudgetExceeded, "RESOURCE_EXHAUSTED", 429, Retry.NEVER, False),
    ("E12", errors.CircuitOpen, "UNAVAILABLE", 503, Retry.ELSEWHERE, False),
    ("E13", errors.ContextPoisoned, "UNAVAILABLE", 503, Retry.ELSEWHERE, False),
    ("E14", errors.Unsupported, "UNIMPLEMENTED", 400, Retry.NEVER, False),
    ("E15", errors.DeploymentNotFound, "NOT_FOUND", 404, Retry.NEVER, False),
    ("E16", errors.NotLeader, "FAILED_PRECONDITION", 503, Retry.AT_LEADER, False),
    ("E17", errors.Internal, "INTERNAL", 500, Retry.NEVER, False),
]


def tree(cls: type[InferenceError] = InferenceError) -> list[type[InferenceError]]:
    """Every class below the base that the package itself defines."""
    found = [c for sub in cls.__subclasses__() for c in (sub, *tree(sub))]
    return [c for c in found if c.__module__.startswith(("inference_runtime.", "services."))]


@pytest.mark.parametrize(
    ("cls", "grpc_code", "http_status", "retry", "breaker"), [row[1:] for row in TABLE], ids=[r[0] for r in TABLE]
)
def test_each_error_says_what_the_register_says(
    cls: type[InferenceError], grpc_code: str, http_status: int, retry: Retry, breaker: bool
) -> None:
    """E01-E17: the table of the register, row by row."""
    assert (cls.grpc_code.name, cls.http_status, cls.retry, cls.trips_breaker) == (grpc_code, http_status, retry, breaker)


def test_the_codes_are_grpcs_own() -> None:
    """E01-E17: errors.py does not import grpc, so the numbers are compared here."""
    assert {c.name: c.value for c in errors.ErrorCode} == {
        c.name: c.value[0] for c in grpc.StatusCode if c.name in errors.ErrorCode.__members__
    }
    assert {c.name: c.value for c in errors.ErrorCode}.items() <= dict(code_pb2.Code.items()).items()


def test_every_class_is_complete_and_public() -> None:
    """E01-E17: every class of the tree has a reason of its own, a status, a sentence, and stands in __all__."""
    classes = tree()
    reasons = [cls.reason for cls in classes]

    assert sorted(set(reasons)) == sorted(reasons)
    for cls in classes:
        assert cls.__doc__
        assert 400 <= cls.http_status < 600
        assert cls.http_type
        assert cls.reason == cls.reason.upper()
        assert cls.http_status < 500 or cls.http_type in {"server_error", "service_unavailable", "timeout_error"}
    in_module = {cls.__name__ for cls in classes if cls.__module__ == errors.__name__}
    assert in_module <= set(errors.__all__)
    assert {row[1] for row in TABLE} <= set(classes)


@pytest.mark.parametrize("cls", [c for c in tree() if c is not errors.Internal], ids=lambda c: c.__name__)
def test_an_error_crosses_the_wire_whole(cls: type[InferenceError]) -> None:
    """E01-E17: class, message, delay and metadata survive status and bytes, for the whole tree."""
    sent = cls("deployment 'x' is full; try later", retry_after_s=1.25, param="model", address="10.0.0.1:5")

    status = status_pb2.Status.FromString(status_from_error(sent).SerializeToString())
    back = error_from_status(status)

    assert status.code == cls.grpc_code.value
    assert type(back) is errors.error_class(cls.reason)
    assert back.reason == cls.reason
    assert (back.message, back.retry_after_s, back.metadata) == (sent.message, sent.retry_after_s, sent.metadata)


def test_the_class_comes_back_for_every_reason_of_the_tree() -> None:
    """E01-E17: in the other direction, each reason names exactly the class it came from."""
    for cls in [c for c in tree() if c.__module__ == errors.__name__]:
        assert errors.error_class(cls.reason) is cls
    assert errors.error_class("REASON_OF_A_NEWER_PEER") is errors.Internal


@pytest.mark.parametrize("fault", [ValueError("token sk-secret"), errors.Internal("weights at /root/secret"), KeyError("x")])
def test_our_faults_do_not_show_their_text(fault: Exception) -> None:
    """E17: what is outside the tree becomes INTERNAL, its text stays in our log."""
    status = status_from_error(fault)

    assert status.code == errors.ErrorCode.INTERNAL.value
    assert status.message == INTERNAL_TEXT
    assert b"secret" not in status.SerializeToString()
    assert type(error_from_status(status)) is errors.Internal


def test_a_delay_travels_only_when_there_is_one() -> None:
    """E01: RetryInfo is there when waiting helps; a fraction of a second survives."""
    with_delay = status_from_error(errors.RateLimited("slow down", retry_after_s=0.05))
    without = status_from_error(errors.RateLimited("slow down"))

    assert error_from_status(with_delay).retry_after_s == pytest.approx(0.05)
    assert error_from_status(without).retry_after_s is None
    assert not any(d.Is(error_details_pb2.RetryInfo.DESCRIPTOR) for d in without.details)


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        (grpc.StatusCode.CANCELLED, errors.RequestCancelled),
        (grpc.StatusCode.DEADLINE_EXCEEDED, errors.Timeout),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, errors.Backpressure),
        (grpc.StatusCode.UNAVAILABLE, errors.NetworkError),
        (grpc.StatusCode.UNAUTHENTICATED, errors.Unauthorized),
        (grpc.StatusCode.UNIMPLEMENTED, errors.Unsupported),
        (grpc.StatusCode.UNKNOWN, errors.Internal),
        (grpc.StatusCode.DATA_LOSS, errors.Internal),
    ],
    ids=lambda value: getattr(value, "name", getattr(value, "__name__", "")),
)
def test_a_status_without_our_details_still_gets_a_class(code: grpc.StatusCode, expected: type[InferenceError]) -> None:
    """Every code a foreign server or the channel itself may answer becomes one of ours."""
    assert type(error_from_status(status_pb2.Status(code=code.value[0], message="by hand"))) is expected


def test_details_of_another_domain_are_not_ours() -> None:
    """A reason of somebody else's tree does not choose a class of ours."""
    foreign = error_details_pb2.ErrorInfo(reason="BUDGET_EXCEEDED", domain="example.com")
    packed = any_pb2.Any()
    packed.Pack(foreign)

    back = error_from_status(status_pb2.Status(code=grpc.StatusCode.UNAVAILABLE.value[0], message="busy", details=[packed]))

    assert DOMAIN != "example.com"
    assert type(back) is errors.NetworkError


def test_a_leaders_address_is_a_field() -> None:
    """E16: the address of the leader comes back, and is empty while there is none."""
    known = error_from_status(status_from_error(errors.NotLeader("not here", role="coordinator", address="127.0.0.1:7")))
    unknown = error_from_status(status_from_error(errors.NotLeader("nobody leads", role="coordinator", address="")))

    assert isinstance(known, errors.NotLeader)
    assert isinstance(unknown, errors.NotLeader)
    assert (known.address, unknown.address) == ("127.0.0.1:7", "")
