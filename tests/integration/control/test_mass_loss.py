"""E-06 at the deployment manager: engines that vanish many at once keep their places for a while."""

from __future__ import annotations

import asyncio
import contextlib
import time

import pytest

from inference_runtime.coordination import EtcdClient
from inference_runtime.testing.etcd import EtcdProcess
from services.deployment_manager.settings import DeploymentManagerSettings
from tests.integration.control.kit import FakeEngine, assignments, singleton, until
from tests.integration.control.test_deployment_manager import apply, assigned, get, spec


@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("new_leader", [False, True])
async def test_engines_that_vanish_many_at_once_keep_their_places_for_a_while(
    etcd: EtcdProcess, client: EtcdClient, count: int, new_leader: bool
) -> None:
    """E-06: engines come back one by one, each at its own moment. Those who are back must not be given what belongs to others,
    also by a leader that was elected meanwhile and has never seen them."""
    settings = DeploymentManagerSettings(engine_gone_s=0.1, settle_s=0, mass_loss_s=60)
    engines = [await FakeEngine(client, f"e{i}").join() for i in range(count)]
    async with contextlib.AsyncExitStack() as stack:
        manager = await stack.enter_async_context(singleton("deployment_manager", etcd.endpoint, settings))
        await apply(manager, spec(replicas=count))
        before = await assigned(client, count)
        await asyncio.gather(*(engine.leave() for engine in engines))
        if new_leader:
            await stack.aclose()
            manager = await stack.enter_async_context(singleton("deployment_manager", etcd.endpoint, settings))
        back = [await FakeEngine(client, f"e{i}").join() for i in range(count - 1)]
        for engine in back:
            for assignment in before:
                if assignment.engine_id == engine.id:
                    await engine.serve("a", assignment.replica_id)

        async def seen() -> bool:
            return (await get(manager)).status.ready_replicas == count - 1

        await until(seen, "those who are back to be seen")
        await apply(manager, spec("b"))  # a step of its own, planned after the missing one would have been gone
        await until(lambda: placed(client, "b"), "the other deployment to be placed")
        assert [a for a in await assignments(client) if a.deployment == "a"] == before


async def placed(client: EtcdClient, deployment: str) -> bool:
    return any(a.deployment == deployment for a in await assignments(client))


async def test_engines_that_do_not_come_back_in_time_are_gone(etcd: EtcdProcess, client: EtcdClient) -> None:
    settings = DeploymentManagerSettings(engine_gone_s=0.1, mass_loss_s=1.5)
    engines = [await FakeEngine(client, f"e{i}").join() for i in range(3)]
    async with singleton("deployment_manager", etcd.endpoint, settings) as manager:
        await apply(manager, spec(replicas=3))
        before = await assigned(client, 3)
        began_s = time.monotonic()
        await asyncio.gather(*(engine.leave() for engine in engines))
        await FakeEngine(client, "e9").join()

        async def moved() -> bool:
            return {a.engine_id for a in await assignments(client)} == {"e9"}

        await until(moved, "all replicas to have another place")
        assert time.monotonic() - began_s > 1.0
        assert {a.engine_id for a in before} == {"e0", "e1", "e2"}
