"""One run of one cell: a new cluster of real processes, standing load, a random moment, the fault, a while without it.

Faults are seen before they count, half way, and to be gone; a cell whose fault was not seen proves nothing.
"""

from __future__ import annotations

import asyncio
import random
import time
from typing import Any

from bench.faults.fencing import leader_writes, read_history
from bench.faults.judge import Run, judge
from bench.faults.load import MODEL, Load
from bench.faults.scene import LEASE_TTL_S, Cell, Scene, told_file
from inference_runtime.errors import InferenceError
from inference_runtime.testing.cluster import Cluster
from inference_runtime.testing.faults import FaultNotVerified

__all__ = ["run_cell"]

#: Seconds of load after the fault is healed.
AFTER_S = 1.0
#: Seconds between two orders that make the deployment manager write assignments.
CHURN_S = 0.3


async def run_cell(cell: Cell, seed: int, *, full: bool = False) -> Run:
    """One run, as long as the matrix says or (not `full`) shorter.

    A fault that cannot be verified, and a system that does not come back, are problems of the run, not raised.
    """
    rng = random.Random(f"{cell.id} {seed}")
    shape = {"engines": cell.engines, "gateways": 2, "singletons": cell.singletons, "lease_ttl_s": LEASE_TTL_S}
    async with Cluster(**{**shape, **cell.cluster, **({} if full else cell.quick_cluster)}) as cluster:
        await cluster.apply(_deployment(cell, rng, cluster))
        await cluster.wait_serving(MODEL)
        load = Load(cluster, streams=cell.streams, tokens=cell.tokens, rng=rng, elsewhere=cell.gateways_die)
        scene = Scene(cell, cluster, load, rng, full)
        stop = asyncio.Event()
        async with load.running(), asyncio.TaskGroup() as tasks:
            await load.started()
            if cell.churn:
                tasks.create_task(_churn(cluster, stop))
            await asyncio.sleep(rng.uniform(0, cell.tokens * cell.pace_s / 2))
            try:
                await cell.act(scene)
                await asyncio.sleep(AFTER_S)
            except* FaultNotVerified as group:
                scene.verified = False
                scene.problems += map(str, leaves(group))
            except* (InferenceError, TimeoutError) as group:
                scene.problems += [f"{type(err).__name__}: {err}" for err in leaves(group)]
            finally:
                stop.set()
        writes = leader_writes(await read_history(cluster.etcd, scene.history_from), scene.standing)
    if cell.gateways_die:
        scene.figures["asked_elsewhere"] = load.asked_elsewhere
    if cell.churn and (writes.assignments == 0 or writes.terms < cell.terms):
        scene.verified = False
        scene.problems.append(f"{writes.assignments} assignments in {writes.terms} terms: fencing was not put to the test")
    return judge(
        load,
        writes,
        verified=scene.verified and scene.faults > 0,
        window=(scene.since, (scene.until or time.monotonic()) + AFTER_S),
        may_break=scene.may_break,
        figures=scene.figures,
        problems=scene.problems,
        seed=seed,
        notes=scene.notes,
        excused=scene.excused,
    )


def _deployment(cell: Cell, rng: random.Random, cluster: Cluster) -> dict[str, Any]:
    options: dict[str, Any] = {"pace_s": cell.pace_s}
    if cell.told:
        options["faults_file"] = str(told_file(cluster))
    if cell.id == "R-04":
        # Late enough for every stream to be under way, and so late that the next context is not asked for as much.
        options["sticky_at_token"] = rng.randrange(13_000, 16_000)
    base = {"name": MODEL, "model": "scripted", "runtime": "scripted", "runtime_config": options}
    whole = {**base, "replicas": cell.replicas, "serving": {"max_concurrent": 128}, **cell.deployment}
    return whole | {"runtime_config": options | dict(cell.deployment.get("runtime_config", {}))}


def leaves(group: BaseExceptionGroup[BaseException]) -> list[BaseException]:
    """The exceptions of a group and of all groups in it."""
    found = []
    for err in group.exceptions:
        found += leaves(err) if isinstance(err, BaseExceptionGroup) else [err]
    return found


async def _churn(cluster: Cluster, stop: asyncio.Event) -> None:
    """Give the deployment manager orders for as long as nobody stops it; nobody may lead at times."""
    number = 0
    async with cluster.client() as client:
        while not stop.is_set():
            number += 1
            spec = {"name": "churn", "model": "scripted", "runtime": "scripted", "replicas": number % 3}
            try:
                async with asyncio.timeout(2):
                    await client.apply(spec)
            except (InferenceError, TimeoutError):
                pass  # while nobody leads, nobody takes orders
            await asyncio.sleep(CHURN_S)
