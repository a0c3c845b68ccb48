"""The panic rule: when many engines lose their leases at once, the registry is at fault, not the engines. Pure.

Engines that died one by one are believed dead at once. Engines that vanish in a crowd are believed in for a while: those who talk
to them find out for themselves which of them answer. An engine that drained before it left is not missed.
"""

from __future__ import annotations

from collections.abc import Collection

__all__ = ["LossGuard", "is_crowd"]

#: A crowd: at least this many, and more than this share of all.
CROWD_ENGINES = 3
CROWD_SHARE = 0.3
#: Keys of one lease vanish together, but are seen over several watches. More apart than this, a removal was meant.
TOGETHER_S = 2.0


def is_crowd(lost: int, alive: int, least: int = 1) -> bool:
    """Whether so many losses at once speak against the registry: more than a few and more than a share, or all there were.

    Args:
        lost: How many vanished.
        alive: How many are left.
        least: Fewer are never a crowd, even if they were all.
    """
    return lost >= least and (not alive or (lost >= CROWD_ENGINES and lost > CROWD_SHARE * (alive + lost)))


class LossGuard:
    """Which vanished engines are still believed in.

    Args:
        window_s: Losses within this time of each other are a crowd; two lease times.
        freeze_s: How long a lost engine is believed in; 0 for never.
        least: Fewer losses are never a crowd.
    """

    def __init__(self, window_s: float, freeze_s: float, least: int = 1) -> None:
        self._window_s, self._freeze_s, self._least = window_s, freeze_s, least
        self._lost_at: dict[str, float] = {}
        self._frozen: dict[str, float] = {}

    def lost(self, engine_ids: Collection[str], alive: Collection[str], now_s: float) -> bool:
        """Engines vanished without having drained. True when that is the moment of panic.

        Args:
            engine_ids: Who vanished.
            alive: Who is left.
            now_s: The present.
        """
        self.calm_down(now_s)
        self._lost_at |= dict.fromkeys(engine_ids, now_s)
        recent = [lost for lost, at_s in self._lost_at.items() if now_s - at_s <= self._window_s and lost not in alive]
        if not is_crowd(len(recent), len(alive), self._least):
            return False
        calm = not self._frozen
        self._frozen |= {lost: self._lost_at[lost] for lost in recent}
        return calm and self._freeze_s > 0

    def believed_until(self, engine_id: str) -> float:
        """When the belief in this engine ends; 0 when there is none."""
        lost_s = self._frozen.get(engine_id)
        return 0.0 if lost_s is None else lost_s + self._freeze_s

    def believed(self, engine_id: str, removed_s: float, now_s: float) -> bool:
        """Whether something of this engine that was removed at `removed_s` still counts."""
        return now_s < self.believed_until(engine_id) and abs(removed_s - self._frozen[engine_id]) <= TOGETHER_S

    def next_change_s(self) -> float | None:
        """When the oldest belief ends; None while there is no panic."""
        return min(self._frozen.values()) + self._freeze_s if self._frozen else None

    def calm_down(self, now_s: float) -> None:
        """Forget beliefs that have ended."""
        keep_s = max(self._window_s, self._freeze_s)
        self._lost_at = {lost: at_s for lost, at_s in self._lost_at.items() if now_s - at_s <= keep_s}
        self._frozen = {lost: at_s for lost, at_s in self._frozen.items() if now_s - at_s < self._freeze_s}
