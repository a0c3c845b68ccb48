"""Coordination over etcd: who leads, who is there, what was decided.

`EtcdClient` talks to etcd; `PrefixWatch` follows keys; `Registration` keeps a process's own keys alive; `Election`, `Term` and
`LeaderObserver` make singletons; `keys` spells every key. Nothing on a request's path waits for any of it.
"""

from inference_runtime.coordination import keys
from inference_runtime.coordination.election import Candidate, Election, LeaderObserver, Term
from inference_runtime.coordination.errors import (
    Compacted,
    EtcdDenied,
    EtcdError,
    EtcdOutcomeUnknown,
    EtcdUnavailable,
    LeaseLost,
    StoreReplaced,
)
from inference_runtime.coordination.etcd import EtcdClient, Grant
from inference_runtime.coordination.fencing import Fence, FencingToken, LeaderInfo
from inference_runtime.coordination.identity import ACKNOWLEDGE, StoreGuard, StoreMark, StoreRecord
from inference_runtime.coordination.kv import Compare, KeyValue, Op, OpResult, TxnResult
from inference_runtime.coordination.lease import DEFAULT_TTL_S, Lease
from inference_runtime.coordination.registry import Registration
from inference_runtime.coordination.watch import PrefixWatch, WatchBatch, watch_prefix

__all__ = [
    "ACKNOWLEDGE",
    "DEFAULT_TTL_S",
    "Candidate",
    "Compacted",
    "Compare",
    "Election",
    "EtcdClient",
    "EtcdDenied",
    "EtcdError",
    "EtcdOutcomeUnknown",
    "EtcdUnavailable",
    "Fence",
    "FencingToken",
    "Grant",
    "KeyValue",
    "LeaderInfo",
    "LeaderObserver",
    "Lease",
    "LeaseLost",
    "Op",
    "OpResult",
    "PrefixWatch",
    "Registration",
    "StoreGuard",
    "StoreMark",
    "StoreRecord",
    "StoreReplaced",
    "Term",
    "TxnResult",
    "WatchBatch",
    "keys",
    "watch_prefix",
]
