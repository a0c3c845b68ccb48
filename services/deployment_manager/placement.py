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
    """What one replica of a deployment needs."""

    deployment: str
    runtime: str
    accelerators: int = 0
    node_labels: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Booking:
    """What one replica holds: a place on an engine, and devices of its host by index."""

    deployment: str
    engine_id: str
    host: str
    accelerators: tuple[int, ...] = ()

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
    for label, value in sorted(need.node_labels.items()):
        found = engine.node.labels.get(label)
        if found != value:
            return f"its node has {label}={found}, not {value}" if found is not None else f"its node has no label {label}={value}"
    if need.accelerators:
        devices = engine.node.accelerators
        broken = [device for device in devices if device.unschedulable]
        if need.accelerators > len(devices):
            return f"its node has {len(devices)} accelerators, {need.accelerators} are needed"
        if need.accelerators > len(devices) - len(broken):
            why = "; ".join(f"accelerator {device.index}: {device.unschedulable}" for device in broken)
            return f"{len(broken)} of its {len(devices)} accelerators take nothing ({why}), {need.accelerators} are needed"
    return ""


def lost_devices(accelerators: Collection[int], engine: common_pb2.Engine) -> bool:
    """Whether one of these devices of an engine's host takes nothing any more."""
    return bool(accelerators) and any(d.unschedulable for d in engine.node.accelerators if d.index in accelerators)


def place(
    need: Need, engines: Iterable[common_pb2.Engine], held: Sequence[Booking], closed_hosts: Collection[str] = ()
) -> Booking | Refusal:
    """A place for one more replica: on the engine that holds the fewest of this deployment, then the fewest in all, then by id.

    Args:
        need: What it needs.
        engines: All that are registered.
        held: Everything that is placed, also what is on its way out and still holds its devices.
        closed_hosts: Hosts where somebody holds devices that are not known; they take no replica that needs one.
    """
    of_this = Counter(booking.engine_id for booking in held if booking.deployment == need.deployment)
    of_all = Counter(booking.engine_id for booking in held)
    taken = frozenset(device for booking in held if booking.accelerators for device in booking.devices())
    reasons: dict[str, str] = {}
    choices: list[tuple[tuple[int, int, str], Booking]] = []
    for engine in engines:
        reason = misfit(need, engine)
        free: list[int] = []
        if not reason and engine.state == common_pb2.ENGINE_STATE_DRAINING:
            reason = "it drains"
        if not reason and need.accelerators:
            host = host_of(engine)
            devices = [device for device in engine.node.accelerators if not device.unschedulable]
            free = sorted({device.index for device in devices if (host, device.index) not in taken})
            if host in closed_hosts:
                reason = "a replica that is being stopped there still holds accelerators"
            elif len(free) < need.accelerators:
                total = len(engine.node.accelerators)
                reason = f"{len(free)} of {total} accelerators are free, {need.accelerators} are needed"
        if reason:
            reasons[engine.id] = reason
            continue
        booking = Booking(need.deployment, engine.id, host_of(engine), tuple(free[: need.accelerators]))
        choices.append(((of_this[engine.id], of_all[engine.id], engine.id), booking))
    return min(choices)[1] if choices else Refusal(need.deployment, reasons)
