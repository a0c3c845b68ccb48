"""Who of those that should speak with this coordinator does. Pure: the caller gives the time.

A coordinator that holds its lease and hears nobody is of no use, and another would perhaps do no better: leadership stays where
it is, and an operator is told.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

__all__ = ["Attendance", "Condition"]

#: Share of the registered engines that may be silent. More of them cannot reach this process, rather than being ill.
SILENT_SHARE = 0.5


@dataclass(frozen=True, slots=True)
class Condition:
    """How a coordinator is doing.

    Args:
        engines: Engines that are registered and not draining.
        silent: Those of them that have not reported for a while.
        watchers: Gateways that watch the table.
        revision: etcd's revision that the table stands for.
        frozen: The table is not what etcd says, on purpose.
        lacks: What is amiss, by reason: one sentence each.
    """

    engines: int
    silent: int
    watchers: int
    revision: int
    frozen: bool
    lacks: dict[str, str] = field(default_factory=dict)


class Attendance:
    """Notes who speaks.

    Args:
        silence_s: Seconds after which an engine that reports nothing, or the absence of every gateway, counts as silence.
    """

    def __init__(self, silence_s: float) -> None:
        self._silence_s = silence_s
        self._heard: dict[str, float] = {}
        self._most_gateways = 0
        self._nobody_since_s: float | None = None

    def heard(self, engine_id: str, now_s: float) -> None:
        """An engine reported."""
        self._heard[engine_id] = now_s

    def gateways(self, number: int, now_s: float) -> None:
        """So many gateways watch now."""
        self._most_gateways = max(self._most_gateways, number)
        self._nobody_since_s = None if number else now_s

    def look(self, engines: Collection[str], now_s: float) -> tuple[int, dict[str, str]]:
        """How many of the registered engines are silent, and what that means. An engine's time begins when it is first seen
        registered."""
        self._heard = {engine_id: self._heard.get(engine_id, now_s) for engine_id in engines}
        silent = sum(now_s - heard_s > self._silence_s for heard_s in self._heard.values())
        lacks: dict[str, str] = {}
        if silent > SILENT_SHARE * len(engines):
            lacks["engines_silent"] = (
                f"{silent} of {len(engines)} engines are registered in etcd and do not reach this coordinator; is the network"
                " between them cut?"
            )
        if self._most_gateways and self._nobody_since_s is not None and now_s - self._nobody_since_s > self._silence_s:
            lacks["no_gateways"] = f"no gateway watches the routes any more; {self._most_gateways} did in this term"
        return silent, lacks
