"""The waiting room: a state machine beside a plain list, and its bounds one by one (Q01-Q04)."""

from __future__ import annotations

import math
import time
from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from inference_runtime.generation import Priority, SamplingParams
from services.engine.fairness import MAX_ABSENT, FairLane
from services.engine.queue import EXPECTED_OUTPUT_TOKENS, Waiting, WaitingRoom, cost_tokens
from services.engine.turnover import LEAST_ENDS, Turnover

AGE_S = 10
MOST_TOKENS = 50
#: What a request of each tenant costs: unlike, so that turns by requests are not taken for turns by tokens.
TOKENS = {"a": 1, "b": 10, "c": 45, "d": MOST_TOKENS}
FOREVER = math.inf


class RoomBesideAList(RuleBasedStateMachine):
    """The model is a list of (waiting, level); what the room does is judged by looking through all of it."""

    def __init__(self) -> None:
        super().__init__()
        self.room: WaitingRoom[int] = WaitingRoom(12, 300, AGE_S)
        self.model: dict[Waiting[int], int] = {}
        self.now = 0
        self.came = 0
        self.ended: Counter[int] = Counter()
        # Work served to each tenant in a lane since both of a pair wait there without a break.
        self.served: dict[tuple[int, str, str], int] = {}
        # Items of other tenants that were served before the first of a tenant that was new in its lane.
        self.newcomers: dict[tuple[int, str], Counter[str]] = {}
        self.known: set[tuple[int, str]] = set()

    def tenants(self, level: int) -> set[str]:
        return {w.tenant for w, at in self.model.items() if at == level}

    def refresh(self) -> None:
        """Pairs that do not both wait any more start anew."""
        for level in Priority:
            here = self.tenants(level)
            if not here:
                self.known = {k for k in self.known if k[0] != level}
                self.newcomers = {k: v for k, v in self.newcomers.items() if k[0] != level}
            for key in [k for k in self.served if k[0] == level and not {k[1], k[2]} <= here]:
                del self.served[key]
            for a in here:
                if (level, a) not in self.known:
                    self.known.add((level, a))
                    self.newcomers[level, a] = Counter()
                for b in here - {a}:
                    self.served.setdefault((level, a, b), 0)
            for gone in [k for k in self.newcomers if k[0] == level and k[1] not in here]:
                del self.newcomers[gone]

    @rule(
        tenant=st.sampled_from(sorted(TOKENS)),
        priority=st.sampled_from(Priority),
        patience=st.sampled_from([3, FOREVER, FOREVER]),
    )
    def put(self, tenant: str, priority: Priority, patience: float) -> None:
        tokens = TOKENS[tenant]
        fits = len(self.model) < 12 and sum(w.tokens for w in self.model) + tokens <= 300
        assert self.room.fits(tokens) == fits
        if fits:
            self.came += 1
            waiting = self.room.put(
                self.came, tenant=tenant, priority=priority, tokens=tokens, now_s=self.now, deadline_s=self.now + patience
            )
            self.model[waiting] = int(priority)
            self.refresh()

    @rule(seconds=st.sampled_from([1, 9, 10, 21]))
    def wait(self, seconds: int) -> None:
        self.now += seconds

    @rule(pair=st.sampled_from(["ac", "bd", "cd"]), priority=st.sampled_from(Priority), turns=st.integers(1, 20))
    def keep_two_tenants_busy(self, pair: str, priority: Priority, turns: int) -> None:
        for _ in range(turns):
            for tenant in pair:
                if not any(w.tenant == tenant and at == priority for w, at in self.model.items()):
                    self.put(tenant, priority, FOREVER)
                    self.put(tenant, priority, FOREVER)
            self.take()

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        waiting = data.draw(st.sampled_from(sorted(self.model, key=lambda w: w.item)))
        self.room.drop(waiting)
        self.room.drop(waiting)
        del self.model[waiting]
        self.ended[waiting.item] += 1
        self.refresh()

    @rule()
    def take(self) -> None:
        for w in self.model:
            self.model[w] = min(Priority.CRITICAL, w.priority + int(self.now - w.arrived_s) // AGE_S)
        self.refresh()
        served, expired = self.room.take(self.now)
        for w in expired:
            assert w.deadline_s <= self.now
            del self.model[w]
            self.ended[w.item] += 1
        self.refresh()
        if served is None:
            assert not self.model
            return
        level = self.model[served]
        assert served.deadline_s > self.now
        assert level == max(self.model.values()), "a higher priority, by arrival or by age, was passed over"
        equals = [w.item for w in self.model if (w.tenant, w.priority) == (served.tenant, served.priority)]
        assert served.item == min(equals), "a tenant's requests of one priority changed places"
        for key in self.served:
            if key[0] == level and key[1] == served.tenant:
                self.served[key] += served.tokens
        for (at, tenant), before in self.newcomers.items():
            if at == level and tenant != served.tenant:
                before[served.tenant] += 1
        self.newcomers.pop((level, served.tenant), None)
        del self.model[served]
        self.ended[served.item] += 1
        self.check_fairness()
        self.refresh()

    def check_fairness(self) -> None:
        for (level, a, b), tokens in self.served.items():
            other = self.served.get((level, b, a), 0)
            assert abs(tokens - other) <= 2 * MOST_TOKENS, "tenants that both wait were served unequally"
        for before in self.newcomers.values():
            assert all(items <= 1 for items in before.values()), "a newcomer waited for more than one request of another tenant"

    @invariant()
    def nothing_is_lost_or_doubled_and_bounds_hold(self) -> None:
        assert len(self.room) == len(self.model) <= 12
        assert self.room.tokens == sum(w.tokens for w in self.model) <= 300
        assert all(w.inside for w in self.model)
        assert sum(self.ended.values()) + len(self.model) == self.came
        assert set(self.ended.values()) <= {1}

    def teardown(self) -> None:
        self.now += 1
        for _ in range(len(self.model)):
            if self.model:
                self.take()
        assert not self.model


TestRoomBesideAList = RoomBesideAList.TestCase
TestRoomBesideAList.settings = settings(max_examples=60, stateful_step_count=60, deadline=None)


def put(
    room: WaitingRoom[str], item: str, tenant: str = "", priority: Priority = Priority.NORMAL, now_s: float = 0
) -> Waiting[str]:
    return room.put(item, tenant=tenant, priority=priority, tokens=10, now_s=now_s, deadline_s=FOREVER)


def drain(room: WaitingRoom[str], now_s: float = 0) -> list[str]:
    items = []
    while (served := room.take(now_s)[0]) is not None:
        items.append(served.item)
    return items


def test_one_tenant_with_a_thousand_requests_does_not_delay_another() -> None:
    """Q04: fairness by work done, not by requests in the queue."""
    room: WaitingRoom[str] = WaitingRoom(2000, 10**6)
    for i in range(1000):
        put(room, f"many-{i}", "many")
    served = [room.take(0)[0] for _ in range(5)]
    put(room, "single", "other")

    assert [w.item for w in served if w is not None] == [f"many-{i}" for i in range(5)]
    assert drain(room)[:3] == ["single", "many-5", "many-6"]


def test_a_tenant_that_comes_late_has_saved_nothing_up() -> None:
    """Q04: from then on turns are equal; it does not catch up with what the other got before."""
    room: WaitingRoom[str] = WaitingRoom(2000, 10**6)
    for _ in range(200):
        put(room, "early", "a")
    for _ in range(50):
        room.take(0)
    for _ in range(100):
        put(room, "late", "b")
    counts = Counter(w.item for w in (room.take(0)[0] for _ in range(40)) if w is not None)

    assert counts == {"early": 20, "late": 20}


def test_shares_are_equal_in_tokens_not_in_requests() -> None:
    """Q04: a tenant of long requests gets fewer of them."""
    room: WaitingRoom[str] = WaitingRoom(2000, 10**6)
    for i in range(400):
        room.put("long", tenant="a", priority=Priority.NORMAL, tokens=40, now_s=i, deadline_s=FOREVER)
        room.put("short", tenant="b", priority=Priority.NORMAL, tokens=10, now_s=i, deadline_s=FOREVER)
    counts = Counter(w.item for w in (room.take(0)[0] for _ in range(250)) if w is not None)

    assert counts["short"] == pytest.approx(4 * counts["long"], abs=4)


def test_a_tenant_pays_for_what_it_used_and_not_for_what_it_asked() -> None:
    """Q04: max_tokens is an upper bound; what was not generated is given back."""
    room: WaitingRoom[str] = WaitingRoom(2000, 10**6)
    for _ in range(300):
        put(room, "asks-much", "a")
        put(room, "uses-all", "b")
    counts: Counter[str] = Counter()
    for _ in range(110):
        waiting, _ = room.take(0)
        assert waiting is not None
        counts[waiting.item] += 1
        room.settle(waiting, 1 if waiting.item == "asks-much" else 10)

    assert counts["asks-much"] == pytest.approx(10 * counts["uses-all"], rel=0.1)


def test_background_work_is_served_within_its_bound_under_a_flood_of_critical_work() -> None:
    """Q02: after three times the age bound it is equal to the flood, and the next turn of its tenant is its own."""
    room: WaitingRoom[str] = WaitingRoom(2000, 10**6, AGE_S)
    put(room, "patient", "a", Priority.BACKGROUND, 0)
    order = []
    for now in range(100):
        put(room, f"{now}", "b", Priority.CRITICAL, now)
        put(room, f"{now}'", "b", Priority.CRITICAL, now)
        waiting, _ = room.take(now)
        assert waiting is not None
        order.append(waiting.item)

    assert 3 * AGE_S <= order.index("patient") <= 3 * AGE_S + 1


def test_the_bounds_are_requests_and_tokens() -> None:
    """Q01, Q03."""
    few: WaitingRoom[str] = WaitingRoom(2, 10**6)
    put(few, "1")
    put(few, "2")
    small: WaitingRoom[str] = WaitingRoom(100, 25)
    put(small, "1")
    first = put(small, "2")

    assert not few.fits(1)
    assert not small.fits(6)
    assert small.fits(5)
    small.drop(first)
    assert small.fits(15)


def test_expired_requests_are_handed_out_apart_and_charge_nobody() -> None:
    """They are dropped before any of their work is done."""
    room: WaitingRoom[str] = WaitingRoom(10, 1000)
    room.put("late", tenant="a", priority=Priority.HIGH, tokens=10, now_s=0, deadline_s=5)
    put(room, "mine", "a")
    put(room, "other", "b")
    served, expired = room.take(5)

    assert served is not None
    assert (served.item, [w.item for w in expired]) == ("mine", ["late"])


def test_the_work_ahead_of_a_newcomer_is_its_share_and_of_a_heavy_tenant_its_own() -> None:
    """What a refusal on arrival is decided from."""
    room: WaitingRoom[str] = WaitingRoom(2000, 10**6)
    for i in range(100):
        put(room, f"{i}", "many")

    assert room.ahead("many", Priority.NORMAL, 10) == 1000
    assert room.ahead("other", Priority.NORMAL, 10) == 10
    assert room.ahead("other", Priority.HIGH, 10) == 0
    assert room.ahead("other", Priority.BACKGROUND, 10) == 1000


def test_a_request_costs_its_prompt_and_what_it_is_expected_to_generate() -> None:
    """Q03."""
    assert cost_tokens(100, SamplingParams(max_tokens=10)) == 110
    assert cost_tokens(100, SamplingParams(max_tokens=30_000)) == 100 + EXPECTED_OUTPUT_TOKENS
    assert cost_tokens(100, SamplingParams(max_tokens=10), done=4) == 110


def test_tenants_that_come_once_and_go_are_forgotten() -> None:
    """A clock for each name that was ever seen would be a leak."""
    lane: FairLane[Waiting[str]] = FairLane()
    stays = Waiting("", "stays", Priority.NORMAL, 10**9, 0, FOREVER)
    lane.add(stays)
    lane.add(Waiting("", "stays", Priority.NORMAL, 1, 0, FOREVER))
    for i in range(10_000):
        lane.add(Waiting("", f"{i}", Priority.NORMAL, 1, 0, FOREVER))
        ticket = lane.head()
        assert ticket is not None
        lane.serve(ticket)

    assert len(lane._flows) <= MAX_ABSENT + 2
    assert len(lane._heap) <= 4 * MAX_ABSENT + 64


def test_an_operation_costs_microseconds_however_many_wait() -> None:
    """No look through the queue: ten times as many requests of ten times as many tenants cost about the same each."""

    def per_request_s(n: int) -> float:
        room: WaitingRoom[int] = WaitingRoom(n, 10**9)
        begin = time.process_time()
        for i in range(n):
            room.put(i, tenant=f"{i % (n // 10)}", priority=Priority(1 + i % 4), tokens=10, now_s=i / 100, deadline_s=FOREVER)
        for _ in range(n):
            room.take(n / 100)
        return (time.process_time() - begin) / n

    small, large = min(per_request_s(1000) for _ in range(3)), min(per_request_s(10_000) for _ in range(3))
    assert large < 5 * small + 20e-6


def test_turnover_is_known_after_one_and_does_not_count_time_with_free_places() -> None:
    """The rate behind Retry-After and refusals on arrival."""
    turnover = Turnover()
    turnover.note_end(0.0, 100, 4)  # not full: not counted
    turnover.note_full(0.0, True)
    for i in range(LEAST_ENDS):
        turnover.note_end(10.0 + i * 0.1, 100, 4)
        assert turnover.tokens_per_s(10.0 + i * 0.1) == 0.0
    turnover.note_end(10.8, 100, 4)
    assert turnover.tokens_per_s(10.8) == pytest.approx(1000.0)
    assert turnover.ends_per_s(10.8) == pytest.approx(10.0)
    turnover.note_full(10.8, False)
    turnover.note_full(500.0, True)
    assert turnover.tokens_per_s(500.0) == pytest.approx(1000.0)
    assert turnover.tokens_per_s(508.0) < 100  # nothing ended for ten times as long
    turnover.forget()
    assert turnover.tokens_per_s(508.0) == 0.0
