"""Placement as a pure function."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from inference_runtime.v1 import common_pb2
from services.deployment_manager.placement import Booking, Need, Refusal, place


def engine(
    engine_id: str,
    *,
    host: str = "",
    gpus: int = 0,
    runtimes: tuple[str, ...] = ("scripted",),
    labels: dict[str, str] | None = None,
    draining: bool = False,
) -> common_pb2.Engine:
    return common_pb2.Engine(
        id=engine_id,
        runtimes=runtimes,
        state=common_pb2.ENGINE_STATE_DRAINING if draining else common_pb2.ENGINE_STATE_READY,
        node=common_pb2.Node(
            hostname=host or engine_id, labels=labels or {}, accelerators=[common_pb2.Accelerator(index=i) for i in range(gpus)]
        ),
    )


def place_all(need: Need, count: int, engines: list[common_pb2.Engine]) -> list[Booking]:
    held: list[Booking] = []
    for _ in range(count):
        choice = place(need, engines, held)
        assert isinstance(choice, Booking), choice
        held.append(choice)
    return held


def refusal(need: Need, engines: list[common_pb2.Engine], held: list[Booking] | None = None) -> Refusal:
    choice = place(need, engines, held or [])
    assert isinstance(choice, Refusal)
    return choice


def test_replicas_spread_over_engines() -> None:
    """R12."""
    held = place_all(Need("a", "scripted"), 6, [engine("e1"), engine("e2"), engine("e3")])

    assert Counter(b.engine_id for b in held) == {"e1": 2, "e2": 2, "e3": 2}


def test_an_emptier_engine_is_chosen_among_equals() -> None:
    held = [Booking("other", "e1", "e1"), Booking("other", "e1", "e1"), Booking("other", "e2", "e2")]
    choice = place(Need("a", "scripted"), [engine("e1"), engine("e2"), engine("e3")], held)

    assert isinstance(choice, Booking)
    assert choice.engine_id == "e3"


def test_no_engine_at_all_says_so() -> None:
    assert refusal(Need("a", "scripted"), []).sentence() == "no engine is registered; start one"


@pytest.mark.parametrize(
    ("unfit", "reason"),
    [
        (engine("e", runtimes=("onnx", "torch")), "runtime 'scripted' is not installed (it has onnx, torch)"),
        (engine("e", draining=True, gpus=2, labels={"zone": "a"}), "it drains"),
        (engine("e", gpus=2), "its node has no label zone=a"),
        (engine("e", gpus=2, labels={"zone": "b"}), "its node has zone=b, not a"),
        (engine("e", gpus=1, labels={"zone": "a"}), "its node has 1 accelerators, 2 are needed"),
    ],
)
def test_a_refusal_names_each_engine_with_its_reason(unfit: common_pb2.Engine, reason: str) -> None:
    need = Need("a", "scripted", accelerators=2, node_labels={"zone": "a"})

    assert refusal(need, [unfit]).reasons == {"e": reason}


def test_a_refusal_is_a_sentence_over_all_engines() -> None:
    sentence = refusal(Need("a", "torch"), [engine("e2", runtimes=()), engine("e1")]).sentence()

    assert sentence == (
        "no engine takes it: e1: runtime 'torch' is not installed (it has scripted); "
        "e2: runtime 'torch' is not installed (it has none)"
    )


def test_a_device_that_takes_nothing_is_not_booked() -> None:
    """R12: its engine may use the others, and the refusal says what is wrong with it."""
    sick = engine("e1", gpus=3)
    sick.node.accelerators[1].unschedulable = "its memory is broken"
    (one,) = place_all(Need("a", "scripted", accelerators=2), 1, [sick])
    assert one.accelerators == (0, 2)
    assert refusal(Need("a", "scripted", accelerators=3), [sick]).reasons == {
        "e1": "1 of its 3 accelerators take nothing (accelerator 1: its memory is broken), 3 are needed"
    }
    assert isinstance(place(Need("b", "scripted"), [sick], []), Booking)


def zoned(*zones: str) -> list[common_pb2.Engine]:
    return [engine(f"e{at}", host=f"h{at // 2}", labels={"zone": zone}) for at, zone in enumerate(zones)]


def test_replicas_spread_over_failure_domains_then_hosts_then_engines() -> None:
    """R12: two replicas are in two zones, though one zone has three times the engines; four are on four hosts."""
    engines = zoned("a", "a", "a", "a", "a", "a", "b", "b")
    held = place_all(Need("a", "scripted"), 6, engines)

    zones = [engines[int(b.engine_id[1:])].node.labels["zone"] for b in held]
    assert Counter(zones[:2]) == {"a": 1, "b": 1}
    assert Counter(zones) == {"a": 3, "b": 3}
    assert len({b.host for b in held if b.host != "h3"}) == 3, "each host of zone a has one before one has two"


def test_the_label_to_spread_over_is_the_deployments_choice() -> None:
    engines = [engine(f"e{at}", labels={"zone": "one", "rack": rack}) for at, rack in enumerate("112")]
    held = place_all(Need("a", "scripted", spread_over="rack"), 2, engines)

    assert {engines[int(b.engine_id[1:])].node.labels["rack"] for b in held} == {"1", "2"}


def test_a_taint_keeps_away_those_who_do_not_tolerate_it() -> None:
    tainted = engine("e1")
    tainted.node.taints.append("dedicated=team-a")

    assert refusal(Need("a", "scripted"), [tainted]).reasons == {
        "e1": "its node has the taint dedicated=team-a, which is not tolerated"
    }
    for tolerated in ("dedicated=team-a", "dedicated"):
        assert isinstance(place(Need("a", "scripted", tolerations=frozenset({tolerated})), [tainted], []), Booking)


def test_a_node_hosts_what_its_roles_say() -> None:
    """R15."""
    gateways_only, egress, gpu = engine("e1", gpus=1), engine("e2", gpus=1), engine("e3", gpus=1)
    gateways_only.node.roles.append(common_pb2.NODE_ROLE_EDGE)
    egress.node.roles.append(common_pb2.NODE_ROLE_EGRESS)
    gpu.node.roles.append(common_pb2.NODE_ROLE_GPU)

    assert refusal(Need("a", "scripted"), [gateways_only]).reasons == {"e1": "its node is for edge"}
    (one,) = place_all(Need("a", "scripted", accelerators=1), 1, [gateways_only, egress, gpu])
    assert one.engine_id == "e3"
    (one,) = place_all(Need("a", "scripted"), 1, [gateways_only, egress])
    assert one.engine_id == "e2"


def test_memory_of_a_node_is_given_away_once() -> None:
    """Two engines of one host share its memory."""
    engines = [engine("e1", host="h"), engine("e2", host="h")]
    for item in engines:
        item.node.memory_bytes = 10 << 30
    need = Need("a", "scripted", memory_bytes=4 << 30)
    held = place_all(need, 2, engines)

    assert refusal(need, engines, held).reasons == dict.fromkeys(
        ("e1", "e2"), "2.0 GiB of its node's memory are free, 4.0 GiB are needed"
    )
    assert refusal(Need("b", "scripted", memory_bytes=11 << 30), engines[:1]).reasons == {
        "e1": "its node has 10.0 GiB of memory, 11.0 GiB are needed"
    }
    assert isinstance(place(Need("c", "scripted"), engines, held), Booking), "a need that nobody stated is not looked at"


def test_a_device_that_is_too_small_is_not_booked() -> None:
    mixed = engine("e1", gpus=3)
    for device, gib in zip(mixed.node.accelerators, (24, 80, 80), strict=True):
        device.memory_bytes = gib << 30
    (one,) = place_all(Need("a", "scripted", accelerators=2, memory_bytes=40 << 30), 1, [mixed])

    assert one.accelerators == (1, 2)
    assert refusal(Need("a", "scripted", accelerators=3, memory_bytes=40 << 30), [mixed]).reasons == {
        "e1": "2 of its 3 accelerators have 40.0 GiB of memory and are well"
    }


def islands(*numbers: int) -> common_pb2.Engine:
    made = engine("e1", gpus=len(numbers))
    for device, island in zip(made.node.accelerators, numbers, strict=True):
        device.island = island
    return made


def test_a_group_of_devices_is_joined_by_a_fast_link() -> None:
    """R12: and a small group leaves the large island whole."""
    node = islands(1, 1, 1, 1, 2, 2)
    held = place_all(Need("small", "scripted", accelerators=2), 1, [node])
    assert held[0].accelerators == (4, 5)
    held += place_all(Need("large", "scripted", accelerators=4), 1, [node])
    assert held[1].accelerators == (0, 1, 2, 3)
    assert refusal(Need("x", "scripted", accelerators=5), [node]).reasons == {
        "e1": "at most 4 of its accelerators are joined by a fast link, 5 are needed"
    }
    one = [Booking("other", "e1", "e1", (0, 4))]
    assert refusal(Need("x", "scripted", accelerators=4), [node], one).reasons == {
        "e1": "4 of 6 accelerators are free, not 4 of them joined by a fast link"
    }


def test_trap_31_accelerators_are_never_booked_twice() -> None:
    """Trap 31, P01: each replica gets devices of its own, and the refusal counts what is left."""
    engines = [engine("e1", gpus=4)]
    held = place_all(Need("a", "scripted", accelerators=2), 2, engines)

    assert [b.accelerators for b in held] == [(0, 1), (2, 3)]
    assert refusal(Need("b", "scripted", accelerators=1), engines, held).reasons == {
        "e1": "0 of 4 accelerators are free, 1 are needed"
    }


def test_trap_31_two_engines_of_one_host_share_its_devices() -> None:
    """Trap 31, P01: the same device seen by two processes is one device."""
    engines = [engine("e1", host="h", gpus=1), engine("e2", host="h", gpus=1)]
    held = place_all(Need("a", "scripted", accelerators=1), 1, engines)

    assert refusal(Need("b", "scripted", accelerators=1), engines, held).reasons.keys() == {"e1", "e2"}


def test_a_host_where_unknown_devices_are_held_is_closed_to_those_who_need_one() -> None:
    engines = [engine("e1", host="h", gpus=8)]

    assert isinstance(place(Need("a", "scripted", accelerators=1), engines, [], {"h"}), Refusal)
    assert isinstance(place(Need("a", "scripted"), engines, [], {"h"}), Booking)


def test_device_numbers_with_gaps_are_used_as_they_are() -> None:
    gaps = engine("e", gpus=0)
    gaps.node.accelerators.extend(common_pb2.Accelerator(index=i) for i in (5, 1, 7))
    choice = place(Need("a", "scripted", accelerators=2), [gaps], [])

    assert isinstance(choice, Booking)
    assert choice.accelerators == (1, 5)


def any_engine(
    host: str, gpus: int, runtimes: set[str], zone: str, draining: bool, tainted: bool, joined: bool, gib: int
) -> common_pb2.Engine:
    made = engine("", host=host, gpus=gpus, runtimes=tuple(sorted(runtimes)), labels={"zone": zone}, draining=draining)
    made.node.taints.extend(["dedicated=x"] * tainted)
    made.node.memory_bytes = gib << 30
    for device in made.node.accelerators:
        device.island = 1 + device.index // 2 if joined else 0
        device.memory_bytes = gib << 30
    return made


engines_strategy = st.lists(
    st.builds(
        any_engine,
        st.sampled_from(["h1", "h2", "h3"]),
        st.integers(0, 4),
        st.sets(st.sampled_from(["scripted", "torch"])),
        st.sampled_from("ab"),
        st.booleans(),
        st.booleans(),
        st.booleans(),
        st.sampled_from([0, 8, 16]),
    ),
    max_size=6,
)
needs_strategy = st.lists(
    st.builds(
        lambda name, runtime, gpus, zone, gib, tolerations: Need(
            name, runtime, gpus, {"zone": zone} if zone else {}, gib << 30, tolerations
        ),
        st.sampled_from("xyz"),
        st.sampled_from(["scripted", "torch"]),
        st.integers(0, 3),
        st.sampled_from(["", "a", "b"]),
        st.sampled_from([0, 4, 12]),
        st.sampled_from([frozenset[str](), frozenset({"dedicated"})]),
    ),
    max_size=12,
)


@given(engines_strategy, needs_strategy)
def test_no_device_has_two_owners_and_every_place_fits(engines: list[common_pb2.Engine], needs: list[Need]) -> None:
    """P01, P02, R12 for any engines and any needs, two engines on one host among them."""
    for i, item in enumerate(engines):
        item.id = f"e{i}"
    by_id = {item.id: item for item in engines}
    held: list[Booking] = []
    for need in needs:
        choice = place(need, engines, held)
        if isinstance(choice, Refusal):
            assert choice.reasons.keys() == by_id.keys(), "each engine has its reason"
            assert all(choice.reasons.values())
            continue
        chosen = by_id[choice.engine_id]
        assert need.runtime in chosen.runtimes
        assert chosen.state == common_pb2.ENGINE_STATE_READY
        assert need.node_labels.items() <= dict(chosen.node.labels).items()
        assert len(set(choice.accelerators)) == need.accelerators
        assert set(choice.accelerators) <= {a.index for a in chosen.node.accelerators}
        devices_of = [a for a in chosen.node.accelerators if a.index in choice.accelerators]
        assert len({a.island for a in devices_of}) <= 1, "one island"
        assert all(not a.memory_bytes or a.memory_bytes >= need.memory_bytes for a in devices_of)
        assert not chosen.node.taints or "dedicated" in need.tolerations
        if need.memory_bytes and not need.accelerators and chosen.node.memory_bytes:
            used = sum(b.memory_bytes for b in held if b.host == choice.host) + need.memory_bytes
            assert used <= chosen.node.memory_bytes, "memory of a host is given away once"
        held.append(choice)

    devices = [device for booking in held for device in booking.devices()]
    assert len(devices) == len(set(devices))
