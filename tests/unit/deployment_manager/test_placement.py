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


engines_strategy = st.lists(
    st.builds(
        lambda host, gpus, runtimes, zone, draining: engine(
            "", host=host, gpus=gpus, runtimes=tuple(sorted(runtimes)), labels={"zone": zone}, draining=draining
        ),
        st.sampled_from(["h1", "h2", "h3"]),
        st.integers(0, 4),
        st.sets(st.sampled_from(["scripted", "torch"])),
        st.sampled_from("ab"),
        st.booleans(),
    ),
    max_size=6,
)
needs_strategy = st.lists(
    st.builds(
        lambda name, runtime, gpus, zone: Need(name, runtime, gpus, {"zone": zone} if zone else {}),
        st.sampled_from("xyz"),
        st.sampled_from(["scripted", "torch"]),
        st.integers(0, 3),
        st.sampled_from(["", "a", "b"]),
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
        held.append(choice)

    devices = [device for booking in held for device in booking.devices()]
    assert len(devices) == len(set(devices))
