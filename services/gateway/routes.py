"""The gateway's own copy of the routing table, and the choice of a replica.

The coordinator pushes the table; nobody is asked per request. A table stays in force for as long as no newer one arrives: the
coordinator and etcd may be away, requests on known routes go on.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Generic, Protocol, TypeVar

import grpc

from inference_runtime.coordination import ACKNOWLEDGE, EtcdClient, StoreGuard
from inference_runtime.errors import DeploymentNotFound, InferenceError, NotLeader, StaleLeader
from inference_runtime.rpc import error_from_rpc, open_channel
from inference_runtime.telemetry import MetricSet, get_logger
from inference_runtime.v1 import common_pb2, coordinator_service_pb2, coordinator_service_pb2_grpc
from inference_runtime.wire import seconds
from services.gateway.ejection import Standing, Trust, review
from services.gateway.outcomes import Outcomes
from services.gateway.pace import Pace
from services.gateway.table_store import TableStore

__all__ = ["Leader", "Leaders", "Link", "Route", "RouteTable", "RouteWatch", "Target", "choose"]

log = get_logger(__name__)

#: Used where a route names none.
DEFAULT_FIRST_CHUNK_TIMEOUT_S = 60.0
DEFAULT_TOTAL_TIMEOUT_S = 600.0
DEFAULT_NEXT_CHUNK_TIMEOUT_S = 10.0
#: Seconds between two reviews of who is slow.
REVIEW_S = 1.0
#: Pauses between two tries to reach the coordinator, seconds: short at first, then bounded.
FIRST_PAUSE_S = 0.05
LONGEST_PAUSE_S = 1.0
#: With more replicas than this, pairs are drawn from all of them, at most so often, before those that fit are gathered.
FEW = 8
DRAWS = 4
#: A table that was confirmed within this time is live, seconds. An idle coordinator confirms it every 2 s by default.
LIVE_S = 5.0


class Link(Protocol):
    """What a target is reached through."""

    @property
    def up(self) -> bool:
        """It takes submissions."""
        ...

    @property
    def silent(self) -> bool:
        """Nobody answers there at present, though asked to."""
        ...

    @property
    def silence(self) -> int:
        """For how long, in any unit. Where everybody is starved and late, the one that stands still is late for longest."""
        ...

    def listen(self) -> None:
        """Take notice of what was heard lately. Called four times a second."""
        ...


class Leader(Protocol):
    """Whoever leads a role (coordination.LeaderInfo)."""

    @property
    def address(self) -> str:
        """host:port of its gRPC server."""
        ...


L = TypeVar("L", bound=Leader)


class Leaders(Protocol[L]):
    """Who leads a role (coordination.LeaderObserver)."""

    @property
    def current(self) -> L | None:
        """The leader, None while there is none."""
        ...

    async def changed(self, seen: L | None) -> L | None:
        """The leader, once it is another than `seen`."""
        ...


class Target:
    """One replica as this worker sees it. Lives as long as the replica is in the table or has requests of ours."""

    __slots__ = ("capabilities", "in_flight", "link", "load", "outcomes", "pace", "replica_id", "revision", "serving", "trust")

    def __init__(self, replica: common_pb2.Replica, link: Link) -> None:
        self.replica_id = replica.id
        self.link = link
        self.outcomes = Outcomes()
        self.pace, self.trust = Pace(), Trust()
        #: Requests that ran and waited there at the last report.
        self.load = 0
        #: Requests of this worker that are there now.
        self.in_flight = 0
        self.update(replica)

    def update(self, replica: common_pb2.Replica) -> None:
        """Take over what can change in a replica's life."""
        self.revision = replica.revision
        self.capabilities = replica.capabilities
        self.serving = replica.state == common_pb2.REPLICA_STATE_SERVING

    @property
    def usable(self) -> bool:
        """A request may be sent there now."""
        return self.serving and self.link.up

    @property
    def shunned(self) -> bool:
        """A request goes elsewhere where it can: nobody answers there, or far more slowly than others do."""
        return self.in_flight >= self.trust.limit or self.link.silent

    def worse_than(self, other: Target) -> bool:
        """What this one was asked and has not begun is better asked of the other."""
        if self.link.silent:
            return other.link.silence < self.link.silence / 2
        return self.trust.standing is Standing.OUT and not other.shunned

    @property
    def score(self) -> int:
        """How busy it is: what was reported, and what has been sent there from here."""
        return self.load + self.in_flight


@dataclass(frozen=True, slots=True)
class Route:
    """One deployment and the replicas that answer for it."""

    deployment: str
    runtime: str
    generation: int
    first_chunk_timeout_s: float
    total_timeout_s: float
    targets: tuple[Target, ...]
    next_chunk_timeout_s: float = DEFAULT_NEXT_CHUNK_TIMEOUT_S
    max_context_tokens: int = 0
    disconnected_timeout_s: float = 0.0


class RouteTable:
    """The table. Replaced whole on each change, never edited, so that a reader needs no care.

    Args:
        link_to: The link to an engine, from (engine id, address); the same one for the same arguments.
        on_change: Called after each change that could let a waiting request go on.
        metrics: Where it is published who is put aside; None publishes it nowhere.
    """

    def __init__(
        self,
        link_to: Callable[[str, str], Link],
        on_change: Callable[[], None] = lambda: None,
        metrics: MetricSet | None = None,
    ) -> None:
        self._link_to, self._on_change = link_to, on_change
        metrics = metrics or MetricSet()
        self._silent = metrics.gauge("inference_replicas_silent", "deployment")
        self._ejected = metrics.gauge("inference_replicas_ejected", "deployment")
        self._ejections = metrics.counter("inference_replica_ejections_total", "deployment")
        self._reviewed_at = 0.0
        self._engines: dict[str, tuple[str, str]] = {}
        self.targets: dict[str, Target] = {}
        self.routes: Mapping[str, Route] = MappingProxyType({})
        self.known = False
        self.revision = 0
        self.token = common_pb2.FencingToken()

    @property
    def engines(self) -> set[tuple[str, str]]:
        """(engine id, address) of every engine in the table."""
        return set(self._engines.values())

    def apply(self, update: coordinator_service_pb2.WatchRoutesResponse) -> None:
        """Take over a table or a change of it.

        Raises:
            StaleLeader: It comes from a coordinator that was replaced, or is older than what is here.
        """
        token = update.fencing_token
        same_cluster = token.cluster_id == self.token.cluster_id and bool(token.revision)
        if same_cluster and token.revision < self.token.revision:
            raise StaleLeader("the routing table came from a coordinator that was replaced")
        if same_cluster and update.snapshot and self.known and update.revision < self.revision:
            raise StaleLeader("the routing table is older than the one in use")
        if token.revision:
            self.token.CopyFrom(token)
        routes: dict[str, Route] = {} if update.snapshot else dict(self.routes)
        # A replica belongs to one deployment, so a change touches the targets of its own lines and no others.
        touched = self.routes.keys() if update.snapshot else {*update.removed, *(line.deployment for line in update.deployments)}
        gone = {target.replica_id for name in touched if (old := self.routes.get(name)) for target in old.targets}
        for name in update.removed:
            routes.pop(name, None)
        for line in update.deployments:
            route = routes[line.deployment] = self._route(line)
            gone.difference_update([target.replica_id for target in route.targets])
        for replica_id in gone:
            self.targets.pop(replica_id, None)
            self._engines.pop(replica_id, None)
        for load in update.loads:
            target = self.targets.get(load.replica_id)
            if target is not None:
                target.load = load.running + load.queued
        self.routes = MappingProxyType(routes)
        self.revision = update.revision
        self.known = self.known or update.snapshot
        self._on_change()

    def _route(self, line: coordinator_service_pb2.DeploymentRoute) -> Route:
        targets: list[Target] = []
        for replica in line.replicas:
            engine = (replica.engine_id, replica.address)
            target = self.targets.get(replica.id)
            if target is None or self._engines.get(replica.id) != engine:
                target = self.targets[replica.id] = Target(replica, self._link_to(*engine))
                self._engines[replica.id] = engine
            else:
                target.update(replica)
            targets.append(target)
        return Route(
            deployment=line.deployment,
            runtime=line.runtime,
            generation=line.generation,
            first_chunk_timeout_s=seconds(line.first_chunk_timeout) or DEFAULT_FIRST_CHUNK_TIMEOUT_S,
            total_timeout_s=seconds(line.total_timeout) or DEFAULT_TOTAL_TIMEOUT_S,
            next_chunk_timeout_s=seconds(line.next_chunk_timeout) or DEFAULT_NEXT_CHUNK_TIMEOUT_S,
            targets=tuple(targets),
            max_context_tokens=max((r.max_context_tokens for r in line.replicas), default=0),
            disconnected_timeout_s=seconds(line.disconnected_timeout),
        )

    def unknown(self, name: str) -> DeploymentNotFound:
        """The error for a name that is not in the table."""
        known = ", ".join(sorted(self.routes)[:20]) or "none yet"
        return DeploymentNotFound(f"no deployment is called {name[:200]!r}; there are: {known}", param="model")

    @property
    def ready(self) -> bool:
        """At least one replica can be reached."""
        return any(target.usable for target in self.targets.values())

    def well(self, now: float) -> bool:
        """At least one replica can be reached and does not fail all it is given."""
        return any(target.usable and not target.outcomes.failing(now) for target in self.targets.values())

    def serves(self, target: Target) -> bool:
        """It is in the table, as one that takes requests."""
        return target.serving and self.targets.get(target.replica_id) is target

    def sweep(self, now: float) -> None:
        """Take notice of who answers, and how fast. Called four times a second."""
        for link in {id(target.link): target.link for target in self.targets.values()}.values():
            link.listen()
        if now - self._reviewed_at >= REVIEW_S:
            self._reviewed_at = now
            self._review(now)
        for target in self.targets.values():
            target.pace.waits.clear()  # those of the next look only

    def _review(self, now: float) -> None:
        self._silent.clear()
        self._ejected.clear()
        for route in self.routes.values():
            heard = [target for target in route.targets if target.usable and not target.link.silent]
            for target in review(heard, now) if len(route.targets) > 1 else ():
                self._ejections.inc(route.deployment)
                log.warning(
                    "replica put aside: it is far slower than others",
                    deployment=route.deployment, replica=target.replica_id, for_s=round(target.trust.until - now),
                )  # fmt: skip
            for target in route.targets:
                if not target.usable:
                    target.pace.clear()  # what comes back is another replica, or was idle
            usable = [target for target in route.targets if target.usable]
            self._silent.set(sum(target.link.silent for target in usable), route.deployment)
            self._ejected.set(sum(target.trust.standing is not Standing.FULL for target in usable), route.deployment)

    def shunned(self) -> dict[str, list[str]]:
        """Replicas that get few requests or none where there are others, by cause."""
        usable = [target for target in self.targets.values() if target.usable]
        silent = sorted(target.replica_id for target in usable if target.link.silent)
        slow = sorted(target.replica_id for target in usable if target.trust.standing is not Standing.FULL)
        return {cause: names for cause, names in (("silent", silent), ("slow", slow)) if names}


def choose(route: Route, exclude: Collection[str] = (), revision: str = "") -> Target | None:
    """The replica for a request: the less busy of two drawn at random. None when none is usable.

    Two draws keep gateways that see the same stale loads from all running to the same replica. One that is shunned is chosen only
    where all are.

    Args:
        route: Where it may go.
        exclude: Ids of replicas that were tried.
        revision: Only replicas of this revision; "" for any.
    """
    targets = route.targets
    if len(targets) == 1 and not exclude and not revision:
        return targets[0] if targets[0].usable else None
    if len(targets) > FEW:
        # Nearly always the first two drawn will do, however many there are; a look at all of them is for when they will not.
        for _ in range(DRAWS):
            one, other = targets[int(random.random() * len(targets))], targets[int(random.random() * len(targets))]
            if one is not other and _plain(one, exclude, revision) and _plain(other, exclude, revision):
                return one if one.score <= other.score else other
    fit = [t for t in targets if t.usable and t.replica_id not in exclude and (not revision or t.revision == revision)]
    if len(fit) <= 1:
        return fit[0] if fit else None
    one, other = random.sample(fit, 2)
    if one.shunned or other.shunned:
        # Slow is better than silent, and silent for a moment is better than silent for long.
        least = min(t.link.silence for t in fit)
        fit = (
            [t for t in fit if not t.shunned]
            or [t for t in fit if not t.link.silent]
            or [t for t in fit if t.link.silence == least]
        )
        one, other = random.sample(fit, 2) if len(fit) > 1 else fit * 2
    return one if one.score <= other.score else other


def _plain(target: Target, exclude: Collection[str], revision: str) -> bool:
    """Whether nothing speaks against it."""
    return (
        target.usable
        and not target.shunned
        and target.replica_id not in exclude
        and (not revision or target.revision == revision)
    )


class RouteWatch(Generic[L]):
    """Keeps a table up to date from whoever leads the coordinators.

    Args:
        table: The table.
        leaders: Who leads the coordinators.
        gateway_id: Says who asks.
        metrics: Where revision and age are published.
        etcd: Knows which store is followed; a table of another one is not taken. None takes every table.
        store: Keeps the table on disk; None keeps it nowhere.
    """

    def __init__(
        self,
        table: RouteTable,
        leaders: Leaders[L],
        gateway_id: str,
        metrics: MetricSet,
        etcd: EtcdClient | None = None,
        store: TableStore | None = None,
    ) -> None:
        self._table, self._leaders, self._etcd, self._store = table, leaders, etcd, store
        self._request = coordinator_service_pb2.WatchRoutesRequest(gateway_id=gateway_id)
        self._revision = metrics.gauge("inference_route_table_revision")
        self._age = metrics.gauge("inference_route_table_age_seconds")
        self._confirmed_at = 0.0
        self._began_at = time.monotonic()

    async def run(self) -> None:
        """Watch until cancelled. Outages of coordinator and etcd only make the table old."""
        pause_s = FIRST_PAUSE_S
        while True:
            leader = self._leaders.current or await self._leaders.changed(None)
            if leader is None:
                continue
            before = self._confirmed_at
            try:
                await self._watch(leader)
            except InferenceError as err:
                log.debug(
                    "routing table: coordinator not reached", address=leader.address, reason=err.reason, message=err.message
                )
            pause_s = FIRST_PAUSE_S if self._confirmed_at > before else min(pause_s * 2, LONGEST_PAUSE_S)
            await asyncio.sleep(pause_s * random.uniform(0.5, 1.0))

    async def _watch(self, leader: L) -> None:
        """Follow one leader until it is lost or replaced. Raises the reason."""
        channel = open_channel(leader.address)
        try:
            async with asyncio.TaskGroup() as tasks:
                guard = tasks.create_task(self._watch_leader(leader))
                stub = coordinator_service_pb2_grpc.CoordinatorServiceStub(channel)  # type: ignore[no-untyped-call]
                async for update in stub.WatchRoutes(self._request):
                    await self._check_store(update.fencing_token)
                    self._table.apply(update)
                    if self._store is not None:
                        self._store.took(update, self._guard.mark if self._guard else None)
                    self._confirmed_at = time.monotonic()
                    self._revision.set(self._table.revision)
                guard.cancel()
        except ExceptionGroup as group:
            cause = group.exceptions[0]
            raise (error_from_rpc(cause) if isinstance(cause, grpc.aio.AioRpcError) else cause) from group
        finally:
            await channel.close(None)

    @property
    def _guard(self) -> StoreGuard | None:
        return self._etcd.guard if self._etcd is not None else None

    async def _check_store(self, token: common_pb2.FencingToken) -> None:
        """Lets a table through when it comes from the store that is followed.

        Raises:
            StaleLeader: It does not, or etcd was replaced and nobody has acknowledged that: the routes stay as they are.
        """
        if self._etcd is None or self._guard is None:
            return
        if token.cluster_id != self._etcd.lineage:  # an acknowledgement that this process has not heard of, perhaps
            await self._etcd.verify()
        if self._guard.refusal or token.cluster_id != self._etcd.lineage:
            raise StaleLeader("the routing table comes from another store than the one that is followed")

    async def _watch_leader(self, leader: L) -> None:
        seen: L | None = leader
        while True:
            seen = await self._leaders.changed(seen)
            if seen is not None and seen.address != leader.address:
                raise NotLeader("another coordinator leads by now", role="coordinator", address=seen.address)

    def show_age(self) -> None:
        """Note how old the table is. While the coordinator answers, its stream confirms it without a word. One from disk is
        at least as old as this process."""
        since = self._confirmed_at or (self._began_at if self._table.known else 0.0)
        self._age.set(time.monotonic() - since if since else 0.0)

    @property
    def source(self) -> str:
        """Where the routes come from at present: "live"; "frozen", from a coordinator that is away; "from_disk", from an earlier
        life of this gateway; "none"."""
        if self._confirmed_at:
            return "live" if time.monotonic() - self._confirmed_at <= LIVE_S else "frozen"
        return "from_disk" if self._table.known else "none"

    def warnings(self) -> list[str]:
        """What an operator should know of the routes, in sentences. None of it fails a request."""
        said = []
        if self.source == "from_disk":
            said.append("the routes come from disk: no coordinator has been reached since this gateway started")
        elif self.source == "frozen":
            said.append(f"the routes are {time.monotonic() - self._confirmed_at:.0f} s old: the coordinator does not answer")
        if self._guard is not None and self._guard.refusal:
            said.append(f"etcd is not the store that was followed: {self._guard.refusal}; {ACKNOWLEDGE}")
        return said
