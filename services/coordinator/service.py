"""CoordinatorService: translates and delegates to the table and the registrations of the term."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass

import grpc

from inference_runtime.coordination import EtcdClient, LeaderObserver, Term
from inference_runtime.errors import DeploymentNotFound, EngineLost, NoReplica, NotLeader
from inference_runtime.telemetry import MetricSet, get_logger
from inference_runtime.v1 import coordinator_service_pb2, coordinator_service_pb2_grpc
from inference_runtime.wire import duration
from services.coordinator.load import better_of_two
from services.coordinator.registrar import Registrar
from services.coordinator.settings import CoordinatorSettings
from services.coordinator.table import Table, TableGauges

__all__ = ["ROLE", "CoordinatorService"]

log = get_logger(__name__)

ROLE = "coordinator"
#: Seconds between two looks at what this coordinator lacks.
LOOK_S = 0.5
#: What it can lack.
REASONS = ("engines_silent", "no_gateways", "routes_frozen", "routes_held")

Context = grpc.aio.ServicerContext[object, object]


@dataclass(frozen=True, slots=True)
class _Office:
    """What a term holds."""

    term: Term
    table: Table
    registrar: Registrar


class CoordinatorService(coordinator_service_pb2_grpc.CoordinatorServiceServicer):
    """Answers while it leads; as a follower it names the leader.

    Args:
        client: etcd.
        observer: Knows who leads.
        settings: Intervals.
        metrics: Where the table's size is published.
    """

    def __init__(self, client: EtcdClient, observer: LeaderObserver, settings: CoordinatorSettings, metrics: MetricSet) -> None:
        self._client, self._observer, self._settings = client, observer, settings
        self._draw = random.Random()
        self._office: _Office | None = None
        self._leads = metrics.gauge("inference_leader", "role")
        self._terms = metrics.counter("inference_leader_terms_total", "role")
        self._degraded = metrics.gauge("inference_coordinator_degraded", "reason")
        self._gauges = TableGauges(metrics)

    async def lead(self, term: Term) -> None:
        """Answer and push the table until cancelled, which is how a term ends."""
        table = Table(self._client, self._settings, term.token.to_proto(), self._gauges, term.valid)
        registrar = Registrar(self._client, term, self._settings.registration_ttl_s)
        self._office = _Office(term, table, registrar)
        self._leads.set(1, ROLE)
        self._terms.inc(ROLE)
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(table.run())
                tasks.create_task(self._watch_condition(table))
        finally:
            self._office = None
            self._leads.set(0, ROLE)
            self._degraded.clear()
            registrar.close()

    async def _watch_condition(self, table: Table) -> None:
        """Say what this coordinator lacks, when that begins and when it ends. Runs until cancelled."""
        lacked: set[str] = set()
        while True:
            lacks = table.condition().lacks
            for reason in lacks.keys() - lacked:
                log.warning("coordinator degraded", reason=reason, why=lacks[reason])
            for reason in lacked - lacks.keys():
                log.info("coordinator well again", reason=reason)
            lacked = set(lacks)
            for reason in REASONS:
                self._degraded.set(int(reason in lacked), reason)
            await asyncio.sleep(LOOK_S)

    async def Register(
        self, request: coordinator_service_pb2.RegisterRequest, context: Context
    ) -> coordinator_service_pb2.RegisterResponse:
        valid_for_s = await self._leading().registrar.register(request.engine, request.replicas)
        return coordinator_service_pb2.RegisterResponse(valid_for=duration(valid_for_s))

    async def Deregister(
        self, request: coordinator_service_pb2.DeregisterRequest, context: Context
    ) -> coordinator_service_pb2.DeregisterResponse:
        office = self._leading()
        if office.registrar.knows(request.engine_id):
            office.table.leaves(request.engine_id)
        await office.registrar.deregister(request.engine_id)
        return coordinator_service_pb2.DeregisterResponse()

    async def ReportLoad(
        self, request: coordinator_service_pb2.ReportLoadRequest, context: Context
    ) -> coordinator_service_pb2.ReportLoadResponse:
        office = await self._ready()
        registered = await office.registrar.renew(request.engine_id)
        if not registered and not office.table.engine_known(request.engine_id):
            raise EngineLost(f"engine {request.engine_id!r} is not registered; register it again", engine_id=request.engine_id)
        office.table.report(request.engine_id, request.loads)
        return coordinator_service_pb2.ReportLoadResponse()

    async def Route(
        self, request: coordinator_service_pb2.RouteRequest, context: Context
    ) -> coordinator_service_pb2.RouteResponse:
        office = await self._ready()
        await office.table.settled()
        line = office.table.table.lines.get(request.deployment)
        if line is None:
            raise DeploymentNotFound(
                f"no deployment is called {request.deployment!r}; list them to see which there are", deployment=request.deployment
            )
        if not line.replicas:
            raise NoReplica(
                f"no replica of deployment {request.deployment!r} takes requests at present; its status says why",
                deployment=request.deployment,
            )
        replica = better_of_two(line.replicas, office.table.loads, time.monotonic(), self._draw)
        return coordinator_service_pb2.RouteResponse(replica=replica)

    async def WatchRoutes(
        self, request: coordinator_service_pb2.WatchRoutesRequest, context: Context
    ) -> AsyncIterator[coordinator_service_pb2.WatchRoutesResponse]:
        with self._leading().table.subscribe() as watcher:
            log.info("gateway watches", gateway=request.gateway_id)
            while (message := await watcher.next()) is not None:
                yield message
        raise self._not_leader()

    async def ListReplicas(
        self, request: coordinator_service_pb2.ListReplicasRequest, context: Context
    ) -> coordinator_service_pb2.ListReplicasResponse:
        table, now_s = (await self._ready()).table, time.monotonic()
        replicas = table.replicas(request.deployment)
        loads = [load for replica in replicas if (load := table.loads.get(replica.id, now_s)) is not None]
        return coordinator_service_pb2.ListReplicasResponse(replicas=replicas, loads=loads)

    async def GetStatus(
        self, request: coordinator_service_pb2.GetStatusRequest, context: Context
    ) -> coordinator_service_pb2.GetStatusResponse:
        refusal = self._client.guard.refusal if self._client.guard is not None else ""
        office = self._office
        if office is None:
            return coordinator_service_pb2.GetStatusResponse(store_refusal=refusal)
        condition = office.table.condition()
        return coordinator_service_pb2.GetStatusResponse(
            leading=office.term.valid(),
            fencing_token=office.term.token.to_proto(),
            store_refusal=refusal,
            routes_frozen=condition.frozen,
            degraded=[why for _, why in sorted(condition.lacks.items())],
            engines=condition.engines,
            silent_engines=condition.silent,
            watchers=condition.watchers,
            revision=condition.revision,
        )

    def _leading(self) -> _Office:
        if self._office is None or not self._office.term.valid():
            raise self._not_leader()
        return self._office

    async def _ready(self) -> _Office:
        """The term's office, once its table was read."""
        office = self._leading()
        await office.table.ready()
        if office.table.ended:
            raise self._not_leader()
        return office

    def _not_leader(self) -> NotLeader:
        leader = self._observer.current
        return NotLeader("this process does not lead the coordinator role", role=ROLE, address=leader.address if leader else "")
