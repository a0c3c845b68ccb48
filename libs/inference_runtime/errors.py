"""The error tree: every failure a caller can see, with what each hop needs to know about it.

Each class knows its gRPC code, its HTTP status, the REASON that travels in `google.rpc.ErrorInfo`, whether trying again can help
(and where), and whether it counts against a circuit breaker. Foreign errors are translated into this tree once, at the boundary
that owns the foreign library. Messages name the thing and the way out; they never hold a secret or prompt text.
"""

from __future__ import annotations

import enum
from typing import ClassVar

__all__ = [
    "Backpressure",
    "BadRequest",
    "BudgetExceeded",
    "CircuitOpen",
    "ContentFiltered",
    "ContextLengthExceeded",
    "ContextPoisoned",
    "DeploymentNotFound",
    "Draining",
    "EngineLost",
    "ErrorCode",
    "Forbidden",
    "InferenceError",
    "Internal",
    "NetworkError",
    "NoReplica",
    "NotLeader",
    "PayloadTooLarge",
    "Quarantined",
    "RateLimited",
    "RequestCancelled",
    "RequestTooLarge",
    "Retry",
    "RevisionMismatch",
    "RuntimeNotInstalled",
    "ServerError",
    "SlowConsumer",
    "StaleLeader",
    "Timeout",
    "Unauthorized",
    "Unsupported",
    "error_class",
]


class ErrorCode(enum.Enum):
    """gRPC status codes by name, so that this module does not import grpc."""

    CANCELLED = 1
    INVALID_ARGUMENT = 3
    DEADLINE_EXCEEDED = 4
    NOT_FOUND = 5
    PERMISSION_DENIED = 7
    RESOURCE_EXHAUSTED = 8
    FAILED_PRECONDITION = 9
    UNIMPLEMENTED = 12
    INTERNAL = 13
    UNAVAILABLE = 14
    UNAUTHENTICATED = 16


class Retry(enum.Enum):
    """Whether trying again can help."""

    NEVER = "never"
    AFTER_DELAY = "after_delay"  #: the same place, not before retry_after_s
    ELSEWHERE = "elsewhere"  #: another replica or provider, at once
    AFTER_REBUILD = "after_rebuild"  #: once, after the session was rebuilt
    AT_LEADER = "at_leader"  #: at the address the error names


class InferenceError(Exception):
    """Base of the tree.

    Args:
        message: One sentence for the caller: what was seen and what to change.
        retry_after_s: Seconds to wait before trying again helps; None when unknown.
        metadata: Facts by name, sent along in `google.rpc.ErrorInfo.metadata`. Never secrets, never prompt text.
    """

    reason: ClassVar[str] = "INTERNAL"
    grpc_code: ClassVar[ErrorCode] = ErrorCode.INTERNAL
    http_status: ClassVar[int] = 500
    #: `type` of an OpenAI error body.
    http_type: ClassVar[str] = "server_error"
    #: `code` of an OpenAI error body.
    http_code: ClassVar[str | None] = None
    retry: ClassVar[Retry] = Retry.NEVER
    trips_breaker: ClassVar[bool] = False

    def __init__(self, message: str, *, retry_after_s: float | None = None, **metadata: str) -> None:
        super().__init__(message)
        self.message = message
        self.retry_after_s = retry_after_s
        self.metadata = metadata

    @property
    def param(self) -> str | None:
        """The request field at fault, for OpenAI error bodies."""
        return self.metadata.get("param")


class RateLimited(InferenceError):
    """A provider's or our own rate limit was reached (E01). Feeds the limiter, never the breaker."""

    reason = "RATE_LIMITED"
    grpc_code = ErrorCode.RESOURCE_EXHAUSTED
    http_status = 429
    http_type = "rate_limit_error"
    http_code = "rate_limit_exceeded"
    retry = Retry.AFTER_DELAY


class ServerError(InferenceError):
    """The upstream answered with a server error (E02)."""

    reason = "SERVER_ERROR"
    grpc_code = ErrorCode.UNAVAILABLE
    http_status = 502
    retry = Retry.ELSEWHERE
    trips_breaker = True


class Timeout(InferenceError):
    """A phase took longer than it may (E03). Metadata: phase, elapsed_s."""

    reason = "TIMEOUT"
    grpc_code = ErrorCode.DEADLINE_EXCEEDED
    http_status = 504
    http_type = "timeout_error"
    http_code = "timeout"
    retry = Retry.ELSEWHERE
    trips_breaker = True


class NetworkError(InferenceError):
    """The connection failed (E04)."""

    reason = "NETWORK_ERROR"
    grpc_code = ErrorCode.UNAVAILABLE
    http_status = 502
    retry = Retry.ELSEWHERE
    trips_breaker = True


class ContentFiltered(InferenceError):
    """The content was refused (E05). Never retried and never sent to a fallback."""

    reason = "CONTENT_FILTERED"
    grpc_code = ErrorCode.FAILED_PRECONDITION
    http_status = 400
    http_type = "invalid_request_error"
    http_code = "content_filter"


class BadRequest(InferenceError):
    """The request is wrong (E07). Metadata: param."""

    reason = "BAD_REQUEST"
    grpc_code = ErrorCode.INVALID_ARGUMENT
    http_status = 400
    http_type = "invalid_request_error"


class ContextLengthExceeded(BadRequest):
    """Prompt and output do not fit into the context (E06). Metadata: tokens, max_tokens."""

    reason = "CONTEXT_LENGTH_EXCEEDED"
    http_code = "context_length_exceeded"


class PayloadTooLarge(BadRequest):
    """The request body is larger than the gateway takes."""

    reason = "PAYLOAD_TOO_LARGE"
    http_status = 413
    http_code = "payload_too_large"


class RequestTooLarge(BadRequest):
    """The request needs more memory than the device has, even with nothing else on it."""

    reason = "REQUEST_TOO_LARGE"
    http_status = 413
    http_code = "request_too_large"


class Quarantined(BadRequest):
    """The request was present at the death of two contexts and is refused for a while. It may be what kills them."""

    reason = "REQUEST_QUARANTINED"
    http_status = 422
    http_code = "request_quarantined"


class Unauthorized(InferenceError):
    """The credentials are missing or wrong (E08)."""

    reason = "UNAUTHORIZED"
    grpc_code = ErrorCode.UNAUTHENTICATED
    http_status = 401
    http_type = "authentication_error"
    http_code = "invalid_api_key"
    retry = Retry.AFTER_REBUILD


class Forbidden(InferenceError):
    """The credentials do not allow this (E09)."""

    reason = "FORBIDDEN"
    grpc_code = ErrorCode.PERMISSION_DENIED
    http_status = 403
    http_type = "permission_error"


class Backpressure(InferenceError):
    """Queue or memory of the chosen replica is full (E10)."""

    reason = "BACKPRESSURE"
    grpc_code = ErrorCode.RESOURCE_EXHAUSTED
    http_status = 429
    http_type = "rate_limit_error"
    http_code = "overloaded"
    retry = Retry.ELSEWHERE


class SlowConsumer(InferenceError):
    """The reader of an answer did not keep up and the answer was cut off. What was generated counts.

    Trying again would meet the same reader, hence never. Metadata: input_tokens, output_tokens.
    """

    reason = "SLOW_CONSUMER"
    grpc_code = ErrorCode.RESOURCE_EXHAUSTED
    http_status = 429
    http_type = "rate_limit_error"
    http_code = "slow_consumer"


class BudgetExceeded(InferenceError):
    """The budget of a deployment or key is spent (E11)."""

    reason = "BUDGET_EXCEEDED"
    grpc_code = ErrorCode.RESOURCE_EXHAUSTED
    http_status = 429
    http_type = "insufficient_quota"
    http_code = "budget_exceeded"


class CircuitOpen(InferenceError):
    """The breaker of a provider is open (E12). Metadata: provider."""

    reason = "CIRCUIT_OPEN"
    grpc_code = ErrorCode.UNAVAILABLE
    http_status = 503
    http_type = "service_unavailable"
    retry = Retry.ELSEWHERE


class ContextPoisoned(InferenceError):
    """The device context cannot be used any more and is being replaced (E13)."""

    reason = "CONTEXT_POISONED"
    grpc_code = ErrorCode.UNAVAILABLE
    http_status = 503
    http_type = "service_unavailable"
    retry = Retry.ELSEWHERE


class EngineLost(ContextPoisoned):
    """The engine or the stream to it is gone."""

    reason = "ENGINE_LOST"


class NoReplica(ContextPoisoned):
    """The deployment exists and no replica of it takes requests at present."""

    reason = "NO_REPLICA"


class Draining(ContextPoisoned):
    """The process finishes what it has and takes nothing new."""

    reason = "DRAINING"
    grpc_code = ErrorCode.FAILED_PRECONDITION


class RevisionMismatch(ContextPoisoned):
    """The replica has another revision than the one that made the prefix of this answer. Metadata: revision."""

    reason = "REVISION_MISMATCH"
    grpc_code = ErrorCode.FAILED_PRECONDITION


class Unsupported(InferenceError):
    """The runtime cannot do what was asked (E14). Metadata: feature, runtime."""

    reason = "UNSUPPORTED"
    grpc_code = ErrorCode.UNIMPLEMENTED
    http_status = 400
    http_type = "invalid_request_error"
    http_code = "unsupported"


class RuntimeNotInstalled(Unsupported):
    """The runtime's packages are not installed. The message names the extra to install."""

    reason = "RUNTIME_NOT_INSTALLED"


class DeploymentNotFound(InferenceError):
    """No deployment has this name (E15)."""

    reason = "DEPLOYMENT_NOT_FOUND"
    grpc_code = ErrorCode.NOT_FOUND
    http_status = 404
    http_type = "invalid_request_error"
    http_code = "model_not_found"


class NotLeader(InferenceError):
    """Another process leads this role (E16). Metadata: role, address (empty while there is no leader)."""

    reason = "NOT_LEADER"
    grpc_code = ErrorCode.FAILED_PRECONDITION
    http_status = 503
    http_type = "service_unavailable"
    retry = Retry.AT_LEADER

    @property
    def address(self) -> str:
        """host:port of the leader, or "" while there is none."""
        return self.metadata.get("address", "")


class StaleLeader(InferenceError):
    """A write or an order came from a leader that was replaced. Nothing was changed."""

    reason = "STALE_LEADER"
    grpc_code = ErrorCode.FAILED_PRECONDITION
    http_status = 503
    http_type = "service_unavailable"


class RequestCancelled(InferenceError):
    """The caller went away. Nobody reads this answer; it exists so that every end has a type."""

    reason = "CANCELLED"
    grpc_code = ErrorCode.CANCELLED
    http_status = 499
    http_type = "invalid_request_error"


class Internal(InferenceError):
    """A fault of ours (E17). The text that clients see says no more than that."""

    reason = "INTERNAL"


def _tree(cls: type[InferenceError]) -> list[type[InferenceError]]:
    return [cls, *(c for sub in cls.__subclasses__() for c in _tree(sub))]


_by_reason: dict[str, type[InferenceError]] = {}


def error_class(reason: str) -> type[InferenceError]:
    """The class with this REASON; `Internal` for one we do not know (a newer peer may send it).

    Classes of this module and of every module imported so far count: a package adds an error by deriving from this tree.
    """
    if reason not in _by_reason:
        _by_reason.update({cls.reason: cls for cls in _tree(InferenceError)} | {Internal.reason: Internal})
    return _by_reason.get(reason, Internal)
