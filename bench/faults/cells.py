"""The cells: which fault, how it is injected and healed, and what is promised besides the zeros.

Every cell runs the same way (`run_cell`): a new cluster of real processes, standing load, a random moment, the fault, a while
without it. Faults are seen before they count, half way, and to be gone; a cell whose fault was not seen proves nothing.
"""

from __future__ import annotations

import asyncio
import random
import signal
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from bench.faults.fencing import leader_writes, read_history
from bench.faults.judge import Run, judge
from bench.faults.load import MODEL, Load
from inference_runtime.coordination import EtcdClient, keys
from inference_runtime.coordination.kv import KeyValue
from inference_runtime.errors import InferenceError
from inference_runtime.generation import SamplingParams
from inference_runtime.testing.cluster import Cluster
from inference_runtime.testing.faults import Fault, FaultNotVerified, Freeze, Kill, KillContext, injected, process_state
from inference_runtime.v1 import common_pb2

__all__ = ["CELLS", "LEASE_TTL_S", "Cell", "Scene", "run_cell"]

#: Leases are shorter than a deployment's 10 s, so that a cell in which they run out ends soon.
LEASE_TTL_S = 3.0
#: Seconds of each token: 50 tokens a second for each stream.
PACE_S = 0.02
#: Seconds of load after the fault is healed.
AFTER_S = 1.0
#: Seconds between two orders that make the deployment manager write assignments.
CHURN_S = 0.3
#: Seconds that something gets to become visible.
VISIBLE_S = 15.0


@dataclass(frozen=True, slots=True)
class Cell:
    """One row of the matrix.

    Args:
        id: Its name in the matrix.
        fault: What is done, for people.
        act: Does it.
        promise: What is promised besides the zeros, for people.
        unavailable_s: Longest time in which new requests may fail or wait for more than 2 s.
        stall_s: Longest silence of a stream, seconds, 99th percentile.
        singletons: Candidates of each singleton.
        engines: Engines.
        replicas: Replicas of the deployment.
        streams: Streams that are open at any time.
        tokens: Tokens of each stream.
        deployment: More keys of the deployment.
        churn: Orders keep the deployment manager writing assignments.
        gateways_die: Gateways are taken down: their clients ask another one when they are refused.
    """

    id: str
    fault: str
    act: Callable[[Scene], Awaitable[None]]
    promise: str
    unavailable_s: float = 0.0
    stall_s: float = 6.0
    singletons: int = 1
    engines: int = 3
    replicas: int = 3
    streams: int = 40
    tokens: int = 200
    deployment: Mapping[str, Any] = field(default_factory=dict)
    churn: bool = False
    gateways_die: bool = False


@dataclass(slots=True)
class Scene:
    """What a cell works with while it runs, and what it leaves for the judge."""

    cell: Cell
    cluster: Cluster
    load: Load
    rng: random.Random
    faults: int = 0
    since: float = 0.0
    until: float = 0.0
    may_break: set[int] = field(default_factory=set)
    figures: dict[str, float] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    verified: bool = True
    #: Where etcd's history begins, and the candidates that stood then.
    history_from: int = 1
    standing: list[KeyValue] = field(default_factory=list)

    def pick(self, service: str) -> str:
        """A random process of a service, by name."""
        return self.rng.choice(self.cluster.local.of(service)).spec.name

    @asynccontextmanager
    async def under(self, fault: Fault) -> AsyncIterator[None]:
        """The body runs under the fault, which is seen when it begins and still there when it ends."""
        begin = time.monotonic()
        self.since = self.since or begin
        async with injected(fault):
            yield
            if not fault.is_injected():
                raise FaultNotVerified(f"{fault.name} was gone before it was healed")
        self.until = time.monotonic()
        self.faults += 1

    async def visible(self, condition: Callable[[], Awaitable[bool]], complaint: str) -> None:
        """Return once a condition holds. Raises FaultNotVerified."""
        try:
            async with asyncio.timeout(VISIBLE_S):
                while not await condition():  # noqa: ASYNC110 - etcd and the process table are looked at
                    await asyncio.sleep(0.02)
        except TimeoutError as err:
            raise FaultNotVerified(f"{complaint} within {VISIBLE_S:g} s") from err


# --- engines ---------------------------------------------------------------------------------------------------------


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
    """R-03: longer than its lease."""
    async with scene.under(Freeze(scene.cluster, scene.pick("engine"))):
        await asyncio.sleep(8)


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
    async with EtcdClient(scene.cluster.etcd) as client:
        found, _ = await client.list(keys.replicas_of(MODEL))
    return common_pb2.Replica.FromString(found[0].value) if found else common_pb2.Replica()


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


# --- gateways and clients --------------------------------------------------------------------------------------------


async def gateway_killed(scene: Scene) -> None:
    """G-01."""
    gateways = scene.cluster.local.of("gateway")
    number = scene.rng.randrange(len(gateways))
    scene.may_break.add(number)
    scene.load.probed = [n for n in range(len(gateways)) if n != number]
    async with scene.under(Kill(scene.cluster, gateways[number].spec.name)):
        await asyncio.sleep(3)


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


# --- leaders ---------------------------------------------------------------------------------------------------------


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


# --- etcd ------------------------------------------------------------------------------------------------------------


async def etcd_killed(scene: Scene) -> None:
    """E-01 on one member: killed for longer than every lease, and started again on its data."""
    async with scene.under(Kill(scene.cluster, "etcd")):
        await asyncio.sleep(LEASE_TTL_S + 1)
    await _control_plane_works(scene)


async def etcd_frozen(scene: Scene) -> None:
    """E-02 on one member: nothing answers and nothing is refused."""
    async with scene.under(Freeze(scene.cluster, "etcd")):
        await asyncio.sleep(LEASE_TTL_S + 2)
    await _control_plane_works(scene)


async def etcd_compacted(scene: Scene) -> None:
    """E-04: it comes back with its history gone, so that no watch can go on from where it was."""
    async with scene.under(Kill(scene.cluster, "etcd")):
        await asyncio.sleep(1)
    async with EtcdClient(scene.cluster.etcd) as client:
        scene.standing, revision = await client.list(keys.ELECTIONS)
        await client.compact(revision)
        scene.history_from = revision + 1
    await _control_plane_works(scene)


async def _control_plane_works(scene: Scene) -> None:
    """Orders are taken and carried out again; until then they may be refused, as long as that is said."""
    begin = time.monotonic()
    async with scene.cluster.client() as client:

        async def taken() -> bool:
            try:
                await client.apply({"name": "later", "model": "scripted", "runtime": "scripted"})
            except InferenceError:
                return False
            return True

        await scene.visible(taken, "no order was taken after etcd came back")
    await scene.cluster.wait_ready()
    await scene.cluster.wait_serving("later")
    scene.figures["orders_carried_out_s"] = time.monotonic() - begin


# --- the matrix ------------------------------------------------------------------------------------------------------

_PROCESS = {"isolation": "process"}

CELLS: dict[str, Cell] = {
    cell.id: cell
    for cell in (
        Cell("R-01", "engine: kill -9", engine_killed, "streams move; stall p99 ≤ 1.5 s", stall_s=1.5),
        Cell("R-02", "context's process: kill -9", context_killed, "the engine stays", deployment=_PROCESS),
        Cell("R-03", "engine: SIGSTOP 8 s", engine_frozen, "stall ≤ 6 s"),
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
            "drained or moved; exit code 0",
            singletons=2,
            tokens=100,
            churn=True,
            gateways_die=True,
        ),
        Cell("G-01", "gateway: kill -9 of 1 of 2", gateway_killed, "its open streams may break", gateways_die=True),
        Cell("G-02", "client: kill -9", client_killed, "its places are free within 1 s", streams=20),
        Cell("M-01", "both leaders: kill -9", leaders_killed, "new leader ≤ lease + 2 s", singletons=2, churn=True, stall_s=1.0),
        Cell(
            "M-02",
            "both leaders: SIGSTOP > lease",
            leaders_frozen,
            "no write by the old one",
            singletons=2,
            churn=True,
            stall_s=1.0,
        ),
        Cell("E-01", "etcd (one member): kill -9, 4 s", etcd_killed, "streams untouched", churn=True, stall_s=1.0),
        Cell("E-02", "etcd (one member): SIGSTOP 5 s", etcd_frozen, "streams untouched", churn=True, stall_s=1.0),
        Cell("E-04", "etcd: restart and compaction", etcd_compacted, "streams untouched", churn=True, stall_s=1.0),
    )
}


async def run_cell(cell: Cell, seed: int) -> Run:
    """One run. A fault that cannot be verified, and a system that does not come back, are problems of the run, not raised."""
    rng = random.Random(f"{cell.id} {seed}")
    async with Cluster(engines=cell.engines, gateways=2, singletons=cell.singletons, lease_ttl_s=LEASE_TTL_S) as cluster:
        await cluster.apply(_deployment(cell, rng))
        await cluster.wait_serving(MODEL)
        load = Load(cluster, streams=cell.streams, tokens=cell.tokens, rng=rng, elsewhere=cell.gateways_die)
        scene = Scene(cell, cluster, load, rng)
        stop = asyncio.Event()
        async with load.running(), asyncio.TaskGroup() as tasks:
            await load.started()
            if cell.churn:
                tasks.create_task(_churn(cluster, stop))
            await asyncio.sleep(rng.uniform(0, cell.tokens * PACE_S / 2))
            try:
                await cell.act(scene)
                await asyncio.sleep(AFTER_S)
            except FaultNotVerified as err:
                scene.verified = False
                scene.problems.append(str(err))
            except (InferenceError, TimeoutError) as err:
                scene.problems.append(f"{type(err).__name__}: {err}")
            finally:
                stop.set()
        writes = leader_writes(await read_history(cluster.etcd, scene.history_from), scene.standing)
    if cell.gateways_die:
        scene.figures["asked_elsewhere"] = load.asked_elsewhere
    if cell.churn and (writes.assignments == 0 or (cell.singletons > 1 and writes.terms < 2)):
        scene.verified = False
        scene.problems.append(f"{writes.assignments} assignments in {writes.terms} terms: fencing was not put to the test")
    return judge(
        load,
        writes,
        verified=scene.verified and scene.faults > 0,
        window=(scene.since, (scene.until or time.monotonic()) + AFTER_S),
        may_break=scene.may_break,
        figures=scene.figures,
        problems=scene.problems,
        seed=seed,
    )


def _deployment(cell: Cell, rng: random.Random) -> dict[str, Any]:
    options: dict[str, Any] = {"pace_s": PACE_S}
    if cell.id == "R-04":
        # Late enough for every stream to be under way, and so late that the next context is not asked for as much.
        options["sticky_at_token"] = rng.randrange(13_000, 16_000)
    base = {"name": MODEL, "model": "scripted", "runtime": "scripted", "runtime_config": options}
    return {**base, "replicas": cell.replicas, "serving": {"max_concurrent": 128}, **cell.deployment}


async def _churn(cluster: Cluster, stop: asyncio.Event) -> None:
    """Give the deployment manager orders for as long as nobody stops it; nobody may lead at times."""
    number = 0
    async with cluster.client() as client:
        while not stop.is_set():
            number += 1
            spec = {"name": "churn", "model": "scripted", "runtime": "scripted", "replicas": number % 3}
            try:
                async with asyncio.timeout(2):
                    await client.apply(spec)
            except (InferenceError, TimeoutError):
                pass  # while nobody leads, nobody takes orders
            await asyncio.sleep(CHURN_S)
