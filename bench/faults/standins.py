"""Many processes, as etcd sees them: each with a client, a lease, an engine's and a replica's record, and a watch of its own.

    python -m bench.faults.standins ENDPOINTS FIRST COUNT TTL_S     until its standard input ends
    python -m bench.faults.standins ENDPOINT probe                  ask etcd every 20 ms; one line of JSON for each answer

`Standins` starts them, a few hundred to a process. What they register drains, so that nobody gives them work or routes.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
import threading
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import uvloop

from inference_runtime.coordination import EtcdClient, LeaderObserver, Registration, keys
from inference_runtime.testing.etcd import ask_member
from inference_runtime.v1 import common_pb2

__all__ = ["DEPLOYMENT", "latencies", "probing", "standins"]

#: What their replicas are said to be of. No such deployment exists.
DEPLOYMENT = "standins"
#: Of them in one process.
PER_PROCESS = 125
#: Seconds between two questions.
PROBE_EVERY_S = 0.02


@asynccontextmanager
async def standins(endpoints: Sequence[str], count: int, ttl_s: float, log: Path) -> AsyncIterator[None]:
    """So many stand-ins run during the body, and say to `log` what they have to say. They may be registering when it begins."""
    async with contextlib.AsyncExitStack() as stack:
        for first in range(0, count, PER_PROCESS):
            size = min(PER_PROCESS, count - first)
            command = (",".join(endpoints), str(first), str(size), str(ttl_s))
            await stack.enter_async_context(_running(*command, stderr=log))
        yield


@asynccontextmanager
async def probing(endpoint: str, output: Path) -> AsyncIterator[None]:
    """etcd is asked during the body; see `latencies`."""
    async with _running(endpoint, "probe", stdout=output):
        yield


def latencies(output: Path, since: float, until: float) -> list[float]:
    """Seconds that answers took which were asked for in this time (`time.monotonic()`)."""
    looks = [json.loads(line) for line in output.read_text().splitlines(keepends=True) if line.endswith("\n")]
    return [look["took_s"] for look in looks if since <= look["at"] <= until]


@asynccontextmanager
async def _running(*arguments: str, stdout: Path | None = None, stderr: Path | None = None) -> AsyncIterator[None]:
    command = (sys.executable, "-m", "bench.faults.standins", *arguments)
    with contextlib.ExitStack() as files:
        out, err = (files.enter_context(path.open("ab")) if path else None for path in (stdout, stderr))
        process = await asyncio.create_subprocess_exec(
            *command, stdin=asyncio.subprocess.PIPE, stdout=out or asyncio.subprocess.DEVNULL, stderr=err
        )
    try:
        yield
    finally:
        process.kill()
        await process.wait()


async def _one(endpoints: Sequence[str], number: int, ttl_s: float) -> None:
    name = f"standin-{number}"
    engine = common_pb2.Engine(id=name, address="127.0.0.1:1", state=common_pb2.ENGINE_STATE_DRAINING)
    replica = common_pb2.Replica(id=name, deployment=DEPLOYMENT, engine_id=name, address=engine.address)
    client = EtcdClient(endpoints)
    try:
        async with Registration(client, ttl_s=ttl_s) as registration:
            await registration.set(keys.engine(name), engine.SerializeToString())
            await registration.set(keys.replica(DEPLOYMENT, name), replica.SerializeToString())
            await LeaderObserver(client, "coordinator").run()
    finally:
        await client.close()


async def _serve(endpoints: Sequence[str], first: int, count: int, ttl_s: float) -> None:
    stop = asyncio.Event()
    asyncio.get_running_loop().add_reader(sys.stdin.fileno(), stop.set)
    async with asyncio.TaskGroup() as tasks:
        work = [tasks.create_task(_one(endpoints, number, ttl_s)) for number in range(first, first + count)]
        await stop.wait()
        for task in work:
            task.cancel()


def _probe(endpoint: str) -> None:
    port = int(endpoint.rpartition(":")[2])
    ended = threading.Event()

    def listen() -> None:
        sys.stdin.read()
        ended.set()

    threading.Thread(target=listen, name="stdin", daemon=True).start()
    while not ended.wait(PROBE_EVERY_S):
        begin = time.monotonic()
        if ask_member(port, "/v3/kv/range", {"key": "AA==", "keys_only": True}):
            sys.stdout.write(json.dumps({"at": begin, "took_s": time.monotonic() - begin}) + "\n")
            sys.stdout.flush()


def main() -> None:
    """One of the two commands."""
    endpoints, *rest = sys.argv[1:]
    if rest == ["probe"]:
        _probe(endpoints)
        return
    first, count, ttl_s = rest
    uvloop.run(_serve(endpoints.split(","), int(first), int(count), float(ttl_s)))


if __name__ == "__main__":
    main()
