"""What the control plane may do to requests when it loses its store or its mind: nothing. Real processes, a real etcd."""

from __future__ import annotations

import asyncio
import json
import shutil

import pytest

from inference_runtime.cli.local import http_get
from inference_runtime.cli.store import acknowledge
from inference_runtime.coordination import EtcdClient, keys
from inference_runtime.errors import InferenceError
from inference_runtime.testing.cluster import Cluster
from services.gateway.table_store import TableStore
from tests.e2e.kit import ECHO
from tests.e2e.test_failures import PACED, SINGLETONS, Traffic

LEASE_TTL_S = 2.0
WAIT_S = 60.0


async def readyz(cluster: Cluster) -> dict[str, object]:
    """What the first gateway says of itself; {} while it is not ready."""
    status, body = await http_get(cluster.http.removeprefix("http://"), "/readyz")
    found: dict[str, object] = json.loads(body) if status == 200 else {}
    return found


async def ready_with(cluster: Cluster, routes: str) -> dict[str, object]:
    async with asyncio.timeout(WAIT_S):
        while True:
            found = await readyz(cluster)
            if found.get("routes") == routes:
                return found
            await asyncio.sleep(0.02)


async def test_a_gateway_restarted_without_a_control_plane_serves_from_disk() -> None:
    """E-03, §2.5: etcd, coordinator, manager and metrics are dead; the gateway is killed and comes back; every request is
    answered. When they are back, the table is live again and orders are carried out."""
    async with Cluster(lease_ttl_s=LEASE_TTL_S) as cluster:
        await cluster.apply(ECHO)
        await cluster.wait_serving("echo")
        assert (await ready_with(cluster, "live"))["warnings"] == []
        await until_on_disk(cluster)
        for name in (*SINGLETONS, "etcd"):
            cluster.kill(name)
        assert "does not answer" in str((await ready_with(cluster, "frozen"))["warnings"])
        cluster.kill("gateway")
        cluster.local.processes["gateway"].start()

        found = await ready_with(cluster, "from_disk")
        assert "from disk" in str(found["warnings"])
        traffic = Traffic(cluster.http, "echo")
        async with traffic.running():
            await traffic.answered(20)
            for name in ("etcd", *SINGLETONS):
                await cluster.restart(name)
            await ready_with(cluster, "live")
            await traffic.answered(4)
        traffic.check()
        await cluster.apply({**ECHO, "name": "later"})
        await cluster.wait_serving("later")


def wipe_etcd(cluster: Cluster) -> None:
    """Killed, emptied, started on the same ports: etcd gives it the same cluster id."""
    cluster.kill("etcd")
    shutil.rmtree(cluster.local.data_dir)
    cluster.local.processes["etcd"].start()


@pytest.mark.parametrize(
    "restarted", [(), ("coordinator", "deployment_manager"), ("gateway",)], ids=["nobody", "leaders", "gateway"]
)
async def test_a_wiped_etcd_changes_nothing_until_it_is_acknowledged(restarted: tuple[str, ...]) -> None:
    """E-05: requests go on by frozen routes, orders are refused, also when leaders or the gateway were restarted meanwhile. After
    the acknowledgement everybody follows the new store."""
    async with Cluster(lease_ttl_s=LEASE_TTL_S) as cluster, EtcdClient(cluster.etcd, timeout_s=3.0) as tool:
        await cluster.apply({**ECHO, "runtime_config": PACED})
        await cluster.wait_serving("echo")
        traffic = Traffic(cluster.http, "echo")
        async with traffic.running():
            await traffic.answered(4)
            if "gateway" in restarted:
                await until_on_disk(cluster)
        traffic.check()
        wipe_etcd(cluster)
        for name in restarted:
            cluster.kill(name)
            cluster.local.processes[name].start()

        async with asyncio.timeout(WAIT_S):
            while "acknowledge-store" not in str((await readyz(cluster)).get("warnings")):  # noqa: ASYNC110 - another's
                await asyncio.sleep(0.02)
        traffic = Traffic(cluster.http, "echo")
        async with traffic.running():
            await traffic.answered(20)
        traffic.check()
        stored = {kv.key for kv in (await tool.list(keys.ROOT))[0]}
        assert not any(key.startswith((keys.ENGINES, keys.REPLICAS, keys.ASSIGNMENTS, keys.DEPLOYMENTS)) for key in stored)
        if not restarted:
            assert stored == set()
            with pytest.raises(InferenceError):
                await cluster.apply({**ECHO, "name": "later"})

        await acknowledge(tool, allow_empty=True)
        await cluster.wait_ready()
        await cluster.apply(ECHO)
        await cluster.wait_serving("echo")
        assert (await ready_with(cluster, "live"))["warnings"] == []


async def until_on_disk(cluster: Cluster) -> None:
    """The file is written within a second of the table."""

    def replicas() -> int:
        stored = TableStore(cluster.local.state_dir / "gateway", cluster.etcd).load()
        return sum(len(line.replicas) for line in stored.table.deployments) if stored is not None else 0

    async with asyncio.timeout(WAIT_S):
        while not await asyncio.to_thread(replicas):  # noqa: ASYNC110 - another process's
            await asyncio.sleep(0.02)


@pytest.mark.parametrize("engines", [1, 3])
async def test_when_every_lease_is_revoked_routes_stay_and_everybody_is_back_within_15_s(engines: int) -> None:
    """E-06: etcd loses everybody at once, the leaders, too. Nobody is down, so nobody is treated as such: no request fails, no
    replica moves, and all are registered again within 15 s."""
    async with Cluster(engines=engines, lease_ttl_s=10.0) as cluster, EtcdClient(cluster.etcd) as tool:
        await cluster.apply({**ECHO, "replicas": engines, "runtime_config": PACED})
        await cluster.wait_serving("echo")
        assigned = {kv.key for kv in (await tool.list(keys.ASSIGNMENTS))[0]}
        traffic = Traffic(cluster.http, "echo")
        async with traffic.running():
            await traffic.answered(4)
            leased = {kv.lease_id for kv in (await tool.list(keys.ROOT))[0] if kv.lease_id}
            for lease in leased:
                await tool.revoke(lease)
            assert not any(kv.lease_id for kv in (await tool.list(keys.REPLICAS))[0]), "the fault did not take effect"
            async with asyncio.timeout(15):
                while len((await tool.list(keys.REPLICAS))[0]) < engines:
                    assert await readyz(cluster), "the gateway was left without a route"
                    await asyncio.sleep(0.02)
            await traffic.answered(8)
        traffic.check()
        assert {kv.key for kv in (await tool.list(keys.ASSIGNMENTS))[0]} == assigned
        await cluster.wait_ready()
        await ready_with(cluster, "live")
