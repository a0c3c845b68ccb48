"""PrefixWatch: one snapshot, then every change, through crashes, compaction, silence and replacement of etcd."""

from __future__ import annotations

import asyncio
import shutil

import pytest

from inference_runtime.coordination import EtcdClient, EtcdUnavailable, PrefixWatch, WatchBatch, watch_prefix
from inference_runtime.testing.etcd import EtcdProcess


async def next_batch(watch: PrefixWatch, timeout_s: float = 10.0) -> WatchBatch:
    async with asyncio.timeout(timeout_s):
        return await anext(watch)


def summary(batch: WatchBatch) -> tuple[bool, dict[str, bytes], list[str]]:
    return batch.snapshot, {kv.key: kv.value for kv in batch.puts}, batch.deletes


async def test_the_first_batch_is_the_whole_prefix_and_the_others_are_changes(shared: EtcdClient, prefix: str) -> None:
    await shared.put(prefix + "a", b"1")
    async with watch_prefix(shared, prefix) as watch:
        first = await next_batch(watch)
        await shared.put(prefix + "b", b"2")
        second = await next_batch(watch)
        await shared.delete(prefix + "a")
        third = await next_batch(watch)

    assert summary(first) == (True, {prefix + "a": b"1"}, [])
    assert summary(second) == (False, {prefix + "b": b"2"}, [])
    assert summary(third) == (False, {}, [prefix + "a"])
    assert first.revision < second.revision < third.revision
    assert first.cluster_id == shared.cluster_id


async def test_an_empty_prefix_still_begins_with_a_snapshot(shared: EtcdClient, prefix: str) -> None:
    async with watch_prefix(shared, prefix) as watch:
        assert summary(await next_batch(watch)) == (True, {}, [])


async def test_a_reader_that_was_cancelled_goes_on_where_it_was(shared: EtcdClient, prefix: str) -> None:
    async with watch_prefix(shared, prefix) as watch:
        await next_batch(watch)
        with pytest.raises(TimeoutError):
            await next_batch(watch, 0.1)
        await shared.put(prefix + "a", b"1")

        assert summary(await next_batch(watch)) == (False, {prefix + "a": b"1"}, [])


async def test_silence_reopens_the_stream_and_nothing_is_lost_or_repeated(shared: EtcdClient, prefix: str) -> None:
    async with PrefixWatch(shared, prefix, silence_s=0.1) as watch:
        await next_batch(watch)
        with pytest.raises(TimeoutError):
            await next_batch(watch, 0.5)
        await shared.put(prefix + "a", b"1")

        assert summary(await next_batch(watch)) == (False, {prefix + "a": b"1"}, [])
        with pytest.raises(TimeoutError):
            await next_batch(watch, 0.5)


async def test_no_change_is_lost_while_etcd_is_killed_and_restarted_again_and_again(
    etcd: EtcdProcess, client: EtcdClient
) -> None:
    """E-04: what the reader knows in the end is what etcd holds, though it was killed three times on the way."""
    state: dict[str, bytes] = {}
    revisions: list[int] = []

    async def read() -> None:
        async with watch_prefix(client, "/w/") as watch:
            async for batch in watch:
                assert batch.snapshot == (not revisions)
                revisions.append(batch.revision)
                state.update((kv.key, kv.value) for kv in batch.puts)
                for key in batch.deletes:
                    del state[key]
                if "/w/end" in state:
                    return

    async def write() -> None:
        writer = EtcdClient([etcd.endpoint])
        for i in range(120):
            if i % 40 == 20:
                await asyncio.to_thread(etcd.restart)
            await until_written(writer, f"/w/{i % 7}", str(i).encode(), delete=i % 5 == 0)
        await until_written(writer, "/w/end", b"")
        await writer.close()

    async with asyncio.timeout(30), asyncio.TaskGroup() as group:
        group.create_task(read())
        group.create_task(write())

    assert state == {kv.key: kv.value for kv in (await client.list("/w/"))[0]}
    assert revisions == sorted(revisions)


async def until_written(client: EtcdClient, key: str, value: bytes, *, delete: bool = False) -> None:
    while True:
        try:
            await client.put(key, value)
            if delete:
                await client.delete(key)
            return
        except EtcdUnavailable:
            continue


async def test_after_a_compaction_the_reader_gets_the_difference(etcd: EtcdProcess, client: EtcdClient) -> None:
    """E-04: resuming at the compaction would miss the deletion of b and the change of c."""
    for name in ("a", "b", "c"):
        await client.put(f"/w/{name}", b"1")
    async with watch_prefix(client, "/w/") as watch:
        await next_batch(watch)
        watch.close()  # the connection is away, and meanwhile:
        await client.delete("/w/b")
        await client.put("/w/c", b"2")
        await client.put("/w/d", b"3")
        await client.delete("/w/d")
        revision = await client.put("/w/e", b"4")
        await client.compact(revision)

        missed = await next_batch(watch)
        await client.put("/w/f", b"5")
        later = await next_batch(watch)

    assert summary(missed) == (False, {"/w/c": b"2", "/w/e": b"4"}, ["/w/b"])
    assert summary(later) == (False, {"/w/f": b"5"}, [])


async def test_another_etcd_in_its_place_is_noticed_and_replaces_everything() -> None:
    """E-05: a wiped etcd starts again at revision 1; waiting there for our old revision would hang."""
    with EtcdProcess(fsync=False) as etcd:
        async with EtcdClient([etcd.endpoint]) as client, watch_prefix(client, "/w/") as watch:
            for i in range(20):
                await client.put("/w/a", str(i).encode())
            old = await next_batch(watch)
            etcd.kill()
            shutil.rmtree(etcd.data_dir / "member")
            # etcd derives a cluster's id from its address and name: another name, another cluster
            replacement = EtcdProcess(fsync=False, name="other", client_port=int(etcd.endpoint.rpartition(":")[2]))
            with replacement:
                await until_written(client, "/w/b", b"new")
                new = await next_batch(watch)
                if not new.puts:  # it came before the write
                    new = await next_batch(watch)

    assert new.cluster_id != old.cluster_id
    assert new.revision < old.revision
    assert {kv.key for kv in new.puts} == {"/w/b"}


async def test_a_watch_begun_while_etcd_is_away_waits_for_it(etcd: EtcdProcess) -> None:
    async with EtcdClient([etcd.endpoint], timeout_s=0.5) as client:
        await client.put("/w/a", b"1")
        etcd.kill()
        async with watch_prefix(client, "/w/") as watch, asyncio.TaskGroup() as group:
            first = group.create_task(next_batch(watch, 20))
            await asyncio.to_thread(etcd.start)

    assert summary(first.result()) == (True, {"/w/a": b"1"}, [])


async def test_one_key_can_be_followed_without_its_neighbours(shared: EtcdClient, prefix: str) -> None:
    async with PrefixWatch(shared, prefix + "a", exact=True) as watch:
        await next_batch(watch)
        await shared.put(prefix + "ab", b"neighbour")
        await shared.put(prefix + "a", b"mine")

        assert summary(await next_batch(watch)) == (False, {prefix + "a": b"mine"}, [])
