"""The package `etcd3`, an independent client, sees what we write, and we respect what it holds."""

from __future__ import annotations

import asyncio
import sys
import time
import types
import warnings
from collections.abc import Iterator
from typing import Any

import grpc
import pytest

from inference_runtime.coordination import Candidate, Compare, Election, EtcdClient, Lease, Op, Term, keys
from inference_runtime.coordination.etcd_api import auth_pb2, kv_pb2, rpc_pb2
from inference_runtime.testing.etcd import EtcdProcess
from inference_runtime.v1 import common_pb2

_UNARY = {
    "KV": ["Range", "Put", "DeleteRange:DeleteRange", "Txn", "Compact:Compaction"],
    "Lease": ["LeaseGrant", "LeaseRevoke", "LeaseTimeToLive"],
    "Maintenance": ["Alarm", "Status", "Defragment", "Hash"],
    "Cluster": ["MemberAdd", "MemberRemove", "MemberUpdate", "MemberList"],
    "Auth": ["Authenticate"],
}
_STREAMS = {"Lease": ["LeaseKeepAlive"], "Watch": ["Watch"]}


def _stub_class(service: str) -> type:
    """A synchronous stub as grpcio-tools would generate it, on our messages and etcd's own paths."""

    def connect(self: Any, channel: grpc.Channel) -> None:
        for kind, methods in ((channel.unary_unary, _UNARY), (channel.stream_stream, _STREAMS)):
            for entry in methods.get(service, []):
                method, _, message = entry.partition(":")
                call = kind(
                    f"/etcdserverpb.{service}/{method}",
                    request_serializer=getattr(rpc_pb2, f"{message or method}Request").SerializeToString,
                    response_deserializer=getattr(rpc_pb2, f"{message or method}Response").FromString,
                )
                setattr(self, method, call)

    return type(f"{service}Stub", (), {"__init__": connect})


@pytest.fixture(scope="module")
def etcd3() -> Iterator[Any]:
    """The package itself. Its own stubs cannot be imported beside protobuf 4 and later, so ours stand in."""
    names = dict.fromkeys(("KV", "Lease", "Watch", "Maintenance", "Cluster", "Auth"))
    stubs = types.ModuleType("etcd3.etcdrpc.rpc_pb2_grpc")
    for service in names:
        setattr(stubs, f"{service}Stub", _stub_class(service))
    package = types.ModuleType("etcd3.etcdrpc")
    package.__path__ = []
    for source in (rpc_pb2, stubs):
        package.__dict__.update({k: v for k, v in vars(source).items() if not k.startswith("_")})
    modules = {"": package, ".rpc_pb2": rpc_pb2, ".rpc_pb2_grpc": stubs, ".kv_pb2": kv_pb2, ".auth_pb2": auth_pb2}
    sys.modules.update({f"etcd3.etcdrpc{suffix}": module for suffix, module in modules.items()})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = pytest.importorskip("etcd3", reason="etcd3 is not installed: interoperability is not tested here")
    yield module
    for name in [n for n in sys.modules if n == "etcd3" or n.startswith("etcd3.")]:
        del sys.modules[name]


@pytest.fixture
def other(etcd3: Any, shared_etcd: EtcdProcess) -> Iterator[Any]:
    host, _, port = shared_etcd.endpoint.rpartition(":")
    client = etcd3.client(host=host, port=int(port), timeout=5)
    yield client
    client.close()


async def test_it_reads_what_we_write_and_we_read_what_it_writes(other: Any, shared: EtcdClient, prefix: str) -> None:
    revision = await shared.put(prefix + "a", b"ours")
    value, meta = await asyncio.to_thread(other.get, prefix + "a")
    assert (value, meta.create_revision, meta.mod_revision) == (b"ours", revision, revision)

    await asyncio.to_thread(other.put, prefix + "a", "theirs")
    found = await shared.get(prefix + "a")
    assert found is not None
    assert (found.value, found.version) == (b"theirs", 2)


async def test_a_lock_it_holds_is_not_ours_to_take_and_is_free_when_it_lets_go(other: Any, shared: EtcdClient, role: str) -> None:
    lock = other.lock(role, ttl=30)
    assert await asyncio.to_thread(lock.acquire, 5)
    free = [Compare.create_revision(f"/locks/{role}", "==", 0)]
    take = [Op.put(f"/locks/{role}", b"ours")]

    refused = await shared.txn(compare=free, success=take)
    assert await asyncio.to_thread(lock.release)
    taken = await shared.txn(compare=free, success=take)

    assert (refused.succeeded, taken.succeeded) == (False, True)
    # Its lock itself cannot wait beside today's tenacity (it raises TypeError), so the same question as its lock asks:
    its_turn, _ = await asyncio.to_thread(
        other.transaction, [other.transactions.create(f"/locks/{role}") == 0], [other.transactions.put(f"/locks/{role}", "x")], []
    )
    assert not its_turn


async def test_it_sees_our_lease_live_and_end(other: Any, shared: EtcdClient, prefix: str) -> None:
    async with Lease(shared, ttl_s=30) as lease:
        await shared.put(prefix + "a", b"", lease.id)
        info = await asyncio.to_thread(other.get_lease_info, lease.id)
        assert 0 < info.TTL <= 30
        assert list(info.keys) == [(prefix + "a").encode()]

    assert (await asyncio.to_thread(other.get_lease_info, lease.id)).TTL == -1
    assert (await asyncio.to_thread(other.get, prefix + "a"))[0] is None


async def test_revoking_a_leaders_lease_from_outside_ends_its_term(other: Any, shared: EtcdClient, role: str) -> None:
    terms: asyncio.Queue[Term] = asyncio.Queue()

    async def lead(term: Term) -> None:
        terms.put_nowait(term)
        await asyncio.Event().wait()

    async with asyncio.timeout(15), asyncio.TaskGroup() as group:
        task = group.create_task(Election(shared, role, Candidate("c", "10.0.0.1:7", 1)).run(lead))
        first = await terms.get()
        value, meta = await asyncio.to_thread(other.get, keys.election(role, "c"))
        assert common_pb2.Leader.FromString(value).address == "10.0.0.1:7"
        began = time.monotonic()
        await asyncio.to_thread(other.revoke_lease, meta.lease_id)
        second = await terms.get()
        task.cancel()

    assert time.monotonic() - began < 5
    assert second.token.revision > first.token.revision
