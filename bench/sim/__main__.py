"""The control plane at size: 1,000 engines, 2,000 deployments, 20 gateways. `python -m bench.sim`, or `make sim`

The services' own code runs: the manager's view and reconciler, the coordinator's table, the gateways' routing tables. Under them
are virtual time and an etcd in memory (world.py); engines are reduced to what etcd sees of them. Times called "virtual" are those
of a cluster whose etcd takes 2 ms for a write and whose replicas load in half a second; CPU times are real, of one core.

1. Everything is applied at once, and placed.
2. Engines die one after the other, by the end of their leases.
3. All leases are lost at once, and every engine registers again within ten seconds.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import statistics
import sys
import time
import tracemalloc
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

from bench.sim.world import MemoryEtcd, run_in_virtual_time
from inference_runtime.coordination import Candidate, EtcdClient, FencingToken, Lease, Term, keys, watch_prefix
from inference_runtime.telemetry import MetricSet
from inference_runtime.v1 import common_pb2, coordinator_service_pb2, deployment_pb2
from services.coordinator.settings import CoordinatorSettings
from services.coordinator.table import Table, TableGauges
from services.deployment_manager.reconcile import Reconciler
from services.deployment_manager.rollout import plan_deployment
from services.deployment_manager.settings import DeploymentManagerSettings
from services.deployment_manager.view import View
from services.gateway.routes import RouteTable, choose

OUT = Path(__file__).parents[1] / "out"

LEASE_TTL_S = 10.0
LOAD_S = 0.5
#: Engines of one host, and the accelerators of each host that has any.
ENGINES_PER_HOST, ACCELERATORS = 4, 8
WIDE = "wide"
KILLED = 20
HERD_S = 10.0
MESSAGES = 20_000
LIMIT_CHOICE_US, LIMIT_TABLE_MB = 20.0, 5.0


@dataclass(frozen=True)
class Size:
    """How much there is of everything."""

    engines: int
    deployments: int
    gateways: int

    def specs(self) -> list[deployment_pb2.Deployment]:
        """One deployment with a tenth of the engines, others with one, two or four; a tenth of them need an accelerator."""
        found = [_deployment(WIDE, max(1, self.engines // 10), 0)]
        for at in range(1, self.deployments):
            found.append(_deployment(f"model-{at:05d}", (1, 1, 1, 2, 2, 4)[at % 6] if at % 10 else 1, int(at % 10 == 0)))
        return found


def _deployment(name: str, replicas: int, accelerators: int) -> deployment_pb2.Deployment:
    record = deployment_pb2.Deployment(generation=1, runtime="scripted", revision="0123456789ab")
    record.spec.name, record.spec.model, record.spec.runtime = name, "scripted", "scripted"
    record.spec.replicas, record.spec.accelerators = replicas, accelerators
    record.status.state = deployment_pb2.DEPLOYMENT_STATE_PENDING
    return record


class Fleet:
    """All engines, as etcd sees them: they register, load what they are assigned, and die."""

    def __init__(self, etcd: MemoryEtcd, size: Size) -> None:
        self._etcd = etcd
        self.engines: dict[str, common_pb2.Engine] = {}
        #: What runs, by engine and replica id; the engine's process has it, whatever etcd says.
        self.running: dict[str, dict[str, common_pb2.Replica]] = {}
        self.assigned = 0
        self._dead: set[str] = set()
        for at in range(size.engines):
            host = at // ENGINES_PER_HOST
            engine = common_pb2.Engine(
                id=f"engine-{at:05d}",
                boot_id="b",
                address=f"10.{host >> 8}.{host & 255}.1:{9000 + at % ENGINES_PER_HOST}",
                runtimes=["scripted", "torch"],
                state=common_pb2.ENGINE_STATE_READY,
            )
            engine.node.hostname = f"host-{host:04d}"
            if host % 2:
                for index in range(ACCELERATORS):
                    engine.node.accelerators.add(index=index)
            self.engines[engine.id] = engine
            self.running[engine.id] = {}

    def register(self) -> None:
        """Everybody, one write each."""
        for engine in self.engines.values():
            self._etcd.apply({keys.engine(engine.id): engine.SerializeToString()})

    async def run(self) -> None:
        """Follow assignments until cancelled."""
        async with asyncio.TaskGroup() as loading, watch_prefix(cast(EtcdClient, self._etcd), keys.ASSIGNMENTS) as watch:
            async for batch in watch:
                for kv in batch.puts:
                    self.assigned += 1
                    loading.create_task(self._load(common_pb2.Assignment.FromString(kv.value)))
                for key in batch.deletes:
                    engine_id, replica_id = key.removeprefix(keys.ASSIGNMENTS).split("/")
                    replica = self.running[engine_id].pop(replica_id, None)
                    if replica is not None and engine_id not in self._dead:
                        self._etcd.apply({}, [keys.replica(replica.deployment, replica.id)])

    async def _load(self, assignment: common_pb2.Assignment) -> None:
        engine = self.engines[assignment.engine_id]
        if engine.id in self._dead or assignment.replica_id in self.running[engine.id]:
            return
        replica = common_pb2.Replica(
            id=assignment.replica_id,
            deployment=assignment.deployment,
            engine_id=engine.id,
            address=engine.address,
            revision=assignment.revision,
            generation=assignment.generation,
            state=common_pb2.REPLICA_STATE_LOADING,
            max_concurrent=64,
            max_context_tokens=4096,
        )
        replica.capabilities.chat = replica.capabilities.resume = replica.capabilities.seed = True
        self.running[engine.id][replica.id] = replica
        self._put(replica)
        await asyncio.sleep(LOAD_S)
        if engine.id not in self._dead and replica.id in self.running[engine.id]:
            replica.state = common_pb2.REPLICA_STATE_SERVING
            self._put(replica)

    def _put(self, replica: common_pb2.Replica) -> None:
        self._etcd.apply({keys.replica(replica.deployment, replica.id): replica.SerializeToString()})

    def _keys(self, engine_id: str) -> list[str]:
        return [keys.engine(engine_id), *(keys.replica(r.deployment, r.id) for r in self.running[engine_id].values())]

    async def kill(self, engine_id: str) -> None:
        """The process is gone; etcd learns it from the lease."""
        self._dead.add(engine_id)
        await asyncio.sleep(LEASE_TTL_S)
        self._etcd.apply({}, self._keys(engine_id))

    async def lose_leases(self, draw: random.Random) -> None:
        """All at once; each engine registers again, with what it runs, when it notices."""
        alive = [e for e in self.engines if e not in self._dead]
        self._etcd.apply({}, [key for engine_id in alive for key in self._keys(engine_id)])
        async with asyncio.TaskGroup() as tasks:
            for engine_id in alive:
                tasks.create_task(self._return(engine_id, draw.uniform(0.1, HERD_S)))

    async def _return(self, engine_id: str, after_s: float) -> None:
        await asyncio.sleep(after_s)
        puts = {keys.engine(engine_id): self.engines[engine_id].SerializeToString()}
        puts |= {keys.replica(r.deployment, r.id): r.SerializeToString() for r in self.running[engine_id].values()}
        self._etcd.apply(puts)


class _Link:
    up, silent, silence = True, False, 0

    def listen(self) -> None:
        """There is nothing to hear."""


class Gateway:
    """A gateway's routing table, fed by the coordinator."""

    def __init__(self) -> None:
        self.table = RouteTable(lambda _engine, _address: _Link())
        self.bytes = self.messages = 0
        self.snapshots_s: list[float] = []
        self.changes_s: list[float] = []

    @property
    def replicas(self) -> int:
        """Replicas that it could choose."""
        return len(self.table.targets)

    async def follow(self, table: Table) -> None:
        """Take over what the coordinator sends, until cancelled."""
        with table.subscribe() as news:
            while (message := await news.next()) is not None:
                wire = message.SerializeToString()
                self.bytes += len(wire)
                self.messages += 1
                began = time.perf_counter()
                self.table.apply(coordinator_service_pb2.WatchRoutesResponse.FromString(wire))
                (self.snapshots_s if message.snapshot else self.changes_s).append(time.perf_counter() - began)


@dataclass
class Found:
    """What is reported."""

    engines: int = 0
    deployments: int = 0
    gateways: int = 0
    replicas: int = 0
    placed_virtual_s: float = 0.0
    placed_cpu_s: float = 0.0
    look_us: float = 0.0
    choice_us: float = 0.0
    rebuild_ms: float = 0.0
    apply_snapshot_ms: float = 0.0
    apply_change_us: float = 0.0
    table_wire_mb: float = 0.0
    table_mb: float = 0.0
    failover_s: float = 0.0
    failover_max_s: float = 0.0
    herd_kept_share: float = 0.0
    herd_moved: int = 0
    herd_back_s: float = 0.0
    missed: list[str] = field(default_factory=list)


class _TimedTable(Table):
    rebuilds_s: list[float]

    def _rebuild(self) -> None:
        began = time.perf_counter()
        super()._rebuild()
        self.rebuilds_s.append(time.perf_counter() - began)


async def _until(holds: object, what: str, limit_s: float = 600.0) -> float:
    """Wait until something holds. Returns the virtual seconds that took."""
    assert callable(holds)
    began = time.monotonic()
    while not holds():
        if time.monotonic() - began > limit_s:
            raise TimeoutError(f"after {limit_s:.0f} virtual seconds: {what}")
        await asyncio.sleep(0.01)
    return time.monotonic() - began


async def simulate(size: Size, seed: int) -> Found:
    """All of it."""
    draw = random.Random(seed)
    found = Found(size.engines, size.deployments, size.gateways)
    etcd = MemoryEtcd()
    client = cast(EtcdClient, etcd)
    key = "elections/sim/1"
    token = FencingToken("deployment_manager", etcd.cluster_id, etcd.apply({key: b""}))

    class _Held:
        def valid(self) -> bool:
            return True

    term = Term(token, key, Candidate("sim", "", 0), client, cast(Lease, _Held()))
    manager = DeploymentManagerSettings()
    view = View(client, manager.etcd.lease_ttl_s, manager.mass_loss_s)
    table = _TimedTable(client, CoordinatorSettings(), token.to_proto(), TableGauges(MetricSet()))
    table.rebuilds_s = []
    fleet, gateways = Fleet(etcd, size), [Gateway() for _ in range(size.gateways)]
    specs = size.specs()
    wanted = sum(spec.spec.replicas for spec in specs)
    found.replicas = wanted

    def complete() -> bool:
        return all(gateway.replicas == wanted for gateway in gateways)

    async with asyncio.TaskGroup() as tasks:
        running = [
            tasks.create_task(view.run()),
            tasks.create_task(table.run()),
            tasks.create_task(fleet.run()),
            *(tasks.create_task(gateway.follow(table)) for gateway in gateways),
        ]
        fleet.register()
        running.append(tasks.create_task(Reconciler(view, term, manager.settle_s, manager.engine_gone_s).run()))
        await asyncio.sleep(manager.settle_s + 1)

        cpu = time.process_time()
        for spec in specs:
            etcd.apply({keys.deployment(spec.spec.name): spec.SerializeToString()})
        found.placed_virtual_s = await _until(complete, "not everything is placed and serving")
        found.placed_cpu_s = time.process_time() - cpu

        _measure(found, view, gateways[0], table, manager.engine_gone_s)
        await _kill_some(found, fleet, gateways, draw, complete)

        before, assigned = etcd.writes, fleet.assigned
        least = wanted
        async with asyncio.TaskGroup() as herd:
            herd.create_task(fleet.lose_leases(draw))
            for _ in range(int((HERD_S + 5) / 0.05)):
                await asyncio.sleep(0.05)
                least = min(least, *(gateway.replicas for gateway in gateways))
        found.herd_kept_share = least / wanted
        found.herd_back_s = HERD_S + 5 + await _until(complete, "not everybody is back")
        await asyncio.sleep(120)  # whoever was believed in meanwhile must have been right to be
        found.herd_moved = fleet.assigned - assigned
        assert etcd.writes > before
        if not complete():
            found.missed.append("replicas are missing two minutes after all engines came back")
        for task in running:
            task.cancel()
    return found


def _measure(found: Found, view: View, gateway: Gateway, table: _TimedTable, engine_gone_s: float) -> None:
    """CPU and memory of single things, with everything in place."""
    records = list(view.deployments.values())[:500]
    began = time.perf_counter()
    for record in records:
        plan_deployment(record, view.world(engine_gone_s))
    found.look_us = (time.perf_counter() - began) / len(records) * 1e6

    wide = RouteTable(lambda _engine, _address: _Link())
    wide.apply(_wide_table(found.engines))
    route = wide.routes[WIDE]
    rounds = []
    for _ in range(20):
        began = time.perf_counter()
        for _ in range(MESSAGES // 20):
            choose(route)
        rounds.append((time.perf_counter() - began) / (MESSAGES // 20) * 1e6)
    found.choice_us = statistics.median(rounds)
    found.rebuild_ms = statistics.median(table.rebuilds_s[-50:]) * 1e3
    found.apply_change_us = statistics.median(gateway.changes_s[-200:]) * 1e6

    with table.subscribe() as news:
        wire = news._snapshot(time.monotonic()).SerializeToString()
    found.table_wire_mb = len(wire) / 1e6
    tracemalloc.start()
    one = RouteTable(lambda _engine, _address: _Link())
    one.apply(coordinator_service_pb2.WatchRoutesResponse.FromString(wire))
    found.table_mb = tracemalloc.get_traced_memory()[0] / 1e6
    tracemalloc.stop()
    began = time.perf_counter()
    RouteTable(lambda _engine, _address: _Link()).apply(coordinator_service_pb2.WatchRoutesResponse.FromString(wire))
    found.apply_snapshot_ms = (time.perf_counter() - began) * 1e3


def _wide_table(replicas: int) -> coordinator_service_pb2.WatchRoutesResponse:
    """A table of one deployment with a replica on every engine."""
    message = coordinator_service_pb2.WatchRoutesResponse(snapshot=True, revision=1)
    line = message.deployments.add(deployment=WIDE, runtime="scripted")
    for at in range(replicas):
        line.replicas.add(
            id=f"{WIDE}-{at}", engine_id=f"engine-{at}", address="10.0.0.1:1", state=common_pb2.REPLICA_STATE_SERVING
        )
    return message


async def _kill_some(found: Found, fleet: Fleet, gateways: list[Gateway], draw: random.Random, complete: object) -> None:
    """Engines die; how long until every gateway has as many replicas as before, on others."""
    took = []
    for engine_id in draw.sample(sorted(fleet.engines), KILLED):
        began = time.monotonic()
        await fleet.kill(engine_id)
        await asyncio.sleep(0.1)
        await _until(complete, f"what {engine_id} had did not come back")
        gone = fleet.engines[engine_id].address
        assert all(t.link is not None for g in gateways for r in g.table.routes.values() for t in r.targets), gone
        took.append(time.monotonic() - began)
    found.failover_s, found.failover_max_s = statistics.median(took), max(took)


def show(found: Found, limits: bool) -> None:
    """Print the table; note what was missed."""
    if limits and found.choice_us > LIMIT_CHOICE_US:
        found.missed.append(f"a choice takes {found.choice_us:.1f} µs, more than {LIMIT_CHOICE_US:.0f}")
    if limits and found.table_mb / found.replicas * 1000 > LIMIT_TABLE_MB:
        found.missed.append(f"1,000 replicas take {found.table_mb / found.replicas * 1000:.1f} MB in a gateway")
    if found.herd_kept_share < 1:
        found.missed.append(f"{1 - found.herd_kept_share:.1%} of the routes were lost while all leases were")
    if found.herd_moved:
        found.missed.append(f"{found.herd_moved} replicas were placed anew though no engine had died")
    rows = [
        ("engines, deployments, gateways, replicas", f"{found.engines}, {found.deployments}, {found.gateways}, {found.replicas}"),
        ("all applied at once: until every gateway has all of them", f"{found.placed_virtual_s:.1f} s virtual"),
        ("  CPU of manager, coordinator and all gateways together", f"{found.placed_cpu_s:.1f} s"),
        ("manager: a look at a deployment that is settled", f"{found.look_us:.1f} µs"),
        ("coordinator: the table built anew and compared", f"{found.rebuild_ms:.1f} ms"),
        ("gateway: a whole table taken over, a change", f"{found.apply_snapshot_ms:.1f} ms, {found.apply_change_us:.0f} µs"),
        ("gateway: the table in memory, on the wire", f"{found.table_mb:.2f} MB, {found.table_wire_mb:.2f} MB"),
        (f"gateway: a choice among {found.engines} replicas", f"{found.choice_us:.1f} µs"),
        (
            "an engine dies: until all it had serves elsewhere",
            f"{found.failover_s:.1f} s virtual, longest {found.failover_max_s:.1f}",
        ),
        ("all leases lost at once: routes kept meanwhile, replicas moved", f"{found.herd_kept_share:.1%}, {found.herd_moved}"),
    ]
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        print(f"{name:<{width}}  {value}")
    for line in found.missed:
        print(f"MISSED: {line}")


def main() -> None:
    """Simulate, print, write bench/out/sim.json. Exit status 1 when something was missed."""
    parser = argparse.ArgumentParser(prog="python -m bench.sim", description=__doc__.partition("\n")[0])
    parser.add_argument("--engines", type=int, default=1000)
    parser.add_argument("--deployments", type=int, default=2000)
    parser.add_argument("--gateways", type=int, default=20)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    size = Size(args.engines, args.deployments, args.gateways)
    found = run_in_virtual_time(lambda: simulate(size, args.seed))
    show(found, limits=args.engines >= 1000)
    OUT.mkdir(exist_ok=True)
    with contextlib.closing((OUT / "sim.json").open("w", encoding="utf-8")) as file:
        file.write(json.dumps(vars(found), indent=2) + "\n")
    sys.exit(1 if found.missed else 0)


if __name__ == "__main__":
    main()
