"""What is kept of streams: its bounds, and how a stream goes on from it without a token lost, doubled or invented."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from inference_runtime.v1 import gateway_peer_service_pb2, generation_pb2
from services.gateway.position import Position, Seen, parse_position, place
from services.gateway.records import OVERHEAD_BYTES, NotResumable, Record, RecordStore, choose, plan

STOP = generation_pb2.FINISH_REASON_STOP


def record(
    number: int = 0, *, tokens: list[int] | None = None, now: float = 0.0, attachment: int = 0, finished: bool = False
) -> Record:
    header = gateway_peer_service_pb2.StreamHeader(
        request=generation_pb2.GenerationRequest(request_id=f"{number:032x}", tenant="me"), attachment=attachment
    )
    made = Record(header, now)
    made.tokens.extend(tokens or [])
    if finished:
        made.end = gateway_peer_service_pb2.StreamEnd(finish_reason=STOP)
    return made


# --- the store -----------------------------------------------------------------------------------------------------------


def test_a_record_goes_a_minute_after_it_was_touched_last() -> None:
    store, one = RecordStore(60, 10, 1 << 20), record()
    assert store.put(one, 0.0)
    assert store.grow(one, [1], 59.0)
    assert store.get(one.request_id, 118.9) is one
    assert store.get(one.request_id, 119.0) is None
    assert (len(store), store.size_bytes) == (0, 0)


def test_with_too_many_records_the_one_that_was_touched_longest_ago_goes() -> None:
    store, records = RecordStore(60, 3, 1 << 20), [record(n) for n in range(4)]
    for one in records[:3]:
        store.put(one, 0.0)
    store.grow(records[0], [1], 1.0)
    store.put(records[3], 2.0)
    assert [one in store for one in records] == [True, False, True, True]
    assert store.evicted == 1


def test_bytes_are_bounded_whatever_grows() -> None:
    bound = 4 * OVERHEAD_BYTES
    store = RecordStore(60, 1000, bound)
    first, second = record(1), record(2)
    store.put(first, 0.0)
    store.put(second, 0.0)
    assert store.grow(second, [7] * 500, 1.0)
    assert store.size_bytes <= bound
    assert not store.grow(second, [7] * 5000, 2.0), "alone it is larger than the store"
    assert (len(store), store.size_bytes) == (0, 0)
    assert not store.put(record(3, tokens=[1] * 5000), 3.0)


def test_a_copy_that_knows_less_does_not_take_the_place_of_one_that_knows_more() -> None:
    store = RecordStore(60, 10, 1 << 20)
    newest = record(tokens=[1, 2], attachment=1)
    assert store.put(newest, 0.0)
    assert not store.put(record(tokens=[1, 2, 3]), 0.0), "it is of an earlier attachment"
    assert store.put(record(tokens=[1, 2, 3], attachment=1), 0.0)


@given(st.lists(st.tuples(st.sampled_from("pgdx"), st.integers(0, 5), st.integers(0, 300)), max_size=60))
def test_the_store_never_exceeds_a_bound_and_its_sum_is_that_of_its_records(steps: list[tuple[str, int, int]]) -> None:
    """The bounds hold after every step of any history."""
    store, now, known = RecordStore(10, 4, 6 * OVERHEAD_BYTES), 0.0, {}
    for step, number, amount in steps:
        now += amount / 100
        if step == "p":
            new = record(number, tokens=[1] * amount, now=now)
            if store.put(new, now):
                known[number] = new
        elif step == "g" and number in known and known[number] in store:
            store.grow(known[number], [1] * amount, now)
        elif step == "d":
            store.drop(f"{number:032x}")
        else:
            store.expire(now)
        kept = [one for one in known.values() if one in store]
        assert len(store) == len(kept) <= 4
        assert store.size_bytes == sum(one.size_bytes for one in kept) <= 6 * OVERHEAD_BYTES


# --- how a stream goes on ------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 9), min_size=1, max_size=100), st.data())
def test_behind_what_was_shown_the_answer_goes_on_exactly(answer: list[int], data: st.DataObject) -> None:
    """A client saw up to any token, the copy is at any other; the prefix is what the client saw, token for token."""
    index = data.draw(st.integers(0, len(answer) - 1))
    copied = data.draw(st.integers(0, len(answer)))
    acknowledged = data.draw(st.integers(0, copied))  # the gateway that died had heard of fewer than arrived
    position = parse_position(b"%032x:" % 0 + place(acknowledged, answer, index))
    known = record(tokens=answer[:copied])
    try:
        way = plan(known, position, include_usage=False, repeats=False)
    except NotResumable:
        assert index + 1 - acknowledged > 64, "only an id that could not carry the tokens is refused"
        return
    assert list(way.prefix) == answer[: index + 1]
    assert (way.skip_to, way.over) == (-1, False)


def test_tokens_that_nobody_has_are_made_again_only_where_they_come_out_the_same() -> None:
    known, position = record(tokens=[1, 2, 3]), Position(f"{0:032x}", 9)
    way = plan(known, position, include_usage=False, repeats=True)
    assert (list(way.prefix), way.skip_to) == ([1, 2, 3], 9)
    with pytest.raises(NotResumable, match="10 tokens of this stream, the gateways that live 3"):
        plan(known, position, include_usage=False, repeats=False)


def test_an_id_with_tokens_of_another_stream_is_refused() -> None:
    with pytest.raises(NotResumable, match="not of this stream"):
        plan(record(tokens=[1, 2, 3]), Position(f"{0:032x}", 2, tail=(7, 3)), include_usage=False, repeats=True)


def test_of_a_stream_that_has_ended_only_the_rest_of_its_end_is_told() -> None:
    known = record(tokens=[1, 2, 3], finished=True)
    for seen in (Seen.LAST, Seen.END, Seen.DONE):
        way = plan(known, Position(f"{0:032x}", 2, seen), include_usage=True, repeats=False)
        assert (way.over, way.seen) == (True, seen)
    behind = plan(known, Position(f"{0:032x}", 0), include_usage=True, repeats=False)
    assert (list(behind.prefix), behind.over) == ([1], False)


def test_an_end_that_no_gateway_knows_is_made_again_or_refused() -> None:
    known, last = record(tokens=[1, 2]), Position(f"{0:032x}", 2, Seen.LAST)
    way = plan(known, last, include_usage=False, repeats=True)
    assert (list(way.prefix), way.skip_to, way.over) == ([1, 2], 2, False)
    with pytest.raises(NotResumable, match="its text is complete"):
        plan(known, last, include_usage=False, repeats=False)
    assert plan(known, Position(f"{0:032x}", 2, Seen.END), include_usage=False, repeats=False).over


def test_a_client_that_has_nothing_gets_everything() -> None:
    assert list(plan(record(tokens=[1, 2]), Position(f"{0:032x}"), include_usage=False, repeats=False).prefix) == []


def test_of_copies_that_went_apart_the_one_that_the_client_was_served_from_counts() -> None:
    """Two gateways that cannot reach each other may both go on with a stream, and a runtime need not repeat itself."""
    longer, mine = record(tokens=[1, 2, 7, 7, 7, 7], attachment=2), record(tokens=[1, 2, 3, 4], attachment=1)
    found, way = choose([mine, longer], Position(f"{0:032x}", 4, tail=(4, 5)), include_usage=False, repeats=lambda _: True)
    assert found is mine
    assert list(way.prefix) == [1, 2, 3, 4, 5]
    assert found.attachment == 2, "whoever goes on now is newer than both"
    with pytest.raises(NotResumable, match="not of this stream"):
        choose([mine, longer], Position(f"{0:032x}", 3, tail=(9, 9)), include_usage=False, repeats=lambda _: True)
