"""A candidate in a process of its own, for tests that kill, stop or block it. Prints one line per event.

Usage: candidate.py ENDPOINT ROLE CANDIDATE_ID TTL_S MODE

`leads REVISION` when elected. Then, by MODE: `lead` writes /fenced/ROLE every 50 ms under the guard, and prints `stale` when
refused; `block` blocks the event loop.
"""

from __future__ import annotations

import asyncio
import os
import sys
import time

from inference_runtime.coordination import Candidate, Election, EtcdClient, Op, Term
from inference_runtime.errors import StaleLeader


def say(line: str) -> None:
    print(line, flush=True)


async def main(endpoint: str, role: str, candidate_id: str, ttl_s: str, mode: str) -> None:
    async def lead(term: Term) -> None:
        say(f"leads {term.token.revision}")
        if mode == "block":
            time.sleep(60)  # noqa: ASYNC251 - that is the fault
        while True:
            try:
                await term.txn([Op.put(f"/fenced/{role}", str(term.token.revision).encode())])
            except StaleLeader:
                say("stale")
                raise
            await asyncio.sleep(0.05)

    async with EtcdClient([endpoint]) as client:
        candidate = Candidate(candidate_id, f"127.0.0.1:{len(candidate_id)}", os.getpid())
        election = Election(client, role, candidate, ttl_s=float(ttl_s), on_lost=lambda term: say(f"lost {term.token.revision}"))
        await election.run(lead)


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
