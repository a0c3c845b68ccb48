"""The pure parts: ranges, net effects, differences, keys, tokens."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from inference_runtime.coordination import Fence, FencingToken, KeyValue, LeaderInfo, keys
from inference_runtime.coordination.clock import Backoff, boottime
from inference_runtime.coordination.fencing import oldest
from inference_runtime.coordination.kv import Event, collapse, difference, prefix_end
from inference_runtime.coordination.lease import margin_s
from inference_runtime.errors import BadRequest, StaleLeader
from inference_runtime.v1 import common_pb2


def kv(key: str, revision: int, created: int = 0) -> KeyValue:
    return KeyValue(key, b"", created or revision, revision, 1, 0)


@given(st.binary(min_size=1, max_size=4), st.binary(max_size=5))
def test_the_range_of_a_prefix_holds_exactly_the_keys_that_start_with_it(prefix: bytes, key: bytes) -> None:
    end = prefix_end(prefix)

    inside = key >= prefix and (end == b"\0" or key < end)

    assert inside == key.startswith(prefix)


@given(st.lists(st.tuples(st.sampled_from("abc"), st.booleans()), max_size=30), st.integers(0, 30), st.integers(0, 10))
def test_batches_of_events_lead_to_the_state_that_single_events_lead_to(
    changes: list[tuple[str, bool]], cut: int, repeated: int
) -> None:
    events = [Event(kv(key, i), deleted) for i, (key, deleted) in enumerate(changes, start=1)]
    expected: dict[str, int] = {}
    for event in events:
        expected.pop(event.kv.key, None)
        if not event.deleted:
            expected[event.kv.key] = event.kv.mod_revision

    state: dict[str, int] = {}
    last = 0
    for part in (events[:cut], events[max(0, cut - repeated) :]):  # the second batch repeats some of the first
        puts, deletes = collapse(part, after=last)
        assert not {p.key for p in puts} & set(deletes)
        state.update((p.key, p.mod_revision) for p in puts)
        for key in deletes:
            state.pop(key, None)
        last = max([last, *(e.kv.mod_revision for e in part)])

    assert state == expected


@given(
    st.dictionaries(st.sampled_from("abcdef"), st.integers(1, 9)), st.dictionaries(st.sampled_from("abcdef"), st.integers(1, 9))
)
def test_the_difference_turns_what_was_known_into_what_was_listed(known: dict[str, int], listed: dict[str, int]) -> None:
    puts, deletes = difference(known, [kv(k, r) for k, r in listed.items()])

    after = dict(known)
    after.update((p.key, p.mod_revision) for p in puts)
    for key in deletes:
        del after[key]

    assert after == listed
    assert all(known.get(p.key) != p.mod_revision for p in puts)


def test_the_oldest_candidate_leads() -> None:
    assert oldest([kv("b", 9, created=5), kv("a", 8, created=7)]) == kv("b", 9, created=5)
    assert oldest([]) is None


@pytest.mark.parametrize(("ttl_s", "margin"), [(10.0, 2.0), (30.0, 6.0), (5.0, 2.0), (2.0, 1.0)])
def test_the_margin_is_two_seconds_or_a_fifth(ttl_s: float, margin: float) -> None:
    assert margin_s(ttl_s) == margin


@given(st.floats(0.01, 2), st.floats(0.01, 5), st.integers(1, 40))
def test_a_backoff_never_waits_longer_than_its_cap(first_s: float, cap_s: float, failures: int) -> None:
    backoff = Backoff(first_s, cap_s)

    pauses = [backoff.next_s() for _ in range(failures)]

    assert all(0 <= p <= cap_s for p in pauses)
    backoff.reset()
    assert backoff.next_s() <= first_s


def test_the_lease_clock_never_goes_back() -> None:
    first, second = boottime(), boottime()
    assert second >= first > 0


def test_keys_are_spelled_as_the_layout_says() -> None:
    assert keys.ROOT == "/inference_runtime/v1/"
    assert keys.election("coordinator", "c1") == "/inference_runtime/v1/elections/coordinator/c1"
    assert keys.deployment("org/model") == "/inference_runtime/v1/deployments/org/model"
    assert keys.assignment("e1", "r1") == "/inference_runtime/v1/assignments/e1/r1"
    assert keys.engine("e1") == "/inference_runtime/v1/engines/e1"
    assert keys.replica("d", "r1") == "/inference_runtime/v1/replicas/d/r1"
    assert keys.api_key("k1") == "/inference_runtime/v1/keys/k1"
    assert keys.segments(keys.assignment("e1", "r1"), keys.ASSIGNMENTS) == ("e1", "r1")
    assert keys.segments("/elsewhere", keys.ASSIGNMENTS) == ()


@given(st.text(min_size=1, max_size=6), st.text(min_size=1, max_size=6))
def test_no_deployment_lists_the_replicas_of_another(one: str, other: str) -> None:
    assert keys.replica(other, "r").startswith(keys.replicas_of(one)) == (one == other)


@pytest.mark.parametrize("bad", ["", "a/b", "/"])
def test_an_id_that_is_no_segment_is_refused(bad: str) -> None:
    with pytest.raises(BadRequest):
        keys.engine(bad)
    with pytest.raises(BadRequest):
        keys.election("coordinator", bad)


@given(st.lists(st.integers(1, 20), min_size=1, max_size=20))
def test_a_fence_accepts_a_token_exactly_if_none_higher_came_before(revisions: list[int]) -> None:
    """M-02: what an engine or gateway does with the orders of a former leader."""
    fence = Fence()
    highest = 0
    for revision in revisions:
        token = FencingToken("coordinator", 7, revision)
        if revision < highest:
            with pytest.raises(StaleLeader):
                fence.check(token)
        else:
            fence.check(token)
        highest = max(highest, revision)
        seen = fence.highest("coordinator")
        assert seen is not None
        assert seen.revision == highest


def test_a_fence_refuses_another_cluster_and_keeps_roles_apart() -> None:
    """E-05: after a wipe of etcd, revisions start again and prove nothing."""
    fence = Fence()
    fence.check(FencingToken("coordinator", 1, 50))

    fence.check(FencingToken("metrics", 1, 3))
    with pytest.raises(StaleLeader, match="cluster"):
        fence.check(FencingToken("coordinator", 2, 51))


def test_tokens_and_leaders_survive_the_wire() -> None:
    token = FencingToken("coordinator", 2**64 - 1, 42)
    value = common_pb2.Leader(role="coordinator", candidate_id="c", address="h:1", pid=9).SerializeToString()

    info = LeaderInfo.from_key("coordinator", KeyValue("…/c", value, 42, 43, 2, 1), 2**64 - 1)

    assert info == LeaderInfo("coordinator", "c", "h:1", 9, token)
    assert FencingToken.from_proto(info.to_proto().token) == token


def test_a_leader_key_that_holds_something_else_still_names_a_leader() -> None:
    info = LeaderInfo.from_key("coordinator", KeyValue("/e/coordinator/alien", b"\xff", 4, 4, 1, 0), 1)

    assert (info.candidate_id, info.address, info.token.revision) == ("alien", "", 4)
