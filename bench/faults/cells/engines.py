"""Cells of engines and their contexts."""

from __future__ import annotations

import asyncio
import json
import math
import re
import signal
import statistics
import time
from itertools import pairwise
from typing import Any

from bench.faults.asking import Answer, verdict_on
from bench.faults.judge import WAIT_S
from bench.faults.load import MODEL
from bench.faults.metrics import metrics_of
from bench.faults.scene import PACE_S, VISIBLE_S, Cell, Scene
from inference_runtime.coordination import EtcdClient, keys
from inference_runtime.runners.scripted_faults import HANG, slow
from inference_runtime.testing.faults import FaultNotVerified, Freeze, Kill, KillContext, contexts_of, process_state
from inference_runtime.testing.told import TellSteps
from inference_runtime.v1 import common_pb2

__all__ = ["CELLS"]


async def engine_killed(scene: Scene) -> None:
    """R-01."""
    async with scene.under(Kill(scene.cluster, scene.pick("engine"))):
        await asyncio.sleep(3)


async def context_killed(scene: Scene) -> None:
    """R-02: the child that computes is killed, its engine goes on."""
    name = scene.pick("engine")
    engine = scene.cluster.pids()[name]
    fault = KillContext(scene.cluster, name)
    async with scene.under(fault):
        await asyncio.sleep(2)
    if scene.cluster.pids()[name] != engine or process_state(engine) in {"", "Z"}:
        scene.problems.append(f"{name} died with its context")


async def engine_frozen(scene: Scene) -> None:
    """R-03: longer than its lease. New requests must not wait until its sessions are known to be dead."""
    begin = time.monotonic()
    async with scene.under(Freeze(scene.cluster, scene.pick("engine"))):
        await asyncio.sleep(scene.sized("seconds frozen:", quick=8, full=30))
    new = [a.end - a.begin for a in scene.load.answers if a.probe and a.begin >= begin]
    scene.measured("slowest_new_s", max(new, default=math.inf))


async def context_poisoned(scene: Scene) -> None:
    """R-04: the deployment is made so that the device asserts at a token; only a new process can compute again."""
    begin = time.monotonic()
    scene.since = begin
    fault = await _replica(scene)

    async def restarted() -> bool:
        now = await _replica(scene)
        return now.restarts > fault.restarts and now.state == common_pb2.REPLICA_STATE_SERVING

    await scene.visible(restarted, "the context was not poisoned and restarted")
    scene.until = time.monotonic()
    scene.faults += 1


async def _replica(scene: Scene) -> common_pb2.Replica:
    return next(iter(await _replicas(scene)), common_pb2.Replica())


async def _replicas(scene: Scene) -> list[common_pb2.Replica]:
    async with EtcdClient(scene.cluster.etcd) as client:
        found, _ = await client.list(keys.replicas_of(MODEL))
    return [common_pb2.Replica.FromString(kv.value) for kv in found]


#: An engine of R-05 does not wait for its streams: most of them are handed over.
SHORT_DRAIN = {"INFERENCE_ENGINE__DRAIN_TIMEOUT_S": "0.6", "INFERENCE_ENGINE__DRAIN_NOTICE_S": "0.2"}


async def everything_rolled(scene: Scene) -> None:
    """R-05: SIGTERM for each process in turn; each is back before the next one goes."""
    names = [name for name in scene.cluster.pids() if name != "etcd"]
    scene.rng.shuffle(names)
    scene.since = time.monotonic()
    for name in names:
        process = scene.cluster.local.processes[name]
        pid = process.pid
        scene.cluster.kill(name, signal.SIGTERM)

        async def ended(process: Any = process) -> bool:
            return not process.running

        await scene.visible(ended, f"{name} (pid {pid}) did not end on SIGTERM")
        if process.exit_code != 0:
            scene.problems.append(f"{name} ended with exit code {process.exit_code} on SIGTERM")
        await scene.cluster.restart(name)
        scene.faults += 1
    scene.until = time.monotonic()
    logs = [path.read_text(encoding="utf-8", errors="replace") for path in scene.cluster.local.logs.glob("engine*.log")]
    handed_over = sum(int(count) for log in logs for count in re.findall(r'requests handed over .*streams="(\d+)"', log))
    scene.measured("handed_over", handed_over)
    if not handed_over:
        raise FaultNotVerified("no stream outlived its engine")


# --- R-06 ------------------------------------------------------------------------------------------------------------

#: What the engine waits for a step, and in a short run, seconds.
HANG_S, QUICK_HANG_S = 30.0, 5.0
#: Time from there to the end of the process: it writes its stacks first (0.5 s), and we look every 20 ms; seconds.
TO_KILL_S = 1.0


async def step_hung(scene: Scene) -> None:
    """R-06: the step of one context does not end, while its process breathes."""
    name = scene.pick("engine")
    engine = scene.cluster.pids()[name]
    context = _only_context(scene, name)
    limit_s = scene.sized("hang limit, seconds:", quick=QUICK_HANG_S, full=HANG_S)
    fault = TellSteps(scene.told, [context], HANG)
    async with scene.under(fault):
        begin = time.monotonic()

        async def killed() -> bool:
            return process_state(context) in {"", "Z"}

        await scene.visible(killed, "the hung context was not killed", limit_s + VISIBLE_S)
        took_s = time.monotonic() - begin
    scene.measured("killed_after_s", took_s)
    if took_s > limit_s + TO_KILL_S:
        scene.problems.append(f"the hung context was killed after {took_s:.1f} s, not {limit_s:g}")
    await scene.visible(lambda: _serves_again(scene), "the context was not replaced")
    log = (scene.cluster.local.logs / f"{name}.log").read_text(encoding="utf-8", errors="replace")
    if "stack of the hung context" not in log or "scripted_faults.py" not in log:
        scene.problems.append(f"no stack of the hung step was kept in the log of {name}")
    if scene.cluster.pids()[name] != engine or process_state(engine) in {"", "Z"}:
        scene.problems.append(f"{name} died with its context")


def _only_context(scene: Scene, engine: str) -> int:
    contexts = contexts_of(scene.cluster.pids()[engine])
    if len(contexts) != 1:
        raise FaultNotVerified(f"{engine} has {len(contexts)} context processes, not one")
    return contexts[0]


async def _serves_again(scene: Scene) -> bool:
    replicas = await _replicas(scene)
    return any(r.restarts for r in replicas) and all(r.state == common_pb2.REPLICA_STATE_SERVING for r in replicas)


# --- one request that harms others -----------------------------------------------------------------------

#: Longest prompt that the device of R-07 has memory for, tokens, and the one that is sent.
MEMORY_TOKENS, HUGE_TOKENS = 4000, 9000


async def memory_exhausted(scene: Scene) -> None:
    """R-07: one prompt is so large that the step that reads it runs out of memory."""
    scene.since = time.monotonic()
    status, said = await verdict_on(_any_door(scene), "x" * HUGE_TOKENS, tokens=8)
    scene.until = time.monotonic()
    scene.measured("told_after_s", scene.until - scene.since)
    if status not in {413, 500}:
        scene.problems.append(f"the huge prompt was answered with status {status}, not 413 or 500: {said[-200:]}")
    steps = sum(
        line.count("out_of_memory") > 0 and "step failed" in line
        for log in scene.cluster.local.logs.glob("engine*.log")
        for line in log.read_text(encoding="utf-8", errors="replace").splitlines()
    )
    if not steps:
        raise FaultNotVerified("no step ran out of memory")
    scene.faults += 1
    scene.measured("steps_out_of_memory", steps)
    scene.measured("context_deaths", sum(r.restarts for r in await _replicas(scene)))


KILLER = "please divide by zero"
#: How often the killer prompt is sent again once it was refused.
AGAIN = 6


async def killer_prompt(scene: Scene) -> None:
    """R-09, PP-1: a prompt that kills each context that computes it, among many that are well; and again, by every door."""
    scene.since = time.monotonic()
    first = await verdict_on(_any_door(scene), KILLER, tokens=8)
    scene.measured("told_after_s", time.monotonic() - scene.since)
    await scene.visible(lambda: _serves_again(scene), "no context died, or one was not replaced")
    scene.measured("context_deaths", sum(r.restarts for r in await _replicas(scene)))
    again = [await verdict_on(_door(scene, number), KILLER, tokens=8) for number in range(AGAIN)]
    scene.until = time.monotonic()
    scene.faults += 1
    for status, said in (first, *again):
        if status != 422 or json.loads(said)["error"]["code"] != "request_quarantined":
            scene.problems.append(f"the killer prompt was answered with status {status}, not quarantined: {said[-200:]}")
    await scene.visible(lambda: _serves_again(scene), "a context was not replaced")
    scene.measured("context_deaths_sent_again", sum(r.restarts for r in await _replicas(scene)))


def _any_door(scene: Scene) -> str:
    return _door(scene, scene.rng.randrange(len(scene.cluster.local.http_urls)))


def _door(scene: Scene, number: int) -> str:
    urls = scene.cluster.local.http_urls
    return urls[number % len(urls)].removeprefix("http://")


# --- R-08 ------------------------------------------------------------------------------------------------------------

#: How many times as long a step of the slow engine takes.
SLOWER = 20
#: Time that gateways get to send nothing new to it, seconds.
EJECTED_S = 10.0
#: A stream is slow when half of its tokens took this many times the pace.
SLOW = 5
#: Time between two looks at it, seconds.
LOOK_S = 0.2
#: The gateways' count of replicas that get nothing, or little, because they are slow.
EJECTED = "inference_replicas_ejected"
#: Streams that a gateway may send to an engine that it tries again, all gateways together.
TRIALS = 4


async def engine_slow(scene: Scene) -> None:
    """R-08: one engine computes at a twentieth of its pace; then half of all do, and half must go on being asked."""
    names = [p.spec.name for p in scene.cluster.local.of("engine")]
    scene.rng.shuffle(names)
    pids = scene.cluster.pids()
    shares = _Shares(scene, len(names))
    async with asyncio.TaskGroup() as tasks:
        watch = tasks.create_task(shares.watch())
        async with scene.under(TellSteps(scene.told, [pids[names[0]]], slow(SLOWER))):
            begin = time.monotonic()
            await asyncio.sleep(EJECTED_S + scene.sized("seconds slow after that:", quick=4, full=10))
            end = time.monotonic()
        late = [a for a in scene.load.answers if is_slow(a) and begin + EJECTED_S <= a.begin < end]
        early = [a.begin - begin for a in scene.load.answers if is_slow(a) and begin <= a.begin < begin + EJECTED_S]
        scene.measured("ejected_after_s", max(early, default=0.0))
        scene.measured("sent_to_the_slow_one_later", len(late))
        half = [pids[name] for name in names[1 : 1 + len(names) // 2 + 1]]
        async with scene.under(TellSteps(scene.told, half, slow(SLOWER))):
            await asyncio.sleep(scene.sized("seconds with most engines slow:", quick=5, full=15))
        watch.cancel()
    if shares.most >= 0:
        scene.measured("most_ejected_share", shares.most)


class _Shares:
    """The largest share of a deployment's replicas that one gateway held back, watched all the time."""

    def __init__(self, scene: Scene, replicas: int) -> None:
        self._scene, self._replicas = scene, replicas
        self.most = -1.0

    async def watch(self) -> None:
        """Look until cancelled."""
        while True:
            for number in range(self._scene.load.gateways):
                for name, labels, value in await metrics_of(_door(self._scene, number)):
                    if name == EJECTED and labels["deployment"] == MODEL:
                        self.most = max(self.most, value / self._replicas)
            await asyncio.sleep(LOOK_S)


def is_slow(answer: Answer) -> bool:
    """Whether a stream ran at the pace of a slow engine, for the most part."""
    gaps = [b - a for a, b in pairwise(answer.stamps)]
    return not answer.probe and len(gaps) > 2 and statistics.median(gaps) > SLOW * PACE_S


_PROCESS = {"isolation": "process"}

CELLS = (
    Cell("R-01", "engine: kill -9", engine_killed, "streams move; stall p99 ≤ 1.5 s", stall_s=1.5),
    Cell("R-02", "context's process: kill -9", context_killed, "the engine stays", deployment=_PROCESS),
    Cell(
        "R-03",
        "engine: SIGSTOP 30 s",
        engine_frozen,
        "no new request waits for more than 2 s; stall ≤ 6 s",
        limits={"slowest_new_s": WAIT_S},
    ),
    Cell(
        "R-04",
        "poisoned context (sticky 710), one replica",
        context_poisoned,
        "a new process; unavailable for the load time + 2 s",
        unavailable_s=2.0,
        replicas=1,
        deployment=_PROCESS,
    ),
    Cell(
        "R-05",
        "SIGTERM for every process in turn",
        everything_rolled,
        "drained, or handed over after 0.6 s; exit code 0",
        cluster={"settings": {"engine": SHORT_DRAIN}},
        singletons=2,
        tokens=100,
        churn=True,
        terms=2,
        gateways_die=True,
    ),
    Cell(
        "R-06",
        "a step that does not end",
        step_hung,
        "its process is killed at 30 s, with a dump; stall ≤ 32 s; nothing new is sent there after 2 s",
        # What was sent there before anybody could know waits until the process is killed.
        unavailable_s=2.0,
        stall_s=32.0,
        deployment=_PROCESS,
        told=True,
        cluster={"settings": {"engine": {"INFERENCE_ENGINE__HANG_S": f"{HANG_S:g}"}}},
        quick_cluster={"settings": {"engine": {"INFERENCE_ENGINE__HANG_S": f"{QUICK_HANG_S:g}"}}},
        limits={"killed_after_s": HANG_S + TO_KILL_S},
    ),
    Cell(
        "R-07",
        "out of memory in one step, by one huge prompt",
        memory_exhausted,
        "that request gets 413 or 500; others go on",
        stall_s=1.5,
        deployment={"runtime_config": {"oom_prompt_tokens": MEMORY_TOKENS}},
        limits={"context_deaths": 0, "steps_out_of_memory": 2},
    ),
    Cell(
        "R-08",
        "engine: 20 times slower",
        engine_slow,
        "no new streams for it after 10 s; never more than half of the engines out",
        stall_s=2.0,
        engines=4,
        replicas=4,
        told=True,
        limits={"sent_to_the_slow_one_later": TRIALS, "most_ejected_share": 0.5},
    ),
    Cell(
        "R-09",
        "killer prompt, 200 streams",
        killer_prompt,
        "2 contexts die at most; the prompt is quarantined",
        engines=4,
        replicas=4,
        streams=200,
        tokens=100,
        pace_s=0.05,
        deployment={**_PROCESS, "runtime_config": {"poison_on": "divide by zero"}},
        limits={"context_deaths": 2, "context_deaths_sent_again": 2},
    ),
)
