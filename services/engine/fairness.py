"""Fair turns between tenants, by work done: whoever was served least goes next, first come first served within one tenant.

This is start-time fair queueing: a tenant has a clock that rises by the cost of what it is served, and the lowest clock is next.
A tenant that comes in starts at the clock of the last turn, so it neither pays for the past of others nor saves up its own
absence. Against deficit round robin, which it resembles, it needs no quantum to tune and lets a newcomer in after at most one
item of each other tenant, however much they have waiting. Pure: no clock of its own, no I/O.

Source: Goyal, Vin, Cheng, Start-time Fair Queuing (SIGCOMM 1996), with one flow for each tenant.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from typing import Generic, Protocol, TypeVar

__all__ = ["FairLane", "Ticket"]

#: Tenants without waiting items whose clock is remembered. Beyond it the one that left first is forgotten and is new
#: when it comes back.
MAX_ABSENT = 1024


class Ticket(Protocol):
    """An item that waits. Hashable by identity."""

    @property
    def tenant(self) -> str:
        """Whose it is."""
        ...

    @property
    def tokens(self) -> int:
        """Its cost, at least 1."""
        ...


T = TypeVar("T", bound=Ticket)


class _Flow(Generic[T]):
    """One tenant: its clock, its place among equal clocks, and what it has waiting."""

    __slots__ = ("clock", "tenant", "tokens", "turn", "waiting")

    def __init__(self, tenant: str) -> None:
        self.tenant = tenant
        self.clock = self.turn = self.tokens = 0
        self.waiting: OrderedDict[T, None] = OrderedDict()


class FairLane(Generic[T]):
    """Items of one priority. Each operation takes O(log tenants), amortised.

    Bounds, with c for the cost of the largest item:
        A tenant that comes in waits for at most one item of each other tenant before its first.
        While two tenants both wait, what they are served differs by at most 2c.

    Clocks last as long as anything waits: an empty lane forgets them.
    """

    def __init__(self) -> None:
        self._flows: dict[str, _Flow[T]] = {}
        self._absent: OrderedDict[str, None] = OrderedDict()  # of those, the ones that have nothing waiting, oldest first
        self._heap: list[tuple[int, int, _Flow[T]]] = []  # rows that do not match their flow any more are skipped when met
        self._clock = self._turns = self._length = self._tokens = self._waiting_flows = 0
        #: Rises each time the clocks are forgotten.
        self.epoch = 0

    def __len__(self) -> int:
        return self._length

    @property
    def tokens(self) -> int:
        """Cost of all that waits."""
        return self._tokens

    def add(self, ticket: T) -> None:
        """Put an item behind the others of its tenant."""
        flow = self._flows.get(ticket.tenant)
        if flow is None:
            flow = self._flows[ticket.tenant] = _Flow(ticket.tenant)
        if not flow.waiting:
            self._absent.pop(flow.tenant, None)
            self._waiting_flows += 1
            self._turns += 1
            flow.clock, flow.turn = max(flow.clock, self._clock), self._turns
            heapq.heappush(self._heap, (flow.clock, flow.turn, flow))
        flow.waiting[ticket] = None
        flow.tokens += ticket.tokens
        self._length += 1
        self._tokens += ticket.tokens

    def head(self) -> T | None:
        """The item whose turn it is; None when nothing waits."""
        while self._heap:
            clock, turn, flow = self._heap[0]
            if flow.waiting and clock == flow.clock and turn == flow.turn:
                return next(iter(flow.waiting))
            heapq.heappop(self._heap)
        return None

    def serve(self, ticket: T) -> None:
        """Take the head out and charge its tenant."""
        flow = self._flows[ticket.tenant]
        self._clock = max(self._clock, flow.clock)
        flow.clock += ticket.tokens
        self._turns += 1
        flow.turn = self._turns
        self.remove(ticket)
        if flow.waiting:
            heapq.heapreplace(self._heap, (flow.clock, flow.turn, flow))

    def remove(self, ticket: T) -> None:
        """Take an item out without a charge."""
        flow = self._flows[ticket.tenant]
        del flow.waiting[ticket]
        flow.tokens -= ticket.tokens
        self._length -= 1
        self._tokens -= ticket.tokens
        if not self._length:
            self._flows.clear()
            self._absent.clear()
            self._heap.clear()
            self._clock = self._waiting_flows = 0
            self.epoch += 1
        elif not flow.waiting:
            self._waiting_flows -= 1
            self._absent[flow.tenant] = None
            if len(self._absent) > MAX_ABSENT:
                del self._flows[self._absent.popitem(last=False)[0]]

    def refund(self, tenant: str, tokens: int, epoch: int) -> None:
        """Give back what an item cost less than it was charged. `epoch` is the lane's when it was served."""
        flow = self._flows.get(tenant)
        if flow is None or epoch != self.epoch:
            return
        flow.clock = max(self._clock, flow.clock - tokens)
        if flow.waiting:
            heapq.heappush(self._heap, (flow.clock, flow.turn, flow))
        if len(self._heap) > 4 * len(self._flows) + 64:  # rows out of date
            self._heap = [(f.clock, f.turn, f) for f in self._flows.values() if f.waiting]
            heapq.heapify(self._heap)

    def ahead(self, tenant: str, tokens: int) -> int:
        """About the work that is served before a new item of this cost, if nobody else came in: all that waits, or the tenant's
        own and as much for each other tenant, where that is less."""
        if not self._length:
            return 0
        flow = self._flows.get(tenant)
        own, others = (flow.tokens, self._waiting_flows - bool(flow.waiting)) if flow is not None else (0, self._waiting_flows)
        item = max(tokens, self._tokens // self._length)
        return min(self._tokens, own + others * (own + item))
