"""One usage record for each request, sent in batches to whoever leads the metrics service.

While that service is away records wait, bounded; what does not fit any more is counted as lost, never silently. A batch may be
sent twice: the ledger counts a (request id, attempt) once.
"""

from __future__ import annotations

import asyncio
import collections
from typing import Generic

import grpc

from inference_runtime.errors import InferenceError
from inference_runtime.rpc import error_from_rpc, open_channel
from inference_runtime.telemetry import MetricSet, get_logger
from inference_runtime.v1 import generation_pb2, metrics_service_pb2, metrics_service_pb2_grpc
from services.gateway.routes import L, Leaders

__all__ = ["UsageEntry", "UsageReporter", "usage_columns"]

log = get_logger(__name__)

#: One ended request: request id, deployment, replica id, tokens (prompt, output, reasoning, cached), finish reason, outcome
#: ("ok", "cancelled" or an error's reason), accepted at (wall clock, ns), time to the first token (s, 0 for none), duration (s),
#: tenant, attempt. A tuple and not a message: it is made on every request's path and waits in thousands.
UsageEntry = tuple[str, str, str, int, int, int, int, int, str, int, float, float, str, int]

CANCELLED = generation_pb2.FINISH_REASON_CANCELLED

#: A batch leaves when it is this large or this old.
BATCH_RECORDS = 512
BATCH_AGE_S = 1.0
#: Records that wait while the metrics service is away; some 40 MB at most.
MAX_WAITING = 65_536
SEND_TIMEOUT_S = 5.0
#: Pause between two tries to send what is left at the end, seconds.
FLUSH_RETRY_S = 0.1


class UsageReporter(Generic[L]):
    """Takes records, never waits, and sends them."""

    def __init__(self, leaders: Leaders[L], metrics: MetricSet) -> None:
        self._leaders = leaders
        self._lost = metrics.counter("inference_usage_records_lost_total")
        self._waiting: collections.deque[UsageEntry] = collections.deque()
        self._full = asyncio.Event()
        self._channel: grpc.aio.Channel | None = None
        self._address = ""

    @property
    def waiting(self) -> int:
        """Records that were not sent yet."""
        return len(self._waiting)

    def add(self, entry: UsageEntry) -> None:
        """Take a record. The oldest one is dropped, and counted, when too many wait."""
        self._waiting.append(entry)
        if len(self._waiting) >= BATCH_RECORDS:
            if len(self._waiting) > MAX_WAITING:
                self._waiting.popleft()
                self._lost.inc()
            self._full.set()

    async def run(self) -> None:
        """Send until cancelled."""
        try:
            while True:
                try:
                    async with asyncio.timeout(BATCH_AGE_S):
                        await self._full.wait()
                except TimeoutError:
                    pass
                self._full.clear()
                while self._waiting:
                    if not await self._send_batch():
                        await asyncio.sleep(BATCH_AGE_S)  # nobody there: no haste
                        break
        finally:
            await self._forget_leader()

    async def flush(self, timeout_s: float) -> None:
        """Send what waits, for at most `timeout_s` seconds; count what stays as lost. Call it once nothing is added any more.

        While nobody leads it tries again: a metrics service that leaves is replaced within a second.
        """
        try:
            async with asyncio.timeout(timeout_s):
                while self._waiting:
                    if not await self._send_batch():
                        await asyncio.sleep(FLUSH_RETRY_S)
        except TimeoutError:
            pass
        finally:
            await self._forget_leader()
        if self._waiting:
            log.warning("usage records lost: the metrics service is away", records=len(self._waiting))
            self._lost.inc(by=len(self._waiting))

    async def _send_batch(self) -> bool:
        """Send the oldest records. Returns whether they arrived; if not they stay where they are."""
        leader = self._leaders.current
        if leader is None:
            return False
        if leader.address != self._address or self._channel is None:
            await self._forget_leader()
            self._channel, self._address = open_channel(leader.address), leader.address
        count = min(BATCH_RECORDS, len(self._waiting))
        entries = [self._waiting.popleft() for _ in range(count)]
        batch = metrics_service_pb2.RecordUsageRequest(columns=usage_columns(entries))
        arrived = False
        try:
            stub = metrics_service_pb2_grpc.MetricsServiceStub(self._channel)  # type: ignore[no-untyped-call]
            await stub.RecordUsage(batch, timeout=SEND_TIMEOUT_S)
            arrived = True
        except grpc.aio.AioRpcError as err:
            error: InferenceError = error_from_rpc(err)
            log.debug("usage records not taken", address=self._address, reason=error.reason, message=error.message)
        finally:
            if not arrived:
                self._waiting.extendleft(reversed(entries))
        return arrived

    async def _forget_leader(self) -> None:
        channel, self._channel, self._address = self._channel, None, ""
        if channel is not None:
            await channel.close(None)


def usage_columns(entries: list[UsageEntry]) -> metrics_service_pb2.UsageColumns:
    """Entries as they travel: far cheaper to make than a message for each."""
    kinds: dict[tuple[str, str, str, str, int, int], int] = {}
    (
        request_ids, deployments, replica_ids, prompts, outputs, reasoning, cached, finish_reasons, outcomes, accepted_ns,
        first_s, duration_s, tenants, attempts,
    ) = zip(*entries, strict=True)  # fmt: skip
    columns = metrics_service_pb2.UsageColumns(
        request_ids=request_ids, input_tokens=prompts, output_tokens=outputs, accepted_at_ns=accepted_ns,
        time_to_first_token_s=first_s, duration_s=duration_s,
        kind_indexes=[
            kinds.setdefault(kind, len(kinds))
            for kind in zip(deployments, replica_ids, tenants, outcomes, finish_reasons, attempts, strict=True)
        ],
    )  # fmt: skip
    if any(reasoning):
        columns.reasoning_tokens.extend(reasoning)
    if any(cached):
        columns.cached_input_tokens.extend(cached)
    for deployment, replica_id, tenant, outcome, finish_reason, attempt in kinds:
        kind = columns.kinds.add(deployment=deployment, replica_id=replica_id, tenant=tenant, attempt=attempt)
        if outcome == "ok":
            kind.finish_reason = finish_reason  # type: ignore[assignment]
        elif outcome == "cancelled":
            kind.finish_reason = CANCELLED
        else:
            kind.error_reason = outcome
    return columns
