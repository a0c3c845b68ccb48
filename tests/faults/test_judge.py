"""The judge of the fault matrix can say no: histories that are wrong on purpose."""

from __future__ import annotations

import asyncio
import os
import random
import subprocess
import sys
from typing import Any, cast

import pytest

from bench.faults.cells import CELLS
from bench.faults.fencing import Writes, leader_writes
from bench.faults.judge import Run, judge, percentile, unavailable_s
from bench.faults.load import MODEL, Answer, Load, Outcome
from bench.faults.report import BEGIN, END, row_of, table, write_docs
from inference_runtime.coordination import keys
from inference_runtime.coordination.kv import Event, KeyValue
from inference_runtime.testing.cluster import Cluster
from inference_runtime.testing.faults import FaultNotVerified, KillContext, contexts_of
from inference_runtime.testing.history import History
from inference_runtime.v1 import common_pb2

ROLE = "deployment_manager"
NOTHING = Writes(0, 0, ())


def candidate(revision: int, name: str, *, deleted: bool = False, created: int = 0) -> Event:
    """A candidate's key comes or goes."""
    return Event(KeyValue(keys.election(ROLE, name), b"", created or revision, revision, 1, 7), deleted)


def write(revision: int, token: int) -> Event:
    """An assignment is written under a term."""
    value = common_pb2.Assignment(fencing_token=common_pb2.FencingToken(role=ROLE, revision=token)).SerializeToString()
    return Event(KeyValue(keys.assignment("e", f"r{revision}"), value, revision, revision, 1, 0), False)


def test_writes_of_those_who_led_are_no_effects_of_a_second_leader() -> None:
    """I5: tokens rise with the terms, and a standby is not a leader."""
    events = [candidate(1, "a"), candidate(2, "b"), write(3, 1), candidate(4, "a", deleted=True), write(5, 2)]

    assert leader_writes(events) == Writes(2, 2, ())


@pytest.mark.parametrize(
    ("events", "said"),
    [
        pytest.param(
            [candidate(1, "a"), candidate(2, "b"), candidate(3, "a", deleted=True), write(4, 2), write(5, 1)],
            "token 1 of deployment_manager after 2",
            id="a token falls",
        ),
        pytest.param([candidate(1, "a"), candidate(2, "b"), write(3, 2)], "while 1 led", id="the standby writes"),
        pytest.param([candidate(1, "a"), candidate(2, "a", deleted=True), write(3, 1)], "while nobody led", id="nobody leads"),
    ],
)
def test_a_write_by_somebody_who_does_not_lead_is_found(events: list[Event], said: str) -> None:
    """I5."""
    effects = leader_writes(events).effects

    assert len(effects) == 1
    assert said in effects[0]


def test_candidates_that_stood_before_the_history_begins_count() -> None:
    """E-04: the beginning of etcd's history was compacted away."""
    standing = [candidate(1, "a").kv, candidate(2, "b").kv]

    assert leader_writes([write(5, 1)], standing).effects == ()
    assert len(leader_writes([write(5, 2)], standing).effects) == 1


class Addresses:
    """As much of a cluster as an unused load asks for."""

    http_urls = ("http://127.0.0.1:1", "http://127.0.0.1:2")
    grpc_addresses = ("127.0.0.1:1", "127.0.0.1:2")

    @property
    def local(self) -> Addresses:
        """Itself."""
        return self


def answered(
    *, words: list[int] | None = None, outcome: Outcome = "ended", gateway: int = 0, model: str = MODEL, excused: bool = False
) -> Run:
    """A run of one stream of eight tokens that got `words` of them, by place."""
    load = Load(cast(Cluster, Addresses()), streams=1, tokens=8, rng=random.Random(1))
    record = load.history.begin("hello", seed=1, tokens=8)
    expected = record.expected()
    record.chunk(0, [expected[i] for i in (range(8) if words is None else words)])
    if outcome == "ended":
        record.end()
    else:
        record.fail("told to")
    load.answers.append(Answer(record, gateway, 0.0, False, [1.0, 2.5, 3.0], 3.0, outcome, model=model))
    return judge(
        load,
        NOTHING,
        verified=True,
        window=(0.0, 3.0),
        may_break={1},
        figures={},
        problems=[],
        seed=1,
        excused=lambda answer: excused,
    )


def test_an_undisturbed_run_is_all_zeros_and_its_longest_silence_is_known() -> None:
    """I1 to I4."""
    run = answered()

    assert (run.lost, run.duplicated, run.foreign, run.failed, run.broken) == (0, 0, 0, 0, 0)
    assert (run.tokens, run.stall_p99_s, run.verified) == (8, 1.5, True)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        pytest.param({"words": [0, 1, 2, 4, 5, 6, 7]}, "lost", id="lost"),
        pytest.param({"words": [0, 1, 2, 2, 3, 4, 5, 6, 7]}, "duplicated", id="doubled"),
        pytest.param({"words": [0, 1, 3, 2, 4, 5, 6, 7]}, "foreign", id="out of order"),
        pytest.param({"outcome": "failed"}, "failed", id="failed"),
        pytest.param({"outcome": "refused"}, "failed", id="refused"),
        pytest.param({"outcome": "broken"}, "failed", id="broken at a gateway that lives"),
    ],
)
def test_what_must_be_zero_and_is_not_breaks_a_promise(changes: dict[str, Any], field: str) -> None:
    """§4.4: exit status 1 comes from here."""
    run = answered(**changes)

    assert getattr(run, field) == 1
    assert any(promise.startswith(field) for promise in row_of(CELLS["R-01"], [run]).broken_promises)


def test_a_stream_of_a_killed_gateway_may_break_and_is_counted() -> None:
    """G-01: what came before is still held against the truth."""
    run = answered(outcome="broken", gateway=1, words=[0, 1, 2])

    assert (run.broken, run.failed, run.lost) == (1, 0, 0)
    assert answered(outcome="broken", gateway=1, words=[0, 2]).lost == 1


@pytest.mark.parametrize(("outcome", "failed"), [("refused", 0), ("failed", 0), ("broken", 1)])
def test_a_request_that_did_not_have_to_be_served_is_excused_when_it_was_told_so(outcome: Outcome, failed: int) -> None:
    """P-01, P-02: what it got is still held against the truth, and nothing excuses a connection that just ends."""
    assert answered(outcome=outcome, excused=True).failed == failed
    assert answered(outcome=outcome, excused=True, words=[0, 2]).lost == 1


def test_only_streams_of_the_standing_load_tell_of_stalls() -> None:
    """P-01: the deployment that is overloaded is judged by figures of its own."""
    assert answered().stall_p99_s == 1.5
    assert not answered(model="crowded").verified, "no stream was open under the fault"


def test_time_without_answers_runs_to_the_next_good_one() -> None:
    """Failing, and waiting for more than two seconds, are the same."""
    history = History()

    def probe(begin: float, took_s: float, outcome: Outcome = "ended") -> Answer:
        return Answer(history.begin("x"), 0, begin, True, [], begin + took_s, outcome)

    assert unavailable_s([probe(0, 0.1), probe(1, 1.9)]) == 0
    assert unavailable_s([probe(0, 0.1), probe(1, 0.1, "failed"), probe(2, 2.1), probe(4, 0.1)]) == 3
    assert unavailable_s([probe(0, 0.1), probe(1, 0.5, "failed"), probe(2, 0.5, "failed")]) == 1.5
    assert unavailable_s([probe(0, 0.1), probe(1, 4), probe(2, 0.1)]) == 0, "one slow request is counted as such"


def test_percentiles_are_values_that_were_measured() -> None:
    """No interpolation; nothing of nothing."""
    assert percentile([], 0.99) == 0
    assert percentile([3, 1, 2], 0.99) == 3
    assert percentile(range(1, 101), 0.5) == 50


def test_a_run_whose_fault_was_not_seen_breaks_a_promise_and_the_page_says_so(tmp_path: Any) -> None:
    """§4.2: an unverified fault is no pass."""
    good = answered()
    unseen = judge(
        Load(cast(Cluster, Addresses()), streams=1, tokens=8, rng=random.Random(1)),
        NOTHING,
        verified=True,
        window=(0.0, 1.0),
        may_break=set(),
        figures={},
        problems=[],
        seed=2,
    )
    page = tmp_path / "faults.md"
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")

    row = row_of(CELLS["R-01"], [good, unseen])
    write_docs([row], page)

    assert not unseen.verified, "no stream was open under the fault"
    assert row.broken_promises == ("not every fault was verified",)
    assert "| NO " in table([row])
    assert page.read_text().startswith("before\n")
    assert page.read_text().endswith("after\n")
    assert "old" not in page.read_text()


async def test_an_injector_with_a_wrong_target_says_so() -> None:
    """§4.2, control run: this process has no context to kill until one is there, and then it is killed for certain."""

    class Alone:
        def pids(self) -> dict[str, int]:
            return {"engine": os.getpid()}

    cluster = cast(Cluster, Alone())
    with pytest.raises(FaultNotVerified, match="0 context processes"):
        KillContext(cluster, "engine")
    child = subprocess.Popen(  # noqa: ASYNC220 - a moment
        [sys.executable, "-c", "input()", "services.engine.child"], stdin=subprocess.PIPE
    )
    try:
        async with asyncio.timeout(10):
            while contexts_of(os.getpid()) != [child.pid]:  # noqa: ASYNC110 - exec sends no event
                await asyncio.sleep(0.01)
        fault = KillContext(cluster, "engine")
        assert not fault.is_injected()
        fault.inject()
        assert child.wait(10) == -9
        assert fault.is_injected()
        assert not fault.is_healed()
    finally:
        child.kill()
        child.communicate()
