"""Which replicas of a deployment are so much slower than the others that they get nothing new for a while. Pure.

A replica that answers at a fifth of its peers' pace or worse is put aside for ten seconds and then tried with two requests at a
time: what those take decides whether it is one of its peers again or put aside for twice as long. It is compared with the middle
of the deployment's own replicas at the same time, so that load, model and prompts are the same for all. Answers that run there
go on.

It is a preference and no more: where nobody else is left, a slow replica is asked. It is weak where replicas differ by design (a
fast and a slow kind of accelerator under one deployment), and it says nothing of a deployment most of whose replicas are slow.
"""

from __future__ import annotations

import enum
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from services.gateway.pace import Pace

__all__ = ["EjectionRule", "Member", "Standing", "Trust", "review"]


@dataclass(frozen=True, slots=True)
class EjectionRule:
    """The numbers.

    Args:
        factor: So many times slower than the middle is slow.
        token_margin_s: And at least so much slower for a token: a pace that nobody notices is no fault. Seconds.
        first_margin_s: And for the first token. Seconds.
        least_busy_s: Time of begun answers that a judgement, or a pace to compare with, needs; of all answers together, seconds.
        least_turns: Reviews in a row that must have seen it busy, so that many answers that stall for a moment are no proof.
        least_answers: Answers it needs: one may be slow for reasons of its own.
        least_firsts: First tokens that a judgement or a pace to compare with needs.
        out_s: How long a replica is put aside, seconds; doubled each time.
        longest_out_s: The longest of these times.
        forgotten_s: A replica that was well for this long starts from the shortest again.
        share: Part of the usable replicas that may be put aside or on trial.
        trial_requests: Requests in flight of one that is tried again.
    """

    factor: float = 5.0
    token_margin_s: float = 0.02
    first_margin_s: float = 0.25
    least_busy_s: float = 2.0
    least_turns: int = 3
    least_answers: int = 2
    least_firsts: int = 5
    out_s: float = 10.0
    longest_out_s: float = 160.0
    forgotten_s: float = 300.0
    share: float = 0.5
    trial_requests: int = 2


RULE = EjectionRule()


class Standing(enum.Enum):
    """What a replica is given."""

    FULL = "full"  #: requests like its peers
    OUT = "out"  #: nothing new
    TRIAL = "trial"  #: a few, to see


class Trust:
    """The standing of one replica."""

    __slots__ = ("limit", "standing", "times", "until")

    def __init__(self) -> None:
        self.standing = Standing.FULL
        #: Requests in flight at which it gets no more, where there is somebody else.
        self.limit: float = math.inf
        #: End of the present, or latest, time aside.
        self.until = 0.0
        #: Times aside, one after the other.
        self.times = 0

    def restore(self) -> None:
        """It is one of its peers."""
        self.standing, self.limit = Standing.FULL, math.inf

    def _try(self, rule: EjectionRule) -> None:
        self.standing, self.limit = Standing.TRIAL, rule.trial_requests

    def _put_aside(self, now: float, rule: EjectionRule) -> None:
        if now - self.until > rule.forgotten_s:
            self.times = 0
        self.until = now + min(rule.out_s * 2**self.times, rule.longest_out_s)
        self.times += 1
        self.standing, self.limit = Standing.OUT, 0


class Member(Protocol):
    """One replica of a deployment."""

    @property
    def pace(self) -> Pace:
        """How fast it answers."""
        ...

    @property
    def trust(self) -> Trust:
        """Its standing, which a review changes."""
        ...


M = TypeVar("M", bound=Member)


def review(members: Sequence[M], now: float, rule: EjectionRule = RULE) -> list[M]:
    """Judge the replicas of one deployment by each other. Returns those that were put aside by this review.

    Args:
        members: Those that can be asked at present. The share counts among them.
        now: Any clock that never goes back, seconds. Ask about once a second.
        rule: The numbers.
    """
    for member in members:
        member.pace.turn(now)
        trust = member.trust
        if trust.standing is Standing.OUT and now >= trust.until:
            trust._try(rule)
            member.pace.clear()  # only what comes from here on speaks for or against it
    held = [m for m in members if m.trust.standing is not Standing.FULL]
    room = int(len(members) * rule.share) - len(held)
    for member in sorted(held, key=_until)[: max(0, -room)]:  # others have gone: no more than a share is held back
        member.trust.restore()
    limits = _Limits([m.pace for m in members if m.trust.standing is Standing.FULL], rule)
    out: list[M] = []
    found = [(limits.excess(m.pace), m) for m in members if m.trust.standing is not Standing.OUT]
    for excess, member in sorted(found, key=_excess, reverse=True):
        trial = member.trust.standing is Standing.TRIAL
        if excess > 1.0 and (trial or room > 0):
            member.trust._put_aside(now, rule)
            out.append(member)
            room -= not trial
        elif trial and excess <= 1.0 and limits.can_judge(member.pace):
            member.trust.restore()
    return out


def _until(member: Member) -> float:
    return member.trust.until


def _excess(found: tuple[float, object]) -> float:
    return found[0]


class _Limits:
    """The slowest pace that is still well: from the middle of those that are judged by."""

    def __init__(self, paces: Sequence[Pace], rule: EjectionRule) -> None:
        self._rule = rule
        tokens = [p.token_s for p in paces if p.busy_s >= rule.least_busy_s]
        firsts = [statistics.median(f) for p in paces if len(f := p.firsts) >= rule.least_firsts]
        self._token_s = _limit(tokens, rule.factor, rule.token_margin_s)
        self._first_s = _limit(firsts, rule.factor, rule.first_margin_s)

    def excess(self, pace: Pace) -> float:
        """Its pace in parts of what is still well; 0 where nothing can be said."""
        rule = self._rule
        excess = 0.0
        if pace.busy_s >= rule.least_busy_s and pace.turns >= rule.least_turns and pace.answers >= rule.least_answers:
            excess = pace.token_s / self._token_s
        # Who still waits and is over the limit already counts; who is not may turn out either way.
        firsts = pace.firsts + [w for w in pace.waits if w > self._first_s]
        if len(firsts) >= rule.least_firsts:
            excess = max(excess, statistics.median_low(firsts) / self._first_s)
        return excess

    def can_judge(self, pace: Pace) -> bool:
        """There is enough to call it well."""
        rule = self._rule
        return pace.busy_s >= rule.least_busy_s or len(pace.firsts) >= rule.least_firsts


def _limit(values: Sequence[float], factor: float, margin: float) -> float:
    if not values:
        return math.inf
    # Of two, the better one: a tie is decided against the slower half.
    middle = statistics.median_low(values)
    return max(middle * factor, middle + margin)
