"""Health that tells the truth, from the device to the client: nobody is sent to a replica that cannot answer."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest

from inference_runtime.generation import SamplingParams
from inference_runtime.runners.scripted_faults import HANG
from inference_runtime.testing.cluster import Cluster
from inference_runtime.testing.faults import injected
from inference_runtime.testing.scripted import expected_text, user_says
from inference_runtime.testing.told import TellSteps
from inference_runtime.v1 import common_pb2
from tests.e2e.kit import ECHO

SERVING, NOT_READY = common_pb2.REPLICA_STATE_SERVING, common_pb2.REPLICA_STATE_NOT_READY
#: From the hang to a record that says so: a canary is sent two seconds after the last sign of life and has three to answer; the
#: rest is for a busy machine.
FOUND_S = 15.0


@pytest.mark.e2e
async def test_a_device_that_hangs_while_nobody_asks_is_found_before_a_user_is_sent_to_it(tmp_path: Path) -> None:
    """I12: its replica is not ready, every request is answered by the other one, and it is ready again once it steps."""
    faults = tmp_path / "faults"
    async with Cluster(engines=2) as cluster, cluster.client() as client:
        await cluster.apply(ECHO | {"replicas": 2, "runtime_config": {"faults_file": str(faults)}})
        await cluster.wait_serving("echo")

        async def states() -> list[common_pb2.ReplicaState]:
            return sorted(replica.state for replica, _ in await client.replicas("echo"))

        async def until(wanted: list[common_pb2.ReplicaState]) -> None:
            deadline = time.monotonic() + FOUND_S
            while (seen := await states()) != wanted:
                assert time.monotonic() < deadline, f"{seen}, not {wanted}"
                await asyncio.sleep(0.1)

        await until([SERVING, SERVING])
        pid = next(pid for name, pid in cluster.pids().items() if name.startswith("engine"))
        async with injected(TellSteps(faults, [pid], HANG)):
            await until([SERVING, NOT_READY])
            for n in range(10):
                begin = time.monotonic()
                answer = await client.complete("echo", f"{n}", SamplingParams(max_tokens=8))
                assert answer.text == expected_text(user_says(f"{n}"), n=8)
                assert time.monotonic() - begin < 5.0
        await until([SERVING, SERVING])
