"""The drain: its stages one by one, and any order of requests, ends, time and signals against a model that loses nothing."""

from __future__ import annotations

import asyncio
from itertools import count

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from inference_runtime.rpc import Drain, Stage

TIMEOUT_S, NOTICE_S = 10.0, 2.0


def begun(timeout_s: float = TIMEOUT_S, notice_s: float = NOTICE_S) -> Drain:
    """A drain that began at 0."""
    drain = Drain(timeout_s, notice_s)
    drain.begin(0.0)
    return drain


def settled(drain: Drain, now: float, running: int, callers: int) -> Stage:
    """Look until that changes nothing."""
    while drain.look(now, running, callers) is not (stage := drain.look(now, running, callers)):
        pass
    return stage


@pytest.mark.parametrize(
    ("now", "running", "callers", "stage", "admits"),
    [
        pytest.param(0.0, 1, 1, Stage.NOTICE, True, id="who has not heard is served"),
        pytest.param(1.9, 0, 1, Stage.NOTICE, True, id="also while nothing runs: somebody may be on the way"),
        pytest.param(0.0, 0, 0, Stage.OVER, False, id="nothing runs and nobody can come: at once"),
        pytest.param(0.0, 1, 0, Stage.NOTICE, True, id="nobody can come yet something runs"),
        pytest.param(2.0, 1, 1, Stage.CLOSED, False, id="the notice is over"),
        pytest.param(2.0, 0, 1, Stage.OVER, False, id="the notice is over and nothing runs"),
        pytest.param(9.9, 1, 1, Stage.CLOSED, False, id="what runs goes on"),
        pytest.param(10.0, 1, 1, Stage.OVER, False, id="time is up"),
    ],
)
def test_how_far_a_drain_is(now: float, running: int, callers: int, stage: Stage, admits: bool) -> None:
    drain = begun()

    assert settled(drain, now, running, callers) is stage
    assert drain.admits is admits


def test_nothing_happens_before_somebody_asks() -> None:
    drain = Drain(TIMEOUT_S, NOTICE_S)

    assert drain.look(1e9, 0, 0) is Stage.OPEN
    assert drain.admits


def test_asking_again_does_not_begin_anew() -> None:
    """A second wish to drain is no longer drain."""
    drain = begun()
    drain.begin(9.0)

    assert drain.left_s(9.0) == 1.0
    assert settled(drain, 10.0, 1, 1) is Stage.OVER


def test_what_comes_in_while_the_door_is_being_closed_counts() -> None:
    """Between the notice and the end there is always a moment in which nothing new is taken and what came last is seen."""
    drain = begun()

    assert drain.look(2.0, 0, 1) is Stage.CLOSED
    assert drain.look(2.0, 1, 1) is Stage.CLOSED
    assert drain.look(2.0, 0, 1) is Stage.OVER


def test_without_time_everything_is_over_at_once() -> None:
    assert settled(begun(timeout_s=0.0), 0.0, 5, 5) is Stage.OVER


def test_a_notice_is_never_longer_than_the_whole() -> None:
    drain = begun(timeout_s=1.0, notice_s=5.0)

    assert drain.look(0.9, 1, 1) is Stage.NOTICE
    assert settled(drain, 1.0, 1, 1) is Stage.OVER


async def test_waiting_ends_at_the_asked_stage_with_what_still_runs() -> None:
    drain = Drain(timeout_s=0.1, notice_s=0.0)

    assert await drain.until(Stage.CLOSED, lambda: 3, lambda: 1) == 3
    assert drain.stage is Stage.CLOSED
    assert await drain.until(Stage.OVER, lambda: 3, lambda: 1) == 3


async def test_waiting_sees_the_last_request_end() -> None:
    running = {1}
    drain = Drain(timeout_s=60.0, notice_s=0.0)
    asyncio.get_running_loop().call_later(0.05, running.clear)

    async with asyncio.timeout(30):
        assert await drain.until(Stage.OVER, lambda: len(running), lambda: 1) == 0


class Engine:
    """An engine of the model: a real drain, and the requests that run here."""

    def __init__(self) -> None:
        self.drain = Drain(TIMEOUT_S, NOTICE_S)
        self.running: set[int] = set()
        self.began_at: float | None = None
        self.told = False  # the gateway has heard that it drains
        self.alive = True


class Draining(RuleBasedStateMachine):
    """Engines that are stopped and started in any order, and a gateway that hears of it late. A request is on its way to an
    engine, runs there, or is answered. One that is refused, handed over, or was at an engine that ended at once is sent again.
    None is ever nowhere or in two places, and in the end all are answered."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.numbers = count()
        self.engines = [Engine() for _ in range(3)]
        self.on_the_way: dict[int, Engine] = {}
        self.answered: list[int] = []
        self.sent = 0
        #: Requests that may have moved, because their engine ran out of time, was told twice, or took nothing any more.
        self.may_move: set[int] = set()
        self.moved: set[int] = set()

    # --- the gateway ---

    def choose(self) -> Engine | None:
        """An engine that the gateway believes to take requests."""
        return next((e for e in self.engines if e.alive and not e.told), None)

    def send(self, number: int, *, again: bool = False) -> None:
        if again:
            self.moved.add(number)
        engine = self.choose()
        assert engine is not None, "one engine always stays"
        self.on_the_way[number] = engine

    @rule()
    def request(self) -> None:
        """A client asks."""
        self.sent += 1
        self.send(next(self.numbers))

    @precondition(lambda self: self.on_the_way)
    @rule(data=st.data())
    def arrive(self, data: st.DataObject) -> None:
        """A request comes to its engine, in time or late."""
        number = data.draw(st.sampled_from(sorted(self.on_the_way)))
        engine = self.on_the_way.pop(number)
        if engine.alive and engine.drain.admits:
            engine.running.add(number)
            return
        in_time = engine.alive and engine.began_at is not None and self.now < engine.began_at + NOTICE_S
        assert not in_time or not (engine.running or not engine.told), "refused while the notice lasts"
        self.may_move.add(number)
        engine.told = True
        self.send(number, again=True)

    @rule(data=st.data())
    def hear(self, data: st.DataObject) -> None:
        """The news that an engine drains reaches the gateway."""
        engine = data.draw(st.sampled_from(self.engines))
        engine.told = engine.told or engine.began_at is not None

    # --- the engines ---

    @rule(data=st.data())
    def answer(self, data: st.DataObject) -> None:
        """A request ends."""
        engine = data.draw(st.sampled_from(self.engines))
        if engine.running:
            number = data.draw(st.sampled_from(sorted(engine.running)))
            engine.running.remove(number)
            self.answered.append(number)

    @rule(data=st.data())
    def signal(self, data: st.DataObject) -> None:
        """SIGTERM: the first one drains, the second one ends the process. The last engine is left alone."""
        engine = data.draw(st.sampled_from(self.engines))
        if not any(e is not engine and e.alive and e.began_at is None for e in self.engines) or not engine.alive:
            return
        if engine.began_at is None:
            engine.began_at = self.now
            engine.drain.begin(self.now)
        else:
            self.end(engine)

    def end(self, engine: Engine) -> None:
        """The process is gone; the gateway notices, and sends what was there elsewhere."""
        engine.alive, engine.told = False, True
        lost, engine.running = engine.running, set()
        self.may_move |= lost
        for number in lost:
            self.send(number, again=True)

    @rule(seconds=st.sampled_from([0.0, 0.1, 1.0, NOTICE_S, 5.0, TIMEOUT_S]))
    def time_goes_by(self, seconds: float) -> None:
        """Often a little, sometimes much."""
        self.now += seconds

    @rule(data=st.data())
    def look(self, data: st.DataObject) -> None:
        """What the shell around a drain does all the time."""
        engine = data.draw(st.sampled_from(self.engines))
        if not engine.alive or engine.began_at is None:
            return
        age_s = self.now - engine.began_at
        stage = settled(engine.drain, self.now, len(engine.running), 0 if engine.told else 1)
        if stage is Stage.OVER:
            assert not engine.running or age_s >= TIMEOUT_S, "handed over before its time was up"
            assert engine.told or age_s >= NOTICE_S, "gone before somebody could hear of it"
            self.end(engine)
        else:
            assert age_s < TIMEOUT_S, "it runs for longer than it may"
            assert engine.running or stage is Stage.NOTICE, "nothing runs, and it waits"
            assert age_s < NOTICE_S or not engine.drain.admits, "it takes requests after the notice"

    @rule(data=st.data())
    def restart(self, data: st.DataObject) -> None:
        """An engine that ended comes back."""
        at = data.draw(st.integers(0, len(self.engines) - 1))
        if not self.engines[at].alive:
            self.engines[at] = Engine()

    # --- what always holds ---

    @invariant()
    def every_request_is_in_one_place(self) -> None:
        """Nothing lost, nothing twice."""
        places = [*self.on_the_way, *self.answered, *(n for e in self.engines for n in e.running)]
        assert sorted(places) == list(range(self.sent))

    @invariant()
    def nobody_moves_without_need(self) -> None:
        """A drain that has time enough costs no request anything."""
        assert self.moved <= self.may_move

    def teardown(self) -> None:
        """Let everything arrive and end: all are answered, each once."""
        while self.on_the_way:
            number, engine = self.on_the_way.popitem()
            if engine.alive and engine.drain.admits:
                engine.running.add(number)
            else:
                engine.told = True
                self.send(number, again=True)
        for engine in self.engines:
            self.answered += engine.running
        assert sorted(self.answered) == list(range(self.sent))


TestDraining = Draining.TestCase
TestDraining.settings = settings(max_examples=200, stateful_step_count=50, deadline=None)
