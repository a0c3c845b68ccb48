"""What to do next for one deployment: single decisions, then whole histories in a small simulated cluster."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from inference_runtime.deployment import DeploymentSpec, Serving, revision_of
from inference_runtime.v1 import common_pb2, deployment_pb2
from inference_runtime.wire import spec_from_proto, spec_to_proto
from services.deployment_manager.rollout import Plan, World, plan_deployment
from tests.unit.deployment_manager.test_placement import engine

State = deployment_pb2.DeploymentState
LOADING, SERVING = common_pb2.REPLICA_STATE_LOADING, common_pb2.REPLICA_STATE_SERVING
FAILED, DRAINING = common_pb2.REPLICA_STATE_FAILED, common_pb2.REPLICA_STATE_DRAINING


def deployment(replicas: int = 1, *, generation: int = 1, model: str = "m", accelerators: int = 0) -> deployment_pb2.Deployment:
    spec = DeploymentSpec(name="a", model=model, runtime="scripted", replicas=replicas, accelerators=accelerators)
    return deployment_pb2.Deployment(
        spec=spec_to_proto(spec), generation=generation, runtime="scripted", revision=revision_of(spec, "scripted")
    )


@dataclass
class Cluster:
    """A cluster in memory: it does what plans say, as engines would."""

    engines: dict[str, common_pb2.Engine]
    gone: set[str] = field(default_factory=set)
    assignments: dict[str, common_pb2.Assignment] = field(default_factory=dict)
    replicas: dict[str, common_pb2.Replica] = field(default_factory=dict)
    leaving: list[common_pb2.Assignment] = field(default_factory=list)
    hosts: dict[str, str] = field(default_factory=dict)
    made: int = 0

    def world(self) -> World:
        self.hosts |= {e.id: e.node.hostname for e in self.engines.values()}
        self.leaving = [a for a in self.leaving if a.replica_id in self.replicas]
        return World(self.engines, self.gone, self.assignments, self.replicas, self.leaving, self.hosts)

    def step(self, wanted: deployment_pb2.Deployment) -> Plan:
        """One look and what follows from it."""
        plan = plan_deployment(wanted, self.world())
        for booking in plan.place:
            self.made += 1
            replica_id = f"r{self.made:03d}"
            self.assignments[replica_id] = common_pb2.Assignment(
                replica_id=replica_id,
                engine_id=booking.engine_id,
                deployment=booking.deployment,
                spec=wanted.spec,
                generation=wanted.generation,
                revision=wanted.revision,
                accelerators=booking.accelerators,
            )
            self.replicas[replica_id] = common_pb2.Replica(
                id=replica_id, deployment=booking.deployment, engine_id=booking.engine_id, state=LOADING
            )
        for assignment in plan.remove:
            del self.assignments[assignment.replica_id]
            if assignment.replica_id in self.replicas:
                self.replicas[assignment.replica_id].state = DRAINING
                self.leaving.append(assignment)
        return plan

    def load(self) -> None:
        """What loads, serves; what drains, is gone."""
        for replica in list(self.replicas.values()):
            if replica.state == LOADING:
                replica.state = SERVING
            elif replica.state == DRAINING:
                del self.replicas[replica.id]

    def lose(self, engine_id: str) -> None:
        """The engine's lease is lost for good."""
        del self.engines[engine_id]
        self.gone.add(engine_id)
        self.replicas = {k: r for k, r in self.replicas.items() if r.engine_id != engine_id}

    def settle(self, wanted: deployment_pb2.Deployment) -> Plan:
        """Look and follow until nothing is left to do."""
        for _ in range(200):
            plan = self.step(wanted)
            before = [(r.id, r.state) for r in self.replicas.values()]
            self.load()
            if not plan.place and not plan.remove and before == [(r.id, r.state) for r in self.replicas.values()]:
                return plan
        raise AssertionError("the plan never comes to rest")

    def serving(self) -> list[str]:
        return [r.id for r in self.replicas.values() if r.state == SERVING]


def cluster(*engines: common_pb2.Engine) -> Cluster:
    return Cluster({e.id: e for e in engines})


def test_a_deployment_goes_from_pending_to_loading_to_serving() -> None:
    """R04."""
    c = cluster()
    plan = c.step(deployment())
    assert (plan.state, plan.reason) == (State.DEPLOYMENT_STATE_PENDING, "no engine is registered; start one")

    c.engines["e1"] = engine("e1")
    assert len(c.step(deployment()).place) == 1
    plan = c.step(deployment())
    assert (plan.state, plan.reason) == (State.DEPLOYMENT_STATE_LOADING, "0 of 1 replicas serve")

    c.load()
    plan = c.step(deployment())
    assert (plan.state, plan.reason, plan.ready) == (State.DEPLOYMENT_STATE_SERVING, "", 1)
    assert not plan.place
    assert not plan.remove


def test_some_of_the_replicas_is_degraded() -> None:
    c = cluster(engine("e1"), engine("e2"))
    c.settle(deployment(2))
    c.replicas["r001"].state = common_pb2.REPLICA_STATE_RESTARTING
    plan = c.step(deployment(2))

    assert (plan.state, plan.reason, plan.ready) == (State.DEPLOYMENT_STATE_DEGRADED, "1 of 2 replicas serve", 1)
    assert not plan.place, "a restart is the engine's work"


def test_a_replica_that_gave_up_fails_the_deployment_with_its_reason() -> None:
    c = cluster(engine("e1"))
    c.settle(deployment())
    c.replicas["r001"].state, c.replicas["r001"].reason = FAILED, "model m is not there"
    plan = c.step(deployment())

    assert plan.state == State.DEPLOYMENT_STATE_FAILED
    assert plan.reason == "0 of 1 replicas serve; replica r001 failed: model m is not there"
    assert not plan.place, "trying the same again would fail the same way, for ever"


def test_no_replica_asked_for_is_served_by_none() -> None:
    c = cluster(engine("e1"))
    c.settle(deployment(2))
    plan = c.settle(deployment(0))

    assert (plan.state, plan.reason) == (State.DEPLOYMENT_STATE_SERVING, "no replica is asked for")
    assert not c.replicas


def test_fewer_replicas_takes_back_those_that_do_not_serve_first() -> None:
    c = cluster(engine("e1"), engine("e2"), engine("e3"))
    c.settle(deployment(3))
    c.replicas["r002"].state = FAILED
    c.step(deployment(2, generation=2))

    assert sorted(c.assignments) == ["r001", "r003"]


def test_more_replicas_leaves_those_that_run_alone() -> None:
    c = cluster(engine("e1"), engine("e2"))
    c.settle(deployment(1))
    c.settle(deployment(2, generation=2))

    assert c.serving() == ["r001", "r002"]


def test_a_changed_model_is_rolled_one_by_one_and_capacity_never_falls() -> None:
    c = cluster(engine("e1"), engine("e2"))
    c.settle(deployment(3))
    new = deployment(3, generation=2, model="m2")
    for _ in range(20):
        c.step(new)
        assert len(c.serving()) >= 3
        assert len(c.assignments) <= 4, "one more than asked for, at most"
        c.load()

    assert {a.generation for a in c.assignments.values()} == {2}
    assert plan_deployment(new, c.world()).state == State.DEPLOYMENT_STATE_SERVING


def test_old_replicas_serve_while_new_ones_fail() -> None:
    c = cluster(engine("e1"))
    c.settle(deployment(1))
    new = deployment(1, generation=2, model="m2")
    c.step(new)
    c.replicas["r002"].state = FAILED
    for _ in range(5):
        plan = c.step(new)

    assert c.serving() == ["r001"]
    assert (plan.state, plan.ready) == (State.DEPLOYMENT_STATE_DEGRADED, 0)


def test_without_room_the_old_goes_first_one_at_a_time() -> None:
    c = cluster(engine("e1", gpus=2))
    c.settle(deployment(2, accelerators=1))
    new = deployment(2, generation=2, model="m2", accelerators=1)
    for _ in range(20):
        c.step(new)
        assert len(c.serving()) >= 1
        c.load()

    assert {a.generation for a in c.assignments.values()} == {2}
    assert len(c.serving()) == 2


def test_while_one_old_replica_leaves_the_next_one_stays() -> None:
    """Draining takes minutes; the plan is asked for again all the time."""
    c = cluster(engine("e1", gpus=2))
    c.settle(deployment(2, accelerators=1))
    for _ in range(5):
        c.step(deployment(2, generation=2, model="m2", accelerators=1))

    assert len(c.serving()) == 1
    assert len(c.assignments) == 1


def test_the_old_stays_where_its_going_would_not_help() -> None:
    c = cluster(engine("e1", gpus=1))
    c.settle(deployment(1, accelerators=1))
    plan = c.settle(deployment(1, generation=2, model="m2", accelerators=8))

    assert c.serving() == ["r001"]
    assert plan.state == State.DEPLOYMENT_STATE_DEGRADED
    assert "its node has 1 accelerators, 8 are needed" in plan.reason


def test_a_lost_engine_s_replicas_find_another_place() -> None:
    c = cluster(engine("e1"), engine("e2"))
    c.settle(deployment(2))
    c.lose("e1")
    plan = c.settle(deployment(2))

    assert {a.engine_id for a in c.assignments.values()} == {"e2"}
    assert (plan.state, plan.ready) == (State.DEPLOYMENT_STATE_SERVING, 2)


def test_assignments_wait_for_a_lost_engine_while_there_is_no_other_place() -> None:
    """All engines away at once means that etcd lost them, not that they died: they find their assignments when they are back."""
    c = cluster(engine("e1"), engine("e2"))
    c.settle(deployment(2))
    before = dict(c.assignments)
    c.lose("e1")
    c.lose("e2")
    plan = c.settle(deployment(2))

    assert c.assignments == before
    assert plan.state == State.DEPLOYMENT_STATE_PENDING


def test_an_engine_that_is_missing_for_a_moment_keeps_its_replicas() -> None:
    c = cluster(engine("e1"), engine("e2"))
    c.settle(deployment(2))
    c.lose("e1")
    c.gone.clear()
    plan = c.step(deployment(2))

    assert not plan.place
    assert not plan.remove
    assert plan.state == State.DEPLOYMENT_STATE_DEGRADED


def test_a_draining_engine_is_left_after_its_replacement_serves() -> None:
    c = cluster(engine("e1"), engine("e2"))
    c.settle(deployment(1))
    c.engines["e1"].state = common_pb2.ENGINE_STATE_DRAINING
    c.step(deployment(1))
    assert c.serving() == ["r001"]
    c.settle(deployment(1))

    assert [a.engine_id for a in c.assignments.values()] == ["e2"]


def test_devices_of_a_replica_that_still_drains_stay_booked() -> None:
    """P01 in time: the old context must be gone before its device is given away."""
    c = cluster(engine("e1", gpus=1))
    c.settle(deployment(1, accelerators=1))
    other = deployment(1, accelerators=1)
    other.spec.name = "b"
    gone = deployment(0, generation=2, accelerators=1)
    c.step(gone)

    assert not c.assignments
    assert not c.step(other).place
    c.load()
    assert len(c.step(other).place) == 1


def test_a_running_replica_that_nobody_remembers_closes_its_host() -> None:
    """After a hand-over the new leader does not know what a draining replica holds."""
    c = cluster(engine("e1", gpus=4))
    c.settle(deployment(1, accelerators=1))
    c.assignments.clear()

    assert not plan_deployment(deployment(1, accelerators=1), c.world()).place
    assert plan_deployment(deployment(1), c.world()).place


def test_deletion_drains_then_forgets() -> None:
    """R04: deleting, drained, removed."""
    c = cluster(engine("e1"))
    c.settle(deployment(2))
    wanted = deployment(2)
    wanted.deleting = True
    plan = c.step(wanted)
    assert (plan.state, plan.forget) == (State.DEPLOYMENT_STATE_DRAINING, False)
    assert not c.assignments

    plan = c.step(wanted)
    assert (plan.reason, plan.forget) == ("2 replicas finish what they have", False)
    c.load()
    assert c.step(wanted).forget


@pytest.mark.parametrize(
    ("change", "replaced"),
    [
        ({"model": "m2"}, True),
        ({"runtime_config": {"pace_ms": 1}}, True),
        ({"serving": Serving(max_concurrent=3)}, True),
        ({"accelerators": 1}, True),
        ({"replicas": 2}, False),
        ({"node_labels": {"zone": "a"}}, False),
    ],
)
def test_what_changes_a_replica_and_what_does_not(change: dict[str, object], replaced: bool) -> None:
    c = cluster(engine("e1", gpus=4, labels={"zone": "a"}))
    c.settle(deployment(1))
    spec = spec_from_proto(deployment(1).spec).model_copy(update=change)
    c.settle(
        deployment_pb2.Deployment(
            spec=spec_to_proto(spec), generation=2, runtime="scripted", revision=revision_of(spec, "scripted")
        )
    )

    assert ("r001" not in c.assignments) is replaced


def test_a_replica_leaves_a_node_that_no_longer_fits() -> None:
    c = cluster(engine("e1"), engine("e2", labels={"zone": "a"}))
    c.settle(deployment(1))
    assert [a.engine_id for a in c.assignments.values()] == ["e1"]
    wanted = deployment(1, generation=2)
    wanted.spec.node_labels["zone"] = "a"
    c.settle(wanted)

    assert [a.engine_id for a in c.assignments.values()] == ["e2"]


def test_a_replica_leaves_a_device_that_is_broken() -> None:
    """It gets another one where there is one; without, it stays with its reason until a person repairs what is broken."""
    c = cluster(engine("e1", gpus=2))
    wanted = deployment(accelerators=1)
    c.settle(wanted)
    (first,) = c.assignments.values()
    assert tuple(first.accelerators) == (0,)
    c.engines["e1"].node.accelerators[0].unschedulable = "its memory is broken"
    c.replicas[first.replica_id].state = FAILED
    plan = c.settle(wanted)
    assert plan.state == State.DEPLOYMENT_STATE_SERVING
    (second,) = c.assignments.values()
    assert tuple(second.accelerators) == (1,)
    c.engines["e1"].node.accelerators[1].unschedulable = "so is this one"
    c.replicas[second.replica_id].state = FAILED
    plan = c.settle(wanted)
    assert not plan.ready
    assert "so is this one" in plan.reason


@dataclass(frozen=True)
class Act:
    kind: str
    number: int


acts = st.lists(
    st.builds(
        Act,
        st.sampled_from(["step", "load", "lose", "return", "drain", "fail", "change", "scale", "gpus", "remember_nothing"]),
        st.integers(0, 5),
    ),
    max_size=40,
)


@given(acts)
@settings(max_examples=150, deadline=None)
def test_whatever_happens_no_device_has_two_owners_and_it_comes_to_rest(history: list[Act]) -> None:
    """P01 over time, R12: losses, drains, changes and hand-overs in any order; two engines share one host."""
    spares = {f"e{i}": engine(f"e{i}", host=f"h{i // 2}", gpus=2) for i in range(4)}
    c = cluster(*(replace_engine(e) for e in spares.values()))
    wanted, model, gpus, replicas, generation = deployment(2, accelerators=1), 1, 1, 2, 1
    for act in history:
        ids = sorted(c.engines)
        match act.kind:
            case "step":
                c.step(wanted)
            case "load":
                c.load()
            case "lose" if ids:
                c.lose(ids[act.number % len(ids)])
            case "return":
                back = f"e{act.number % 4}"
                if back not in c.engines:  # a new process on the same host, under a new name
                    name = f"{back}x{len(c.gone)}"
                    c.engines[name] = replace_engine(spares[back], name)
            case "drain" if ids:
                c.engines[ids[act.number % len(ids)]].state = common_pb2.ENGINE_STATE_DRAINING
            case "fail" if c.replicas:
                c.replicas[sorted(c.replicas)[act.number % len(c.replicas)]].state = FAILED
            case "remember_nothing":
                c.leaving.clear()
            case "change" | "scale" | "gpus":
                generation += 1
                model, replicas, gpus = (
                    model + (act.kind == "change"),
                    act.number if act.kind == "scale" else replicas,
                    act.number % 3 if act.kind == "gpus" else gpus,
                )
                wanted = deployment(replicas, generation=generation, model=f"m{model}", accelerators=gpus)
        check_devices(c)
    plan = c.settle(wanted)
    check_devices(c)
    ready = [a for a in c.assignments.values() if a.replica_id in c.serving() and same(a, wanted)]
    drained = {e.id for e in c.engines.values() if e.state == common_pb2.ENGINE_STATE_DRAINING}
    assert plan.ready == len([a for a in ready if a.engine_id not in drained])


def same(assignment: common_pb2.Assignment, wanted: deployment_pb2.Deployment) -> bool:
    return assignment.revision == wanted.revision and assignment.spec.accelerators == wanted.spec.accelerators


def replace_engine(template: common_pb2.Engine, name: str = "") -> common_pb2.Engine:
    copy = common_pb2.Engine()
    copy.CopyFrom(template)
    copy.id = name or template.id
    return copy


def check_devices(c: Cluster) -> None:
    """Every device of a living engine's host has at most one owner among the replicas that run."""
    world = replace(c.world(), replicas=c.replicas)
    assigned = {**c.assignments, **{a.replica_id: a for a in c.leaving}}
    owners: dict[tuple[str, int], str] = {}
    for replica in c.replicas.values():
        for index in assigned[replica.id].accelerators if replica.id in assigned else ():
            device = (world.host(replica.engine_id), index)
            assert owners.setdefault(device, replica.id) == replica.id, f"{device} belongs to two replicas"
