"""What a batch of usage records adds up to, by deployment. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from inference_runtime.errors import RequestCancelled
from inference_runtime.v1 import generation_pb2, metrics_service_pb2

__all__ = ["Totals", "add_up"]


@dataclass(slots=True)
class Totals:
    """The counters of one deployment."""

    requests: int = 0
    cancelled: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    cost_micro_usd: int = 0
    errors_by_reason: Counter[str] = field(default_factory=Counter)

    @property
    def records(self) -> int:
        """All records."""
        return self.requests + self.cancelled + self.errors

    @property
    def errors(self) -> int:
        """Requests that failed."""
        return self.errors_by_reason.total()

    def add(self, record: metrics_service_pb2.UsageRecord) -> None:
        """Count one record. Tokens and cost count however the request ended: they were spent."""
        if record.error_reason == RequestCancelled.reason or record.finish_reason == generation_pb2.FINISH_REASON_CANCELLED:
            self.cancelled += 1
        elif record.error_reason:
            self.errors_by_reason[record.error_reason] += 1
        else:
            self.requests += 1
        self.input_tokens += record.usage.input_tokens
        self.output_tokens += record.usage.output_tokens
        self.cost_micro_usd += record.cost_micro_usd

    def to_proto(self, deployment: str) -> metrics_service_pb2.DeploymentUsage:
        """The counters as a message."""
        return metrics_service_pb2.DeploymentUsage(
            deployment=deployment,
            requests=self.requests,
            errors=self.errors,
            cancelled=self.cancelled,
            input_tokens=self.input_tokens,
            output_tokens=self.output_tokens,
            cost_micro_usd=self.cost_micro_usd,
            errors_by_reason=dict(self.errors_by_reason),
        )


def add_up(records: Iterable[metrics_service_pb2.UsageRecord]) -> dict[str, Totals]:
    """Totals by deployment. Every record counts: telling a repeated one from a new one is the ledger's work, which remembers."""
    totals: dict[str, Totals] = {}
    for record in records:
        totals.setdefault(record.deployment, Totals()).add(record)
    return totals
