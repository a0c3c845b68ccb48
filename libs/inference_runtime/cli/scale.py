"""`inferctl scale`: another number of replicas, and nothing else, whatever others change at the same time."""

from __future__ import annotations

from dataclasses import dataclass

from inference_runtime.client import InferenceClient
from inference_runtime.errors import BadRequest, ServerError
from inference_runtime.wire import spec_from_proto

__all__ = ["Scaled", "scale"]

#: Attempts while others change the deployment. Each loss means that somebody else got on, so more than a few is not a race.
MAX_RACES = 8


@dataclass(frozen=True, slots=True)
class Scaled:
    """What became of it: the number of replicas before, the generation now, and whether anything changed."""

    before: int
    generation: int
    changed: bool


async def scale(client: InferenceClient, name: str, replicas: int) -> Scaled:
    """Give a deployment so many replicas. What is written back is the specification that was read, or nothing.

    Raises:
        DeploymentNotFound: There is none.
        BadRequest: It is being deleted.
        ServerError: Others change it all the time.
    """
    for _ in range(MAX_RACES):
        found = await client.deployment(name)
        if found.deleting:
            raise BadRequest(f"deployment {name!r} is being deleted; apply it again to bring it back", param="name")
        spec = spec_from_proto(found.spec).model_copy(update={"replicas": replicas})
        try:
            answer = await client.apply(spec, expected_generation=found.generation)
        except BadRequest as err:
            if err.param != "expected_generation":
                raise
            continue
        return Scaled(found.spec.replicas, answer.deployment.generation, answer.changed)
    raise ServerError(f"deployment {name!r} is being changed by others all the time; try again", retry_after_s=1.0)
