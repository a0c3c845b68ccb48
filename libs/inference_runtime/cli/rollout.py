"""`inferctl rollout status`: how far the generation that was asked for last has come."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from inference_runtime.cli.views import name_of
from inference_runtime.client import InferenceClient
from inference_runtime.errors import ServerError, Timeout
from inference_runtime.v1 import deployment_pb2

__all__ = ["follow", "sentence"]

#: Seconds between two looks.
LOOK_S = 0.2


def sentence(found: deployment_pb2.Deployment) -> str:
    """Where a deployment stands, in one line."""
    status = found.status
    if status.observed_generation != found.generation:
        return f"generation {found.generation} is accepted, generation {status.observed_generation} is what is known"
    state = name_of(deployment_pb2.DeploymentState, status.state, "DEPLOYMENT_STATE_")
    reason = f": {status.reason}" if status.reason else ""
    return f"generation {found.generation}, {state}, {status.ready_replicas} of {found.spec.replicas} replicas{reason}"


async def follow(client: InferenceClient, name: str, timeout_s: float, say: Callable[[str], None]) -> None:
    """Say where a deployment stands, at each change, until all replicas of its current generation serve.

    Raises:
        DeploymentNotFound: There is none.
        ServerError: It failed.
        Timeout: It took too long; the message holds where it stands.
    """
    said = ""
    try:
        async with asyncio.timeout(timeout_s):
            while True:
                found = await client.deployment(name)
                if (now := sentence(found)) != said:
                    say(now)
                    said = now
                if found.status.observed_generation == found.generation:
                    if found.status.state == deployment_pb2.DEPLOYMENT_STATE_SERVING:
                        return
                    if found.status.state == deployment_pb2.DEPLOYMENT_STATE_FAILED:
                        raise ServerError(f"deployment {name!r} failed: {found.status.reason}")
                await asyncio.sleep(LOOK_S)
    except TimeoutError as err:
        raise Timeout(f"deployment {name!r} does not serve after {timeout_s:g} s: {said}") from err
