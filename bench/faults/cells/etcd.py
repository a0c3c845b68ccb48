"""Cells of the store."""

from __future__ import annotations

import asyncio
import time

from bench.faults.scene import LEASE_TTL_S, Cell, Scene
from inference_runtime.coordination import EtcdClient, keys
from inference_runtime.errors import InferenceError
from inference_runtime.testing.faults import Freeze, Kill

__all__ = ["CELLS"]


async def etcd_killed(scene: Scene) -> None:
    """E-01 on one member: killed for longer than every lease, and started again on its data."""
    async with scene.under(Kill(scene.cluster, "etcd")):
        await asyncio.sleep(LEASE_TTL_S + 1)
    await _control_plane_works(scene)


async def etcd_frozen(scene: Scene) -> None:
    """E-02 on one member: nothing answers and nothing is refused."""
    async with scene.under(Freeze(scene.cluster, "etcd")):
        await asyncio.sleep(LEASE_TTL_S + 2)
    await _control_plane_works(scene)


async def etcd_compacted(scene: Scene) -> None:
    """E-04: it comes back with its history gone, so that no watch can go on from where it was."""
    async with scene.under(Kill(scene.cluster, "etcd")):
        await asyncio.sleep(1)
    async with EtcdClient(scene.cluster.etcd) as client:
        scene.standing, revision = await client.list(keys.ELECTIONS)
        await client.compact(revision)
        scene.history_from = revision + 1
    await _control_plane_works(scene)


async def _control_plane_works(scene: Scene) -> None:
    """Orders are taken and carried out again; until then they may be refused, as long as that is said."""
    begin = time.monotonic()
    async with scene.cluster.client() as client:

        async def taken() -> bool:
            try:
                await client.apply({"name": "later", "model": "scripted", "runtime": "scripted"})
            except InferenceError:
                return False
            return True

        await scene.visible(taken, "no order was taken after etcd came back")
    await scene.cluster.wait_ready()
    await scene.cluster.wait_serving("later")
    scene.figures["orders_carried_out_s"] = time.monotonic() - begin


CELLS = (
    Cell("E-01", "etcd (one member): kill -9, 4 s", etcd_killed, "streams untouched", churn=True, stall_s=1.0),
    Cell("E-02", "etcd (one member): SIGSTOP 5 s", etcd_frozen, "streams untouched", churn=True, stall_s=1.0),
    Cell("E-04", "etcd: restart and compaction", etcd_compacted, "streams untouched", churn=True, stall_s=1.0),
)
