"""What the cells of engines, networks and overload measure with; and two of them, run where the promise cannot be kept, are red.

`test_red.py` breaks each of their promises in figures.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bench.faults.asking import Answer, Broken, verdict_on
from bench.faults.cells import CELLS, engines, pressure
from bench.faults.crowd import p99_s, served, took_s
from bench.faults.metrics import parse
from bench.faults.report import row_of
from bench.faults.run import leaves, run_cell
from inference_runtime.runner import RunnerConfig
from inference_runtime.runners.scripted import RUNTIME
from inference_runtime.runners.scripted_faults import HANG, confirmed, slow
from inference_runtime.testing import faults
from inference_runtime.testing.faults import FaultNotVerified, injected
from inference_runtime.testing.history import History
from inference_runtime.testing.told import TellSteps


async def test_a_process_that_does_not_step_has_no_fault_of_its_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """§4.2, control run: whoever is told and does not confirm it, is not hung; whoever steps and is told, is, until healed."""
    monkeypatch.setattr(faults, "VERIFY_S", 0.1)
    told, pid = tmp_path / "told", os.getpid()
    with pytest.raises(FaultNotVerified, match="did not take effect"):
        async with injected(TellSteps(told, [pid], HANG)):
            pass
    monkeypatch.setattr(faults, "VERIFY_S", 30)
    fault, runner = TellSteps(told, [pid], slow(3)), RUNTIME.make_runner(RunnerConfig("m", {"faults_file": str(told)}))

    async def step_for_ever() -> None:
        while True:
            runner._pass_time()
            await asyncio.sleep(0.001)

    async with asyncio.TaskGroup() as tasks:
        stepping = tasks.create_task(step_for_ever())
        async with injected(fault):
            assert confirmed(told, pid) == "slow 3"
        assert confirmed(told, pid) == ""
        stepping.cancel()


def answer(*gaps: float, took: float = 1.0, outcome: Any = "ended", probe: bool = False) -> Answer:
    """An answer with a token after each of these times."""
    stamps = [sum(gaps[: n + 1]) for n in range(len(gaps))]
    return Answer(History().begin("x"), 0, 0.0, probe, stamps, took, outcome)


def test_a_stream_is_slow_when_most_of_it_is() -> None:
    """R-08: one pause is a pause."""
    assert engines.is_slow(answer(0, *[0.4] * 10))
    assert not engines.is_slow(answer(0, *[0.02] * 10, 5.0))
    assert not engines.is_slow(answer(0, *[0.4] * 10, probe=True))


def test_only_what_was_served_counts_as_goodput() -> None:
    """P-01."""
    crowd = [answer(took=t) for t in (1.0, 2.0, 3.0)] + [answer(took=0.001, outcome="refused")]

    assert len(served(crowd)) == 3
    assert p99_s(served(crowd)) == 3.0
    assert took_s(crowd, 0.25) == 0.001


def test_samples_are_read_with_their_labels() -> None:
    """Counters that cells read."""
    text = '# TYPE a counter\na_total{kind="move",deployment="x y"} 3\nb 0.5\n'

    assert parse(text) == [("a_total", {"kind": "move", "deployment": "x y"}, 3.0), ("b", {}, 0.5)]


def test_what_goes_wrong_in_the_tasks_of_a_cell_is_told_one_by_one() -> None:
    """A fault that was not verified in one task hides no other."""
    inner = ExceptionGroup("", [ValueError("b"), ValueError("c")])

    assert [str(err) for err in leaves(ExceptionGroup("", [ValueError("a"), inner]))] == ["a", "b", "c"]


@asynccontextmanager
async def door(reply: bytes) -> AsyncIterator[str]:
    """A gateway that says the same to everybody."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(reply)
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        host, port = server.sockets[0].getsockname()
        yield f"{host}:{port}"


async def test_the_verdict_on_a_prompt_is_its_status_and_what_was_said() -> None:
    """R-07, R-09; a connection that just ends is no verdict."""
    async with door(b"HTTP/1.1 422 Unprocessable Content\r\nx: y\r\n\r\n{}") as address:
        assert await verdict_on(address, "kill", tokens=1) == (422, "{}")
    async with door(b"") as address:
        with pytest.raises(Broken):
            await verdict_on(address, "kill", tokens=1)


@pytest.mark.e2e
@pytest.mark.slow
async def test_r_06_is_red_where_nobody_ends_a_hung_step() -> None:
    """The same cell on engines that wait for a step for ten minutes."""
    patient = {"settings": {"engine": {"INFERENCE_ENGINE__HANG_S": "600"}}}

    row = row_of(CELLS["R-06"], [await run_cell(replace(CELLS["R-06"], quick_cluster=patient), seed=1)])

    assert any("the hung context was not killed" in promise for promise in row.broken_promises)


@pytest.mark.e2e
@pytest.mark.slow
async def test_p_01_is_red_where_everybody_waits_in_a_queue(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same overload on a deployment that refuses nobody: what is accepted waits for what came before."""
    monkeypatch.setitem(pressure.CROWDED, "serving", {"max_concurrent": pressure.PLACES, "queue_capacity": 100})

    row = row_of(CELLS["P-01"], [await run_cell(CELLS["P-01"], seed=1)])

    assert any("accepted_p99_by_idle" in promise for promise in row.broken_promises)
