"""The waiting room of a replica: bounded by requests and by tokens, ordered by priority, age and tenant.

Higher priorities go first. A request rises by one priority for each AGE_S that it waits, so nobody waits for ever. Within a
priority, tenants take fair turns by tokens, and each tenant's requests keep their order. Pure: times are passed in,
monotonic seconds that never fall. The core owns it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Generic, TypeVar

from inference_runtime.generation import Priority, SamplingParams
from services.engine.fairness import FairLane

__all__ = ["EXPECTED_OUTPUT_TOKENS", "Waiting", "WaitingRoom", "cost_tokens"]

#: Time after which a waiting request counts as one of the next priority, seconds. Three of them stay well below the 60 s that a
#: first chunk may take by default.
AGE_S = 10.0
#: Output that a request is taken to need where it allows more: most answers end by themselves, and who sets no limit allows the
#: rest of the context. What was really used is settled afterwards.
EXPECTED_OUTPUT_TOKENS = 1024

T = TypeVar("T")


def cost_tokens(prompt_tokens: int, sampling: SamplingParams, done: int = 0) -> int:
    """Work that a request stands for: its prompt, and its output as far as it is expected.

    Args:
        prompt_tokens: Length of the prompt.
        sampling: With max_tokens > 0.
        done: Output it already has: it is read like a prompt.
    """
    return prompt_tokens + done + min(sampling.max_tokens - done, EXPECTED_OUTPUT_TOKENS)


class Waiting(Generic[T]):
    """A request in the room, or just served from it."""

    __slots__ = ("arrived_s", "deadline_s", "epoch", "inside", "item", "level", "priority", "tenant", "tokens")

    def __init__(self, item: T, tenant: str, priority: Priority, tokens: int, arrived_s: float, deadline_s: float) -> None:
        self.item, self.tenant, self.priority, self.tokens = item, tenant, priority, tokens
        self.arrived_s, self.deadline_s = arrived_s, deadline_s
        #: Priority that it counts as; rises with age.
        self.level = int(priority)
        #: Whether it waits.
        self.inside = False
        #: Of its lane, when it was served.
        self.epoch = 0


class WaitingRoom(Generic[T]):
    """Requests that wait for a place in the batch.

    Promises, with P = CRITICAL - priority and c for the cost of the largest request:
        At most `max_requests` and `max_tokens` wait.
        P · age_s after a request came, it counts as CRITICAL: no newcomer of any priority has more than equal turns with it. From
        then on it is served before any tenant got (own tokens ahead of it) + 2c of work, so the wait ends for every request.
        A tenant's request waits for at most one request of each other tenant in its priority, besides those of its own tenant
        and of higher priorities: 1,000 requests of one tenant delay the only one of another by one request.

    Each operation costs O(log tenants), amortised.

    Args:
        max_requests: Requests that may wait.
        max_tokens: Their cost together.
        age_s: See AGE_S.
    """

    def __init__(self, max_requests: int, max_tokens: int, age_s: float = AGE_S) -> None:
        self.max_requests, self.max_tokens, self._age_s = max_requests, max_tokens, age_s
        self._lanes: dict[int, FairLane[Waiting[T]]] = {p: FairLane() for p in sorted(Priority, reverse=True)}
        # Those of one priority and level came in the order of their age. Lower levels first: one pass lifts by several.
        self._rising: list[tuple[int, int, OrderedDict[Waiting[T], None]]] = [
            (priority, level, OrderedDict()) for priority in sorted(Priority) for level in range(priority, Priority.CRITICAL)
        ]
        self._ages = {(priority, level): ages for priority, level, ages in self._rising}

    def __len__(self) -> int:
        return sum(map(len, self._lanes.values()))

    @property
    def tokens(self) -> int:
        """Cost of all that waits."""
        return sum(lane.tokens for lane in self._lanes.values())

    def fits(self, tokens: int) -> bool:
        """Whether one more of this cost may wait."""
        return len(self) < self.max_requests and self.tokens + tokens <= self.max_tokens

    def put(self, item: T, *, tenant: str, priority: Priority, tokens: int, now_s: float, deadline_s: float) -> Waiting[T]:
        """Let a request wait. `fits(tokens)` must hold, and tokens ≥ 1."""
        assert tokens > 0
        assert self.fits(tokens)
        waiting = Waiting(item, tenant, priority, tokens, now_s, deadline_s)
        waiting.inside = True
        self._add(waiting)
        return waiting

    def take(self, now_s: float) -> tuple[Waiting[T] | None, Sequence[Waiting[T]]]:
        """Serve whose turn it is: that one (None when nobody waits), and those found on the way whose deadline has passed."""
        self._lift(now_s)
        expired: list[Waiting[T]] = []
        for lane in self._lanes.values():
            while (waiting := lane.head()) is not None:
                if waiting.deadline_s > now_s:
                    waiting.epoch = lane.epoch
                    self._leave(waiting)
                    lane.serve(waiting)
                    return waiting, expired
                self.drop(waiting)
                expired.append(waiting)
        return None, expired

    def drop(self, waiting: Waiting[T]) -> None:
        """Take a request out that does not want to be served any more. No-op for one that does not wait."""
        if waiting.inside:
            self._leave(waiting)
            self._lanes[waiting.level].remove(waiting)

    def settle(self, waiting: Waiting[T], used_tokens: int) -> None:
        """Say what a request that was served has really cost, so that its tenant pays no more than that."""
        if used_tokens < waiting.tokens:
            self._lanes[waiting.level].refund(waiting.tenant, waiting.tokens - used_tokens, waiting.epoch)

    def ahead(self, tenant: str, priority: Priority, tokens: int) -> int:
        """Work, in tokens, that would be served before a new request of this kind, as things stand now."""
        higher = sum(lane.tokens for level, lane in self._lanes.items() if level > priority)
        return higher + self._lanes[priority].ahead(tenant, tokens)

    def _add(self, waiting: Waiting[T]) -> None:
        self._lanes[waiting.level].add(waiting)
        ages = self._ages.get((waiting.priority, waiting.level))
        if ages is not None:
            ages[waiting] = None

    def _leave(self, waiting: Waiting[T]) -> None:
        waiting.inside = False
        ages = self._ages.get((waiting.priority, waiting.level))
        if ages is not None:
            del ages[waiting]

    def _lift(self, now_s: float) -> None:
        """Let those rise whose time has come."""
        for priority, level, ages in self._rising:
            while ages:
                waiting = next(iter(ages))
                if now_s - waiting.arrived_s < (level + 1 - priority) * self._age_s:
                    break
                self.drop(waiting)
                waiting.level, waiting.inside = level + 1, True
                self._add(waiting)
