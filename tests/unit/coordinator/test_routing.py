"""The routing table as a value."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from inference_runtime.v1 import common_pb2, coordinator_service_pb2, deployment_pb2
from inference_runtime.wire import duration
from services.coordinator.routing import RouteTable, apply_change, build_table, diff_tables

SERVING = common_pb2.REPLICA_STATE_SERVING


def deployment(name: str, *, deleting: bool = False, generation: int = 1) -> deployment_pb2.Deployment:
    timeouts = deployment_pb2.Timeouts(first_chunk=duration(5), next_chunk=duration(4), total=duration(50))
    spec = deployment_pb2.DeploymentSpec(name=name, timeouts=timeouts)
    return deployment_pb2.Deployment(spec=spec, generation=generation, runtime="scripted", deleting=deleting)


def replica(replica_id: str, of: str, engine: str = "e", state: common_pb2.ReplicaState = SERVING) -> common_pb2.Replica:
    return common_pb2.Replica(id=replica_id, deployment=of, engine_id=engine, state=state)


def test_a_line_carries_what_a_gateway_needs() -> None:
    table = build_table(7, [deployment("a", generation=3)], [replica("r2", "a"), replica("r1", "a")], {})

    line = table.lines["a"]
    assert [r.id for r in line.replicas] == ["r1", "r2"]
    assert (line.runtime, line.generation, line.first_chunk_timeout.seconds, line.total_timeout.seconds) == ("scripted", 3, 5, 50)
    assert line.next_chunk_timeout.seconds == 4
    assert table.revision == 7


def test_a_deployment_nobody_serves_has_a_line_and_no_replica() -> None:
    """A gateway answers 503 for it, not 404 (R03)."""
    table = build_table(1, [deployment("a")], [replica("r", "a", state=common_pb2.REPLICA_STATE_LOADING)], {})

    assert table.lines.keys() == {"a"}
    assert not table.lines["a"].replicas


def test_only_replicas_that_serve_are_in_the_table() -> None:
    replicas = [replica(f"r{s}", "a") for s in common_pb2.ReplicaState.values() if s != SERVING]
    for other in replicas:
        other.state = int(other.id[1:])  # type: ignore[assignment]

    assert build_table(1, [deployment("a")], replicas, {}).replica_ids() == frozenset()


def test_replicas_of_a_draining_engine_take_nothing_new() -> None:
    engines = {
        "old": common_pb2.Engine(id="old", state=common_pb2.ENGINE_STATE_DRAINING),
        "new": common_pb2.Engine(id="new", state=common_pb2.ENGINE_STATE_READY),
    }
    table = build_table(1, [deployment("a")], [replica("r1", "a", "old"), replica("r2", "a", "new")], engines)

    assert table.replica_ids() == {"r2"}


def test_a_replica_seen_before_its_engine_counts() -> None:
    assert build_table(1, [deployment("a")], [replica("r", "a", "unseen")], {}).replica_ids() == {"r"}


def test_a_deployment_that_is_deleted_and_one_that_never_was_have_no_line() -> None:
    table = build_table(1, [deployment("a", deleting=True)], [replica("r", "a"), replica("s", "b")], {})

    assert not table.lines


def test_equal_tables_differ_in_nothing() -> None:
    one, other = (build_table(3, [deployment("a")], [replica("r", "a")], {}) for _ in range(2))

    assert not diff_tables(one, other)


lines = st.dictionaries(
    st.sampled_from("abcdef"),
    st.builds(
        lambda replicas, generation: coordinator_service_pb2.DeploymentRoute(
            generation=generation, replicas=[common_pb2.Replica(id=r) for r in sorted(replicas)]
        ),
        st.sets(st.sampled_from(["r1", "r2", "r3"])),
        st.integers(1, 3),
    ),
)
tables = st.builds(RouteTable, st.integers(0, 9), lines)


@given(tables, tables)
def test_a_change_turns_one_table_into_the_other(old: RouteTable, new: RouteTable) -> None:
    change = diff_tables(old, new)

    assert apply_change(old, change).lines == new.lines
    assert all(old.lines.get(name) != line for name, line in change.changed.items())
    assert not change.removed & new.lines.keys()


@given(st.lists(tables, min_size=1))
def test_the_revision_never_falls(history: list[RouteTable]) -> None:
    held, revisions = RouteTable(), [0]
    for table in history:
        change = diff_tables(held, table)
        held = apply_change(held, change)
        revisions.append(change.revision)

    assert revisions == sorted(revisions)
