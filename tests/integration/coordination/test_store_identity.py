"""E-05: an etcd that was wiped, replaced or restored from an older state is not acted on before somebody says so."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from inference_runtime.cli.store import acknowledge
from inference_runtime.coordination import (
    Candidate,
    Election,
    EtcdClient,
    EtcdUnavailable,
    LeaderObserver,
    Op,
    PrefixWatch,
    Registration,
    StoreGuard,
    StoreRecord,
    StoreReplaced,
    Term,
    keys,
)
from inference_runtime.errors import BadRequest, StaleLeader
from inference_runtime.testing.etcd import EtcdProcess
from tests.integration.coordination.conftest import Eventually

TTL_S = 4.0


@pytest.fixture
def etcd(tmp_path: Path) -> EtcdProcess:
    return EtcdProcess(tmp_path / "etcd", fsync=False)


@pytest.fixture(autouse=True)
def running(etcd: EtcdProcess) -> object:
    with etcd:
        yield


def guarded(etcd: EtcdProcess, refusals: list[str] | None = None, guard: StoreGuard | None = None) -> EtcdClient:
    said: list[str] = [] if refusals is None else refusals
    return EtcdClient([etcd.endpoint], guard=guard or StoreGuard(), on_store=said.append)


def wipe(etcd: EtcdProcess) -> None:
    """A new, empty etcd on the same ports, which makes the same cluster id."""
    etcd.kill()
    shutil.rmtree(etcd.data_dir)
    etcd.start()


def copy_data(etcd: EtcdProcess, to: Path) -> None:
    """A snapshot, taken cold."""
    etcd.kill()
    shutil.copytree(etcd.data_dir, to)
    etcd.start()


def restore(etcd: EtcdProcess, source: Path) -> None:
    etcd.kill()
    shutil.rmtree(etcd.data_dir)
    shutil.copytree(source, etcd.data_dir)
    etcd.start()


async def settled(client: EtcdClient) -> EtcdClient:
    """Once it has seen that its connection is another."""
    async with asyncio.timeout(10):
        while True:
            try:
                await client.get("/anything")
                return client
            except StoreReplaced:
                return client
            except EtcdUnavailable:
                continue


async def test_the_first_client_names_the_store_and_all_agree(etcd: EtcdProcess) -> None:
    async with guarded(etcd) as one, guarded(etcd) as other, EtcdClient([etcd.endpoint]) as tool:
        assert one.guard is not None
        assert one.guard.mark is not None
        assert one.lineage == other.lineage != one.cluster_id
        assert tool.lineage == tool.cluster_id == one.cluster_id
        stored = await tool.get(keys.STORE)
    assert stored is not None
    assert StoreRecord.from_bytes(stored.value) == StoreRecord(one.guard.mark.store_id)


async def test_many_clients_at_once_give_one_name(etcd: EtcdProcess) -> None:
    clients = [guarded(etcd) for _ in range(10)]
    await asyncio.gather(*(client.connect() for client in clients))

    assert len({client.lineage for client in clients}) == 1
    for client in clients:
        await client.close()


async def test_a_wiped_store_is_neither_read_nor_written_until_it_is_acknowledged(etcd: EtcdProcess) -> None:
    """E-05. Same cluster id, empty: only its id and its revision tell."""
    refusals: list[str] = []
    async with guarded(etcd, refusals) as client, EtcdClient([etcd.endpoint]) as tool:
        await client.put("/k", b"1")
        lineage, cluster_id = client.lineage, client.cluster_id
        await asyncio.to_thread(wipe, etcd)
        await settled(client)

        for call in (client.get("/k"), client.list("/"), client.put("/k", b"2"), client.grant(5), client.verify()):
            with pytest.raises(StoreReplaced, match="inferctl acknowledge-store"):
                await call
        assert client.cluster_id == cluster_id, "the injected fault is the hard one: the cluster id is the same"
        assert (await tool.list("/"))[0] == []
        assert [bool(r) for r in refusals] == [True]
        assert client.lineage == lineage

        with pytest.raises(BadRequest, match="--allow-empty"):
            await acknowledge(tool)
        await acknowledge(tool, allow_empty=True)

        await client.put("/k", b"3")
        assert [bool(r) for r in refusals] == [True, False]
        assert client.lineage != lineage


async def test_a_wiped_store_that_has_outgrown_the_old_one_is_refused_by_its_id(etcd: EtcdProcess) -> None:
    """E-05: nobody was there when the revision was low, and fresh processes have made the store theirs."""
    async with guarded(etcd) as client, EtcdClient([etcd.endpoint], timeout_s=3.0) as tool:
        await client.put("/k", b"1")
        watch = PrefixWatch(client, "/k")
        assert (await anext(watch)).snapshot
        await asyncio.to_thread(wipe, etcd)
        await settled(tool)
        for i in range(20):
            await tool.put("/k", str(i).encode())
        async with guarded(etcd) as fresh:
            assert fresh.lineage != client.lineage

        async with asyncio.TaskGroup() as group:
            waiting = group.create_task(anext(watch))
            with pytest.raises(StoreReplaced):
                while True:
                    try:
                        await client.verify()
                    except StoreReplaced:
                        raise
                    except EtcdUnavailable:
                        continue
            assert not waiting.done()
            await tool.put(keys.deployment("a"), b"")
            await acknowledge(tool)
            batch = await waiting

        assert batch.snapshot
        assert [kv.value for kv in batch.puts] == [b"19"]
        assert batch.cluster_id == client.lineage
        watch.close()


async def test_a_watch_that_begins_after_the_exchange_does_not_begin(etcd: EtcdProcess) -> None:
    """Nothing was open that could have noticed, and the revision is higher than any that was seen: only the id tells."""
    async with guarded(etcd) as client, EtcdClient([etcd.endpoint], timeout_s=3.0) as tool:
        await asyncio.to_thread(wipe, etcd)
        await settled(tool)
        for i in range(20):
            await tool.put("/k", str(i).encode())
        watch = PrefixWatch(client, "/k")
        async with asyncio.TaskGroup() as group:
            first = group.create_task(anext(watch))
            async with asyncio.timeout(10):
                while client.guard is None or not client.guard.refusal:  # noqa: ASYNC110 - in etcd
                    await asyncio.sleep(0.01)
            assert not first.done()
            first.cancel()
        watch.close()


async def test_a_store_restored_from_an_older_state_is_refused(etcd: EtcdProcess, tmp_path: Path) -> None:
    """E-05: everything in it is genuine, id and cluster id are right, and it is the past."""
    async with guarded(etcd) as client:
        await client.put("/k", b"old")
        await asyncio.to_thread(copy_data, etcd, tmp_path / "copy")
        await settled(client)
        for _ in range(5):
            await client.put("/k", b"new")
        await asyncio.to_thread(restore, etcd, tmp_path / "copy")
        await settled(client)

        with pytest.raises(StoreReplaced, match="went back"):
            await client.get("/k")
        async with EtcdClient([etcd.endpoint]) as tool:
            for _ in range(10):
                await tool.put("/k", b"grown")
            with pytest.raises(StoreReplaced, match="went back"):
                await client.get("/k")
            await tool.put(keys.deployment("a"), b"")
            await acknowledge(tool)
        kv = await client.get("/k")
        assert kv is not None
        assert kv.value == b"grown"


async def test_a_restored_store_whose_revision_was_bumped_is_the_same(etcd: EtcdProcess, tmp_path: Path) -> None:
    """E-05 with bump: normal. The bump is made by writing, which etcdutl does by a flag."""
    async with guarded(etcd) as client:
        await client.put("/k", b"old")
        lineage = client.lineage
        await asyncio.to_thread(copy_data, etcd, tmp_path / "copy")
        await settled(client)
        for _ in range(5):
            await client.put("/k", b"new")
        mark = client.guard.mark if client.guard else None
    await asyncio.to_thread(restore, etcd, tmp_path / "copy")
    async with EtcdClient([etcd.endpoint]) as tool:
        for _ in range(10):
            await tool.put("/bump", b"")

    async with guarded(etcd, guard=StoreGuard(mark)) as again:
        assert (await again.get("/k")) is not None
        assert again.lineage == lineage


async def test_the_right_store_coming_back_needs_no_acknowledgement(etcd: EtcdProcess, tmp_path: Path) -> None:
    refusals: list[str] = []
    async with guarded(etcd, refusals) as client:
        await client.put("/k", b"1")
        etcd.kill()
        shutil.move(etcd.data_dir, tmp_path / "right")
        await asyncio.to_thread(etcd.start)
        await settled(client)
        with pytest.raises(StoreReplaced):
            await client.get("/k")
        await asyncio.to_thread(restore, etcd, tmp_path / "right")
        async with asyncio.timeout(10):
            while True:
                try:
                    kv = await client.get("/k")
                    break
                except EtcdUnavailable:
                    continue
        assert kv is not None
        assert [bool(r) for r in refusals] == [True, False]


async def test_what_was_remembered_refuses_another_store_from_the_start(etcd: EtcdProcess) -> None:
    async with guarded(etcd) as client:
        mark = client.guard.mark if client.guard else None
    await asyncio.to_thread(wipe, etcd)

    again = guarded(etcd, guard=StoreGuard(mark))
    with pytest.raises(StoreReplaced):
        await again.connect()
    await again.close()


@asynccontextmanager
async def office(client: EtcdClient) -> AsyncIterator[tuple[asyncio.Queue[Term], LeaderObserver]]:
    terms: asyncio.Queue[Term] = asyncio.Queue()

    async def lead(term: Term) -> None:
        terms.put_nowait(term)
        await asyncio.Event().wait()

    observer = LeaderObserver(client, "r")
    async with asyncio.TaskGroup() as group:
        tasks = [
            group.create_task(Election(client, "r", Candidate.here("h:1"), ttl_s=TTL_S).run(lead)),
            group.create_task(observer.run()),
        ]
        yield terms, observer
        for task in tasks:
            task.cancel()


async def test_nobody_leads_and_nothing_is_registered_in_a_refused_store(etcd: EtcdProcess, eventually: Eventually) -> None:
    """E-05: writes are refused, the last known leader stays known, and everything comes back by itself afterwards."""
    async with (
        guarded(etcd) as client,
        EtcdClient([etcd.endpoint], timeout_s=3.0) as tool,
        Registration(client, ttl_s=TTL_S, jitter_s=0.1) as registration,
        office(client) as (terms, observer),
    ):
        await registration.set(keys.engine("e1"), b"here")
        assert await registration.flush(5)
        async with asyncio.timeout(10):
            first = await terms.get()
            known = await observer.wait()
        await asyncio.to_thread(wipe, etcd)
        async with asyncio.timeout(20):
            await first.lost()

        with pytest.raises(StaleLeader):
            await first.txn([Op.put("/effect", b"")])
        assert terms.empty()
        assert observer.current == known
        assert (await tool.list("/"))[0] == [], "nothing was written into a store that nobody acknowledged"

        await acknowledge(tool, allow_empty=True)
        async with asyncio.timeout(15):
            second = await terms.get()
        assert second.token.cluster_id == client.lineage != first.token.cluster_id
        await eventually(lambda: found(tool, keys.engine("e1")), 15)


async def found(client: EtcdClient, key: str) -> bool:
    return await client.get(key) is not None


async def test_an_acknowledgement_ends_the_terms_of_those_who_follow_that_store(etcd: EtcdProcess) -> None:
    """Tokens of before and after cannot be compared, so no term spans an acknowledgement."""
    async with guarded(etcd) as client, EtcdClient([etcd.endpoint]) as tool, office(client) as (terms, _):
        async with asyncio.timeout(30):
            first = await terms.get()
            await acknowledge(tool, allow_empty=True)
            await first.lost()
            second = await terms.get()

        assert first.token.cluster_id != second.token.cluster_id == client.lineage
        with pytest.raises(StaleLeader):
            await first.txn([Op.put("/effect", b"")])
