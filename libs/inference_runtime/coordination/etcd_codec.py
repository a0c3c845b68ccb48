"""Between etcd's messages and our values. No I/O here."""

from __future__ import annotations

from inference_runtime.coordination.etcd_api import kv_pb2, rpc_pb2
from inference_runtime.coordination.kv import (
    Compare,
    CompareTarget,
    Event,
    KeyValue,
    Op,
    OpKind,
    OpResult,
    WatchUpdate,
    prefix_end,
)
from inference_runtime.errors import BadRequest

__all__ = ["address_of", "compare_proto", "key_value", "op_proto", "op_result", "watch_update"]

_COMPARE_RESULT = {
    "==": rpc_pb2.Compare.EQUAL,
    "!=": rpc_pb2.Compare.NOT_EQUAL,
    "<": rpc_pb2.Compare.LESS,
    ">": rpc_pb2.Compare.GREATER,
}


def address_of(endpoint: str) -> str:
    """host:port of an endpoint, which may have a scheme. Raises BadRequest for anything else."""
    address = endpoint.removeprefix("http://").removeprefix("https://").rstrip("/")
    host, colon, port = address.rpartition(":")
    if not (address.startswith("unix:") or (host and colon and port.isdigit())):
        raise BadRequest(f"The etcd endpoint {endpoint!r} is not host:port, for example 127.0.0.1:2379.", param="endpoints")
    return address


def key_value(kv: kv_pb2.KeyValue) -> KeyValue:
    """A key as etcd tells it."""
    return KeyValue(kv.key.decode(), kv.value, kv.create_revision, kv.mod_revision, kv.version, kv.lease)


def watch_update(answer: rpc_pb2.WatchResponse) -> WatchUpdate:
    """One answer of a watch."""
    events = tuple(Event(key_value(e.kv), e.type == kv_pb2.Event.DELETE) for e in answer.events)
    return WatchUpdate(answer.header.revision, answer.header.cluster_id, events)


def compare_proto(compare: Compare) -> rpc_pb2.Compare:
    """A guard as etcd takes it."""
    made = rpc_pb2.Compare(key=compare.key.encode(), result=_COMPARE_RESULT[compare.op])
    match compare.target:
        case CompareTarget.CREATE_REVISION:
            made.target, made.create_revision = rpc_pb2.Compare.CREATE, compare.number
        case CompareTarget.MOD_REVISION:
            made.target, made.mod_revision = rpc_pb2.Compare.MOD, compare.number
        case CompareTarget.VERSION:
            made.target, made.version = rpc_pb2.Compare.VERSION, compare.number
    return made


def op_proto(op: Op) -> rpc_pb2.RequestOp:
    """An operation as etcd takes it."""
    key = op.key.encode()
    end = prefix_end(key) if op.prefix else b""
    match op.kind:
        case OpKind.PUT:
            return rpc_pb2.RequestOp(request_put=rpc_pb2.PutRequest(key=key, value=op.value, lease=op.lease_id))
        case OpKind.DELETE:
            return rpc_pb2.RequestOp(request_delete_range=rpc_pb2.DeleteRangeRequest(key=key, range_end=end))
        case OpKind.GET:
            return rpc_pb2.RequestOp(request_range=rpc_pb2.RangeRequest(key=key, range_end=end))


def op_result(response: rpc_pb2.ResponseOp) -> OpResult:
    """The answer to an operation."""
    return OpResult(
        kvs=tuple(key_value(kv) for kv in response.response_range.kvs), deleted=response.response_delete_range.deleted
    )
