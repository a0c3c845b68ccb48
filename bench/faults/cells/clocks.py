"""Cells of clocks that are wrong."""

from __future__ import annotations

import asyncio
import datetime
import time
import zoneinfo
from itertools import pairwise

from bench.faults.fencing import read_history
from bench.faults.office import ROLES, deposed_at, terms
from bench.faults.scene import LEASE_TTL_S, Cell, Scene
from inference_runtime.cli.local import SINGLETONS
from inference_runtime.coordination import EtcdClient, keys
from inference_runtime.errors import InferenceError
from inference_runtime.generation import SamplingParams
from inference_runtime.testing.faults import FaultNotVerified
from inference_runtime.testing.inside import ClockJump, Suspend
from inference_runtime.v1 import common_pb2

__all__ = ["CELLS"]

#: Where processes live: a zone whose clocks are changed twice a year.
ZONE = "Europe/Berlin"
#: A deployment whose answers take longer than they may, seconds.
SLOW, TOTAL_S = "slow", 1.0
#: How far from its time a deadline may be, seconds: what a busy machine adds.
DEADLINE_SLACK_S = 0.5
#: How long a machine is suspended, seconds.
SUSPENDED_S = 60.0
#: An order that is given to whoever leads after that.
ORDER = "after"


async def wall_clocks_jump(scene: Scene) -> None:
    """C-01: by an hour and a day, ahead and back, and over both changes of the local clock; in every process at once."""
    hold_s = scene.sized("seconds of each jump", quick=2, full=10)
    slow = {"name": SLOW, "model": "scripted", "runtime": "scripted", "runtime_config": {"pace_s": 0.1}}
    await scene.cluster.apply({**slow, "timeouts": {"total_s": TOTAL_S, "first_chunk_s": TOTAL_S}})
    await scene.cluster.wait_serving(SLOW)
    processes = sorted(scene.cluster.hooks)
    leases, offices = await _leases(scene), await terms(scene.cluster)
    for wall_s in (3600.0, -3600.0, 86400.0, -86400.0, *_changes()):
        async with asyncio.TaskGroup() as tasks:
            across = tasks.create_task(_deadline_off_s(scene))
            await asyncio.sleep(TOTAL_S / 3)
            async with scene.under(ClockJump(scene.cluster, processes, wall_s)):
                scene.measured("deadline_off_s", await across)
                scene.measured("deadline_off_s", await _deadline_off_s(scene))
                await asyncio.sleep(hold_s)
    scene.measured("leases_lost", len(leases - await _leases(scene)))
    scene.measured("terms_lost", len(offices - await terms(scene.cluster)))


def _changes() -> list[float]:
    """How far to set clocks so that the local time jumps a second later: to summer time, and back."""
    try:
        zone = zoneinfo.ZoneInfo(ZONE)
    except zoneinfo.ZoneInfoNotFoundError as err:
        raise FaultNotVerified(f"this machine does not know the zone {ZONE}") from err
    now = datetime.datetime.now(datetime.UTC)
    hours = [now.replace(minute=0, second=0, microsecond=0) + datetime.timedelta(hours=n) for n in range(1, 366 * 24)]
    offsets = [hour.astimezone(zone).utcoffset() for hour in hours]
    changes = [hour for hour, (before, after) in zip(hours[1:], pairwise(offsets), strict=True) if before != after]
    if len(changes) < 2:
        raise FaultNotVerified(f"the clocks of {ZONE} are not changed")
    return [(change - now).total_seconds() - 1 for change in changes[:2]]


async def _deadline_off_s(scene: Scene) -> float:
    """How far from its time a request was ended that takes too long."""
    begin = time.monotonic()
    async with scene.cluster.client() as client:
        try:
            await client.complete(SLOW, "slow", SamplingParams(max_tokens=300))
        except InferenceError:
            return abs(time.monotonic() - begin - TOTAL_S)
    raise FaultNotVerified(f"a request of {TOTAL_S:g} s ended well after {time.monotonic() - begin:.1f} s")


async def _leases(scene: Scene) -> set[int]:
    async with EtcdClient(scene.cluster.etcd) as client:
        found = [kv for prefix in (keys.ELECTIONS, keys.ENGINES) for kv in (await client.list(prefix))[0]]
    return {kv.lease_id for kv in found if kv.lease_id}


async def leaders_suspended(scene: Scene) -> None:
    """C-02: each leader finds that a minute has passed, with an order waiting for it."""
    for role in ROLES:
        old = await scene.cluster.leader(role)
        # Nothing is under way when it happens, so that all that follows was done afterwards.
        await _order(scene, replicas=1)
        await scene.cluster.wait_serving(ORDER)
        term, revision = await _term(scene, role)
        leads = asyncio.Event()
        async with asyncio.TaskGroup() as tasks:
            deposed = tasks.create_task(deposed_at(scene.cluster, role, old, leads))
            await leads.wait()
            async with scene.under(Suspend(scene.cluster, old, SUSPENDED_S)):
                begin = time.monotonic()

                async def taken() -> bool:
                    return await _order(scene, replicas=2)

                async def another_term() -> bool:
                    return (await _term(scene, role))[0] not in {0, term}  # noqa: B023 - awaited here

                scene.measured("order_taken_s", await scene.seconds_until(taken, begin))
                scene.measured("another_term_s", await scene.seconds_until(another_term, begin))
                scene.measured("stepped_down_s", await deposed - begin)
        await scene.cluster.wait_serving(ORDER)
        tokens = [
            common_pb2.Assignment.FromString(event.kv.value).fencing_token
            for event in await read_history(scene.cluster.etcd, revision + 1)
            if event.kv.key.startswith(keys.ASSIGNMENTS) and not event.deleted
        ]
        if not tokens:
            raise FaultNotVerified("nobody wrote anything after the suspend")
        scene.measured("effects_of_the_old_term", sum(t.role == role and t.revision == term for t in tokens))


async def _order(scene: Scene, *, replicas: int) -> bool:
    try:
        await scene.cluster.apply({"name": ORDER, "model": "scripted", "runtime": "scripted", "replicas": replicas})
    except InferenceError:
        return False
    return True


async def _term(scene: Scene, role: str) -> tuple[int, int]:
    """The revision that fences the present term, 0 for none; and etcd's revision."""
    async with EtcdClient(scene.cluster.etcd) as client:
        candidates, revision = await client.list(keys.election_prefix(role))
    return min((kv.create_revision for kv in candidates), default=0), revision


CELLS = (
    Cell(
        "C-01",
        "wall clocks of every process: ±1 h, ±1 day, both changes of summer time",
        wall_clocks_jump,
        "no lease or term lost; deadlines in time",
        singletons=2,
        churn=True,
        stall_s=1.0,
        limits={"deadline_off_s": DEADLINE_SLACK_S, "leases_lost": 0, "terms_lost": 0},
        cluster={"hooked": (*SINGLETONS, "engine", "gateway"), "settings": {"*": {"TZ": ZONE}}},
    ),
    Cell(
        "C-02",
        f"both leaders: boot time jumps by {SUSPENDED_S:g} s (suspend)",
        leaders_suspended,
        "steps down before its first effect",
        singletons=2,
        stall_s=1.0,
        limits={"effects_of_the_old_term": 0, "stepped_down_s": LEASE_TTL_S / 3 + 0.5, "another_term_s": LEASE_TTL_S + 2},
        cluster={"hooked": ROLES},
    ),
)
