"""The routing table on disk: what is written is read again, and nothing else is ever used."""

from __future__ import annotations

import asyncio
import stat
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from inference_runtime.coordination import StoreMark
from inference_runtime.errors import ServerError
from inference_runtime.v1 import common_pb2, coordinator_service_pb2
from services.gateway.routes import RouteTable
from services.gateway.table_store import FILE, StoredTable, TableStore

ETCD = ("127.0.0.1:2379",)
MARK = StoreMark("a" * 32, 2**63 + 5, 41, ("b" * 32,))


def update(*names: str, revision: int = 41, snapshot: bool = True, removed: tuple[str, ...] = (), term: int = 3) -> Update:
    lines = [
        coordinator_service_pb2.DeploymentRoute(
            deployment=name,
            runtime="scripted",
            replicas=[common_pb2.Replica(id=f"{name}-1", engine_id="e1", address="h:1", state=common_pb2.REPLICA_STATE_SERVING)],
        )
        for name in names
    ]
    token = common_pb2.FencingToken(role="coordinator", cluster_id=7, revision=term)
    return Update(revision=revision, snapshot=snapshot, deployments=lines, removed=removed, fencing_token=token)


Update = coordinator_service_pb2.WatchRoutesResponse


@asynccontextmanager
async def writing(store: TableStore) -> AsyncIterator[None]:
    async with asyncio.TaskGroup() as group:
        task = group.create_task(store.run())
        yield
        task.cancel()


async def written(folder: Path, names: set[str]) -> StoredTable:
    """What a gateway that starts now finds, once it is this."""
    async with asyncio.timeout(5):
        while True:
            stored = TableStore(folder, ETCD).load()
            if stored is not None and {line.deployment for line in stored.table.deployments} == names:
                return stored
            await asyncio.sleep(0.01)


async def test_every_change_reaches_the_disk_as_a_whole_table(tmp_path: Path) -> None:
    """E-03: a gateway that starts in an outage has the routes of the moment before."""
    store = TableStore(tmp_path / "gateway", ETCD)
    assert store.load() is None
    async with writing(store):
        store.took(update("a", "b"), MARK)
        first = await written(tmp_path / "gateway", {"a", "b"})
        store.took(update("c", revision=42, snapshot=False, removed=("a",), term=4), MARK)
        second = await written(tmp_path / "gateway", {"b", "c"})

    assert first.table.snapshot
    assert (first.mark, first.endpoints) == (MARK, ETCD)
    assert (first.table.revision, first.table.fencing_token.revision) == (41, 3)
    assert (second.table.revision, second.table.fencing_token.revision) == (42, 4)
    path = tmp_path / "gateway" / FILE
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert [p.name for p in path.parent.iterdir()] == [FILE], "no draft is left"


async def test_a_gateway_that_came_from_disk_writes_the_whole_table_at_the_first_change(tmp_path: Path) -> None:
    before = TableStore(tmp_path, ETCD)
    async with writing(before):
        before.took(update("a", "b"), MARK)
        await written(tmp_path, {"a", "b"})

    store = TableStore(tmp_path, ETCD)
    assert store.load() is not None
    async with writing(store):
        store.took(update("c", revision=42, snapshot=False), MARK)
        await written(tmp_path, {"a", "b", "c"})


async def test_load_reports_write_nothing(tmp_path: Path) -> None:
    store = TableStore(tmp_path, ETCD)
    async with writing(store):
        store.took(update("a"), MARK)
        await written(tmp_path, {"a"})
        inode = (tmp_path / FILE).stat().st_ino
        store.took(Update(revision=99, loads=[common_pb2.ReplicaLoad(replica_id="a-1", running=3)]), MARK)
        store.took(Update(revision=100), MARK)
        await asyncio.sleep(0)

    assert (tmp_path / FILE).stat().st_ino == inode


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_a_changed_or_cut_file_is_never_used(data: st.DataObject) -> None:
    """Whatever bit falls, whatever end is missing: no table, and no exception but the one that says so."""
    whole = StoredTable(update("a", "b"), MARK, ETCD).to_bytes()
    if data.draw(st.booleans(), label="cut"):
        broken = whole[: data.draw(st.integers(0, len(whole) - 1), label="length")]
    else:
        place = data.draw(st.integers(0, len(whole) - 1), label="place")
        broken = whole[:place] + bytes([whole[place] ^ 1 << data.draw(st.integers(0, 7), label="bit")]) + whole[place + 1 :]

    with pytest.raises(ValueError, match=r"^(it|its) "):
        StoredTable.from_bytes(broken)
    assert StoredTable.from_bytes(whole) == StoredTable(update("a", "b"), MARK, ETCD)


@given(st.binary(max_size=200))
def test_any_other_file_is_refused(data: bytes) -> None:
    with pytest.raises(ValueError):
        StoredTable.from_bytes(data)


def test_a_broken_file_is_left_out_and_a_table_of_another_etcd_too(tmp_path: Path) -> None:
    whole = StoredTable(update("a"), None, ETCD).to_bytes()
    (tmp_path / FILE).write_bytes(whole[:-1])
    assert TableStore(tmp_path, ETCD).load() is None

    (tmp_path / FILE).write_bytes(whole)
    assert TableStore(tmp_path, ("10.0.0.1:2379",)).load() is None
    stored = TableStore(tmp_path, ("10.0.0.1:2379", *ETCD)).load()
    assert stored is not None
    assert stored.mark is None


def test_a_directory_that_cannot_be_used_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")

    with pytest.raises(ServerError, match="choose another state_dir"):
        TableStore(tmp_path / "file" / "gateway", ETCD).load()


class Link:
    up = True
    silent = False
    silence = 0

    def listen(self) -> None:
        """Nothing is said."""


def test_a_table_from_disk_never_wins_over_a_live_one() -> None:
    """Whatever its revision and term were: a live table of another history replaces it, one of the same is newer anyway."""
    for cluster, revision, term in ((7, 41, 3), (7, 42, 3), (7, 42, 4), (9, 1, 1)):
        table = RouteTable(lambda engine, address: Link())
        table.apply(update("old"))
        live = update("new", revision=revision, term=term)
        live.fencing_token.cluster_id = cluster

        table.apply(live)

        assert set(table.routes) == {"new"}
