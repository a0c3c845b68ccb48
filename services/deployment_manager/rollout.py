"""What to do next for one deployment, and what to say about it. Pure: the world in, steps and status out.

The order never leaves a deployment with less than it had, where there is room: a new replica first, the old one goes when the new
one serves. Without room the old one goes first, but only where that makes room. A replica on an engine that is gone keeps its
assignment until another place is found, because the engine may come back and look for it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from inference_runtime.v1 import common_pb2, deployment_pb2
from services.deployment_manager.placement import Booking, Need, Refusal, host_of, lost_devices, misfit, place

__all__ = ["Plan", "World", "need_of", "plan_deployment"]

#: New replicas that may load at once while old ones still serve.
SURGE = 1


@dataclass(frozen=True, slots=True)
class World:
    """What is registered, as of one look.

    Args:
        engines: Registered engines, by id.
        gone: Engines that were away for too long; their replicas need another place. An engine that is in neither is missing.
        assignments: All, by replica id.
        replicas: All that are registered, by id.
        leaving: Assignments that were taken back while their replica still runs and holds its devices.
        hosts: Host name by engine id, also of engines that are missing.
        by_deployment: The assignments again, by deployment and replica id, from whoever keeps that up to date. Empty: they are
            searched.
        booked: What assignments book, as far as somebody worked it out, by replica id. Filled here; dropping an entry of an
            assignment or of a host that changed is the keeper's part.
    """

    engines: Mapping[str, common_pb2.Engine]
    gone: Collection[str]
    assignments: Mapping[str, common_pb2.Assignment]
    replicas: Mapping[str, common_pb2.Replica]
    leaving: Sequence[common_pb2.Assignment] = ()
    hosts: Mapping[str, str] = field(default_factory=dict)
    by_deployment: Mapping[str, Mapping[str, common_pb2.Assignment]] = field(default_factory=dict)
    booked: dict[str, Booking] = field(default_factory=dict)

    def of(self, deployment: str) -> list[common_pb2.Assignment]:
        """The assignments of a deployment, the oldest generation first."""
        if self.by_deployment:
            found = list(self.by_deployment.get(deployment, {}).values())
        else:
            found = [a for a in self.assignments.values() if a.deployment == deployment]
        return sorted(found, key=lambda a: (a.generation, a.replica_id))

    def bookings(self, without: Collection[str] = (), leaving: bool = True) -> list[Booking]:
        """What is held: by every assignment but those named and those of engines that are gone, and by what is leaving."""
        held = [self._booking(i, a) for i, a in self.assignments.items() if i not in without]
        held += [self._booking(a.replica_id, a) for a in self.leaving if leaving]
        return [booking for booking in held if booking.engine_id not in self.gone] if self.gone else held

    def _booking(self, replica_id: str, assignment: common_pb2.Assignment) -> Booking:
        booking = self.booked.get(replica_id)
        if booking is None:
            engine_id = assignment.engine_id
            devices = tuple(assignment.accelerators)
            memory = 0 if devices else assignment.spec.memory_bytes
            booking = Booking(assignment.deployment, engine_id, self.host(engine_id), devices, memory)
            self.booked[replica_id] = booking
        return booking

    def host(self, engine_id: str) -> str:
        """The host of an engine, as last known."""
        engine = self.engines.get(engine_id)
        return host_of(engine) if engine is not None else self.hosts.get(engine_id, f"engine:{engine_id}")

    def closed_hosts(self) -> frozenset[str]:
        """Hosts with a replica that nobody remembers assigning: which devices it holds is not known until it is gone."""
        known = {a.replica_id for a in self.leaving}
        return frozenset(
            self.host(replica.engine_id)
            for replica in self.replicas.values()
            if replica.id not in self.assignments and replica.id not in known
        )


@dataclass(frozen=True, slots=True)
class Plan:
    """The next steps for one deployment.

    Args:
        place: Places for new replicas.
        remove: Assignments to take back.
        forget: True when it was being deleted and nothing is left of it.
        state: Where it stands.
        reason: Why, in one sentence.
        ready: Replicas that serve what is asked for now.
    """

    place: tuple[Booking, ...]
    remove: tuple[common_pb2.Assignment, ...]
    forget: bool
    state: deployment_pb2.DeploymentState
    reason: str
    ready: int


def need_of(deployment: deployment_pb2.Deployment) -> Need:
    """What one replica of a deployment needs."""
    spec = deployment.spec
    return Need(
        spec.name,
        deployment.runtime,
        spec.accelerators,
        dict(spec.node_labels),
        spec.memory_bytes,
        frozenset(spec.tolerations),
        spec.spread_over or "zone",
    )


def plan_deployment(deployment: deployment_pb2.Deployment, world: World) -> Plan:
    """The next steps for one deployment. Asked again after each change until there are none."""
    mine = world.of(deployment.spec.name)
    if deployment.deleting:
        return _plan_deletion(deployment, mine, world)
    need, wanted = need_of(deployment), deployment.spec.replicas
    current, outdated, lost = [], [], []
    for assignment in mine:
        engine = world.engines.get(assignment.engine_id)
        if assignment.engine_id in world.gone:
            lost.append(assignment)
        elif not _same_replica(assignment, deployment) or (engine is not None and not _stays(need, assignment, engine)):
            outdated.append(assignment)
        else:
            current.append(assignment)

    remove: list[common_pb2.Assignment] = []
    serving = [a for a in current if _serves(a, world)]
    if len(current) > wanted:
        spare = sorted(current, key=lambda a: (_serves(a, world), a.generation, a.replica_id))[: len(current) - wanted]
        remove += spare
        current = [a for a in current if a not in spare]
        serving = [a for a in current if _serves(a, world)]

    placed, refusal = _place_missing(need, wanted, current, outdated, world)
    if refusal is not None and outdated and len(current) < wanted:
        remove += _make_room(need, outdated, world)
    else:
        remove += _retire(outdated, allowed=max(0, wanted - len(serving)), world=world)
    # A lost replica is taken back for each one that stands in for it.
    stand_ins = len(current) + len(placed) + len(outdated)
    remove += lost[: max(0, len(lost) - max(0, wanted - stand_ins))]
    state, reason = _status(wanted, current, mine, serving, refusal, world)
    return Plan(tuple(placed), tuple(remove), False, state, reason, len(serving))


def _plan_deletion(deployment: deployment_pb2.Deployment, mine: Sequence[common_pb2.Assignment], world: World) -> Plan:
    left = [r for r in world.replicas.values() if r.deployment == deployment.spec.name]
    reason = f"{len(left)} replicas finish what they have" if left else "being deleted"
    return Plan((), tuple(mine), not mine and not left, deployment_pb2.DEPLOYMENT_STATE_DRAINING, reason, 0)


def _same_replica(assignment: common_pb2.Assignment, deployment: deployment_pb2.Deployment) -> bool:
    """Whether a replica made from this assignment is what the deployment asks for now. How many there are, and which nodes may
    hold them, does not change a replica."""
    if assignment.revision != deployment.revision:
        return False
    old, new = deployment_pb2.DeploymentSpec(), deployment_pb2.DeploymentSpec()
    old.CopyFrom(assignment.spec)
    new.CopyFrom(deployment.spec)
    for spec in (old, new):
        spec.replicas = 0
        for where in ("node_labels", "tolerations", "spread_over"):
            spec.ClearField(where)
    return old == new


def _stays(need: Need, assignment: common_pb2.Assignment, engine: common_pb2.Engine) -> bool:
    if engine.state == common_pb2.ENGINE_STATE_DRAINING or misfit(need, engine):
        return False
    return not lost_devices(assignment.accelerators, engine)


def _replica(assignment: common_pb2.Assignment, world: World) -> common_pb2.Replica | None:
    return world.replicas.get(assignment.replica_id)


def _serves(assignment: common_pb2.Assignment, world: World) -> bool:
    replica = _replica(assignment, world)
    return replica is not None and replica.state == common_pb2.REPLICA_STATE_SERVING


def _place_missing(
    need: Need,
    wanted: int,
    current: Sequence[common_pb2.Assignment],
    outdated: Sequence[common_pb2.Assignment],
    world: World,
) -> tuple[list[Booking], Refusal | None]:
    missing = max(0, wanted - len(current))
    if outdated:
        loading = sum(not _serves(a, world) for a in current)
        missing = min(missing, max(0, SURGE - loading))
    placed: list[Booking] = []
    if not missing:
        return placed, None
    held, closed = world.bookings(), world.closed_hosts() if need.accelerators else frozenset[str]()
    for _ in range(missing):
        choice = place(need, world.engines.values(), held, closed)
        if isinstance(choice, Refusal):
            return placed, choice
        placed.append(choice)
        held.append(choice)
    return placed, None


def _make_room(need: Need, outdated: Sequence[common_pb2.Assignment], world: World) -> list[common_pb2.Assignment]:
    """The old replica whose going makes room for a new one, one that does not serve first; none when it would not help, or when
    what is leaving already will."""
    if isinstance(place(need, world.engines.values(), world.bookings(leaving=False)), Booking):
        return []
    for old in sorted(outdated, key=lambda a: _serves(a, world)):
        if isinstance(place(need, world.engines.values(), world.bookings({old.replica_id}, leaving=False)), Booking):
            return [old]
    return []


def _retire(outdated: Sequence[common_pb2.Assignment], allowed: int, world: World) -> list[common_pb2.Assignment]:
    """Old replicas that are not needed any more, those that do not serve first."""
    return sorted(outdated, key=lambda a: _serves(a, world))[: max(0, len(outdated) - allowed)]


def _status(
    wanted: int,
    current: Sequence[common_pb2.Assignment],
    mine: Sequence[common_pb2.Assignment],
    serving: Sequence[common_pb2.Assignment],
    refusal: Refusal | None,
    world: World,
) -> tuple[deployment_pb2.DeploymentState, str]:
    if wanted == 0:
        return deployment_pb2.DEPLOYMENT_STATE_SERVING, "no replica is asked for"
    if len(serving) >= wanted:
        return deployment_pb2.DEPLOYMENT_STATE_SERVING, ""
    failed = [r for a in current if (r := _replica(a, world)) and r.state == common_pb2.REPLICA_STATE_FAILED]
    why = [f"{len(serving)} of {wanted} replicas serve"]
    why += [f"replica {r.id} failed: {r.reason or 'no reason given'}" for r in failed[:1]]
    why += [refusal.sentence()] if refusal else []
    reason = "; ".join(why)
    if any(_serves(a, world) for a in mine):
        return deployment_pb2.DEPLOYMENT_STATE_DEGRADED, reason
    if failed and len(failed) == len(current):
        return deployment_pb2.DEPLOYMENT_STATE_FAILED, reason
    if not current and refusal is not None:
        return deployment_pb2.DEPLOYMENT_STATE_PENDING, refusal.sentence()
    return deployment_pb2.DEPLOYMENT_STATE_LOADING, reason
