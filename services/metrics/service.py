"""MetricsService: checks and translates; the ledger counts."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import grpc

from inference_runtime.coordination import LeaderObserver, Term
from inference_runtime.errors import BadRequest, NotLeader
from inference_runtime.telemetry import MetricSet
from inference_runtime.v1 import metrics_service_pb2, metrics_service_pb2_grpc
from services.metrics.aggregate import Totals
from services.metrics.columns import from_columns
from services.metrics.ledger import Ledger
from services.metrics.settings import MetricsSettings

__all__ = ["ROLE", "MetricsService"]

ROLE = "metrics"
#: Records of one call. A batch is one transaction; a larger one would hold up the calls behind it.
MAX_BATCH = 10_000
#: The largest cost of one record, in millionths of a US dollar: a million dollars. Keeps every sum inside 64 bits.
MAX_COST_MICRO_USD = 10**12
MAX_NAME_CHARS = 256

Context = grpc.aio.ServicerContext[object, object]


class MetricsService(metrics_service_pb2_grpc.MetricsServiceServicer):
    """Answers while it leads; as a follower it names the leader.

    Args:
        observer: Knows who leads.
        settings: Where the leader keeps its ledger.
        metrics: Where the counters are published.
    """

    def __init__(self, observer: LeaderObserver, settings: MetricsSettings, metrics: MetricSet) -> None:
        self._observer, self._settings = observer, settings
        self._ledger: Ledger | None = None
        self._term: Term | None = None
        self._leads = metrics.gauge("inference_leader", "role")
        self._terms = metrics.counter("inference_leader_terms_total", "role")
        self._requests = metrics.counter("inference_requests_total", "deployment", "outcome")
        self._tokens_in = metrics.counter("inference_tokens_in_total", "deployment")
        self._tokens_out = metrics.counter("inference_tokens_out_total", "deployment")
        self._cost = metrics.counter("inference_cost_usd_total", "deployment")

    async def lead(self, term: Term) -> None:
        """Serve until cancelled, which is how a term ends.

        Raises:
            ServerError: The ledger cannot be opened.
        """
        ledger = Ledger(self._settings.ledger_path(), self._settings.max_records)
        await ledger.open()
        try:
            self._leads.set(1, ROLE)
            self._terms.inc(ROLE)
            for deployment, totals in (await ledger.totals()).items():
                self._publish(deployment, totals)
            self._ledger, self._term = ledger, term
            await asyncio.Event().wait()
        finally:
            self._ledger = self._term = None
            self._leads.set(0, ROLE)
            for counter in (self._requests, self._tokens_in, self._tokens_out, self._cost):
                counter.values.clear()  # who does not lead does not count, or a sum over both would be double
            await ledger.close()

    async def RecordUsage(
        self, request: metrics_service_pb2.RecordUsageRequest, context: Context
    ) -> metrics_service_pb2.RecordUsageResponse:
        ledger = self._leading()
        records = [*request.records, *from_columns(request.columns)]
        _check(records)
        new = await ledger.record(records)
        for deployment, totals in new.items():
            self._publish(deployment, totals)
        return metrics_service_pb2.RecordUsageResponse(accepted=sum(totals.records for totals in new.values()))

    async def GetSnapshot(
        self, request: metrics_service_pb2.GetSnapshotRequest, context: Context
    ) -> metrics_service_pb2.GetSnapshotResponse:
        totals = await self._leading().totals(request.deployment)
        return metrics_service_pb2.GetSnapshotResponse(deployments=[t.to_proto(name) for name, t in totals.items()])

    def _leading(self) -> Ledger:
        if self._ledger is None or self._term is None or not self._term.valid():
            leader = self._observer.current
            raise NotLeader("this process does not lead the metrics role", role=ROLE, address=leader.address if leader else "")
        return self._ledger

    def _publish(self, deployment: str, totals: Totals) -> None:
        self._requests.inc(deployment, "ok", by=totals.requests)
        self._requests.inc(deployment, "cancelled", by=totals.cancelled)
        for reason, count in totals.errors_by_reason.items():
            self._requests.inc(deployment, reason, by=count)
        self._tokens_in.inc(deployment, by=totals.input_tokens)
        self._tokens_out.inc(deployment, by=totals.output_tokens)
        self._cost.inc(deployment, by=totals.cost_micro_usd / 1e6)


def _check(records: Sequence[metrics_service_pb2.UsageRecord]) -> None:
    if len(records) > MAX_BATCH:
        raise BadRequest(f"{len(records)} records in one call; send at most {MAX_BATCH}", param="records")
    for i, record in enumerate(records):
        if not record.request_id or not record.deployment:
            raise BadRequest(f"record {i} has no request_id or no deployment", param=f"records[{i}]")
        if max(len(record.request_id), len(record.deployment), len(record.error_reason)) > MAX_NAME_CHARS:
            raise BadRequest(f"record {i} has a name of more than {MAX_NAME_CHARS} characters", param=f"records[{i}]")
        if not 0 <= record.cost_micro_usd <= MAX_COST_MICRO_USD:
            raise BadRequest(f"record {i} costs less than nothing or more than a million dollars", param=f"records[{i}]")
