"""What a batch of usage records adds up to."""

from __future__ import annotations

import pytest

from inference_runtime.v1 import generation_pb2, metrics_service_pb2
from services.metrics.aggregate import Totals, add_up

Record = metrics_service_pb2.UsageRecord


def record(request_id: str, **fields: object) -> metrics_service_pb2.UsageRecord:
    usage = generation_pb2.Usage(input_tokens=10, output_tokens=5)
    return Record(request_id=request_id, deployment="a", usage=usage, cost_micro_usd=7, **fields)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("fields", "requests", "cancelled", "errors"),
    [
        ({"finish_reason": generation_pb2.FINISH_REASON_STOP}, 1, 0, {}),
        ({"finish_reason": generation_pb2.FINISH_REASON_LENGTH}, 1, 0, {}),
        ({"finish_reason": generation_pb2.FINISH_REASON_CANCELLED}, 0, 1, {}),
        ({"error_reason": "CANCELLED"}, 0, 1, {}),
        ({"error_reason": "BACKPRESSURE"}, 0, 0, {"BACKPRESSURE": 1}),
    ],
)
def test_a_record_counts_as_what_it_came_to(
    fields: dict[str, object], requests: int, cancelled: int, errors: dict[str, int]
) -> None:
    totals = add_up([record("r", **fields)])["a"]

    assert (totals.requests, totals.cancelled, dict(totals.errors_by_reason)) == (requests, cancelled, errors)
    assert (totals.input_tokens, totals.output_tokens, totals.cost_micro_usd) == (10, 5, 7), "spent however it ended"
    assert totals.records == 1


def test_deployments_are_counted_apart() -> None:
    other = Record(request_id="x", deployment="b")
    totals = add_up([record("r"), other, record("s")])

    assert {name: t.requests for name, t in totals.items()} == {"a": 2, "b": 1}


def test_the_message_says_what_was_counted() -> None:
    totals = Totals()
    for item in (record("1"), record("2", error_reason="TIMEOUT"), record("3", error_reason="TIMEOUT")):
        totals.add(item)

    assert totals.to_proto("a") == metrics_service_pb2.DeploymentUsage(
        deployment="a",
        requests=1,
        errors=2,
        input_tokens=30,
        output_tokens=15,
        cost_micro_usd=21,
        errors_by_reason={"TIMEOUT": 2},
    )
