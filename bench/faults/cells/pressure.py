"""Cells of overload, slowness and full disks."""

from __future__ import annotations

import asyncio
import math
import time
from typing import Any

from bench.faults.asking import PATIENCE_S
from bench.faults.crowd import arrivals, clients, p99_s, served, took_s
from bench.faults.judge import percentile
from bench.faults.load import MODEL
from bench.faults.metrics import metrics_of
from bench.faults.scene import PACE_S, Cell, Scene
from inference_runtime.cli.local import http_get
from inference_runtime.testing.faults import Fault, FaultNotVerified, Kill

__all__ = ["CELLS"]

# --- P-01 ------------------------------------------------------------------------------------------------------------

#: The deployment that is overloaded: requests that each replica takes at once, and tokens of each.
PLACES, REPLICAS, TOKENS = 8, 2, 20
CROWDED = {
    "name": "crowded",
    "model": "scripted",
    "runtime": "scripted",
    "replicas": REPLICAS,
    "runtime_config": {"pace_s": PACE_S},
    "serving": {"max_concurrent": PLACES, "on_capacity_exhausted": "reject"},
}
#: How many times as many requests come as were served at the peak.
OVERLOAD = 3.0
#: Clients of the idle deployment, and when one that was refused asks again while the peak is measured, seconds.
FEW, AGAIN_S = 2, 0.01
#: Time that a refusal may take, milliseconds: what is more than requests take that ask for nothing at that time. On a busy
#: machine it is only this that tells of the gateway.
REFUSED_MS = 10.0
#: Time between two such requests, seconds.
CONTROL_EVERY_S = 0.03
#: Time that the deployment gets to be as it was, and how long it is watched, seconds.
RECOVERY_S, WATCHED_S = 10.0, 15.0


async def overloaded(scene: Scene) -> None:
    """P-01: three times as many requests as can be served; beside it streams of another deployment, which must not notice."""
    await scene.cluster.apply(CROWDED)
    await scene.cluster.wait_serving("crowded")
    scene.excused = lambda answer: answer.outcome == "refused" and answer.model == "crowded"
    about: dict[str, Any] = {"model": "crowded", "tokens": TOKENS}
    idle = await clients(scene.load, FEW, scene.sized("seconds idle:", quick=3, full=10), **about, kind="idle", again_s=AGAIN_S)
    lasting_s = scene.sized("seconds at the peak:", quick=4, full=10)
    peak = await clients(scene.load, PLACES * REPLICAS, lasting_s, **about, kind="peak", again_s=AGAIN_S)
    peak_per_s = len(served(peak)) / lasting_s
    lasting_s = scene.sized("seconds of overload:", quick=10, full=60)
    scene.since = time.monotonic()
    async with asyncio.TaskGroup() as tasks:
        control = tasks.create_task(_control(scene, lasting_s))
        crowd = await arrivals(scene.load, OVERLOAD * peak_per_s, lasting_s, **about, kind="crowd", rng=scene.rng)
    scene.until = over = time.monotonic()
    after = await clients(scene.load, FEW, WATCHED_S, **about, kind="after", again_s=AGAIN_S)
    refused = [a for a in crowd if a.outcome == "refused"]
    if len(refused) < len(crowd) * (1 - 1.5 / OVERLOAD):
        raise FaultNotVerified(f"{len(refused)} of {len(crowd)} requests were too many: that is no overload of {OVERLOAD:g}")
    scene.faults += 1
    idle_p99_s = p99_s(idle)
    scene.measured("peak_per_s", peak_per_s)
    scene.measured("goodput_lost_share", 1 - len(served(crowd)) / lasting_s / peak_per_s)
    scene.measured("accepted_p99_by_idle", p99_s(served(crowd)) / idle_p99_s)
    scene.measured("idle_p99_ms", idle_p99_s * 1000)
    for name, share in (("p50", 0.5), ("p99", 0.99)):
        refusal_s, control_s = took_s(refused, share), percentile(control.result(), share)
        scene.measured(f"refused_{name}_ms", refusal_s * 1000)
        scene.measured(f"refused_{name}_over_control_ms", (refusal_s - control_s) * 1000)
    late = [a.end - over for a in after if a.outcome != "ended" or a.end - a.begin > 2 * idle_p99_s]
    scene.measured("recovered_after_s", max(late, default=0.0))


async def _control(scene: Scene, lasting_s: float) -> list[float]:
    """How long an answer takes at that time for which nobody has to do anything: what the machine adds to every time, seconds.

    Asked at a rate, as the crowd does: whoever waits for an answer before asking again sees each pause of the machine once.
    """
    took: list[float] = []

    async def ask(number: int) -> None:
        url = scene.cluster.local.http_urls[number % scene.load.gateways]
        begin = time.monotonic()
        status, _ = await http_get(url.removeprefix("http://"), "/healthz")
        if status not in {0, 200}:  # 0: none within a second
            raise FaultNotVerified(f"{url}/healthz answers with status {status}: there is nothing to compare with")
        took.append(time.monotonic() - begin)

    begin = time.monotonic()
    async with asyncio.TaskGroup() as tasks:
        for number in range(int(lasting_s / CONTROL_EVERY_S)):
            await asyncio.sleep(begin + number * CONTROL_EVERY_S - time.monotonic())
            tasks.create_task(ask(number))
    return took


# --- P-02 ------------------------------------------------------------------------------------------------------------

#: Clients that ask again at once when they are refused, and the pause of those who do, seconds.
STORM, AT_ONCE_S = 60, 0.02
#: Time from the end of the outage to the first answer, seconds.
SERVED_AGAIN_S = 5.0


class _Together:
    """Several faults at one moment, healed at one moment."""

    def __init__(self, *faults: Fault) -> None:
        self._faults = faults

    @property
    def name(self) -> str:
        """All of them."""
        return ", ".join(fault.name for fault in self._faults)

    def inject(self) -> None:
        """Put all in."""
        for fault in self._faults:
            fault.inject()

    def is_injected(self) -> bool:
        """Each can be seen."""
        return all(fault.is_injected() for fault in self._faults)

    async def heal(self) -> None:
        """Take all out."""
        await asyncio.gather(*(fault.heal() for fault in self._faults))

    def is_healed(self) -> bool:
        """None can be seen."""
        return all(fault.is_healed() for fault in self._faults)


async def retry_storm(scene: Scene) -> None:
    """P-02: every engine is gone for half a minute, while clients ask again and again; then all come back at once."""
    outage_s = scene.sized("seconds of outage:", quick=8, full=30)
    engines = [Kill(scene.cluster, process.spec.name) for process in scene.cluster.local.of("engine")]
    answers = scene.load.answers
    open_then = sum(not a.end for a in answers)
    asked, attempts = len(answers), await _attempts(scene)
    down, back = time.monotonic(), math.inf
    scene.excused = lambda answer: down <= answer.end <= back + SERVED_AGAIN_S
    async with asyncio.TaskGroup() as tasks:
        lasting_s = outage_s + SERVED_AGAIN_S
        tasks.create_task(clients(scene.load, STORM, lasting_s, model=MODEL, tokens=10, kind="storm", again_s=AT_ONCE_S))
        async with scene.under(_Together(*engines)):
            await asyncio.sleep(outage_s)
            back = time.monotonic()
    more = await _attempts(scene)
    asked = len(answers) - asked
    refused = [a for a in answers if down <= a.end and a.outcome == "refused"]
    if len(refused) < STORM:
        raise FaultNotVerified(f"only {len(refused)} requests were refused during the outage: that is no storm")
    scene.measured("amplification", 1 + (more["retry"] - attempts["retry"]) / asked)
    scene.measured("moves_by_open_stream", (more["move"] - attempts["move"]) / open_then)
    scene.measured("refused", len(refused))
    scene.measured("served_again_after_s", min(a.stamps[0] for a in answers if a.stamps and a.stamps[0] > back) - back)
    scene.measured("refused_until_s", max((a.end - back for a in answers if a.outcome != "ended" and a.end), default=0.0))


async def _attempts(scene: Scene) -> dict[str, float]:
    """Further attempts that the gateways made so far, by kind."""
    counts = {"retry": 0.0, "move": 0.0}
    for url in scene.cluster.local.http_urls:
        for name, labels, value in await metrics_of(url.removeprefix("http://")):
            if name == "inference_retries_total":
                counts[labels["kind"]] += value
    return counts


CELLS: tuple[Cell, ...] = (
    Cell(
        "P-01",
        "overload: 3 times what can be served",
        overloaded,
        "goodput ≥ 90 % of the peak; p99 of the accepted ≤ twice the idle one; refused within 10 ms (p50 and p99, over "
        "those of empty requests); well again within 10 s",
        stall_s=1.0,
        streams=8,
        limits={
            "goodput_lost_share": 0.1,
            "accepted_p99_by_idle": 2.0,
            "refused_p50_over_control_ms": REFUSED_MS,
            "refused_p99_over_control_ms": REFUSED_MS,
            "recovered_after_s": RECOVERY_S,
        },
    ),
    Cell(
        "P-02",
        "every engine gone for 30 s, clients that ask again at once",
        retry_storm,
        "gateways make 10 % more attempts at most; served again within 5 s",
        # Nothing can be answered while nobody is there.
        unavailable_s=30 + SERVED_AGAIN_S,
        stall_s=PATIENCE_S,
        limits={
            "amplification": 1.1,
            "moves_by_open_stream": 3,
            "served_again_after_s": SERVED_AGAIN_S,
            "refused_until_s": SERVED_AGAIN_S,
        },
    ),
)
