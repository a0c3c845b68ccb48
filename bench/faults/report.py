"""One row for each cell: what came of its runs, beside what is promised. A table, JSON, a page of the docs."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from bench.faults.judge import Run
from bench.faults.scene import LEASE_TTL_S, Cell

__all__ = ["Row", "row_of", "table", "write_docs", "write_json"]

BEGIN, END = "<!-- faults:begin -->", "<!-- faults:end -->"


@dataclass(frozen=True, slots=True)
class Row:
    """All runs of one cell: sums of what must be zero, the worst of the times."""

    id: str
    fault: str
    promise: str
    runs: int
    requests: int
    tokens: int
    lost: int
    duplicated: int
    foreign: int
    failed: int
    broken: int
    second_leader_effects: int
    leader_writes: int
    slow_new: int
    slowest_new_s: float
    unavailable_s: float
    unavailable_limit_s: float
    stall_p99_s: float
    stall_limit_s: float
    verified: bool
    figures: dict[str, float]
    figure_limits: dict[str, float]
    broken_promises: tuple[str, ...]
    details: tuple[str, ...]


def row_of(cell: Cell, runs: Sequence[Run]) -> Row:
    """Sum up the runs of a cell."""
    unavailable, stall = max(r.unavailable_s for r in runs), max(r.stall_p99_s for r in runs)
    verified = all(r.verified for r in runs)
    zeros = {
        name: sum(getattr(r, name) for r in runs) for name in ("lost", "duplicated", "foreign", "failed", "second_leader_effects")
    }
    promises = [f"{name} is {count}, not 0" for name, count in zeros.items() if count]
    promises += [problem for r in runs for problem in r.problems]
    promises += [f"seed {r.seed}: {excess}" for r in runs for excess in cell.excesses(r.figures)]
    promises += [] if verified else ["not every fault was verified"]
    promises += [f"unavailable for {unavailable} s"] if unavailable > cell.unavailable_s else []
    promises += [f"a stall of {stall} s"] if stall > cell.stall_s else []
    return Row(
        id=cell.id,
        fault="; ".join([cell.fault, *(f"quick: {note}" for note in dict.fromkeys(n for r in runs for n in r.notes))]),
        promise=cell.promise,
        runs=len(runs),
        requests=sum(r.requests for r in runs),
        tokens=sum(r.tokens for r in runs),
        broken=sum(r.broken for r in runs),
        leader_writes=sum(r.leader_writes for r in runs),
        slow_new=sum(r.slow_new for r in runs),
        slowest_new_s=max(r.slowest_new_s for r in runs),
        unavailable_s=unavailable,
        unavailable_limit_s=cell.unavailable_s,
        stall_p99_s=stall,
        stall_limit_s=cell.stall_s,
        verified=verified,
        figures={name: max(r.figures.get(name, 0.0) for r in runs) for name in sorted({n for r in runs for n in r.figures})},
        figure_limits=dict(cell.limits),
        broken_promises=tuple(promises),
        details=tuple(f"seed {r.seed}: {line}" for r in runs for line in r.details),
        **zeros,
    )


HEAD = (
    *("cell", "fault", "runs", "requests", "tokens", "lost", "doubled", "foreign", "failed", "broken", "2nd leader"),
    *("slow new (slowest s)", "unavail. s", "stall p99 s", "besides", "verified"),
)


def _cells(row: Row) -> list[str]:
    return [
        *(row.id, row.fault, *map(str, (row.runs, row.requests, row.tokens, row.lost, row.duplicated, row.foreign, row.failed))),
        *(str(row.broken), f"{row.second_leader_effects} of {row.leader_writes}"),
        f"{row.slow_new} ({row.slowest_new_s:g})",
        *(f"{row.unavailable_s:g} (≤ {row.unavailable_limit_s:g})", f"{row.stall_p99_s:g} (≤ {row.stall_limit_s:g})"),
        ", ".join(f"{name} {value:g}{_limit(row, name)}" for name, value in row.figures.items()) or "-",
        "yes" if row.verified else "NO",
    ]


def _limit(row: Row, figure: str) -> str:
    return f" (≤ {row.figure_limits[figure]:g})" if figure in row.figure_limits else ""


def table(rows: Sequence[Row]) -> str:
    """A Markdown table that can be read as it is, and below it what was not kept."""
    lines = [list(HEAD), *(_cells(row) for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(HEAD))]
    text = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in lines]
    text.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(text)


def write_json(rows: Sequence[Row], path: Path) -> None:
    """All figures, for programs."""
    path.parent.mkdir(exist_ok=True)
    document = {"machine": _machine(), "lease_ttl_s": LEASE_TTL_S, "cells": [asdict(row) for row in rows]}
    path.write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_docs(rows: Sequence[Row], path: Path) -> None:
    """Put the table between the marks of the page.

    Raises:
        ValueError: The page has no marks.
    """
    before, _, rest = path.read_text(encoding="utf-8").partition(BEGIN)
    _, mark, after = rest.partition(END)
    if not mark:
        raise ValueError(f"{path} has no {BEGIN} … {END}")
    promises = "\n".join(f"- {row.id}: {row.promise}." for row in rows)
    text = f"{BEGIN}\nOn {_machine()}:\n\n{table(rows)}\n\nPromised besides the zeros:\n\n{promises}\n{END}"
    path.write_text(f"{before}{text}{after}", encoding="utf-8")


def _machine() -> str:
    return f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}"
