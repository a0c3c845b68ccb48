"""Registration: a process's keys come back whatever happens to lease or etcd, and go when it leaves."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from inference_runtime.coordination import EtcdClient, Registration
from inference_runtime.testing.etcd import EtcdProcess

Eventually = Callable[[Callable[[], Awaitable[bool]], float], Awaitable[None]]


async def test_keys_appear_change_vanish_and_leave_with_the_process(shared: EtcdClient, prefix: str) -> None:
    async with Registration(shared) as registration:
        await registration.set(prefix + "a", b"1")
        await registration.set(prefix + "b", b"1")
        assert await registration.flush(5)
        found, _ = await shared.list(prefix)
        assert {kv.key: (kv.value, kv.lease_id) for kv in found} == {
            prefix + "a": (b"1", registration.lease_id),
            prefix + "b": (b"1", registration.lease_id),
        }

        await registration.set(prefix + "a", b"2")
        await registration.remove(prefix + "b")
        assert await registration.flush(5)
        assert [(kv.key, kv.value) for kv in (await shared.list(prefix))[0]] == [(prefix + "a", b"2")]

    assert (await shared.list(prefix))[0] == []


async def test_a_registration_survives_a_crash_of_etcd_without_a_gap(etcd: EtcdProcess, client: EtcdClient) -> None:
    async with Registration(client) as registration:
        await registration.set("/r/a", b"1")
        assert await registration.flush(5)
        before = registration.lease_id

        await asyncio.to_thread(etcd.restart)
        await registration.set("/r/b", b"2")
        assert await registration.flush(10)

        found, _ = await client.list("/r/")
        assert [(kv.key, kv.lease_id) for kv in found] == [("/r/a", before), ("/r/b", before)]
        assert found[0].version == 1


async def test_a_lost_lease_is_replaced_and_everything_registered_again(
    shared: EtcdClient, prefix: str, eventually: Eventually
) -> None:
    """E-06: all leases revoked at once."""
    async with Registration(shared, ttl_s=3, jitter_s=0.2) as registration:
        for name in "abc":
            await registration.set(prefix + name, name.encode())
        assert await registration.flush(5)
        before = registration.lease_id
        await shared.revoke(before)
        assert (await shared.list(prefix))[0] == []

        async def back() -> bool:
            return len((await shared.list(prefix))[0]) == 3

        await eventually(back, 5)
        assert registration.lease_id not in (0, before)
        assert await registration.flush(5)


async def test_a_write_that_meets_a_lost_lease_does_not_wait_for_the_next_renewal(shared: EtcdClient, prefix: str) -> None:
    async with Registration(shared, ttl_s=60, jitter_s=0.1) as registration:
        await registration.set(prefix + "a", b"1")
        assert await registration.flush(5)
        await shared.revoke(registration.lease_id)

        await registration.set(prefix + "a", b"2")

        assert await registration.flush(5)
        found = await shared.get(prefix + "a")
        assert found is not None
        assert (found.value, found.lease_id) == (b"2", registration.lease_id)


async def test_while_etcd_is_away_everything_is_remembered(etcd: EtcdProcess, client: EtcdClient) -> None:
    """Traffic does not care: set and remove return at once, and apply when etcd is back, even after the lease ran out."""
    async with Registration(client, ttl_s=2, jitter_s=0.2) as registration:
        await registration.set("/r/old", b"1")
        await registration.set("/r/stays", b"1")
        assert await registration.flush(5)
        etcd.kill()

        async with asyncio.timeout(0.1):
            await registration.remove("/r/old")
            await registration.set("/r/new", b"2")
        assert not await registration.flush(2.5)  # longer than the lease
        assert registration.lease_id == 0
        await asyncio.to_thread(etcd.start)

        assert await registration.flush(10)
        assert [(kv.key, kv.value) for kv in (await client.list("/r/"))[0]] == [("/r/new", b"2"), ("/r/stays", b"1")]


async def test_a_registration_made_before_etcd_is_there_waits_for_it(etcd: EtcdProcess, client: EtcdClient) -> None:
    etcd.kill()
    async with Registration(client) as registration:
        await registration.set("/r/a", b"1")
        await asyncio.to_thread(etcd.start)

        assert await registration.flush(10)
        assert await client.get("/r/a") is not None


async def test_close_ends_a_registration_that_runs_in_a_task_of_its_owner(shared: EtcdClient, prefix: str) -> None:
    registration = Registration(shared)
    async with asyncio.timeout(10), asyncio.TaskGroup() as group:
        group.create_task(registration.run())
        await registration.set(prefix + "a", b"1")
        assert await registration.flush(5)

        await registration.close()

        assert await shared.get(prefix + "a") is None
