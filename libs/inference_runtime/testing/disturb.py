"""A disturbed way between two processes, as a fault that is verified by what its proxies counted.

async with injected(Disturb(cluster.etcd_doors["coordinator"], up=CUT, down=CUT, what="cutting the coordinator off etcd")):
    ...                                    # nothing passes, for certain, and something wanted to
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Collection, Sequence
from dataclasses import replace

from inference_runtime.testing.faults import FaultNotVerified
from inference_runtime.testing.proxy import CLEAR, Disturbance, Lane, TcpProxy

__all__ = ["Disturb"]

#: Seconds that the way through a healed proxy gets to be seen.
HEALED_S = 10.0
#: Pause between two looks.
POLL_S = 0.02


class Disturb:
    """A disturbance of one or more doors as a fault: seen by what the doors counted, and healed for certain.

    Args:
        doors: Where; one of them has to have had an effect, and none of them may contradict it.
        up: From clients to the target.
        down: From the target to clients.
        only: Process ids of the clients that it concerns; None for all.
        what: For messages.
    """

    def __init__(
        self,
        doors: Sequence[TcpProxy],
        *,
        up: Disturbance = CLEAR,
        down: Disturbance = CLEAR,
        only: Collection[int] | None = None,
        what: str = "disturbing",
    ) -> None:
        if not doors or (up == CLEAR and down == CLEAR):
            raise FaultNotVerified(f"{what}: there is nothing to disturb")
        self._doors, self._up, self._down, self._only, self._what = tuple(doors), up, down, only, what
        self._before: list[tuple[tuple[Lane, Lane], int]] = []
        self._ways_through = 0

    @property
    def name(self) -> str:
        """What it is."""
        return f"{self._what} ({', '.join(f'{door.address} to {door.target}' for door in self._doors)})"

    def inject(self) -> None:
        """Put it in."""
        self._before = [((replace(door.up), replace(door.down)), door.held_back) for door in self._doors]
        for door in self._doors:
            door.disturb(up=self._up, down=self._down, only=self._only)

    def is_injected(self) -> bool:
        """Bytes met it, and none came past it. Where both directions are cut, one is enough: no question, no answer."""
        pairs = list(zip(self._doors, self._before, strict=True))
        if any(door.up.disturbance != self._up or door.down.disturbance != self._down for door, _ in pairs):
            return False
        cuts = [door.held_back > held_back for door, (_, held_back) in pairs if self._up.cut or self._down.cut]
        for wanted, place in ((self._up, 0), (self._down, 1)):
            lanes = [(was[place], (door.up, door.down)[place]) for door, (was, _) in pairs]
            if wanted.cut:
                if any(now.forwarded != was.forwarded for was, now in lanes):
                    raise FaultNotVerified(f"{self.name}: bytes passed")
                cuts += [now.received > was.received for was, now in lanes]
            elif wanted != CLEAR and not any(_met(wanted, was, now) for was, now in lanes):
                return False
        return not cuts or any(cuts)

    async def heal(self) -> None:
        """Take it out, and return once a new connection through each door was passed on.

        Raises:
            FaultNotVerified: It was not.
        """
        self._ways_through = 0
        for door in self._doors:
            door.clear()
        for door in self._doors:
            before = door.passed_on
            try:
                async with asyncio.timeout(HEALED_S):
                    while door.passed_on == before:
                        host, _, port = door.address.rpartition(":")
                        _, writer = await asyncio.open_connection(host, int(port))
                        await asyncio.sleep(POLL_S)
                        writer.close()
            except (TimeoutError, OSError) as err:
                raise FaultNotVerified(f"{self.name}: nothing passes after it was healed") from err
            self._ways_through += 1

    def is_healed(self) -> bool:
        """Each door let a new connection through, and disturbs nobody."""
        return self._ways_through == len(self._doors) and all(
            door.up.disturbance == CLEAR and door.down.disturbance == CLEAR for door in self._doors
        )


def _met(wanted: Disturbance, was: Lane, now: Lane) -> bool:
    """Whether bytes passed a lane as they should."""
    passed, writes = now.forwarded - was.forwarded, now.writes - was.writes
    return (
        passed > 0
        and math.inf > now.kept_s >= wanted.delay_s
        and (not wanted.stall_share or now.stalls > was.stalls)
        and (not wanted.slice_bytes or writes * wanted.slice_bytes >= passed)
    )
