"""DeploymentManagerService: translates and delegates to the catalogue and the view of the term."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass

import grpc

from inference_runtime.coordination import ACKNOWLEDGE, EtcdClient, LeaderObserver, StoreReplaced, Term, keys
from inference_runtime.errors import BadRequest, NotLeader
from inference_runtime.settings import environment
from inference_runtime.telemetry import MetricSet
from inference_runtime.v1 import (
    common_pb2,
    deployment_manager_service_pb2,
    deployment_manager_service_pb2_grpc,
    deployment_pb2,
)
from services.deployment_manager.catalog import Catalog, with_status
from services.deployment_manager.reconcile import Reconciler
from services.deployment_manager.rollout import plan_deployment
from services.deployment_manager.settings import DeploymentManagerSettings
from services.deployment_manager.view import View

__all__ = ["ROLE", "DeploymentManagerService"]

ROLE = "deployment_manager"

Context = grpc.aio.ServicerContext[object, object]


@dataclass(frozen=True, slots=True)
class _Office:
    """What a term holds."""

    term: Term
    catalog: Catalog
    view: View


class DeploymentManagerService(deployment_manager_service_pb2_grpc.DeploymentManagerServiceServicer):
    """Answers while it leads; as a follower it names the leader.

    Args:
        client: etcd.
        observer: Knows who leads.
        settings: Periods.
        metrics: Where leading is published.
    """

    def __init__(
        self, client: EtcdClient, observer: LeaderObserver, settings: DeploymentManagerSettings, metrics: MetricSet
    ) -> None:
        self._client, self._observer, self._settings = client, observer, settings
        self._office: _Office | None = None
        self._leads = metrics.gauge("inference_leader", "role")
        self._terms = metrics.counter("inference_leader_terms_total", "role")

    async def lead(self, term: Term) -> None:
        """Answer and reconcile until cancelled, which is how a term ends."""
        view = View(self._client, self._settings.etcd.lease_ttl_s, self._settings.mass_loss_s)
        self._office = _Office(term, Catalog(self._client, term), view)
        reconciler = Reconciler(view, term, self._settings.settle_s, self._settings.engine_gone_s)
        self._leads.set(1, ROLE)
        self._terms.inc(ROLE)
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(view.run())
                tasks.create_task(reconciler.run())
        finally:
            self._office = None
            self._leads.set(0, ROLE)
            view.end()

    async def ApplyDeployment(
        self, request: deployment_manager_service_pb2.ApplyDeploymentRequest, context: Context
    ) -> deployment_manager_service_pb2.ApplyDeploymentResponse:
        office = self._leading()
        if not request.HasField("spec"):
            raise BadRequest("the request has no spec", param="spec")
        runtimes = sorted({runtime for engine in office.view.engines.values() for runtime in engine.runtimes})
        record, changed = await office.catalog.apply(
            request.spec, environment(), runtimes, dry_run=request.dry_run, expected_generation=request.expected_generation
        )
        if request.dry_run and changed:
            record = self._foresee(record, office.view)
        return deployment_manager_service_pb2.ApplyDeploymentResponse(deployment=record, changed=changed)

    async def DeleteDeployment(
        self, request: deployment_manager_service_pb2.DeleteDeploymentRequest, context: Context
    ) -> deployment_manager_service_pb2.DeleteDeploymentResponse:
        await self._leading().catalog.delete(request.name)
        return deployment_manager_service_pb2.DeleteDeploymentResponse()

    async def GetDeployment(
        self, request: deployment_manager_service_pb2.GetDeploymentRequest, context: Context
    ) -> deployment_manager_service_pb2.GetDeploymentResponse:
        record = await self._leading().catalog.get(request.name)
        return deployment_manager_service_pb2.GetDeploymentResponse(deployment=record)

    async def ListDeployments(
        self, request: deployment_manager_service_pb2.ListDeploymentsRequest, context: Context
    ) -> deployment_manager_service_pb2.ListDeploymentsResponse:
        records = await self._leading().catalog.list()
        return deployment_manager_service_pb2.ListDeploymentsResponse(deployments=records)

    async def WatchDeployments(
        self, request: deployment_manager_service_pb2.WatchDeploymentsRequest, context: Context
    ) -> AsyncIterator[deployment_manager_service_pb2.WatchDeploymentsResponse]:
        with self._leading().view.subscribe() as watcher:
            while (changes := await watcher.next()) is not None:
                for name, record in changes:
                    gone = deployment_pb2.Deployment(spec=deployment_pb2.DeploymentSpec(name=name))
                    yield deployment_manager_service_pb2.WatchDeploymentsResponse(
                        deployment=record or gone, removed=record is None
                    )
        raise self._not_leader()

    async def ListEngines(
        self, request: deployment_manager_service_pb2.ListEnginesRequest, context: Context
    ) -> deployment_manager_service_pb2.ListEnginesResponse:
        self._leading()
        stored, _ = await self._client.list(keys.ENGINES)
        engines = sorted((common_pb2.Engine.FromString(kv.value) for kv in stored), key=lambda engine: engine.id)
        return deployment_manager_service_pb2.ListEnginesResponse(engines=engines)

    def _foresee(self, record: deployment_pb2.Deployment, view: View) -> deployment_pb2.Deployment:
        """What would become of a record that is not stored."""
        plan = plan_deployment(record, view.world(self._settings.engine_gone_s))
        reason = plan.reason
        if plan.place:
            reason = "would be placed on " + ", ".join(sorted({booking.engine_id for booking in plan.place}))
        foreseen = deployment_pb2.Deployment()
        foreseen.CopyFrom(with_status(record, plan.state, reason, plan.ready, record.created_at.ToDatetime()))
        return foreseen

    def _leading(self) -> _Office:
        refusal = self._client.guard.refusal if self._client.guard is not None else ""
        if refusal:  # nobody leads in such a store, and the caller should know why
            raise StoreReplaced(f"etcd is not the store that was followed: {refusal}; run `{ACKNOWLEDGE}` to go on with it")
        if self._office is None or not self._office.term.valid():
            raise self._not_leader()
        return self._office

    def _not_leader(self) -> NotLeader:
        leader = self._observer.current
        return NotLeader(
            "this process does not lead the deployment_manager role", role=ROLE, address=leader.address if leader else ""
        )
