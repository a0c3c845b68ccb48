"""Cells of leaders: killed, frozen, stuck, cut off."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import grpc

from bench.faults.office import ROLES, deposed_at, terms
from bench.faults.scene import LEASE_TTL_S, Cell, Scene
from inference_runtime.rpc import error_from_rpc, open_channel
from inference_runtime.testing.disturb import Disturb
from inference_runtime.testing.faults import Freeze, Kill
from inference_runtime.testing.inside import BlockLoop
from inference_runtime.testing.proxy import CLEAR, CUT, Disturbance
from inference_runtime.v1 import coordinator_service_pb2, coordinator_service_pb2_grpc

__all__ = ["CELLS"]

#: A leader trusts its lease for this long after the last renewal was sent: half of one as short as here, 8 s of 10.
VALID_S = LEASE_TTL_S / 2
#: A leader that is stuck is ended so long after that, seconds, with this status. Not read from the product: it is held to them.
WATCHDOG_S, EXIT_STATUS = 1.0, 75
#: What a look at a process or a stream may add to a time that is measured, seconds.
LOOK_S = 0.5
#: How long an event loop is blocked, seconds.
BLOCKED_S = 20.0
#: Seconds from the loss of the engines until a leader has to say that it lacks them: a load report counts for 10.
DEGRADED_S = 15.0


async def leaders_killed(scene: Scene) -> None:
    """M-01: the leaders of both roles that decide, one after the other."""
    for role in ROLES:
        old = await scene.cluster.leader(role)
        begin = time.monotonic()
        async with scene.under(Kill(scene.cluster, old)):
            await _replaced(scene, role, old, begin)
            await asyncio.sleep(1)


async def leaders_frozen(scene: Scene) -> None:
    """M-02: each leader stands still for longer than its lease, and goes on while another one leads."""
    for role in ROLES:
        old = await scene.cluster.leader(role)
        begin = time.monotonic()
        async with scene.under(Freeze(scene.cluster, old)):
            await _replaced(scene, role, old, begin)
            await asyncio.sleep(1)
        await _leads_no_more(scene, role, old)


async def loops_blocked(scene: Scene) -> None:
    """M-03: each leader's event loop stands still; only a thread of its own can end its term, by ending the process."""
    for role in ROLES:
        old = await scene.cluster.leader(role)
        process = scene.cluster.local.processes[old]

        async def ended(process: Any = process) -> bool:
            return not process.running

        begin = time.monotonic()
        async with scene.under(BlockLoop(scene.cluster, old, BLOCKED_S)):
            scene.measured("ended_after_s", await scene.seconds_until(ended, begin))
            if process.exit_code != EXIT_STATUS:
                scene.problems.append(f"{old} ended with status {process.exit_code}, not {EXIT_STATUS}")
            await _replaced(scene, role, old, begin)
            await asyncio.sleep(1)
        await _leads_no_more(scene, role, old)


async def leaders_cut_off(scene: Scene) -> None:
    """M-04: each leader loses etcd, and nothing else."""
    for role in ROLES:
        await _cut_off(scene, role, up=CUT, down=CUT)


async def leaders_cut_off_one_way(scene: Scene) -> None:
    """M-06: what a leader says does not reach etcd, then what etcd says does not reach the leader."""
    for role in ROLES:
        await _cut_off(scene, role, up=CUT, down=CLEAR)
        await _cut_off(scene, role, up=CLEAR, down=CUT)


async def _cut_off(scene: Scene, role: str, *, up: Disturbance, down: Disturbance) -> None:
    old = await scene.cluster.leader(role)
    leads = asyncio.Event()
    async with asyncio.TaskGroup() as tasks:
        deposed = tasks.create_task(deposed_at(scene.cluster, role, old, leads))
        await leads.wait()
        begin = time.monotonic()
        doors = scene.cluster.etcd_doors[old]
        async with scene.under(Disturb(doors, up=up, down=down, what=f"cutting {old} off etcd")):
            await _replaced(scene, role, old, begin)
            scene.measured("stepped_down_s", await deposed - begin)
            await asyncio.sleep(1)
    if not scene.cluster.local.processes[old].running:
        await scene.cluster.restart(old)  # it may have ended itself
    await scene.cluster.wait_ready()
    await _leads_no_more(scene, role, old)


async def engines_out_of_reach(scene: Scene) -> None:
    """M-05: the coordinator that leads holds its lease, and no engine reaches it."""
    leader = await scene.cluster.leader("coordinator")
    pids = scene.cluster.pids()
    engines = [pids[p.spec.name] for p in scene.cluster.local.of("engine")]
    door = scene.cluster.rpc_doors[leader]
    before = await terms(scene.cluster)
    channel = open_channel(door.address)
    try:
        stub = coordinator_service_pb2_grpc.CoordinatorServiceStub(channel)  # type: ignore[no-untyped-call]

        async def degraded() -> bool:
            return bool(await _complaints(stub))

        async def well() -> bool:
            return not await _complaints(stub)

        if await degraded():
            scene.problems.append("the coordinator was degraded before its engines were cut off")
        begin = time.monotonic()
        async with scene.under(Disturb([door], up=CUT, down=CUT, only=engines, what=f"cutting the engines off {leader}")):
            scene.measured("degraded_said_s", await scene.seconds_until(degraded, begin))
            await asyncio.sleep(2 * LEASE_TTL_S)
        scene.measured("well_again_s", await scene.seconds_until(well))
    finally:
        await channel.close(None)
    scene.measured("terms_lost", len(before - await terms(scene.cluster)))


async def _complaints(stub: coordinator_service_pb2_grpc.CoordinatorServiceStub) -> list[str]:
    """What a coordinator says that it lacks; not asked for more often than is good for a machine that is measured."""
    await asyncio.sleep(LOOK_S / 2)
    try:
        return list((await stub.GetStatus(coordinator_service_pb2.GetStatusRequest(), timeout=2)).degraded)
    except grpc.aio.AioRpcError as err:
        raise error_from_rpc(err) from err


async def _replaced(scene: Scene, role: str, old: str, begin: float) -> None:
    """Return once another process leads, and note how long that took."""
    await scene.cluster.leader(role, other_than=old)
    scene.measured("handover_s", time.monotonic() - begin)


async def _leads_no_more(scene: Scene, role: str, old: str) -> None:
    if await scene.cluster.leader(role) == old:
        scene.problems.append(f"{old} leads {role} again at once")


_HANDOVER = {"handover_s": LEASE_TTL_S + 2}
#: Orders keep coming, so that there is something to write, and leaders change.
_FENCED: dict[str, Any] = {"singletons": 2, "churn": True, "terms": 2, "stall_s": 1.0}

CELLS = (
    Cell("M-01", "both leaders: kill -9", leaders_killed, "new leader ≤ lease + 2 s", limits=_HANDOVER, **_FENCED),
    Cell("M-02", "both leaders: SIGSTOP > lease", leaders_frozen, "no write by the old one", limits=_HANDOVER, **_FENCED),
    Cell(
        "M-03",
        f"both leaders: event loop blocked for {BLOCKED_S:g} s",
        loops_blocked,
        "its watchdog ends it within a second of its lease's validity; new leader ≤ lease + 2 s",
        limits={**_HANDOVER, "ended_after_s": VALID_S + WATCHDOG_S + LOOK_S},
        cluster={"hooked": ROLES},
        **_FENCED,
    ),
    Cell(
        "M-04",
        "both leaders: cut off etcd",
        leaders_cut_off,
        "steps down when its lease is not to be trusted any more; new leader ≤ lease + 2 s",
        limits={**_HANDOVER, "stepped_down_s": VALID_S + LOOK_S},
        cluster={"etcd_doors": ROLES},
        **_FENCED,
    ),
    Cell(
        "M-05",
        "coordinator that leads: reached by no engine",
        engines_out_of_reach,
        "nobody else leads; it says that it is degraded",
        singletons=2,
        churn=True,
        stall_s=1.0,
        limits={"degraded_said_s": DEGRADED_S, "well_again_s": DEGRADED_S, "terms_lost": 0},
        cluster={"rpc_doors": ("coordinator",)},
    ),
    Cell(
        "M-06",
        "both leaders: cut off etcd one way, then the other",
        leaders_cut_off_one_way,
        "as M-04",
        limits={**_HANDOVER, "stepped_down_s": VALID_S + LOOK_S},
        cluster={"etcd_doors": ROLES},
        **_FENCED,
    ),
)
