"""From what clients received and leaders wrote to figures. Pure."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass

from bench.faults.fencing import Writes
from bench.faults.load import MODEL, Answer, Load

__all__ = ["WAIT_S", "Run", "judge", "percentile", "unavailable_s"]

#: A new request that waits for longer is one that is not served.
WAIT_S = 2.0
#: Ends of a request that can be excused: it was told why. A connection that just ends tells nothing.
EXCUSABLE = frozenset({"refused", "failed"})
#: Messages that a run keeps of each kind.
SHOWN = 5


@dataclass(frozen=True, slots=True)
class Run:
    """One run of one cell: counts, seconds, and sentences about what went wrong."""

    seed: int
    requests: int
    tokens: int
    lost: int
    duplicated: int
    foreign: int
    failed: int
    broken: int
    second_leader_effects: int
    leader_writes: int
    leader_terms: int
    slow_new: int
    slowest_new_s: float
    unavailable_s: float
    stall_p99_s: float
    verified: bool
    problems: tuple[str, ...]
    figures: Mapping[str, float]
    details: tuple[str, ...]
    notes: tuple[str, ...] = ()


def judge(
    load: Load,
    writes: Writes,
    *,
    verified: bool,
    window: tuple[float, float],
    may_break: Set[int],
    figures: Mapping[str, float],
    problems: Sequence[str],
    seed: int,
    notes: Sequence[str] = (),
    excused: Callable[[Answer], bool] = lambda answer: False,
) -> Run:
    """Hold a run against the truth.

    Args:
        load: All requests, ended.
        writes: What leaders wrote.
        verified: Every fault was seen, and seen to be gone.
        window: From the first fault to the end of the load after the last, seconds of the monotonic clock.
        may_break: Gateways whose open streams were killed with them.
        figures: What the cell measured by itself.
        problems: What the cell saw that must not be.
        seed: Of the run.
        notes: In what the run was smaller than the matrix's.
        excused: Requests that were not served and did not have to be, where they were told so. What they got is still checked.
    """
    findings = load.history.findings()
    kinds = Counter(finding.kind for finding in findings)
    broken = [a for a in load.answers if a.outcome == "broken" and a.gateway in may_break]
    allowed = {id(a) for a in [*broken, *(a for a in load.answers if a.outcome in EXCUSABLE and excused(a))]}
    failed = [a for a in load.answers if a.outcome != "ended" and id(a) not in allowed]
    streams = [a for a in load.answers if a.model == MODEL and not a.probe and id(a) not in allowed]
    stalls = [s for a in streams if (s := a.stall_s(*window)) is not None]
    probes = [a for a in load.answers if a.probe]
    details = [
        *(
            f"{a.record.name} via gateway {a.gateway + 1} {a.outcome} after {len(a.stamps)} tokens: {a.error}"
            for a in failed[:SHOWN]
        ),
        *(str(f) for f in findings[:SHOWN]),
        *writes.effects[:SHOWN],
    ]
    return Run(
        seed=seed,
        requests=len(load.answers),
        tokens=sum(len(a.record.words()[0]) for a in load.answers),
        lost=kinds["lost"] + kinds["cut"],
        duplicated=kinds["doubled"],
        foreign=kinds["foreign"] + kinds["reordered"] + kinds["misplaced"],
        failed=len(failed),
        broken=len(broken),
        second_leader_effects=len(writes.effects),
        leader_writes=writes.assignments,
        leader_terms=writes.terms,
        slow_new=sum(not is_good(a) for a in probes),
        slowest_new_s=round(max((a.end - a.begin for a in probes), default=0.0), 2),
        unavailable_s=round(unavailable_s(probes), 2),
        stall_p99_s=round(percentile(stalls, 0.99), 2),
        verified=verified and bool(stalls),
        problems=tuple(problems),
        figures={name: round(value, 2) for name, value in figures.items()},
        details=tuple(details),
        notes=tuple(notes),
    )


def is_good(probe: Answer) -> bool:
    """A new request that was answered in time."""
    return probe.outcome == "ended" and probe.end - probe.begin <= WAIT_S


def unavailable_s(probes: Sequence[Answer]) -> float:
    """The longest time in which no new request was answered: from the first of at least two in a row that failed or waited for
    more than `WAIT_S` to the next good one, or to the end of the last. One alone is a slow request: the next was answered."""
    longest = 0.0
    bad: list[Answer] = []
    for probe in probes:
        if not is_good(probe):
            bad.append(probe)
            continue
        if len(bad) > 1:
            longest = max(longest, probe.begin - bad[0].begin)
        bad = []
    return max(longest, bad[-1].end - bad[0].begin) if len(bad) > 1 else longest


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that this share of all does not exceed; 0 without values."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)] if ordered else 0.0
