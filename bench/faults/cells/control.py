"""Cells of leaders."""

from __future__ import annotations

import asyncio
import time
from typing import Any

from bench.faults.scene import LEASE_TTL_S, Cell, Scene
from inference_runtime.testing.faults import Freeze, Kill

__all__ = ["CELLS"]


async def leaders_killed(scene: Scene) -> None:
    """M-01: the leaders of both roles that decide, one after the other."""
    for role in ("coordinator", "deployment_manager"):
        old = await scene.cluster.leader(role)
        begin = time.monotonic()
        async with scene.under(Kill(scene.cluster, old)):
            await scene.cluster.leader(role, other_than=old)
            _handover(scene, role, time.monotonic() - begin)
            await asyncio.sleep(1)


async def leaders_frozen(scene: Scene) -> None:
    """M-02: each leader stands still for longer than its lease, and goes on while another one leads."""
    for role in ("coordinator", "deployment_manager"):
        old = await scene.cluster.leader(role)
        begin = time.monotonic()
        async with scene.under(Freeze(scene.cluster, old)):
            await scene.cluster.leader(role, other_than=old)
            _handover(scene, role, time.monotonic() - begin)
            await asyncio.sleep(1)
        if await scene.cluster.leader(role) == old:
            scene.problems.append(f"{old} leads again after it was frozen")


def _handover(scene: Scene, role: str, took_s: float) -> None:
    scene.figures["handover_s"] = max(took_s, scene.figures.get("handover_s", 0.0))
    if took_s > LEASE_TTL_S + 2:
        scene.problems.append(f"{role}: a new leader took {took_s:.1f} s")


#: Orders keep coming, so that there is something to write, and leaders change.
_FENCED: dict[str, Any] = {"singletons": 2, "churn": True, "terms": 2, "stall_s": 1.0}

CELLS = (
    Cell("M-01", "both leaders: kill -9", leaders_killed, "new leader ≤ lease + 2 s", **_FENCED),
    Cell("M-02", "both leaders: SIGSTOP > lease", leaders_frozen, "no write by the old one", **_FENCED),
)
