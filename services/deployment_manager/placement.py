"""Where a replica goes: a pure function of what it needs, the engines and what they already hold (R12).

A device is booked by host and index, not by engine: two engine processes on one machine see the same devices. An engine is either
chosen or named in the refusal with its reason.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from inference_runtime.v1 import common_pb2

__all__ = ["Booking", "Device", "Need", "Refusal", "host_of", "lost_devices", "misfit", "place"]

#: A device: host name, index.
Device = tuple[str, int]


@dataclass(frozen=True, slots=True)
class Need:
    """What one replica of a deployment needs.

    Args:
        deployment: Its name.
        runtime: The runtime that must be installed.
        accelerators: Devices of one node, and of one island of its fast links where it has such.
        node_labels: Labels the node must carry.
        memory_bytes: Memory of each device, or of the node for a replica without one; 0 for not known.
        tolerations: Taints that do not matter.
        spread_over: The node label over whose values replicas are spread first.
    """

    deployment: str
    runtime: str
    accelerators: int = 0
    node_labels: Mapping[str, str] = field(default_factory=dict)
    memory_bytes: int = 0
    tolerations: frozenset[str] = frozenset()
    spread_over: str = "zone"


@dataclass(frozen=True, slots=True)
class Booking:
    """What one replica holds: a place on an engine, and devices of its host by index."""

    deployment: str
    engine_id: str
    host: str
    accelerators: tuple[int, ...] = ()
    memory_bytes: int = 0  #: of the node

    def devices(self) -> frozenset[Device]:
        """The devices nobody else may have."""
        return frozenset((self.host, index) for index in self.accelerators)


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a deployment finds no place: one reason for each engine."""

    deployment: str
    reasons: Mapping[str, str]

    def sentence(self) -> str:
        """The refusal for a person."""
        if not self.reasons:
            return "no engine is registered; start one"
        return "no engine takes it: " + "; ".join(f"{engine}: {reason}" for engine, reason in sorted(self.reasons.items()))


def host_of(engine: common_pb2.Engine) -> str:
    """The name under which an engine's devices are booked. An engine that does not say where it runs stands alone."""
    return engine.node.hostname or f"engine:{engine.id}"


def misfit(need: Need, engine: common_pb2.Engine) -> str:
    """Why an engine cannot hold a replica however empty it is; "" when it can.

    Draining is not a misfit: what runs there may finish.
    """
    if need.runtime not in engine.runtimes:
        return f"runtime {need.runtime!r} is not installed (it has {', '.join(sorted(engine.runtimes)) or 'none'})"
    node = engine.node
    for label, value in sorted(need.node_labels.items()):
        found = node.labels.get(label)
        if found != value:
            return f"its node has {label}={found}, not {value}" if found is not None else f"its node has no label {label}={value}"
    for taint in node.taints:
        if taint not in need.tolerations and taint.partition("=")[0] not in need.tolerations:
            return f"its node has the taint {taint}, which is not tolerated"
    if node.roles and not _ROLES[need.accelerators > 0].intersection(node.roles):
        return f"its node is for {', '.join(sorted(_role(role) for role in node.roles))}"
    if need.accelerators:
        return _device_misfit(need, node)
    if node.memory_bytes and need.memory_bytes > node.memory_bytes:
        return f"its node has {_gib(node.memory_bytes)} of memory, {_gib(need.memory_bytes)} are needed"
    return ""


#: What a node must be for, by whether a replica needs accelerators.
_ROLES = {
    False: frozenset((common_pb2.NODE_ROLE_EGRESS, common_pb2.NODE_ROLE_GPU)),
    True: frozenset((common_pb2.NODE_ROLE_GPU,)),
}


def _role(role: common_pb2.NodeRole) -> str:
    return common_pb2.NodeRole.Name(role).removeprefix("NODE_ROLE_").lower()


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"


def _device_misfit(need: Need, node: common_pb2.Node) -> str:
    devices = node.accelerators
    if need.accelerators > len(devices):
        return f"its node has {len(devices)} accelerators, {need.accelerators} are needed"
    broken = [device for device in devices if device.unschedulable]
    if need.accelerators > len(devices) - len(broken):
        why = "; ".join(f"accelerator {device.index}: {device.unschedulable}" for device in broken)
        return f"{len(broken)} of its {len(devices)} accelerators take nothing ({why}), {need.accelerators} are needed"
    fit = [device for device in devices if _device_fits(need, device)]
    if need.accelerators > len(fit):
        return f"{len(fit)} of its {len(devices)} accelerators have {_gib(need.memory_bytes)} of memory and are well"
    largest = max(Counter(device.island for device in fit).values())
    if need.accelerators > largest:
        return f"at most {largest} of its accelerators are joined by a fast link, {need.accelerators} are needed"
    return ""


def _device_fits(need: Need, device: common_pb2.Accelerator) -> bool:
    """Whether a device that nobody holds would do. One that does not tell its size is believed to."""
    return not device.unschedulable and not (device.memory_bytes and need.memory_bytes > device.memory_bytes)


def lost_devices(accelerators: Collection[int], engine: common_pb2.Engine) -> bool:
    """Whether one of these devices of an engine's host takes nothing any more."""
    return bool(accelerators) and any(d.unschedulable for d in engine.node.accelerators if d.index in accelerators)


def place(
    need: Need, engines: Iterable[common_pb2.Engine], held: Sequence[Booking], closed_hosts: Collection[str] = ()
) -> Booking | Refusal:
    """A place for one more replica: in the failure domain that holds the fewest of this deployment, then on such a host, then on
    such an engine; among those the engine that holds the fewest in all, then by id.

    Its devices come from the island with the fewest free ones that suffice, so that whole islands stay for those who need them.

    Args:
        need: What it needs.
        engines: All that are registered.
        held: Everything that is placed, also what is on its way out and still holds its devices.
        closed_hosts: Hosts where somebody holds devices that are not known; they take no replica that needs one.
    """
    every = list(engines)
    domains = {engine.id: engine.node.labels.get(need.spread_over, "") for engine in every}
    of_this = [booking for booking in held if booking.deployment == need.deployment]
    in_domain = Counter(domains.get(booking.engine_id, "") for booking in of_this)
    on_host = Counter(booking.host for booking in of_this)
    on_engine = Counter(booking.engine_id for booking in of_this)
    of_all = Counter(booking.engine_id for booking in held)
    taken = frozenset(device for booking in held if booking.accelerators for device in booking.devices())
    memory: Counter[str] = Counter()
    if need.memory_bytes and not need.accelerators:
        for booking in held:
            memory[booking.host] += booking.memory_bytes
    reasons: dict[str, str] = {}
    best: tuple[tuple[int, int, int, int, str], Booking] | None = None
    for engine in every:
        reason, host = misfit(need, engine), host_of(engine)
        devices: tuple[int, ...] = ()
        if not reason and engine.state == common_pb2.ENGINE_STATE_DRAINING:
            reason = "it drains"
        if not reason and need.accelerators:
            if host in closed_hosts:
                reason = "a replica that is being stopped there still holds accelerators"
            else:
                devices, reason = _free_devices(need, engine.node, host, taken)
        elif not reason and engine.node.memory_bytes and memory[host] + need.memory_bytes > engine.node.memory_bytes:
            left = _gib(max(0, engine.node.memory_bytes - memory[host]))
            reason = f"{left} of its node's memory are free, {_gib(need.memory_bytes)} are needed"
        if reason:
            reasons[engine.id] = reason
            continue
        rank = in_domain[domains[engine.id]], on_host[host], on_engine[engine.id], of_all[engine.id], engine.id
        if best is None or rank < best[0]:
            best = rank, Booking(need.deployment, engine.id, host, devices, 0 if devices else need.memory_bytes)
    return best[1] if best is not None else Refusal(need.deployment, reasons)


def _free_devices(need: Need, node: common_pb2.Node, host: str, taken: Collection[Device]) -> tuple[tuple[int, ...], str]:
    """Free devices of one island that do, or why there are none."""
    free = {d.index: d.island for d in node.accelerators if _device_fits(need, d) and (host, d.index) not in taken}
    islands: dict[int, list[int]] = {}
    for index, island in sorted(free.items()):
        islands.setdefault(island, []).append(index)
    enough = [indexes for indexes in islands.values() if len(indexes) >= need.accelerators]
    if enough:
        return tuple(min(enough, key=lambda indexes: (len(indexes), indexes))[: need.accelerators]), ""
    total = len(node.accelerators)
    if len(free) >= need.accelerators:
        return (), f"{len(free)} of {total} accelerators are free, not {need.accelerators} of them joined by a fast link"
    return (), f"{len(free)} of {total} accelerators are free, {need.accelerators} are needed"
