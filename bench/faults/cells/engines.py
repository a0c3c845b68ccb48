"""Cells of engines and their contexts."""

from __future__ import annotations

import asyncio
import signal
import time
from typing import Any

from bench.faults.load import MODEL
from bench.faults.scene import Cell, Scene
from inference_runtime.coordination import EtcdClient, keys
from inference_runtime.testing.faults import Freeze, Kill, KillContext, process_state
from inference_runtime.v1 import common_pb2

__all__ = ["CELLS"]


async def engine_killed(scene: Scene) -> None:
    """R-01."""
    async with scene.under(Kill(scene.cluster, scene.pick("engine"))):
        await asyncio.sleep(3)


async def context_killed(scene: Scene) -> None:
    """R-02: the child that computes is killed, its engine goes on."""
    name = scene.pick("engine")
    engine = scene.cluster.pids()[name]
    fault = KillContext(scene.cluster, name)
    async with scene.under(fault):
        await asyncio.sleep(2)
    if scene.cluster.pids()[name] != engine or process_state(engine) in {"", "Z"}:
        scene.problems.append(f"{name} died with its context")


async def engine_frozen(scene: Scene) -> None:
    """R-03: longer than its lease."""
    async with scene.under(Freeze(scene.cluster, scene.pick("engine"))):
        await asyncio.sleep(8)


async def context_poisoned(scene: Scene) -> None:
    """R-04: the deployment is made so that the device asserts at a token; only a new process can compute again."""
    begin = time.monotonic()
    scene.since = begin
    fault = await _replica(scene)

    async def restarted() -> bool:
        now = await _replica(scene)
        return now.restarts > fault.restarts and now.state == common_pb2.REPLICA_STATE_SERVING

    await scene.visible(restarted, "the context was not poisoned and restarted")
    scene.until = time.monotonic()
    scene.faults += 1


async def _replica(scene: Scene) -> common_pb2.Replica:
    async with EtcdClient(scene.cluster.etcd) as client:
        found, _ = await client.list(keys.replicas_of(MODEL))
    return common_pb2.Replica.FromString(found[0].value) if found else common_pb2.Replica()


async def everything_rolled(scene: Scene) -> None:
    """R-05: SIGTERM for each process in turn; each is back before the next one goes."""
    names = [name for name in scene.cluster.pids() if name != "etcd"]
    scene.rng.shuffle(names)
    scene.since = time.monotonic()
    for name in names:
        process = scene.cluster.local.processes[name]
        pid = process.pid
        scene.cluster.kill(name, signal.SIGTERM)

        async def ended(process: Any = process) -> bool:
            return not process.running

        await scene.visible(ended, f"{name} (pid {pid}) did not end on SIGTERM")
        if process.exit_code != 0:
            scene.problems.append(f"{name} ended with exit code {process.exit_code} on SIGTERM")
        await scene.cluster.restart(name)
        scene.faults += 1
    scene.until = time.monotonic()


_PROCESS = {"isolation": "process"}

CELLS = (
    Cell("R-01", "engine: kill -9", engine_killed, "streams move; stall p99 ≤ 1.5 s", stall_s=1.5),
    Cell("R-02", "context's process: kill -9", context_killed, "the engine stays", deployment=_PROCESS),
    Cell("R-03", "engine: SIGSTOP 8 s", engine_frozen, "stall ≤ 6 s"),
    Cell(
        "R-04",
        "poisoned context (sticky 710), one replica",
        context_poisoned,
        "a new process; unavailable for the load time + 2 s",
        unavailable_s=2.0,
        replicas=1,
        deployment=_PROCESS,
    ),
    Cell(
        "R-05",
        "SIGTERM for every process in turn",
        everything_rolled,
        "drained or moved; exit code 0",
        singletons=2,
        tokens=100,
        churn=True,
        terms=2,
        gateways_die=True,
    ),
)
