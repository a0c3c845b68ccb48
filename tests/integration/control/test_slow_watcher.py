"""A watcher that does not listen costs a set of names, and is told how things are when it does."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

import pytest

from inference_runtime.coordination import EtcdClient
from inference_runtime.telemetry import MetricSet
from inference_runtime.v1 import common_pb2
from services.coordinator import table as table_module
from services.coordinator.settings import CoordinatorSettings
from services.coordinator.table import Table, TableGauges
from tests.integration.control.kit import FakeEngine, put_deployment, until


@contextlib.asynccontextmanager
async def following(client: EtcdClient) -> AsyncIterator[Table]:
    table = Table(client, CoordinatorSettings(), common_pb2.FencingToken(), TableGauges(MetricSet()))
    async with asyncio.TaskGroup() as group:
        running = group.create_task(table.run())
        await table.ready()
        yield table
        running.cancel()


async def holds(table: Table, name: str, replica_id: str) -> bool:
    line = table.table.lines.get(name)
    return line is not None and [r.id for r in line.replicas] == [replica_id]


async def test_many_changes_of_one_line_are_one_message(client: EtcdClient) -> None:
    engine = await FakeEngine(client, "e1").join()
    await put_deployment(client, "a")
    async with following(client) as table:
        with table.subscribe() as watcher:
            await watcher.next()
            for i in range(100):
                await engine.serve("a", f"r{i}")
                await engine.drop("a", f"r{i}")
            await engine.serve("a", "last")
            await until(lambda: holds(table, "a", "last"), "the last change")
            message = await watcher.next()

    assert message is not None
    assert not message.snapshot
    assert [[r.id for r in line.replicas] for line in message.deployments] == [["last"]]


async def test_too_many_changes_are_the_whole_table_again(client: EtcdClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table_module, "MAX_OWED", 5)
    engine = await FakeEngine(client, "e1").join()
    async with following(client) as table:
        with table.subscribe() as watcher:
            await watcher.next()
            for i in range(10):
                await put_deployment(client, f"d{i}")
            await engine.serve("d9", "last")
            await until(lambda: holds(table, "d9", "last"), "the last change")
            message = await watcher.next()

    assert message is not None
    assert message.snapshot
    assert len(message.deployments) == 10


async def test_a_watcher_is_told_that_the_term_is_over(client: EtcdClient) -> None:
    async with following(client) as table:
        with table.subscribe() as watcher:
            await watcher.next()
            async with asyncio.TaskGroup() as group:
                waiting = group.create_task(watcher.next())
                await asyncio.sleep(0)
                table.ended = True
                watcher.wake.set()

    assert waiting.result() is None
