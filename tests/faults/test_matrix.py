"""Cells of the fault matrix on real processes. `make faults` runs them all, and says more."""

from __future__ import annotations

import pytest

from bench.faults.__main__ import QUICK
from bench.faults.cells import CELLS
from bench.faults.report import row_of
from bench.faults.run import run_cell

#: Stalls are bounded loosely here: other tests may run on the same cores.
STALL_S = 6.0


@pytest.mark.e2e
@pytest.mark.parametrize("name", [pytest.param(name, marks=[] if name in QUICK else [pytest.mark.slow]) for name in CELLS])
async def test_under_this_fault_nothing_is_lost_doubled_or_foreign(name: str) -> None:
    """§4.4: the fault was seen and seen to be gone; every token came once and in its place; no request failed; nobody wrote who
    did not lead; new requests were answered."""
    cell = CELLS[name]

    run = await run_cell(cell, seed=1)

    told = "\n".join([*run.problems, *run.details])
    assert run.verified, told
    assert (run.lost, run.duplicated, run.foreign, run.failed, run.second_leader_effects) == (0, 0, 0, 0, 0), told
    assert run.problems == (), told
    assert cell.excesses(run.figures) == [], told
    assert run.unavailable_s <= cell.unavailable_s, told
    assert run.stall_p99_s <= max(cell.stall_s, STALL_S), told
    assert run.broken == 0 or cell.gateways_die, told
    # The load was there: most streams were open, and got on, while the fault lasted.
    assert run.requests >= cell.streams
    assert run.tokens >= cell.streams * cell.tokens
    assert row_of(cell, [run]).lost == 0
