"""Usage records a column at a time: what a gateway noted is what the ledger gets."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from inference_runtime.errors import BadRequest
from inference_runtime.v1 import generation_pb2
from inference_runtime.v1 import metrics_service_pb2 as pb
from services.gateway.usage import UsageEntry, usage_columns
from services.metrics.columns import from_columns

TOKENS = st.integers(0, 2**32 - 1)
SECONDS = st.floats(0, 86_400)
ENTRIES = st.lists(
    st.tuples(
        st.uuids().map(str), st.sampled_from(["a", "b"]), st.sampled_from(["r1", "r2", ""]), TOKENS, TOKENS, TOKENS, TOKENS,
        st.sampled_from([generation_pb2.FINISH_REASON_STOP, generation_pb2.FINISH_REASON_LENGTH]),
        st.sampled_from(["ok", "cancelled", "BACKPRESSURE"]), st.integers(0, 2**62), SECONDS, SECONDS, st.sampled_from(["", "t"]),
        st.integers(0, 3),
    ),
    min_size=1, max_size=8,
)  # fmt: skip


@given(ENTRIES)
def test_a_batch_arrives_as_it_was_noted(entries: list[UsageEntry]) -> None:
    """A row for each entry, with everything it had."""
    sent = pb.UsageColumns.FromString(usage_columns(entries).SerializeToString())
    for entry, record in zip(entries, from_columns(sent), strict=True):
        request_id, deployment, replica_id, prompt, output, reasoning, cached, finish, outcome = entry[:9]
        accepted_ns, first_s, duration_s, tenant, attempt = entry[9:]
        assert (record.request_id, record.deployment, record.replica_id) == (request_id, deployment, replica_id)
        assert (record.tenant, record.attempt) == (tenant, attempt)
        usage = record.usage
        assert (usage.input_tokens, usage.output_tokens) == (prompt, output)
        assert (usage.reasoning_tokens, usage.cached_input_tokens) == (reasoning, cached)
        ended = {"ok": (finish, ""), "cancelled": (generation_pb2.FINISH_REASON_CANCELLED, "")}.get(outcome, (0, outcome))
        assert (record.finish_reason, record.error_reason) == ended
        assert record.accepted_at.ToNanoseconds() == accepted_ns
        assert record.time_to_first_token.ToNanoseconds() == pytest.approx(first_s * 1e9, abs=1)
        assert record.duration.ToNanoseconds() == pytest.approx(duration_s * 1e9, abs=1)


def columns() -> pb.UsageColumns:
    return pb.UsageColumns(request_ids=["a", "b"], kinds=[pb.UsageRecord(deployment="d")], kind_indexes=[0, 0])


def test_columns_that_are_left_out_hold_zeros() -> None:
    assert [(r.request_id, r.usage.input_tokens) for r in from_columns(columns())] == [("a", 0), ("b", 0)]


@pytest.mark.parametrize(
    "wrong",
    [
        pb.UsageColumns(output_tokens=[1]),
        pb.UsageColumns(kind_indexes=[0]),
        pb.UsageColumns(duration_s=[1.0, math.nan]),
        pb.UsageColumns(duration_s=[1.0, -1.0]),
        pb.UsageColumns(time_to_first_token_s=[math.inf, 0.0]),
    ],
)
def test_columns_that_do_not_fit_are_refused(wrong: pb.UsageColumns) -> None:
    batch = columns()
    batch.MergeFrom(wrong)
    with pytest.raises(BadRequest):
        from_columns(batch)


def test_a_row_of_a_kind_that_is_not_there_is_refused() -> None:
    batch = columns()
    batch.kind_indexes[1] = 1
    with pytest.raises(BadRequest, match="kind 1"):
        from_columns(batch)


def test_nothing_is_nothing() -> None:
    assert from_columns(pb.UsageColumns()) == []
