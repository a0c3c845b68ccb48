"""Usage records out of columns: what a gateway sends, as what the ledger keeps."""

from __future__ import annotations

from collections.abc import Sequence

from inference_runtime.errors import BadRequest
from inference_runtime.v1 import metrics_service_pb2

__all__ = ["from_columns"]

NS = 1_000_000_000
LONGEST_S = 366 * 86_400.0


def from_columns(columns: metrics_service_pb2.UsageColumns) -> list[metrics_service_pb2.UsageRecord]:
    """One record for each row.

    Raises:
        BadRequest: A column has another number of rows, a row names a kind that is not there, or a time is none.
    """
    rows = len(columns.request_ids)

    def column(name: str, *, needed: bool = False) -> Sequence[float]:
        values: Sequence[float] = getattr(columns, name)
        if not values and not needed:
            return [0] * rows
        if len(values) != rows:
            raise BadRequest(f"column {name} has {len(values)} rows, the batch has {rows}", param=f"columns.{name}")
        return values

    records = []
    for request_id, kind, prompt, output, reasoning, cached, accepted_ns, first_s, duration_s in zip(
        columns.request_ids, column("kind_indexes", needed=True), column("input_tokens"), column("output_tokens"),
        column("reasoning_tokens"), column("cached_input_tokens"), column("accepted_at_ns"),
        column("time_to_first_token_s"), column("duration_s"), strict=True,
    ):  # fmt: skip
        if kind >= len(columns.kinds):
            raise BadRequest(f"kind {kind} of a row is not among the {len(columns.kinds)} kinds", param="columns.kind_indexes")
        if not (0 <= first_s <= LONGEST_S and 0 <= duration_s <= LONGEST_S):  # also no number at all
            raise BadRequest("a duration of a row is below zero or above a year", param="columns.duration_s")
        record = metrics_service_pb2.UsageRecord()
        record.CopyFrom(columns.kinds[int(kind)])
        record.request_id = request_id
        usage = record.usage
        usage.input_tokens, usage.output_tokens = int(prompt), int(output)
        usage.reasoning_tokens, usage.cached_input_tokens = int(reasoning), int(cached)
        record.accepted_at.seconds, record.accepted_at.nanos = divmod(int(accepted_ns), NS)
        record.time_to_first_token.FromNanoseconds(int(first_s * NS))
        record.duration.FromNanoseconds(int(duration_s * NS))
        records.append(record)
    return records
