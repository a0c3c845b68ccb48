"""The usage ledger on a real SQLite file."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from inference_runtime.errors import ServerError
from inference_runtime.v1 import generation_pb2, metrics_service_pb2
from services.metrics.aggregate import add_up
from services.metrics.ledger import Ledger

Record = metrics_service_pb2.UsageRecord


def record(request_id: str, attempt: int = 0, deployment: str = "a", error_reason: str = "") -> metrics_service_pb2.UsageRecord:
    return Record(
        request_id=request_id,
        attempt=attempt,
        deployment=deployment,
        error_reason=error_reason,
        usage=generation_pb2.Usage(input_tokens=3, output_tokens=2),
    )


@pytest.fixture
async def ledger(tmp_path: Path) -> AsyncIterator[Ledger]:
    ledger = Ledger(str(tmp_path / "deep" / "usage.sqlite3"), max_records=1000)
    await ledger.open()
    yield ledger
    await ledger.close()


async def count(ledger: Ledger, deployment: str = "a") -> int:
    totals = await ledger.totals(deployment)
    return totals[deployment].records if deployment in totals else 0


async def test_a_record_sent_twice_counts_once(ledger: Ledger) -> None:
    """R13, B04."""
    assert (await ledger.record([record("r")]))["a"].records == 1
    assert await ledger.record([record("r")]) == {}

    assert await count(ledger) == 1


async def test_a_record_twice_in_one_batch_counts_once(ledger: Ledger) -> None:
    assert (await ledger.record([record("r"), record("r")]))["a"].records == 1


async def test_another_attempt_is_another_record(ledger: Ledger) -> None:
    await ledger.record([record("r", 0, error_reason="ENGINE_LOST"), record("r", 1)])

    totals = (await ledger.totals())["a"]
    assert (totals.requests, totals.errors_by_reason["ENGINE_LOST"]) == (1, 1)


async def test_trap_06_records_survive_a_restart(tmp_path: Path) -> None:
    """Trap 6: the original's metrics were dead code. Sums and what was seen are on disk."""
    path = str(tmp_path / "usage.sqlite3")
    first = Ledger(path, max_records=1000)
    await first.open()
    await first.record([record("r", error_reason="TIMEOUT"), record("s")])
    await first.close()

    second = Ledger(path, max_records=1000)
    await second.open()
    try:
        assert await second.record([record("s")]) == {}
        totals = (await second.totals())["a"]
        assert (totals.requests, dict(totals.errors_by_reason), totals.input_tokens) == (1, {"TIMEOUT": 1}, 6)
    finally:
        await second.close()


async def test_two_processes_share_one_file(tmp_path: Path) -> None:
    """In a hand-over on one machine both open the ledger: a late write of the old leader neither counts twice nor is lost."""
    path = str(tmp_path / "usage.sqlite3")
    old, new = Ledger(path, max_records=1000), Ledger(path, max_records=1000)
    await old.open()
    await new.open()
    try:
        await asyncio.gather(
            *(old.record([record(f"r{i}")]) for i in range(20)), *(new.record([record(f"r{i}")]) for i in range(10, 30))
        )
        assert await count(old) == await count(new) == 30
    finally:
        await old.close()
        await new.close()


async def test_the_ledger_keeps_its_newest_rows_and_all_sums(tmp_path: Path) -> None:
    path = tmp_path / "usage.sqlite3"
    ledger = Ledger(str(path), max_records=10)
    await ledger.open()
    try:
        for i in range(25):
            await ledger.record([record(f"r{i}")])
        assert await count(ledger) == 25
        assert await ledger.record([record(f"r{i}") for i in range(15, 25)]) == {}, "the newest ten are still known"
    finally:
        await ledger.close()


async def test_memory_needs_no_file() -> None:
    ledger = Ledger(":memory:", max_records=10)
    await ledger.open()
    try:
        await ledger.record([record("r")])
        assert await count(ledger) == 1
    finally:
        await ledger.close()


async def test_a_file_that_is_no_ledger_is_refused_in_one_sentence(tmp_path: Path) -> None:
    path = tmp_path / "usage.sqlite3"
    path.write_bytes(b"not a database, by no means, and long enough to be looked at" * 100)
    ledger = Ledger(str(path), max_records=10)

    with pytest.raises(ServerError, match=r"usage\.sqlite3: file is not a database"):
        await ledger.open()


async def test_a_directory_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    blocker = tmp_path / "file"
    blocker.touch()

    with pytest.raises(ServerError, match="choose another state_dir"):
        await Ledger(os.path.join(blocker, "sub", "usage.sqlite3"), max_records=10).open()


async def test_a_batch_is_all_or_nothing(ledger: Ledger) -> None:
    too_much = record("s")
    too_much.cost_micro_usd = 2**63 - 1
    with pytest.raises(OverflowError):  # a sum no ledger can hold: the service refuses such costs at the door
        await ledger.record([record("r"), too_much, Record(request_id="t", deployment="a", cost_micro_usd=2**63 - 1)])

    assert await count(ledger) == 0
    assert (await ledger.record([record("r")]))["a"].records == 1


ids = st.tuples(st.sampled_from("abcdefgh"), st.integers(0, 2), st.sampled_from(["a", "b"]), st.sampled_from(["", "TIMEOUT"]))


@given(st.lists(st.lists(ids, max_size=6), max_size=8))
@settings(max_examples=30, deadline=None)
def test_any_order_of_repeats_gives_the_sums_of_the_first_ones(batches: list[list[tuple[str, int, str, str]]]) -> None:
    """B04 as a property: the ledger equals a dictionary that keeps the first record of each id."""

    async def run() -> None:
        ledger = Ledger(":memory:", max_records=1000)
        first: dict[tuple[str, int], metrics_service_pb2.UsageRecord] = {}
        await ledger.open()
        try:
            for batch in batches:
                records = [record(request_id, attempt, name, error) for request_id, attempt, name, error in batch]
                for item in records:
                    first.setdefault((item.request_id, item.attempt), item)
                await ledger.record(records)
            assert await ledger.totals() == add_up(first.values())
        finally:
            await ledger.close()

    asyncio.run(run())
