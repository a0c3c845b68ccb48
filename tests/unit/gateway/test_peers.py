"""Which gateway keeps copies, and what it takes."""

from __future__ import annotations

from inference_runtime.v1 import gateway_peer_service_pb2 as wire
from inference_runtime.v1 import generation_pb2
from services.gateway.peer_service import MAX_SENDERS, Copies
from services.gateway.peers import FAILED_S, PeerTable, nearest
from services.gateway.records import RecordStore


def gateway(name: str, hostname: str = "here") -> wire.Gateway:
    return wire.Gateway(id=name, hostname=hostname, address="127.0.0.1:1", peer_key="k")


# --- who keeps them ------------------------------------------------------------------------------------------------------


def test_another_machine_is_asked_before_the_same_one_and_gateways_do_not_all_ask_the_same() -> None:
    others = [gateway(f"local-{n}") for n in range(5)] + [gateway(f"remote-{n}", "there") for n in range(5)]
    first = set()
    for number in range(50):
        order = nearest(gateway(f"own-{number}"), others)
        assert [other.hostname for other in order] == ["there"] * 5 + ["here"] * 5
        assert order == nearest(gateway(f"own-{number}"), reversed(others)), "the order of registration means nothing"
        first.add(order[0].id)
    assert len(first) > 2


async def test_the_keeper_stays_while_it_is_well_registered_or_not() -> None:
    """A lease that etcd lost is no reason to send every copy anew."""
    table = PeerTable(gateway("own"))
    assert table.keeper(None, 0.0) is None
    table.apply([gateway("own"), gateway("a")])
    assert [peer.gateway.id for peer in table.peers] == ["a"], "it is no peer of its own"
    keeper = table.keeper(None, 0.0)
    assert keeper is not None
    table.apply([gateway("b")])
    assert table.keeper(keeper, 1.0) is keeper
    keeper.failed_at = 1.0
    successor = table.keeper(keeper, 1.5)
    assert successor is not None
    assert successor.gateway.id == "b"
    successor.failed_at = 2.0
    assert table.keeper(successor, 2.5) is None
    assert table.keeper(None, 2.0 + FAILED_S + 0.1) is successor, "it is tried again after a while"


# --- what it takes -------------------------------------------------------------------------------------------------------


def begin(handle: int, *, attachment: int = 0, sender: str = "a") -> wire.ReplicateRequest:
    request = generation_pb2.GenerationRequest(request_id=f"{handle:032x}", tenant="me")
    header = wire.StreamHeader(request=request, attachment=attachment)
    return wire.ReplicateRequest(gateway_id=sender, begun=[wire.StreamBegin(handle=handle, header=header)])


def more(handle: int, offset: int, *tokens: int, sender: str = "a", end: bool = False) -> wire.ReplicateRequest:
    progress = wire.StreamProgress(handle=handle, offset=offset, token_ids=tokens, revision="r1")
    if end:
        progress.end.finish_reason = generation_pb2.FINISH_REASON_STOP
    return wire.ReplicateRequest(gateway_id=sender, progress=[progress])


def tokens_of(store: RecordStore, handle: int) -> list[int]:
    record = store.get(f"{handle:032x}", 0.0)
    assert record is not None
    return list(record.tokens)


def test_a_message_that_comes_twice_adds_nothing_twice_and_a_gap_ends_the_copy() -> None:
    store = RecordStore(60, 10, 1 << 20)
    copies = Copies(store)
    assert copies.take(begin(1), 0.0) == []
    for _ in range(2):
        assert copies.take(more(1, 0, 7, 8), 0.0) == []
    assert copies.take(more(1, 1, 8, 9), 0.0) == []
    assert tokens_of(store, 1) == [7, 8, 9]
    assert copies.take(more(1, 5, 1), 0.0) == [1], "what lies between never came"
    assert tokens_of(store, 1) == [7, 8, 9]
    assert copies.take(more(1, 3, 1), 0.0) == [1], "it was given up"


def test_a_sender_that_begins_anew_goes_on_with_the_copy_that_is_there() -> None:
    store = RecordStore(60, 10, 1 << 20)
    copies = Copies(store)
    copies.take(begin(1), 0.0)
    copies.take(more(1, 0, 7, 8), 0.0)
    assert copies.take(begin(1), 1.0) == []
    assert copies.take(more(1, 0, 7, 8, 9), 1.0) == []
    assert tokens_of(store, 1) == [7, 8, 9]
    assert copies.take(begin(1, attachment=1, sender="b"), 2.0) == []
    assert tokens_of(store, 1) == [], "its client has come back elsewhere: that one is the true one"
    assert copies.take(more(1, 3, 1), 2.0) == [1], "and what the first one still sends is not taken"
    assert copies.take(begin(1), 2.0) == [1]


def test_what_had_no_room_is_refused_and_what_nobody_can_come_back_to_goes() -> None:
    store = RecordStore(60, 1, 1 << 20)
    copies = Copies(store)
    copies.take(begin(1), 0.0)
    copies.take(begin(2), 0.0)
    assert copies.take(more(1, 0, 7), 0.0) == [1], "the second took its place"
    assert copies.take(wire.ReplicateRequest(gateway_id="a", dropped=[2]), 0.0) == []
    assert len(store) == 0
    assert copies.take(more(2, 0, 7), 0.0) == [2]


def test_a_stream_that_has_ended_is_kept_and_no_longer_added_to() -> None:
    store = RecordStore(60, 10, 1 << 20)
    copies = Copies(store)
    copies.take(begin(1), 0.0)
    assert copies.take(more(1, 0, 7, end=True), 0.0) == []
    record = store.get(f"{1:032x}", 0.0)
    assert record is not None
    assert record.end is not None
    assert record.revision == "r1"
    assert copies.take(more(1, 1, 8), 0.0) == [1]


def test_senders_are_bounded_too() -> None:
    """Each start of a gateway is a sender of its own."""
    store = RecordStore(60, 10_000, 1 << 24)
    copies = Copies(store)
    for number in range(MAX_SENDERS + 1):
        copies.take(begin(number, sender=f"gateway-{number}"), 0.0)
    assert copies.take(more(0, 0, 7, sender="gateway-0"), 0.0) == [0]
    assert copies.take(more(1, 0, 7, sender=f"gateway-{MAX_SENDERS}"), 0.0) == [1], "handles are a sender's own"
    assert copies.take(more(MAX_SENDERS, 0, 7, sender=f"gateway-{MAX_SENDERS}"), 0.0) == []
