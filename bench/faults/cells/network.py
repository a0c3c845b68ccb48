"""Cells of networks between processes, and of providers."""

from __future__ import annotations

import asyncio
import time

from bench.faults.scene import Cell, Scene
from inference_runtime.testing.disturb import Disturb
from inference_runtime.testing.proxy import CUT, Disturbance

__all__ = ["CELLS"]

#: Share of what is sent that is lost on the way: TCP sends it again, and what follows waits for it.
LOSS = 0.1
LOSSY, SLICED = Disturbance(stall_share=LOSS), Disturbance(slice_bytes=1)


async def engine_link_disturbed(scene: Scene) -> None:
    """N-01: between all gateways and one engine, which go on running: first nothing passes, then with losses, then in slices."""
    for what, disturbance, quick_s in (("cut", CUT, 5.0), ("loss", LOSSY, 3.0), ("slices", SLICED, 3.0)):
        door = scene.cluster.rpc_doors[scene.pick("engine")]
        fault = Disturb([door], up=disturbance, down=disturbance, what=f"gateways to an engine: {what}")
        begin = time.monotonic()
        async with scene.under(fault):
            await asyncio.sleep(scene.sized(f"seconds of {what}:", quick=quick_s, full=10.0))
        scene.until = time.monotonic()
        slowest = max((a.end - a.begin for a in scene.load.answers if a.probe and a.begin >= begin and a.end), default=0.0)
        scene.measured(f"slowest_new_{what}_s", slowest)
        await scene.cluster.wait_ready()


CELLS: tuple[Cell, ...] = (
    Cell(
        "N-01",
        "gateways to an engine: cut, 10 % lost, 1-byte slices",
        engine_link_disturbed,
        "streams move; nothing comes twice",
        cluster={"rpc_doors": ["engine"]},
    ),
)
