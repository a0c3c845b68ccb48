"""Elections and fencing as a machine: three candidates with clocks of their own, one etcd, messages that come late or never.

The model knows real time; a candidate knows its own clock. What decides is ours: how long a lease is trusted, who is the oldest
candidate, whether a receiver takes a token. Two things are held against it at every moment: nobody has an effect after one of a
later term, and no two candidates trust their office at once.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from inference_runtime.coordination import Fence, FencingToken, KeyValue
from inference_runtime.coordination.fencing import oldest
from inference_runtime.coordination.lease import DEFAULT_TTL_S, valid_until
from inference_runtime.errors import StaleLeader

#: Local seconds per real second. The slowest clock that is promised to be safe: a lease is trusted for 8 of its 10 seconds.
RATES = (0.8, 1.0, 1.3)
CANDIDATES = range(len(RATES))


@dataclass
class Etcd:
    """What etcd does with leases and keys. It ends a lease at any moment after its time, never before."""

    revision: int = 1
    now: float = 0.0
    leases: dict[int, float] = field(default_factory=dict)
    keys: dict[str, KeyValue] = field(default_factory=dict)
    fenced: list[int] = field(default_factory=list)

    def put(self, key: str, lease: int) -> int:
        self.revision += 1
        self.keys[key] = KeyValue(key, b"", self.revision, self.revision, 1, lease)
        return self.revision

    def end(self, lease: int) -> None:
        self.leases.pop(lease, None)
        self.keys = {key: kv for key, kv in self.keys.items() if kv.lease_id != lease}


@dataclass
class Candidate:
    """What one process knows. `sent` is a renewal on its way, by its own clock, and whether etcd has seen it."""

    name: str
    rate: float
    lease: int = 0
    trusted_until: float = float("-inf")
    sent: tuple[float, bool] | None = None
    revision: int = 0
    won: bool = False
    token: FencingToken | None = None
    deposed: bool = False


class Elections(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.etcd = Etcd()
        self.candidates = [Candidate(f"c{i}", rate) for i, rate in enumerate(RATES)]
        self.next_lease = 0
        self.writes: list[tuple[Candidate, FencingToken]] = []
        self.orders: list[FencingToken] = []
        self.receiver, self.accepted = Fence(), [0]

    def local(self, candidate: Candidate) -> float:
        return self.etcd.now * candidate.rate

    def valid(self, candidate: Candidate) -> bool:
        return self.local(candidate) < candidate.trusted_until

    # --- time, and what goes wrong ---------------------------------------------------------------------------------------

    @rule(seconds=st.sampled_from([0.1, 1.0, 2.0, 3.0, 7.9, 8.0, 12.0]))
    def time_passes(self, seconds: float) -> None:
        """Also a pause: whoever takes no step meanwhile was paused."""
        self.etcd.now += seconds

    @rule()
    def leases_run_out(self) -> None:
        for lease, end in list(self.etcd.leases.items()):
            if self.etcd.now >= end:
                self.etcd.end(lease)

    @rule(i=st.sampled_from(CANDIDATES))
    def crash(self, i: int) -> None:
        self.candidates[i] = Candidate(f"{self.candidates[i].name}'", RATES[i])

    @rule(i=st.sampled_from(CANDIDATES))
    def an_operator_deletes_the_key(self, i: int) -> None:
        candidate = self.candidates[i]
        if self.etcd.keys.pop(candidate.name, None) is not None:
            candidate.deposed = True

    # --- leases ----------------------------------------------------------------------------------------------------------

    @rule(i=st.sampled_from(CANDIDATES), on_its_way=st.sampled_from([0.0, 0.5]))
    def take_a_lease(self, i: int, on_its_way: float) -> None:
        candidate = self.candidates[i]
        if candidate.lease in self.etcd.leases:
            return
        sent_at = self.local(candidate)
        self.etcd.now += on_its_way
        self.next_lease += 1
        self.etcd.leases[self.next_lease] = self.etcd.now + DEFAULT_TTL_S
        fresh = Candidate(candidate.name, candidate.rate, self.next_lease, valid_until(sent_at, DEFAULT_TTL_S))
        self.candidates[i] = fresh

    @rule(i=st.sampled_from(CANDIDATES))
    def send_a_renewal(self, i: int) -> None:
        candidate = self.candidates[i]
        if self.valid(candidate):
            candidate.sent = self.local(candidate), False

    @rule(i=st.sampled_from(CANDIDATES))
    def a_renewal_arrives(self, i: int) -> None:
        candidate = self.candidates[i]
        if candidate.sent is not None and candidate.lease in self.etcd.leases:
            self.etcd.leases[candidate.lease] = self.etcd.now + DEFAULT_TTL_S
            candidate.sent = candidate.sent[0], True

    @rule(i=st.sampled_from(CANDIDATES), late_s=st.sampled_from([0.0, 1.0, 5.0]))
    def a_renewal_is_answered(self, i: int, late_s: float) -> None:
        self.etcd.now += late_s
        candidate = self.candidates[i]
        if candidate.sent is not None and candidate.sent[1]:
            candidate.trusted_until = valid_until(candidate.sent[0], DEFAULT_TTL_S)
            candidate.sent = None

    # --- campaign --------------------------------------------------------------------------------------------------------

    @rule(i=st.sampled_from(CANDIDATES))
    def stand(self, i: int) -> None:
        candidate = self.candidates[i]
        if candidate.lease in self.etcd.leases and candidate.name not in self.etcd.keys and not candidate.deposed:
            candidate.revision = self.etcd.put(candidate.name, candidate.lease)

    @rule(i=st.sampled_from(CANDIDATES))
    def look(self, i: int) -> None:
        candidate = self.candidates[i]
        leader = oldest(self.etcd.keys.values())
        candidate.won = leader is not None and (leader.key, leader.create_revision) == (candidate.name, candidate.revision)

    @rule(i=st.sampled_from(CANDIDATES))
    def enter_office(self, i: int) -> None:
        """Maybe long after it looked: then its own lease is what counts."""
        candidate = self.candidates[i]
        if candidate.won and candidate.token is None and self.valid(candidate):
            candidate.token = FencingToken("r", 1, candidate.revision)

    @initialize(slow=st.booleans())
    def somebody_leads(self, slow: bool) -> None:
        for i in CANDIDATES if slow else reversed(CANDIDATES):
            self.campaign(i)

    @rule(i=st.sampled_from(CANDIDATES))
    def campaign(self, i: int) -> None:
        """Everything that leads into office, without a pause."""
        if not self.valid(self.candidates[i]):
            self.leases_run_out()
            self.take_a_lease(i, 0.0)
            self.stand(i)
        self.look(i)
        self.enter_office(i)
        self.send_an_effect(i)

    @rule(i=st.sampled_from(CANDIDATES), seconds=st.sampled_from([8.0, 10.0, 11.0, 12.0]))
    def take_over_after_a_silence(self, i: int, seconds: float) -> None:
        """Everybody was paused, or cut off; one is the first to act again."""
        self.etcd.now += seconds
        self.campaign(i)

    # --- effects ---------------------------------------------------------------------------------------------------------

    @rule(i=st.sampled_from(CANDIDATES))
    def send_an_effect(self, i: int) -> None:
        """The leader looks at its lease, then sends; what it sent may arrive at any later time."""
        candidate = self.candidates[i]
        if candidate.token is not None and self.valid(candidate):
            self.writes.append((candidate, candidate.token))
            self.orders.append(candidate.token)

    @precondition(lambda self: self.writes)
    @rule(data=st.data())
    def a_write_arrives_at_etcd(self, data: st.DataObject) -> None:
        candidate, token = self.writes.pop(data.draw(st.integers(0, len(self.writes) - 1)))
        kv = self.etcd.keys.get(candidate.name)
        if kv is not None and kv.create_revision == token.revision:  # the guard of every leader's transaction
            self.etcd.fenced.append(token.revision)

    @precondition(lambda self: self.orders)
    @rule(data=st.data())
    def an_order_arrives_at_a_receiver(self, data: st.DataObject) -> None:
        token = self.orders.pop(data.draw(st.integers(0, len(self.orders) - 1)))
        with contextlib.suppress(StaleLeader):
            self.receiver.check(token)
            self.accepted.append(token.revision)

    # --- what holds ------------------------------------------------------------------------------------------------------

    @invariant()
    def no_effect_of_a_former_leader(self) -> None:
        assert self.etcd.fenced == sorted(self.etcd.fenced)
        assert self.accepted == sorted(self.accepted)

    @invariant()
    def nobody_trusts_an_office_that_another_may_have(self) -> None:
        leading = [c for c in self.candidates if c.token is not None and self.valid(c) and not c.deposed]
        assert len(leading) <= 1, leading


TestElections = Elections.TestCase
TestElections.settings = settings(max_examples=300, stateful_step_count=30, deadline=None)
