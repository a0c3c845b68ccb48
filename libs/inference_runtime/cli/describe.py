"""`inferctl describe`: all that is known of one deployment, engine or replica, as a document for scripts and lines for people."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any

from inference_runtime.cli.views import document_of, name_of
from inference_runtime.client import InferenceClient
from inference_runtime.errors import DeploymentNotFound, EngineLost
from inference_runtime.v1 import common_pb2, deployment_pb2

__all__ = ["DESCRIBERS", "Description"]

REPLICA_COLUMNS = ("REPLICA", "DEPLOYMENT", "ENGINE", "STATE", "GENERATION", "RUNNING", "QUEUED", "RESTARTS", "REASON")

Loaded = tuple[common_pb2.Replica, common_pb2.ReplicaLoad]


@dataclass(frozen=True, slots=True)
class Description:
    """What is known of one thing.

    Args:
        document: For scripts.
        facts: Label and value, in the order in which they are shown.
        replicas: Rows of its replicas, under REPLICA_COLUMNS; None where it has none by its nature.
    """

    document: dict[str, Any]
    facts: Sequence[tuple[str, str]]
    replicas: Sequence[Sequence[str]] | None = None


def _row(replica: common_pb2.Replica, load: common_pb2.ReplicaLoad) -> Sequence[str]:
    state = name_of(common_pb2.ReplicaState, replica.state, "REPLICA_STATE_")
    numbers = (str(replica.generation), str(load.running), str(load.queued), str(replica.restarts))
    # A replica's state, then how it is: the columns of REPLICA_COLUMNS.
    return (replica.id, replica.deployment, replica.engine_id, state, *numbers, replica.reason)


def _documents(replicas: Sequence[Loaded]) -> list[dict[str, Any]]:
    return [{"replica": document_of(replica), "load": document_of(load)} for replica, load in replicas]


async def _deployment(client: InferenceClient, name: str) -> Description:
    found = await client.deployment(name)
    replicas = await client.replicas(name)
    status, spec = found.status, found.spec
    state = name_of(deployment_pb2.DeploymentState, status.state, "DEPLOYMENT_STATE_")
    behind = "" if status.observed_generation == found.generation else f", the state speaks of {status.observed_generation}"
    facts = [
        ("Deployment", spec.name),
        ("Model", spec.model),
        ("Runtime", found.runtime),
        ("State", f"{state} since {status.changed_at.ToJsonString()}"),
        # A refusal has one clause for each engine.
        ("Reason", "\n".join(status.reason.split("; ")) or "-"),
        ("Ready", f"{status.ready_replicas} of {spec.replicas} replicas"),
        ("Generation", f"{found.generation}{behind}"),
        ("Revision", found.revision),
        ("Created", found.created_at.ToJsonString()),
    ]
    return Description(
        {"deployment": document_of(found), "replicas": _documents(replicas)}, facts, [_row(*entry) for entry in replicas]
    )


async def _engine(client: InferenceClient, name: str) -> Description:
    engine = next((engine for engine in await client.engines() if engine.id == name), None)
    if engine is None:
        raise EngineLost(f"no engine has the id {name!r}; list them with `inferctl get engines`", engine_id=name)
    replicas = [entry for entry in await client.replicas() if entry[0].engine_id == name]
    node = engine.node
    devices = [
        f"{a.index}: {a.name}{f', takes nothing: {a.unschedulable}' if a.unschedulable else ''}" for a in node.accelerators
    ]
    facts = [
        ("Engine", engine.id),
        ("State", name_of(common_pb2.EngineState, engine.state, "ENGINE_STATE_")),
        ("Address", f"{engine.address}, pid {engine.pid}"),
        ("Started", engine.started_at.ToJsonString()),
        ("Node", f"{node.hostname}, {node.cpu_cores} cores, {node.memory_bytes / 2**30:.1f} GiB"),
        ("Accelerators", "\n".join(devices) or "-"),
        ("Labels", ", ".join(f"{key}={value}" for key, value in sorted(node.labels.items())) or "-"),
        ("Taints", ", ".join(node.taints) or "-"),
        ("Runtimes", ", ".join(engine.runtimes) or "-"),
    ]
    return Description(
        {"engine": document_of(engine), "replicas": _documents(replicas)}, facts, [_row(*entry) for entry in replicas]
    )


async def _replica(client: InferenceClient, name: str) -> Description:
    found = next((entry for entry in await client.replicas() if entry[0].id == name), None)
    if found is None:
        raise DeploymentNotFound(f"no replica has the id {name!r}; list them with `inferctl get replicas`")
    replica, load = found
    facts = [
        ("Replica", replica.id),
        ("Deployment", f"{replica.deployment}, generation {replica.generation}, revision {replica.revision}"),
        ("Engine", f"{replica.engine_id} at {replica.address}"),
        ("Runtime", replica.runtime),
        ("State", name_of(common_pb2.ReplicaState, replica.state, "REPLICA_STATE_")),
        ("Reason", replica.reason or "-"),
        ("Requests", f"{load.running} of {replica.max_concurrent} run, {load.queued} of {replica.queue_capacity} wait"),
        ("Restarts", str(replica.restarts)),
    ]
    return Description(*((_documents([found])[0]), facts))


DESCRIBERS: dict[str, Callable[[InferenceClient, str], Coroutine[Any, Any, Description]]] = {
    "deployment": _deployment,
    "engine": _engine,
    "replica": _replica,
}
