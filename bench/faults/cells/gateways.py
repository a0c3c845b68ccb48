"""Cells of gateways and their clients."""

from __future__ import annotations

import asyncio
import sys
import time

from bench.faults.scene import PACE_S, VISIBLE_S, Cell, Scene
from inference_runtime.generation import SamplingParams
from inference_runtime.testing.faults import FaultNotVerified, Kill, process_state

__all__ = ["CELLS"]


async def gateway_killed(scene: Scene) -> None:
    """G-01."""
    gateways = scene.cluster.local.of("gateway")
    number = scene.rng.randrange(len(gateways))
    scene.may_break.add(number)
    scene.load.probed = [n for n in range(len(gateways)) if n != number]
    async with scene.under(Kill(scene.cluster, gateways[number].spec.name)):
        await asyncio.sleep(3)
    scene.figures["came_back"] = scene.load.came_back
    if not scene.load.came_back:
        scene.problems.append("no stream over HTTP broke: that they go on elsewhere was not put to the test")


#: Requests of the client that is killed, which fill its deployment.
HELD = 4
#: Code of that client: it holds streams that would last ten minutes.
VICTIM = """
import asyncio, sys
from inference_runtime.client import InferenceClient
from inference_runtime.generation import SamplingParams

async def hold(client, seed, started):
    async for chunk in client.generate("narrow", "hold", SamplingParams(seed=seed, max_tokens=30000)):
        started[seed].set()

async def main(address, count):
    started = [asyncio.Event() for _ in range(count)]
    async with InferenceClient(gateway=address) as client, asyncio.TaskGroup() as tasks:
        for seed in range(count):
            tasks.create_task(hold(client, seed, started))
        for event in started:
            await event.wait()
        print("streaming", flush=True)

asyncio.run(main(sys.argv[1], int(sys.argv[2])))
"""


async def client_killed(scene: Scene) -> None:
    """G-02: a client holds every place of a deployment and is killed; a request that waits for a place gets it at once."""
    narrow = {"name": "narrow", "model": "scripted", "runtime": "scripted", "runtime_config": {"pace_s": PACE_S}}
    await scene.cluster.apply({**narrow, "serving": {"max_concurrent": HELD}})
    await scene.cluster.wait_serving("narrow")
    victim = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", VICTIM, scene.cluster.grpc, str(HELD)), stdout=asyncio.subprocess.PIPE
    )
    assert victim.stdout is not None
    try:
        async with asyncio.timeout(VISIBLE_S):
            await victim.stdout.readuntil(b"streaming\n")
        async with scene.cluster.client() as client, asyncio.TaskGroup() as tasks:
            waiting = tasks.create_task(client.complete("narrow", "next", SamplingParams(max_tokens=1)))
            done, _ = await asyncio.wait([waiting], timeout=0.5)
            if done:
                raise FaultNotVerified("the client that is to be killed does not hold every place")
            scene.since = begin = time.monotonic()
            victim.kill()
            await victim.wait()
            if process_state(victim.pid) != "":
                raise FaultNotVerified(f"the client (pid {victim.pid}) still runs")
            async with asyncio.timeout(VISIBLE_S):
                await waiting
            scene.figures["places_freed_s"] = time.monotonic() - begin
    finally:
        if victim.returncode is None:
            victim.kill()
            await victim.wait()
    if scene.figures["places_freed_s"] > 1.0:
        scene.problems.append(f"a killed client held its places for {scene.figures['places_freed_s']:.2f} s")
    scene.faults += 1
    scene.until = time.monotonic()


CELLS = (
    Cell(
        "G-01",
        "gateway: kill -9 of 1 of 2",
        gateway_killed,
        "HTTP streams go on at the other; gRPC ones may break",
        gateways_die=True,
    ),
    Cell("G-02", "client: kill -9", client_killed, "its places are free within 1 s", streams=20),
)
