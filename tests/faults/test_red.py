"""Every cell of the matrix can be red: each thing that it promises is broken once, in figures, and the row says so."""

from __future__ import annotations

from dataclasses import replace

import pytest

from bench.faults.cells import CELLS
from bench.faults.judge import Run
from bench.faults.report import row_of, table

#: A little too much.
OVER = 0.01
ZEROS = ("lost", "duplicated", "foreign", "failed", "second_leader_effects")

CELL = pytest.mark.parametrize("name", CELLS)
LIMITS = pytest.mark.parametrize(("name", "figure"), [(name, figure) for name, cell in CELLS.items() for figure in cell.limits])


def kept(name: str) -> Run:
    """A run that is exactly at every limit of a cell."""
    cell = CELLS[name]
    zeros = dict.fromkeys((*ZEROS, "broken", "slow_new"), 0)
    times = {"slowest_new_s": 0.0, "unavailable_s": cell.unavailable_s, "stall_p99_s": cell.stall_s}
    counts = {"requests": 100, "tokens": 1000, "leader_writes": 9, "leader_terms": 2}
    said = {"problems": (), "figures": dict(cell.limits), "details": ()}
    return Run(seed=1, verified=True, **zeros, **times, **counts, **said)  # type: ignore[arg-type]


def broken(name: str, run: Run) -> tuple[str, ...]:
    """What the row of this run says."""
    row = row_of(CELLS[name], [run])
    assert table([row]).count("\n") == 2
    return row.broken_promises


@CELL
def test_a_run_within_every_limit_is_green(name: str) -> None:
    """Else red would mean nothing."""
    assert broken(name, kept(name)) == ()


@CELL
@pytest.mark.parametrize("field", ZEROS)
def test_one_token_request_or_write_too_many_is_red(name: str, field: str) -> None:
    """I1 to I5: in every cell."""
    assert broken(name, replace(kept(name), **{field: 1})) == (f"{field} is 1, not 0",)  # type: ignore[arg-type]


@CELL
def test_new_requests_that_wait_longer_than_they_may_are_red(name: str) -> None:
    """The column "Unavail." of §4.4."""
    over = CELLS[name].unavailable_s + OVER
    assert broken(name, replace(kept(name), unavailable_s=over)) == (f"unavailable for {over} s",)


@CELL
def test_streams_that_stall_longer_than_they_may_are_red(name: str) -> None:
    """Every cell bounds them."""
    over = CELLS[name].stall_s + OVER
    assert broken(name, replace(kept(name), stall_p99_s=over)) == (f"a stall of {over} s",)


@CELL
def test_a_fault_that_was_not_seen_and_a_complaint_of_the_cell_are_red(name: str) -> None:
    """§4.2."""
    assert broken(name, replace(kept(name), verified=False)) == ("not every fault was verified",)
    assert broken(name, replace(kept(name), problems=("it leads again",))) == ("it leads again",)


@LIMITS
def test_a_figure_over_its_limit_is_red(name: str, figure: str) -> None:
    """What the cell promises besides."""
    figures = dict(CELLS[name].limits) | {figure: CELLS[name].limits[figure] + OVER}
    (promise,) = broken(name, replace(kept(name), figures=figures))

    assert promise.startswith(f"seed 1: {figure} is ")


@LIMITS
def test_a_figure_that_was_not_measured_is_red(name: str, figure: str) -> None:
    """A cell that breaks off before it measures is no pass."""
    figures = {other: limit for other, limit in CELLS[name].limits.items() if other != figure}
    (promise,) = broken(name, replace(kept(name), figures=figures))

    assert promise.startswith(f"seed 1: {figure} was not measured")
