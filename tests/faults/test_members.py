"""Faults of etcd's members and of what they store are seen for certain, and say so when they cannot be."""

from __future__ import annotations

import asyncio
import shutil

import pytest

from inference_runtime.coordination import EtcdClient, keys
from inference_runtime.testing.cluster import Cluster
from inference_runtime.testing.etcd import EtcdCluster, member_status
from inference_runtime.testing.faults import FaultNotVerified, injected
from inference_runtime.testing.members import LeasesRevoked, MembersFrozen, MembersKilled, StoreSwapped


@pytest.mark.e2e
async def test_members_that_are_killed_or_frozen_are_and_come_back() -> None:
    """E-01, E-02: the leader is found, another one follows it."""
    async with EtcdCluster() as store:
        for fault in (MembersKilled, MembersFrozen):
            leader = await asyncio.to_thread(store.leader)
            before = fault(store, [leader])
            assert not before.is_injected()
            async with injected(before):
                assert before.is_injected()
                assert await asyncio.to_thread(store.leader) != leader
            assert before.is_healed()


@pytest.mark.e2e
async def test_a_revoked_lease_and_a_swapped_store_are_seen() -> None:
    """E-05, E-06."""
    async with Cluster() as cluster:
        async with EtcdClient(cluster.etcd) as client:
            lease = (await client.grant(60)).lease_id
            fault = LeasesRevoked(cluster, [lease])
            assert not fault.is_injected()
            async with injected(fault):
                assert await client.time_to_live(lease) is None
        etcd = cluster.local.processes["etcd"]
        etcd.kill()
        older = cluster.folder / "older"
        shutil.copytree(cluster.local.data_dir, older)
        etcd.start()
        await cluster.wait_ready()
        await cluster.apply({"name": "later", "model": "scripted", "runtime": "scripted", "replicas": 0})

        for data in (None, older):
            async with injected(StoreSwapped(cluster, data)), EtcdClient(cluster.etcd) as client:
                assert (await client.list(keys.DEPLOYMENTS))[0] == []
            await cluster.wait_ready()
        async with EtcdClient(cluster.etcd) as client:
            assert len((await client.list(keys.DEPLOYMENTS))[0]) == 1, "what was there is there again"


async def test_faults_without_a_target_say_so() -> None:
    """§4.2, control run."""
    with pytest.raises(FaultNotVerified, match="no members"):
        MembersKilled(None, [0])

    class Without:
        etcd = ("127.0.0.1:1",)

    with pytest.raises(FaultNotVerified, match="no leases"):
        LeasesRevoked(Without(), [])  # type: ignore[arg-type]
    nobody = LeasesRevoked(Without(), [1])  # type: ignore[arg-type]
    nobody.inject()
    assert not nobody.is_injected(), "an etcd that does not answer has not confirmed anything"
    assert member_status(1) == {}
