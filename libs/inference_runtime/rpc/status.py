"""Errors <-> gRPC status: the one place where our tree crosses a wire.

Every status carries `google.rpc.ErrorInfo` (reason, domain, metadata), and `google.rpc.RetryInfo` when waiting helps. A peer gets
our exception back, not a status.
"""

from __future__ import annotations

import grpc
from google.protobuf import duration_pb2
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from inference_runtime.errors import (
    Backpressure,
    InferenceError,
    Internal,
    NetworkError,
    RequestCancelled,
    Timeout,
    Unauthorized,
    Unsupported,
    error_class,
)

__all__ = ["DOMAIN", "INTERNAL_TEXT", "error_from_rpc", "error_from_status", "remaining_s", "status_from_error"]

DOMAIN = "inference-runtime"
#: What a client sees of a fault of ours; the details are in our log under the request's id.
INTERNAL_TEXT = "internal error; the log of the service holds the details under this request's id"

_PLAIN: dict[grpc.StatusCode, type[InferenceError]] = {
    grpc.StatusCode.CANCELLED: RequestCancelled,
    grpc.StatusCode.DEADLINE_EXCEEDED: Timeout,
    grpc.StatusCode.RESOURCE_EXHAUSTED: Backpressure,
    grpc.StatusCode.UNAVAILABLE: NetworkError,
    grpc.StatusCode.UNAUTHENTICATED: Unauthorized,
    grpc.StatusCode.UNIMPLEMENTED: Unsupported,
}


def status_from_error(err: BaseException) -> status_pb2.Status:
    """The status that stands for an exception. Anything outside the tree becomes INTERNAL with its text hidden."""
    known = err if isinstance(err, InferenceError) and type(err) is not Internal else Internal(INTERNAL_TEXT)
    status = status_pb2.Status(code=known.grpc_code.value, message=known.message)
    info = error_details_pb2.ErrorInfo(reason=known.reason, domain=DOMAIN, metadata=known.metadata)
    status.details.add().Pack(info)
    if known.retry_after_s is not None:
        delay = duration_pb2.Duration()
        delay.FromNanoseconds(int(known.retry_after_s * 1e9))
        status.details.add().Pack(error_details_pb2.RetryInfo(retry_delay=delay))
    return status


def error_from_status(status: status_pb2.Status) -> InferenceError:
    """The exception that a status stands for. Inverse of `status_from_error` for the whole tree."""
    info = error_details_pb2.ErrorInfo()
    retry = error_details_pb2.RetryInfo()
    found, retry_after_s = False, None
    for detail in status.details:
        if detail.Is(error_details_pb2.ErrorInfo.DESCRIPTOR):
            found = detail.Unpack(info) and info.domain == DOMAIN
        elif detail.Is(error_details_pb2.RetryInfo.DESCRIPTOR) and detail.Unpack(retry):
            retry_after_s = retry.retry_delay.ToNanoseconds() / 1e9
    if found:
        return error_class(info.reason)(status.message, retry_after_s=retry_after_s, **dict(info.metadata))
    code = next((c for c in grpc.StatusCode if c.value[0] == status.code), grpc.StatusCode.UNKNOWN)
    return _PLAIN.get(code, Internal)(status.message or code.name, retry_after_s=retry_after_s)


def error_from_rpc(err: grpc.aio.AioRpcError) -> InferenceError:
    """The exception behind a failed call."""
    try:
        status = rpc_status.from_call(err)  # type: ignore[arg-type]
    except ValueError:  # grpc-status found code and details that contradict each other: a peer that is not ours
        status = None
    if status is None:
        status = status_pb2.Status(code=err.code().value[0], message=err.details() or "")
    return error_from_status(status)


def remaining_s(context: grpc.aio.ServicerContext[object, object]) -> float | None:
    """Seconds left of the caller's deadline; None when it set none."""
    left = context.time_remaining()
    return None if left is None or left > 10 * 365 * 86400 else left
