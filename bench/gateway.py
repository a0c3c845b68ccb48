"""CPU-microseconds of one gateway worker: per streamed chunk, and per unary request. `python -m bench.gateway`, or `make bench`.

Real processes of every service, the scripted runtime, one gateway worker with everything on (journal, metrics, usage records,
request ids), pinned to a core of its own; engine, control plane and load share the others. Two loads, three runs each, medians:
256 streams of 64 tokens with a token each 20 ms, and 64 connections that ask for a whole answer of about 600 bytes again and
again. CPU is user and system time of every thread of the gateway (`/proc/PID/task/*/schedstat`). Every answer is compared with
the text that the scripted runtime must give; one wrong answer makes the run worthless and the exit status 1.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from inference_runtime.generation import Message, Role, TextPart
from inference_runtime.testing.cluster import Cluster
from inference_runtime.testing.scripted import expected_text

__all__ = ["main"]

HERE = Path(__file__).parent
OUT = HERE / "out"

STREAMS, STREAM_TOKENS, PACE_S = 256, 64, 0.020
UNARY_CONNECTIONS, UNARY_TOKENS = 64, 38
SERVICES = ("gateway", "coordinator", "deployment_manager", "metrics", "engine")
SYSTEM, USER = "You are a helpful assistant.", "Tell me a short story about a gateway that streams tokens."

#: Measured on two cores of an AMD EPYC (Zen 4), a C server as upstream, the same two loads: CPU-µs per chunk, per unary request.
OTHERS: tuple[tuple[str, str, str], ...] = (
    ("a C server, one write per chunk: the floor", "7.4-8.0", "6.6-7.4"),
    ("nginx, plain reverse proxy", "13.7-18.5", "16-23"),
    ("vllm-router (Rust)", "18.6-22.9", "74"),
    ("sglang-router 0.3.2 (Rust)", "21.9-29.8", "96-157"),
    ("LiteLLM proxy, one worker", "816", "10,186"),
)
LIMIT_CHUNK_US, LIMIT_UNARY_US = 20.0, 100.0


@dataclass(frozen=True)
class Load:
    """One kind of load."""

    name: str
    model: str
    connections: int
    tokens: int
    stream: bool
    unit: str


CHUNKS = Load("streams", "bench-stream", STREAMS, STREAM_TOKENS, True, "events")
UNARY = Load("unary", "bench-unary", UNARY_CONNECTIONS, UNARY_TOKENS, False, "answers")


def build_load_generator() -> Path:
    """The compiled load generator. Needs a C compiler."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        sys.exit("bench: no C compiler found; install cc to build the load generator (a Python one would be the bottleneck)")
    OUT.mkdir(exist_ok=True)
    source, binary = HERE / "load.c", OUT / "load"
    if not binary.exists() or binary.stat().st_mtime < source.stat().st_mtime:
        subprocess.run([compiler, "-O2", "-o", str(binary), str(source)], check=True)
    return binary


def cpu_us(pid: int) -> float:
    """User and system time of every thread of a process so far, microseconds."""
    return sum(int(path.read_text().split()[0]) for path in Path(f"/proc/{pid}/task").glob("*/schedstat")) / 1e3


def rss_mb(pid: int) -> float:
    """Resident memory of a process, MB."""
    status = Path(f"/proc/{pid}/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS")) * 1024 / 1e6


def pin(pid: int, cores: set[int]) -> None:
    """Keep every thread of a process, and those it will start, on these cores."""
    for task in Path(f"/proc/{pid}/task").iterdir():
        os.sched_setaffinity(int(task.name), cores)


def write_request(load: Load, port: int) -> tuple[Path, Path]:
    """The request and the expected text, as files for the load generator."""
    body = json.dumps(
        {
            "model": load.model,
            "messages": [{"role": "system", "content": SYSTEM}, {"role": "user", "content": USER}],
            "max_tokens": load.tokens,
            "temperature": 0.7,
            "seed": 1,
            **({"stream": True} if load.stream else {}),
        }
    ).encode()
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Type: application/json\r\nAccept: */*\r\n"
        f"User-Agent: bench\r\nContent-Length: {len(body)}\r\n\r\n"
    ).encode()
    turns = (Message(Role.SYSTEM, (TextPart(SYSTEM),)), Message(Role.USER, (TextPart(USER),)))
    request, expected = OUT / f"{load.name}.request", OUT / f"{load.name}.expected"
    request.write_bytes(head + body)
    expected.write_text(expected_text(turns, seed=1, n=load.tokens))
    return request, expected


def run_load(binary: Path, load: Load, port: int, seconds: float, gateway: int) -> dict[str, float]:
    """One run. Adds CPU-µs per unit to what the load generator says. Exits when an answer was wrong."""
    request, expected = write_request(load, port)
    before = cpu_us(gateway)
    done = subprocess.run(
        [str(binary), str(port), str(load.connections), str(seconds), str(request), str(expected)],
        check=True,
        capture_output=True,
        text=True,
    )
    used = cpu_us(gateway) - before
    result: dict[str, float] = json.loads(done.stdout)
    if not result["answers"] or result["right"] != result["answers"] or result["unfinished"]:
        sys.exit(f"bench: {load.name}: answers were wrong, this run counts for nothing: {done.stdout}")
    # A stream's role event, final event and [DONE] cost too; they are charged to its chunks.
    result["us_per_unit"] = used / result[load.unit]
    result["core_share"] = used / 1e6 / result["elapsed_s"]
    return result


async def measure(seconds: float, runs: int) -> dict[str, object]:
    """Start everything, run both loads, return what was measured."""
    binary = build_load_generator()
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) > 1:
        os.sched_setaffinity(0, set(cores[1:]))  # inherited by every process that is started from here
    async with Cluster() as cluster:
        for load, options in (
            (CHUNKS, {"pace_s": PACE_S, "tokens": STREAM_TOKENS}),
            (UNARY, {"tokens": UNARY_TOKENS, "tokens_per_step": UNARY_TOKENS}),
        ):
            await cluster.apply(
                {
                    "name": load.model,
                    "model": "scripted",
                    "runtime": "scripted",
                    "runtime_config": options,
                    "serving": {"max_concurrent": 1024},
                }
            )
            await cluster.wait_serving(load.model)
        pids = cluster.pids()
        if len(cores) > 1:
            pin(pids["gateway"], {cores[0]})
        port = int(cluster.http.rsplit(":", 1)[1])
        results: dict[str, list[dict[str, float]]] = {}
        for load in (CHUNKS, UNARY):
            await asyncio.to_thread(run_load, binary, load, port, 1.0, pids["gateway"])  # warm
            results[load.name] = [
                await asyncio.to_thread(run_load, binary, load, port, seconds, pids["gateway"]) for _ in range(runs)
            ]
        memory = {name: round(rss_mb(pids[name]), 1) for name in SERVICES}
    return {
        "us_per_chunk": round(statistics.median(r["us_per_unit"] for r in results["streams"]), 2),
        "us_per_unary": round(statistics.median(r["us_per_unit"] for r in results["unary"]), 2),
        "rss_mb": memory,
        "cores": len(cores),
        "machine": platform.processor() or platform.machine(),
        "runs": results,
    }


def show(found: dict[str, object]) -> None:
    """Print the table."""
    rows = [("gateway", "µs per chunk", "µs per unary request"), *OTHERS]
    rows.append(("inference-runtime, one worker, here", str(found["us_per_chunk"]), str(found["us_per_unary"])))
    rows.append(("  must not be above", str(LIMIT_CHUNK_US), str(LIMIT_UNARY_US)))
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    print("\nCPU of the gateway process; the others were measured on another machine of this kind\n")
    for row in rows:
        print(f"{row[0]:<{widths[0]}}  {row[1]:>{widths[1]}}  {row[2]:>{widths[2]}}")
    runs = found["runs"]
    assert isinstance(runs, dict)
    print()
    for name, results in runs.items():
        for r in results:
            print(
                f"{name}: {r['us_per_unit']:.2f} µs, {r['right']:.0f} answers right of {r['answers']:.0f}, "
                f"core {r['core_share']:.0%}, p50 {r['latency_p50_ms']:.1f} ms, p99 {r['latency_p99_ms']:.1f} ms"
            )
    memory = found["rss_mb"]
    assert isinstance(memory, dict)
    print("RSS, MB: " + ", ".join(f"{name} {mb}" for name, mb in memory.items()))


def main() -> None:
    """Measure, print, write bench/out/gateway.json."""
    parser = argparse.ArgumentParser(prog="python -m bench.gateway", description=__doc__)
    parser.add_argument("--seconds", type=float, default=5.0, help="duration of one run")
    parser.add_argument("--runs", type=int, default=3, help="runs of each load; medians count")
    args = parser.parse_args()
    found = asyncio.run(measure(args.seconds, args.runs))
    (OUT / "gateway.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    show(found)


if __name__ == "__main__":
    main()
