"""The routing table and the choice of a replica."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from inference_runtime.errors import StaleLeader
from inference_runtime.telemetry import MetricSet
from inference_runtime.v1 import common_pb2, coordinator_service_pb2
from services.gateway.routes import Route, RouteTable, choose


@dataclass
class Line:
    """A link that is up or down as the test says."""

    up: bool = True
    silence: int = 0

    @property
    def silent(self) -> bool:
        """For half a second or longer."""
        return self.silence >= 2

    def listen(self) -> None:
        """The test says what is heard."""


class Net:
    """Links by (engine id, address)."""

    def __init__(self) -> None:
        self.lines: dict[tuple[str, str], Line] = {}

    def link_to(self, engine_id: str, address: str) -> Line:
        return self.lines.setdefault((engine_id, address), Line())


def replica(name: str, *, revision: str = "r1", state: int = common_pb2.REPLICA_STATE_SERVING) -> common_pb2.Replica:
    return common_pb2.Replica(
        id=name,
        deployment="demo",
        engine_id=f"engine-of-{name}",
        address=f"{name}:1",
        revision=revision,
        state=common_pb2.ReplicaState.Name(state),
    )


def update(
    *replicas: common_pb2.Replica,
    revision: int = 1,
    snapshot: bool = True,
    term: int = 1,
    cluster: int = 7,
    loads: dict[str, int] | None = None,
) -> coordinator_service_pb2.WatchRoutesResponse:
    lines = (
        [coordinator_service_pb2.DeploymentRoute(deployment="demo", runtime="scripted", replicas=replicas)] if replicas else []
    )
    return coordinator_service_pb2.WatchRoutesResponse(
        revision=revision,
        snapshot=snapshot,
        deployments=lines,
        loads=[common_pb2.ReplicaLoad(replica_id=name, running=n) for name, n in (loads or {}).items()],
        fencing_token=common_pb2.FencingToken(role="coordinator", cluster_id=cluster, revision=term),
    )


@pytest.fixture
def net() -> Net:
    return Net()


@pytest.fixture
def table(net: Net) -> RouteTable:
    return RouteTable(net.link_to)


def test_a_snapshot_is_the_whole_table(table: RouteTable) -> None:
    assert not table.known
    table.apply(update(replica("a")))
    assert table.known
    assert table.ready
    table.apply(update(revision=2))
    assert dict(table.routes) == {}
    assert table.engines == set()


def test_a_change_leaves_other_deployments_alone(table: RouteTable) -> None:
    table.apply(update(replica("a")))
    other = coordinator_service_pb2.DeploymentRoute(deployment="other")
    table.apply(coordinator_service_pb2.WatchRoutesResponse(revision=2, deployments=[other]))
    assert sorted(table.routes) == ["demo", "other"]
    table.apply(coordinator_service_pb2.WatchRoutesResponse(revision=3, removed=["demo"]))
    assert sorted(table.routes) == ["other"]


def test_a_replica_keeps_its_requests_over_a_change(table: RouteTable) -> None:
    table.apply(update(replica("a")))
    table.routes["demo"].targets[0].in_flight = 3
    table.apply(update(replica("a"), replica("b"), revision=2))
    assert [t.in_flight for t in table.routes["demo"].targets] == [3, 0]


def test_a_replaced_coordinator_is_refused(table: RouteTable) -> None:
    table.apply(update(replica("a"), term=5))
    with pytest.raises(StaleLeader):
        table.apply(update(replica("b"), term=4, revision=9))
    assert [t.replica_id for t in table.routes["demo"].targets] == ["a"]


def test_a_table_that_is_older_than_ours_is_refused(table: RouteTable) -> None:
    table.apply(update(replica("a"), revision=10))
    with pytest.raises(StaleLeader):
        table.apply(update(revision=9, term=2))
    assert "demo" in table.routes


def test_a_new_etcd_cluster_may_start_from_the_beginning(table: RouteTable) -> None:
    table.apply(update(replica("a"), revision=10, term=5))
    table.apply(update(replica("b"), revision=1, term=1, cluster=8))
    assert [t.replica_id for t in table.routes["demo"].targets] == ["b"]


def test_a_change_wakes_those_who_wait(net: Net) -> None:
    woken: list[int] = []
    table = RouteTable(net.link_to, lambda: woken.append(1))
    table.apply(update(replica("a")))
    assert woken == [1]


def route(table: RouteTable) -> Route:
    return table.routes["demo"]


def test_only_a_serving_replica_with_an_open_session_is_chosen(table: RouteTable, net: Net) -> None:
    table.apply(update(replica("a"), replica("b", state=common_pb2.REPLICA_STATE_RESTARTING)))
    assert {choose(route(table)) for _ in range(20)} == {route(table).targets[0]}
    net.lines["engine-of-a", "a:1"].up = False
    assert choose(route(table)) is None
    assert not table.ready


def test_an_excluded_replica_and_another_revision_are_not_chosen(table: RouteTable) -> None:
    table.apply(update(replica("a"), replica("b"), replica("c", revision="r2")))
    chosen = {t.replica_id for _ in range(50) if (t := choose(route(table), {"a"}, "r1"))}
    assert chosen == {"b"}
    assert choose(route(table), {"a", "b"}, "r1") is None


def test_the_less_busy_of_two_is_chosen(table: RouteTable) -> None:
    table.apply(update(replica("a"), replica("b"), loads={"a": 3}))
    assert {t.replica_id for _ in range(20) if (t := choose(route(table)))} == {"b"}
    route(table).targets[1].in_flight = 9
    assert {t.replica_id for _ in range(20) if (t := choose(route(table)))} == {"a"}


KINDS = st.lists(st.sampled_from(["good", "down", "silent", "slow", "other revision", "tried"]), min_size=1, max_size=40)


@given(KINDS, st.booleans())
def test_the_choice_among_many_is_the_choice_among_few(kinds: list[str], same_revision: bool) -> None:
    """Only what may be chosen is, something is where there is anything, and the better kind first, at any number of replicas."""
    net = Net()
    table = RouteTable(net.link_to)
    table.apply(update(*(replica(str(at), revision="r2" if k == "other revision" else "r1") for at, k in enumerate(kinds))))
    for at, kind in enumerate(kinds):
        line = net.lines[f"engine-of-{at}", f"{at}:1"]
        line.up, line.silence = kind != "down", 9 * (kind == "silent")
        if kind == "slow":
            table.targets[str(at)].trust.limit = 0
    tried = {str(at) for at, kind in enumerate(kinds) if kind == "tried"}
    good = {"good"} if same_revision else {"good", "other revision"}
    best = next((rank for rank in (good, {"slow"}, {"silent"}) if rank & set(kinds)), None)
    for _ in range(5):
        target = choose(route(table), tried, "r1" if same_revision else "")
        assert (target is None) == (best is None)
        assert target is None or best is None or kinds[int(target.replica_id)] in best


def chosen(table: RouteTable) -> set[str]:
    """Ids of those that are chosen."""
    return {t.replica_id for _ in range(60) if (t := choose(route(table)))}


def test_a_silent_replica_is_chosen_only_where_there_is_no_other(table: RouteTable, net: Net) -> None:
    """R-03: also one that has nothing to do, and so would be the better of two."""
    table.apply(update(replica("a"), replica("b"), loads={"b": 9}))
    net.lines["engine-of-a", "a:1"].silence = 9
    assert chosen(table) == {"b"}
    assert choose(route(table), {"b"}) is route(table).targets[0]
    net.lines["engine-of-b", "b:1"].up = False
    assert chosen(table) == {"a"}


def test_where_all_are_late_the_one_that_was_heard_last_is_chosen(table: RouteTable, net: Net) -> None:
    """R-03: on a machine that starves everybody, the engine that stands still is late for longest."""
    table.apply(update(replica("a"), replica("b"), replica("c"), loads={"b": 9}))
    for name, silence in (("a", 12), ("b", 3), ("c", 8)):
        net.lines[f"engine-of-{name}", f"{name}:1"].silence = silence
    assert chosen(table) == {"b"}


def test_a_slow_replica_is_better_than_a_silent_one_and_worse_than_any_other(table: RouteTable, net: Net) -> None:
    """R-08."""
    table.apply(update(replica("a"), replica("b"), replica("c"), loads={"c": 9}))
    net.lines["engine-of-a", "a:1"].silence = 9
    table.targets["b"].trust.limit = 0
    assert chosen(table) == {"c"}
    net.lines["engine-of-c", "c:1"].silence = 9
    assert chosen(table) == {"b"}
    table.targets["b"].trust.limit = 2
    net.lines["engine-of-c", "c:1"].silence = 0
    table.targets["b"].in_flight = 1
    assert chosen(table) == {"b"}  # on trial, with less to do than the other
    table.targets["b"].in_flight = 2
    assert chosen(table) == {"c"}


def test_r_08_the_table_puts_a_slow_replica_aside_and_shows_it(net: Net) -> None:
    metrics = MetricSet()
    table = RouteTable(net.link_to, metrics=metrics)
    table.apply(update(replica("a"), replica("b"), replica("c")))
    for second in range(8):
        for name, token_s in (("a", 0.4), ("b", 0.02), ("c", 0.02)):
            for answer in range(3):
                table.targets[name].pace.went_on(answer, 1.0, int(1 / token_s))
        table.sweep(100.0 + second)
    assert chosen(table) == {"b", "c"}
    assert table.shunned() == {"slow": ["a"]}
    text = metrics.prometheus_text().decode()
    assert 'inference_replicas_ejected{deployment="demo"} 1' in text
    assert 'inference_replicas_silent{deployment="demo"} 0' in text
    assert 'inference_replica_ejections_total{deployment="demo"} 1' in text
    net.lines["engine-of-a", "a:1"].up = False
    table.sweep(109.0)
    assert table.shunned() == {}


def test_a_line_that_names_no_limits_has_those_of_the_gateway(table: RouteTable) -> None:
    """O01: every phase has a limit. A coordinator that is one version older sends no limit from chunk to chunk."""
    table.apply(update(replica("a")))
    line = route(table)
    assert (line.first_chunk_timeout_s, line.next_chunk_timeout_s, line.total_timeout_s) == (60.0, 10.0, 600.0)


def test_load_spreads_over_equal_replicas(table: RouteTable) -> None:
    table.apply(update(*(replica(name) for name in "abcd")))
    counts: Counter[str] = Counter()
    for _ in range(400):
        target = choose(route(table))
        assert target is not None
        target.in_flight += 1
        counts[target.replica_id] += 1
    assert min(counts.values()) > 90
    assert len(counts) == 4
