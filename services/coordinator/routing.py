"""The routing table as a value: built from what is registered, compared with what was sent. Pure.

Every deployment that is not being deleted has a line, also one without a replica that serves: a gateway must tell "nobody serves
this now" (503) from "no such deployment" (404).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from inference_runtime.v1 import common_pb2, coordinator_service_pb2, deployment_pb2

__all__ = ["Change", "RouteTable", "apply_change", "build_table", "diff_tables"]


@dataclass(frozen=True, slots=True)
class RouteTable:
    """All lines, by deployment, and the etcd revision they stand for."""

    revision: int = 0
    lines: Mapping[str, coordinator_service_pb2.DeploymentRoute] = field(default_factory=dict)

    def replica_ids(self) -> frozenset[str]:
        """The replicas that take requests."""
        return frozenset(replica.id for line in self.lines.values() for replica in line.replicas)


@dataclass(frozen=True, slots=True)
class Change:
    """What turns one table into another."""

    revision: int
    changed: Mapping[str, coordinator_service_pb2.DeploymentRoute]
    removed: frozenset[str]

    def __bool__(self) -> bool:
        return bool(self.changed or self.removed)


def build_table(
    revision: int,
    deployments: Iterable[deployment_pb2.Deployment],
    replicas: Iterable[common_pb2.Replica],
    engines: Mapping[str, common_pb2.Engine],
) -> RouteTable:
    """The table.

    A replica is in it when it serves, its deployment exists, and its engine is not draining. A replica whose engine record has
    not arrived yet counts: both hang on one lease, and the order of their registration means nothing.

    Args:
        revision: The etcd revision that the other arguments stand for.
        deployments: The catalogue.
        replicas: All that are registered, in any state.
        engines: All that are registered, by id.
    """
    serving: dict[str, list[common_pb2.Replica]] = {}
    for replica in replicas:
        engine = engines.get(replica.engine_id)
        if engine is not None and engine.state == common_pb2.ENGINE_STATE_DRAINING:
            continue
        if replica.state == common_pb2.REPLICA_STATE_SERVING:
            serving.setdefault(replica.deployment, []).append(replica)
    lines = {
        deployment.spec.name: _line(deployment, serving.get(deployment.spec.name, ()))
        for deployment in deployments
        if not deployment.deleting
    }
    return RouteTable(revision, lines)


def _line(
    deployment: deployment_pb2.Deployment, replicas: Iterable[common_pb2.Replica]
) -> coordinator_service_pb2.DeploymentRoute:
    timeouts = deployment.spec.timeouts
    by_id = sorted(replicas, key=_id)
    return coordinator_service_pb2.DeploymentRoute(
        deployment=deployment.spec.name,
        replicas=by_id,
        runtime=deployment.runtime,
        generation=deployment.generation,
        first_chunk_timeout=timeouts.first_chunk if timeouts.HasField("first_chunk") else None,
        total_timeout=timeouts.total if timeouts.HasField("total") else None,
        next_chunk_timeout=timeouts.next_chunk if timeouts.HasField("next_chunk") else None,
        disconnected_timeout=timeouts.disconnected if timeouts.HasField("disconnected") else None,
    )


def _id(replica: common_pb2.Replica) -> str:
    return replica.id


def diff_tables(old: RouteTable, new: RouteTable) -> Change:
    """What a holder of `old` must be told to hold `new`. The revision never falls, whatever `new` claims."""
    changed = {name: line for name, line in new.lines.items() if old.lines.get(name) != line}
    return Change(max(old.revision, new.revision), changed, frozenset(old.lines.keys() - new.lines.keys()))


def apply_change(table: RouteTable, change: Change) -> RouteTable:
    """The table after a change: what a receiver does."""
    kept = {name: line for name, line in table.lines.items() if name not in change.removed}
    return RouteTable(max(table.revision, change.revision), {**kept, **change.changed})
