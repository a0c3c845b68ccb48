"""Cells of the store: members lost and frozen, all of it restarted, replaced, and its leases gone."""

from __future__ import annotations

import asyncio
import shutil
import sys
import time
from collections.abc import Sequence
from typing import Any

from bench.faults.load import MODEL
from bench.faults.office import fewest_routes
from bench.faults.scene import LEASE_TTL_S, Cell, Scene
from inference_runtime.cli.local import SINGLETONS, http_get
from inference_runtime.coordination import EtcdClient, keys
from inference_runtime.coordination.errors import Compacted, EtcdError
from inference_runtime.coordination.kv import KeyValue
from inference_runtime.errors import InferenceError
from inference_runtime.testing.disturb import Disturb
from inference_runtime.testing.faults import FaultNotVerified, Kill
from inference_runtime.testing.members import LeasesRevoked, MembersFrozen, MembersKilled, StoreSwapped
from inference_runtime.testing.proxy import CUT

__all__ = ["CELLS"]

#: Everybody who talks to etcd.
SERVICES = (*SINGLETONS, "engine", "gateway")
#: Seconds that writes may be refused while etcd finds another leader.
WRITES_BACK_S = 3.0
#: Engines that may vanish before it is a crowd: etcd revokes one lease after the other, and so far each could be alone.
ALONE = 2
#: A deployment that is taken away while nobody looks.
GONE = "gone"


async def etcd_leader_killed(scene: Scene) -> None:
    """E-01: longer than every lease, and started again on its data."""
    async with scene.under(MembersKilled(scene.cluster.store, [await _leader(scene)])):
        await _writes_come_back(scene)
        await asyncio.sleep(LEASE_TTL_S + 1)
    await _control_plane_works(scene)


async def etcd_leader_frozen(scene: Scene) -> None:
    """E-02: its connections stay open, nothing answers, nothing is refused."""
    outage_s = scene.sized("seconds", quick=6, full=15)
    before = await _leases(scene)
    async with scene.under(MembersFrozen(scene.cluster.store, [await _leader(scene)])):
        begin = time.monotonic()
        await _writes_come_back(scene)
        await asyncio.sleep(max(0.0, begin + outage_s - time.monotonic()))
    await _control_plane_works(scene)
    scene.measured("leases_lost", len(before - await _leases(scene)))


async def etcd_quorum_lost(scene: Scene) -> None:
    """E-03: nothing can be written or asked for; half way a gateway is killed and started again."""
    outage_s = scene.sized("seconds", quick=15, full=600)
    number = scene.rng.randrange(2)
    gateway = scene.cluster.local.of("gateway")[number].spec.name
    async with scene.under(MembersKilled(scene.cluster.store, scene.rng.sample(range(3), 2))):
        begin = time.monotonic()
        if not await _refuses_writes(scene):
            raise FaultNotVerified("etcd takes writes with one member of three")
        await asyncio.sleep(outage_s / 2)
        scene.may_break.add(number)
        scene.load.probed = [1 - number]
        async with scene.under(Kill(scene.cluster, gateway)):
            await asyncio.sleep(1)
            scene.cluster.local.processes[gateway].start()
            scene.measured("restarted_serves_s", await scene.seconds_until(lambda: _serves_from_disk(scene, number)))
            scene.load.probed = [0, 1]
        await asyncio.sleep(max(5.0, begin + outage_s - time.monotonic()))
    await _control_plane_works(scene)


async def etcd_compacted(scene: Scene) -> None:
    """E-04: it is killed, comes back while nobody reaches it, changes, and forgets its history: no watch can go on."""
    await scene.cluster.apply({"name": GONE, "model": "scripted", "runtime": "scripted"})
    await scene.cluster.wait_serving(GONE)
    doors = [door for all_of_one in scene.cluster.etcd_doors.values() for door in all_of_one]
    async with scene.under(Disturb(doors, up=CUT, down=CUT, what="cutting everybody off etcd")):
        async with scene.under(Kill(scene.cluster, "etcd")):
            await asyncio.sleep(1)
        async with EtcdClient(scene.cluster.etcd) as client:
            _, followed = await client.list(keys.ROOT)
            await _take_away(client, GONE)
            scene.standing, revision = await client.list(keys.ELECTIONS)
            await client.compact(revision)
            scene.history_from = revision + 1
            await _is_compacted(client, followed)
    scene.measured("stale_route_s", await scene.seconds_until(lambda: _nobody_has(scene, GONE)))
    await _control_plane_works(scene)


async def _take_away(client: EtcdClient, deployment: str) -> None:
    """What the deployment manager does last when a deployment is deleted."""
    replicas, _ = await client.list(keys.replicas_of(deployment))
    assignments, _ = await client.list(keys.ASSIGNMENTS)
    ids = {keys.segments(kv.key, keys.replicas_of(deployment))[0] for kv in replicas}
    for kv in assignments:
        if kv.key.rpartition("/")[2] in ids:
            await client.delete(kv.key)
    if not ids or not await client.delete(keys.deployment(deployment)):
        raise FaultNotVerified(f"there was nothing of {deployment!r} to take away")


async def _is_compacted(client: EtcdClient, revision: int) -> None:
    """Raise FaultNotVerified unless a watch from this revision on is refused."""
    stream = client.watch(keys.ROOT, revision)
    try:
        await stream.open()
        await stream.read(2.0)
    except Compacted:
        return
    finally:
        stream.close()
    raise FaultNotVerified(f"etcd still knows revision {revision}")


async def _nobody_has(scene: Scene, deployment: str) -> bool:
    """Whether no engine hosts a deployment any more, and no gateway offers it."""
    async with EtcdClient(scene.cluster.etcd) as client:
        if (await client.list(keys.replicas_of(deployment)))[0]:
            return False
    for url in scene.cluster.local.http_urls:
        status, body = await http_get(url.removeprefix("http://"), "/v1/models")
        if status != 200 or f'"{deployment}"'.encode() in body:
            return False
    return True


async def etcd_replaced(scene: Scene) -> None:
    """E-05: etcd comes back empty, then is put right; then it comes back as it was some orders ago, which is acknowledged."""
    older = scene.cluster.folder / "older"
    async with scene.under(Kill(scene.cluster, "etcd")):
        await asyncio.to_thread(shutil.copytree, scene.cluster.local.data_dir, older)
    for number in range(3):  # what the older state does not know
        await scene.cluster.apply({"name": f"since-{number}", "model": "scripted", "runtime": "scripted", "replicas": 0})
    async with scene.under(StoreSwapped(scene.cluster, None)):
        await asyncio.sleep(2 * LEASE_TTL_S)
        scene.measured("written_unasked", len(await _written(scene, since=0)))
        scene.measured("orders_taken_unasked", float(await _takes_orders(scene)))
    await _control_plane_works(scene)
    swap = StoreSwapped(scene.cluster, older)
    async with scene.under(swap):
        restored = swap.revision
        await asyncio.sleep(2 * LEASE_TTL_S)
        scene.measured("written_unasked", len(await _written(scene, since=restored)))
        scene.measured("orders_taken_unasked", float(await _takes_orders(scene)))
        await _acknowledge(scene)
        await _control_plane_works(scene)
        swap.keep = True


async def _written(scene: Scene, *, since: int) -> list[KeyValue]:
    async with EtcdClient(scene.cluster.etcd) as client:
        return [kv for kv in (await client.list(keys.ROOT))[0] if kv.mod_revision > since]


async def _takes_orders(scene: Scene) -> bool:
    try:
        async with asyncio.timeout(LEASE_TTL_S):
            await scene.cluster.apply({"name": "unasked", "model": "scripted", "runtime": "scripted"})
    except (InferenceError, TimeoutError):
        return False
    return True


async def _acknowledge(scene: Scene) -> None:
    """What a person types. Raises FaultNotVerified when it fails."""
    command = (sys.executable, "-c", "from inference_runtime.cli.main import main; main()", "acknowledge-store")
    etcd = ",".join(scene.cluster.etcd)
    process = await asyncio.create_subprocess_exec(
        *command, "--etcd", etcd, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    said, _ = await process.communicate()
    if process.returncode != 0:
        raise FaultNotVerified(f"the store could not be acknowledged: {said.decode(errors='replace').strip()}")


async def leases_revoked(scene: Scene) -> None:
    """E-06: every engine loses its lease at the same moment, and is well; then every process does, leaders included."""
    watching, stop = asyncio.Event(), asyncio.Event()
    async with asyncio.TaskGroup() as tasks:
        fewest = tasks.create_task(fewest_routes(scene.cluster, MODEL, watching, stop))
        await watching.wait()
        try:
            await _revoked(scene, await _leases(scene, (keys.ENGINES, keys.REPLICAS)))
            await _control_plane_works(scene)
            await _revoked(scene, await _leases(scene))
            await _control_plane_works(scene)
        finally:
            stop.set()
    scene.measured("routes_dropped", scene.cell.replicas - fewest.result())


async def _revoked(scene: Scene, leases: set[int]) -> None:
    """Revoke leases, and return once every engine is registered again."""
    expected = len(scene.cluster.local.of("engine"))
    begin = time.monotonic()

    async def registered() -> bool:
        async with EtcdClient(scene.cluster.etcd) as client:
            return len((await client.list(keys.ENGINES))[0]) == expected

    async with scene.under(LeasesRevoked(scene.cluster, leases)):
        scene.measured("registered_again_s", await scene.seconds_until(registered, begin))


# --- what is asked of etcd -------------------------------------------------------------------------------------------


async def _leader(scene: Scene) -> int:
    if scene.cluster.store is None:
        raise FaultNotVerified("this etcd has one member")
    return await asyncio.to_thread(scene.cluster.store.leader)


async def _leases(scene: Scene, prefixes: Sequence[str] = (keys.ELECTIONS, keys.ENGINES, keys.REPLICAS)) -> set[int]:
    """Leases of everything that is registered or stands for election, or of some of it."""
    async with EtcdClient(scene.cluster.etcd) as client:
        found = [kv for prefix in prefixes for kv in (await client.list(prefix))[0]]
    return {kv.lease_id for kv in found if kv.lease_id}


async def _write(scene: Scene) -> bool:
    try:
        async with EtcdClient(scene.cluster.etcd, timeout_s=0.5) as client:
            await client.put(keys.ROOT + "faults/written", b"")
    except EtcdError:
        return False
    return True


async def _writes_come_back(scene: Scene) -> None:
    scene.measured("writes_back_s", await scene.seconds_until(lambda: _write(scene)))


async def _refuses_writes(scene: Scene) -> bool:
    return not await _write(scene)


async def _serves_from_disk(scene: Scene, gateway: int) -> bool:
    """Whether a gateway is ready, and says that it took its table from disk."""
    status, body = await http_get(scene.cluster.local.http_urls[gateway].removeprefix("http://"), "/readyz")
    return status == 200 and b"from_disk" in body


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
    scene.measured("orders_carried_out_s", time.monotonic() - begin)


_UNTOUCHED: dict[str, Any] = {"churn": True, "stall_s": 1.0}
_THREE = {"etcd_members": 3}

CELLS = (
    Cell(
        "E-01",
        "etcd: leader of 3 members kill -9",
        etcd_leader_killed,
        "streams untouched; writes back within 3 s",
        limits={"writes_back_s": WRITES_BACK_S},
        cluster=_THREE,
        **_UNTOUCHED,
    ),
    Cell(
        "E-02",
        "etcd: leader of 3 members SIGSTOP 15 s, leases of 10 s",
        etcd_leader_frozen,
        "streams untouched; no lease lost; writes back within 3 s",
        limits={"writes_back_s": WRITES_BACK_S, "leases_lost": 0},
        cluster={**_THREE, "lease_ttl_s": 10.0},
        **_UNTOUCHED,
    ),
    Cell(
        "E-03",
        "etcd: 2 of 3 members kill -9, 600 s; a gateway kill -9 meanwhile",
        etcd_quorum_lost,
        "streams untouched; the gateway serves from its disk; its open streams may break",
        gateways_die=True,
        limits={"restarted_serves_s": 10.0},
        cluster=_THREE,
        **_UNTOUCHED,
    ),
    Cell(
        "E-04",
        "etcd: restart, a change and compaction while nobody reaches it",
        etcd_compacted,
        "streams untouched; no stale route after 5 s",
        limits={"stale_route_s": 5.0},
        # Nobody's lease runs out meanwhile, so that it is the watches that have to cope.
        cluster={"etcd_doors": SERVICES, "lease_ttl_s": 10.0},
        **_UNTOUCHED,
    ),
    Cell(
        "E-05",
        "etcd: comes back empty; comes back as it was some orders ago",
        etcd_replaced,
        "streams untouched; nothing is written and no order is taken until it is put right or acknowledged",
        limits={"written_unasked": 0, "orders_taken_unasked": 0},
        **_UNTOUCHED,
    ),
    Cell(
        "E-06",
        "etcd: leases of all engines revoked at once, then all leases",
        leases_revoked,
        "streams untouched; routes kept; everybody registered again within 15 s",
        limits={"registered_again_s": 15.0, "routes_dropped": ALONE},
        singletons=2,
        **_UNTOUCHED,
    ),
)
