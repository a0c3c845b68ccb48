"""What can go wrong with etcd, as members of the one error tree. Translated from gRPC once, in `etcd.py`."""

from __future__ import annotations

from inference_runtime.errors import ErrorCode, InferenceError, Retry

__all__ = [
    "Compacted",
    "EtcdDenied",
    "EtcdError",
    "EtcdOutcomeUnknown",
    "EtcdUnavailable",
    "LeaseLost",
    "StoreReplaced",
]


class EtcdError(InferenceError):
    """etcd refused a call for a reason that no retry heals. The message quotes etcd."""

    reason = "ETCD_REFUSED"


class EtcdUnavailable(EtcdError):
    """No endpoint answered in time. A write that raises exactly this class was never sent."""

    reason = "ETCD_UNAVAILABLE"
    grpc_code = ErrorCode.UNAVAILABLE
    http_status = 503
    http_type = "service_unavailable"
    retry = Retry.AFTER_DELAY


class EtcdOutcomeUnknown(EtcdUnavailable):
    """A write was sent and no answer came: it may have happened. Read before you decide whether to write again."""

    reason = "ETCD_OUTCOME_UNKNOWN"
    retry = Retry.NEVER


class StoreReplaced(EtcdUnavailable):
    """etcd answers, and it is not the store that was followed: wiped, restored from an older state, or another one. Nothing was
    sent. To whoever waits for etcd it is an etcd that is away, until an operator acknowledges it."""

    reason = "STORE_REPLACED"


class EtcdDenied(EtcdError):
    """etcd did not accept our user, password, certificate or role."""

    reason = "ETCD_DENIED"
    grpc_code = ErrorCode.PERMISSION_DENIED
    http_status = 503
    http_type = "service_unavailable"


class LeaseLost(EtcdError):
    """The lease expired or was revoked, and every key under it is gone. A new lease is needed; this one never comes back."""

    reason = "LEASE_LOST"
    grpc_code = ErrorCode.FAILED_PRECONDITION
    http_status = 503
    http_type = "service_unavailable"


class Compacted(EtcdError):
    """The revision asked for was compacted away. List again: resuming anywhere later would miss changes."""

    reason = "ETCD_COMPACTED"
    grpc_code = ErrorCode.FAILED_PRECONDITION
    http_status = 503
    http_type = "service_unavailable"
