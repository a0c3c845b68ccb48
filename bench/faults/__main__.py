"""`python -m bench.faults`: run cells of the fault matrix, print one table, write bench/out/faults.json.

Exit status 1 when a promise was broken: a token lost, doubled or foreign, a request failed, a write by a leader that was none, a
limit in time missed, a fault that could not be verified.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Sequence
from pathlib import Path

from bench.faults.cells import CELLS
from bench.faults.report import Row, row_of, table, write_docs, write_json
from bench.faults.run import run_cell

ROOT = Path(__file__).parents[2]
OUT = ROOT / "bench" / "out" / "faults.json"
DOCS = ROOT / "docs" / "faults.md"
#: What --quick runs: an engine, a leader, the store.
QUICK = ("R-01", "G-02", "E-01")


def run(names: Sequence[str], seeds: int, *, full: bool) -> list[Row]:
    """Run these cells, each with seeds 1 to `seeds`, and say after each what was not kept."""
    rows = []
    for name in names:
        runs = [asyncio.run(run_cell(CELLS[name], seed, full=full)) for seed in range(1, seeds + 1)]
        row = row_of(CELLS[name], runs)
        rows.append(row)
        print(f"{row.id}: {'; '.join(row.broken_promises) or 'all kept'}", file=sys.stderr)
        for line in row.details:
            print(f"    {line}", file=sys.stderr)
    return rows


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m bench.faults", description="Run the fault matrix.")
    parser.add_argument("--cells", default="", help=f"comma-separated, or all; known are {', '.join(CELLS)}")
    parser.add_argument("--seeds", type=int, default=1, help="runs of each cell")
    parser.add_argument("--quick", action="store_true", help=f"short forms; without --cells only {', '.join(QUICK)}")
    parser.add_argument("--write-docs", action="store_true", help="put the table into docs/faults.md")
    args = parser.parse_args()
    asked = [name for name in args.cells.split(",") if name] or (list(QUICK) if args.quick else ["all"])
    names = list(CELLS) if asked == ["all"] else asked
    if unknown := [name for name in names if name not in CELLS]:
        parser.error(f"no cell {', '.join(unknown)}; known are {', '.join(CELLS)}")
    if args.seeds < 1:
        parser.error("--seeds is 1 or more")
    rows = run(names, args.seeds, full=not args.quick)
    write_json(rows, OUT)
    if args.write_docs:
        write_docs(rows, DOCS)
    print(table(rows))
    return 1 if any(row.broken_promises for row in rows) else 0


if __name__ == "__main__":
    raise SystemExit(main())
