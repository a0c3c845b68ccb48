"""What the gateway's journal costs per chunk. `python -m bench.journal`

CPU time of entering every token of 256 interleaved streams, as frames bring them, less that of the same loop without a journal.
Medians of rounds.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from pathlib import Path

from services.gateway.journal import NEW, Journal

OUT = Path(__file__).parent / "out"

STREAMS, TOKENS, ROUNDS = 256, 200, 15
LIMIT_US = 1.0


def _with_journal() -> float:
    journals = [Journal() for _ in range(STREAMS)]
    began = time.process_time()
    for index in range(TOKENS):
        for journal in journals:
            if journal.accept_one(0, index, 7) is not NEW:
                raise AssertionError("a good chunk was refused")
    return time.process_time() - began


def _without() -> float:
    journals = [Journal() for _ in range(STREAMS)]
    began = time.process_time()
    for index in range(TOKENS):
        for journal in journals:
            if journal is None or index < 0:
                raise AssertionError("never")
    return time.process_time() - began


def main() -> None:
    """Measure, print, write bench/out/journal.json. Exit status 1 above the limit."""
    us = statistics.median((_with_journal() - _without()) / (STREAMS * TOKENS) * 1e6 for _ in range(ROUNDS))
    print(f"journal: {us:.3f} µs per chunk (must not be above {LIMIT_US:.0f})")
    OUT.mkdir(exist_ok=True)
    (OUT / "journal.json").write_text(json.dumps({"us_per_chunk": round(us, 3)}) + "\n", encoding="utf-8")
    sys.exit(us > LIMIT_US)


if __name__ == "__main__":
    main()
