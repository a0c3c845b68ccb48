"""Who leads: as etcd has it, and as a process says of itself, by a stream that only a leader keeps open."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

import grpc

from bench.faults.scene import VISIBLE_S
from inference_runtime.coordination import EtcdClient, keys
from inference_runtime.rpc import open_channel
from inference_runtime.testing.cluster import Cluster
from inference_runtime.testing.faults import FaultNotVerified
from inference_runtime.v1 import (
    coordinator_service_pb2,
    coordinator_service_pb2_grpc,
    deployment_manager_service_pb2,
    deployment_manager_service_pb2_grpc,
)

__all__ = ["ROLES", "deposed_at", "fewest_routes", "terms"]


def _routes(channel: grpc.aio.Channel) -> Any:
    stub = coordinator_service_pb2_grpc.CoordinatorServiceStub(channel)  # type: ignore[no-untyped-call]
    return stub.WatchRoutes(coordinator_service_pb2.WatchRoutesRequest(gateway_id="faults"))


def _deployments(channel: grpc.aio.Channel) -> Any:
    stub = deployment_manager_service_pb2_grpc.DeploymentManagerServiceStub(channel)  # type: ignore[no-untyped-call]
    return stub.WatchDeployments(deployment_manager_service_pb2.WatchDeploymentsRequest())


_STREAMS: dict[str, Callable[[grpc.aio.Channel], Any]] = {"coordinator": _routes, "deployment_manager": _deployments}
#: More replicas than there are.
_MANY = 1 << 30
#: Seconds until a coordinator that ended a stream, or was not there, is asked again.
_AGAIN_S = 0.05
#: The roles that decide.
ROLES = tuple(_STREAMS)


async def deposed_at(cluster: Cluster, role: str, process: str, leads: asyncio.Event) -> float:
    """The moment (`time.monotonic()`) at which a leader stopped answering as one: it stepped down, or ended.

    Args:
        cluster: Where.
        role: What it leads.
        process: Its name.
        leads: Set once it was heard to lead.

    Returns: A moment `VISIBLE_S` after `leads` when it never stopped.

    Raises:
        FaultNotVerified: It was not heard to lead.
    """
    channel = open_channel(cluster.local.processes[process].spec.address)
    try:
        async with asyncio.timeout(VISIBLE_S) as patience:
            async for _ in _STREAMS[role](channel):
                if not leads.is_set():
                    leads.set()
                    patience.reschedule(asyncio.get_running_loop().time() + VISIBLE_S)
    except (grpc.aio.AioRpcError, TimeoutError):
        pass
    finally:
        await channel.close(None)
    if not leads.is_set():
        raise FaultNotVerified(f"{process} does not answer as leader of {role}")
    return time.monotonic()


async def terms(cluster: Cluster) -> set[tuple[str, int]]:
    """The leaders' keys, and the revisions that made them: one for each role that is led."""
    async with EtcdClient(cluster.etcd) as client:
        candidates, _ = await client.list(keys.ELECTIONS)
    first: dict[str, tuple[str, int]] = {}
    for kv in sorted(candidates, key=lambda kv: kv.create_revision):
        first.setdefault(keys.segments(kv.key, keys.ELECTIONS)[0], (kv.key, kv.create_revision))
    return set(first.values())


async def fewest_routes(cluster: Cluster, deployment: str, watching: asyncio.Event, stop: asyncio.Event) -> int:
    """The smallest number of replicas that gateways were told of, from `watching` on until `stop`. Follows changes of leader.

    Args:
        cluster: Where.
        deployment: Whose replicas.
        watching: Set once a first table was received.
        stop: Set it when enough was seen.
    """
    fewest = _MANY

    async def watch() -> None:
        nonlocal fewest
        while True:
            leader = await cluster.leader("coordinator")
            channel = open_channel(cluster.local.processes[leader].spec.address)
            try:
                async for update in _routes(channel):
                    lines = {line.deployment: len(line.replicas) for line in update.deployments}
                    if deployment in lines or deployment in update.removed or update.snapshot:
                        fewest = min(fewest, lines.get(deployment, 0))
                        watching.set()
            except grpc.aio.AioRpcError:
                await asyncio.sleep(_AGAIN_S)
            finally:
                await channel.close(None)

    async with asyncio.TaskGroup() as tasks:
        watcher = tasks.create_task(watch())
        await stop.wait()
        watcher.cancel()
    return fewest
