"""What `inferctl get` shows: one reader for each kind, giving a document for scripts and a row for people."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any, TypeVar

from google.protobuf import json_format
from google.protobuf.message import Message

from inference_runtime.cli.cluster_file import Located
from inference_runtime.client import InferenceClient
from inference_runtime.v1 import common_pb2, deployment_pb2

__all__ = ["KINDS", "Found", "document_of", "name_of", "with_client"]

T = TypeVar("T")

Found = list[tuple[Mapping[str, Any], Sequence[str]]]


def name_of(enum: Any, value: int, prefix: str) -> str:
    """The name of an enum's value for people: lower case, without the enum's prefix."""
    return str(enum.Name(value)).removeprefix(prefix).lower()


def document_of(message: Message) -> dict[str, Any]:
    """A message as plain data for scripts, with every field it has."""
    return json_format.MessageToDict(message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True)


async def _deployments(client: InferenceClient) -> Found:
    found: Found = []
    for d in await client.deployments():
        state = name_of(deployment_pb2.DeploymentState, d.status.state, "DEPLOYMENT_STATE_")
        ready = f"{d.status.ready_replicas}/{d.spec.replicas}"
        found.append((document_of(d), (d.spec.name, d.spec.model, d.runtime, state, ready, str(d.generation), d.status.reason)))
    return found


async def _engines(client: InferenceClient) -> Found:
    found: Found = []
    for e in await client.engines():
        state = name_of(common_pb2.EngineState, e.state, "ENGINE_STATE_")
        devices = ", ".join(a.name for a in e.node.accelerators) or f"{e.node.cpu_cores} CPU cores"
        found.append((document_of(e), (e.id, e.address, str(e.pid), state, e.node.hostname, devices, ", ".join(e.runtimes))))
    return found


async def _replicas(client: InferenceClient) -> Found:
    found: Found = []
    for r, load in await client.replicas():
        state = name_of(common_pb2.ReplicaState, r.state, "REPLICA_STATE_")
        busy = (str(load.running), str(load.queued))
        row = (r.deployment, r.id, r.engine_id, state, *busy, str(r.restarts), r.reason)
        found.append(({"replica": document_of(r), "load": document_of(load)}, row))
    return found


async def _leaders(client: InferenceClient) -> Found:
    found: Found = []
    for role, leader in (await client.leaders()).items():
        if leader is None:
            found.append(({"role": role}, (role, "nobody", "", "", "")))
        else:
            term = str(leader.token.revision)
            found.append((document_of(leader), (role, leader.candidate_id, leader.address, str(leader.pid), term)))
    return found


async def _coordinator(client: InferenceClient) -> Found:
    status = await client.coordinator()
    engines = f"{status.engines}, {status.silent_engines} silent" if status.silent_engines else str(status.engines)
    routes = f"revision {status.revision}{', frozen' if status.routes_frozen else ''}"
    lacks = "; ".join(status.degraded) or "nothing"
    return [(document_of(status), (str(status.fencing_token.revision), engines, str(status.watchers), routes, lacks))]


KINDS: dict[str, tuple[Callable[[InferenceClient], Coroutine[Any, Any, Found]], Sequence[str]]] = {
    "deployments": (_deployments, ("NAME", "MODEL", "RUNTIME", "STATE", "READY", "GENERATION", "REASON")),
    "engines": (_engines, ("ID", "ADDRESS", "PID", "STATE", "HOST", "DEVICES", "RUNTIMES")),
    "replicas": (_replicas, ("DEPLOYMENT", "ID", "ENGINE", "STATE", "RUNNING", "QUEUED", "RESTARTS", "REASON")),
    "coordinator": (_coordinator, ("TERM", "ENGINES", "GATEWAYS", "ROUTES", "LACKS")),
    "leaders": (_leaders, ("ROLE", "CANDIDATE", "ADDRESS", "PID", "TERM")),
}


def with_client(where: Located, work: Callable[[InferenceClient], Coroutine[Any, Any, T]]) -> T:
    """Run `work` with a client of this cluster, in an event loop of its own."""

    async def run() -> T:
        async with InferenceClient(etcd=where.etcd) as client:
            return await work(client)

    return asyncio.run(run())
