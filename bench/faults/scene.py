"""What a cell of the matrix is made of: its description, and the scene that it works on while it runs."""

from __future__ import annotations

import asyncio
import math
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.faults.load import Answer, Load
from inference_runtime.coordination.kv import KeyValue
from inference_runtime.testing.cluster import Cluster
from inference_runtime.testing.faults import Fault, FaultNotVerified, injected

__all__ = ["LEASE_TTL_S", "PACE_S", "VISIBLE_S", "Cell", "Scene", "told_file"]

#: Leases are shorter than a deployment's 10 s, so that a cell in which they run out ends soon.
LEASE_TTL_S = 3.0
#: Seconds of each token: 50 tokens a second for each stream.
PACE_S = 0.02
#: Seconds that something gets to become visible.
VISIBLE_S = 15.0
#: Seconds after which a promise in time counts as broken: more than any limit.
KEPT_S = 30.0


@dataclass(frozen=True, slots=True)
class Cell:
    """One row of the matrix.

    Args:
        id: Its name in the matrix.
        fault: What is done, for people.
        act: Does it.
        promise: What is promised besides the zeros, for people.
        unavailable_s: Longest time in which new requests may fail or wait for more than 2 s.
        stall_s: Longest silence of a stream, seconds, 99th percentile.
        singletons: Candidates of each singleton.
        engines: Engines.
        replicas: Replicas of the deployment.
        streams: Streams that are open at any time.
        tokens: Tokens of each stream.
        pace_s: Seconds of each of them.
        deployment: More keys of the deployment.
        churn: Orders keep the deployment manager writing assignments.
        terms: Least number of terms in which assignments must have been written, where orders keep coming.
        gateways_die: Gateways are taken down: their clients ask another one when they are refused.
        limits: Largest value of each figure that the cell measures by itself; one that was not measured is over its limit.
        cluster: More arguments of the cluster.
        quick_cluster: Those of a short run, where they differ.
        told: Processes that step can be told to hang or to be slow (`Scene.told`).
    """

    id: str
    fault: str
    act: Callable[[Scene], Awaitable[None]]
    promise: str
    unavailable_s: float = 0.0
    stall_s: float = 6.0
    singletons: int = 1
    engines: int = 3
    replicas: int = 3
    streams: int = 40
    tokens: int = 200
    pace_s: float = PACE_S
    deployment: Mapping[str, Any] = field(default_factory=dict)
    churn: bool = False
    terms: int = 1
    gateways_die: bool = False
    limits: Mapping[str, float] = field(default_factory=dict)
    cluster: Mapping[str, Any] = field(default_factory=dict)
    quick_cluster: Mapping[str, Any] = field(default_factory=dict)
    told: bool = False

    def excesses(self, figures: Mapping[str, float]) -> list[str]:
        """What is over its limit, or was not measured: a sentence each."""
        missing = [f"{name} was not measured (limit {limit:g})" for name, limit in self.limits.items() if name not in figures]
        over = {name: value for name, value in figures.items() if value > self.limits.get(name, math.inf)}
        return missing + [f"{name} is {value:g}, over {self.limits[name]:g}" for name, value in over.items()]


def told_file(cluster: Cluster) -> Path:
    """Where the scripted deployment of a cluster looks for what it is told."""
    return cluster.folder / "told"


@dataclass(slots=True)
class Scene:
    """What a cell works with while it runs, and what it leaves for the judge.

    `full` runs take as long as the matrix says; others are shorter and say so in their row.
    """

    cell: Cell
    cluster: Cluster
    load: Load
    rng: random.Random
    full: bool = False
    faults: int = 0
    since: float = 0.0
    until: float = 0.0
    may_break: set[int] = field(default_factory=set)
    figures: dict[str, float] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    verified: bool = True
    #: Whether a request that was refused, or ended in an error, did not have to be served (judge.py).
    excused: Callable[[Answer], bool] = lambda answer: False
    notes: list[str] = field(default_factory=list)
    #: Where etcd's history begins, and the candidates that stood then.
    history_from: int = 1
    standing: list[KeyValue] = field(default_factory=list)

    @property
    def told(self) -> Path:
        """The file that tells processes how their steps are to fare."""
        return told_file(self.cluster)

    def pick(self, service: str) -> str:
        """A random process of a service, by name."""
        return self.rng.choice(self.cluster.local.of(service)).spec.name

    def sized(self, what: str, *, quick: float, full: float) -> float:
        """The size of something (seconds, processes) in this run. A smaller one than the matrix's is told in the row."""
        if self.full:
            return full
        self.notes.append(f"{what} {quick:g} instead of {full:g}")
        return quick

    def measured(self, figure: str, value: float) -> None:
        """Note a figure; the largest counts."""
        self.figures[figure] = max(value, self.figures.get(figure, value))

    @asynccontextmanager
    async def under(self, fault: Fault) -> AsyncIterator[None]:
        """The body runs under the fault, which is seen when it begins and still there when it ends."""
        begin = time.monotonic()
        self.since = self.since or begin
        async with injected(fault):
            yield
            if not fault.is_injected():
                raise FaultNotVerified(f"{fault.name} was gone before it was healed")
        self.until = time.monotonic()
        self.faults += 1

    async def seconds_until(self, condition: Callable[[], Awaitable[bool]], since: float | None = None) -> float:
        """Seconds from `since` (now) until a condition holds, which is a promise. At least `KEPT_S` when it never does."""
        since = time.monotonic() if since is None else since
        try:
            async with asyncio.timeout(KEPT_S):
                while not await condition():  # noqa: ASYNC110 - etcd and the process table are looked at
                    await asyncio.sleep(0.02)
        except TimeoutError:
            return max(time.monotonic() - since, KEPT_S)
        return time.monotonic() - since

    async def visible(self, condition: Callable[[], Awaitable[bool]], complaint: str, within_s: float = VISIBLE_S) -> None:
        """Return once a condition holds. Raises FaultNotVerified."""
        try:
            async with asyncio.timeout(within_s):
                while not await condition():  # noqa: ASYNC110 - etcd and the process table are looked at
                    await asyncio.sleep(0.02)
        except TimeoutError as err:
            raise FaultNotVerified(f"{complaint} within {within_s:g} s") from err
