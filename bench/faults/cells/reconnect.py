"""The cell in which everybody comes back to etcd at once."""

from __future__ import annotations

import asyncio
import time

from bench.faults.judge import percentile
from bench.faults.scene import Cell, Scene
from bench.faults.standins import DEPLOYMENT, latencies, probing, standins
from inference_runtime.coordination import EtcdClient, keys
from inference_runtime.errors import InferenceError
from inference_runtime.testing.etcd import member_status
from inference_runtime.testing.faults import FaultNotVerified, Kill

__all__ = ["CELLS"]

#: A deployment's. Its holders stop trusting it after 8 s.
TTL_S = 10.0
#: So long etcd is down, seconds: everybody has lost its lease by then, and has to register again.
DOWN_S = 9.0
#: Seconds that the answers of etcd are watched after the table is complete.
AFTER_S = 1.0
#: Seconds between two looks at the whole table, which cost etcd something, too.
LOOK_EVERY_S = 0.25
#: Seconds that a herd gets to register at first.
GATHER_S = 60.0


async def everybody_reconnects(scene: Scene) -> None:
    """P-03: etcd is killed for longer than leases are trusted; everybody finds it again, takes another lease and registers."""
    count = int(scene.sized("processes", quick=60, full=500))
    probes = scene.cluster.folder / "probes"
    etcd = scene.cluster.etcd
    async with standins(etcd, count, TTL_S, scene.cluster.local.logs / "standins.log"), probing(etcd[0], probes):
        await _gathered(scene, count)
        async with scene.under(Kill(scene.cluster, "etcd")):
            await asyncio.sleep(DOWN_S)
            scene.cluster.local.processes["etcd"].start()
            await _answers(scene)
            up, revision = time.monotonic(), _status(scene)[1]

            async def complete() -> bool:
                await asyncio.sleep(LOOK_EVERY_S)
                return await _registered(scene, since=revision) == count and await _in_table(scene) == count

            scene.measured("table_complete_s", await scene.seconds_until(complete, up))
            await asyncio.sleep(AFTER_S)
        found = latencies(probes, up, time.monotonic())
        if not found:
            raise FaultNotVerified("nobody asked etcd while everybody came back")
        scene.measured("etcd_p99_s", percentile(found, 0.99))


async def _gathered(scene: Scene, count: int) -> None:
    try:
        async with asyncio.timeout(GATHER_S):
            while await _registered(scene, since=0) < count or await _in_table(scene) < count:  # noqa: ASYNC110 - etcd
                await asyncio.sleep(LOOK_EVERY_S)
    except TimeoutError as err:
        raise FaultNotVerified(f"{count} stand-ins did not register within {GATHER_S:g} s") from err


async def _answers(scene: Scene) -> None:
    async def healthy() -> bool:
        return _status(scene)[0]

    await scene.visible(healthy, "etcd did not come back")


def _status(scene: Scene) -> tuple[bool, int]:
    """Whether etcd has a leader, and its revision."""
    status = member_status(int(scene.cluster.etcd[0].rpartition(":")[2]))
    return status.get("leader", "0") != "0", int(status.get("header", {}).get("revision", 0))


async def _registered(scene: Scene, *, since: int) -> int:
    """Stand-ins that wrote their records after this revision."""
    async with EtcdClient(scene.cluster.etcd) as client:
        found, _ = await client.list(keys.replicas_of(DEPLOYMENT))
    return sum(kv.mod_revision > since for kv in found)


async def _in_table(scene: Scene) -> int:
    """Stand-ins that the coordinator knows of."""
    async with scene.cluster.client() as client:
        try:
            return len(await client.replicas(DEPLOYMENT))
        except InferenceError:
            return 0  # nobody leads at present


CELLS = (
    Cell(
        "P-03",
        f"500 processes reconnect after etcd was down for {DOWN_S:g} s",
        everybody_reconnects,
        "etcd's p99 below 0.5 s; the table complete within 15 s",
        streams=20,
        limits={"etcd_p99_s": 0.5, "table_complete_s": 15.0},
        cluster={"lease_ttl_s": TTL_S},
    ),
)
