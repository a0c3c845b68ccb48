"""One generation as handed to a replica, checked: the engine's own value for the wire's Submission."""

from __future__ import annotations

from dataclasses import dataclass

from inference_runtime.errors import BadRequest, Unsupported
from inference_runtime.generation import GenerationRequest
from inference_runtime.v1 import engine_service_pb2
from inference_runtime.wire import request_from_proto, seconds

__all__ = ["Submission", "submission_from_proto"]


@dataclass(frozen=True, slots=True)
class Submission:
    """What to generate, and how its chunks are to be delivered.

    Args:
        request: What the client asks for, less the number of choices.
        choice: Which of its choices this is.
        stream_id: Number within the session.
        epoch: Attempt; carried back in each chunk.
        revision: Revision that the prefix was made with; "" for any.
        prefix: Output generated so far.
        time_left_s: For the whole request; None means the deployment's own limit.
        credits: Tokens that may be sent before more are granted; 0 means no such limit.
        coalesce_tokens: Hold tokens back until this many are ready or the choice ends.
        traceparent: W3C trace context.
        context_deaths: Unexplained deaths of a context that it was present at elsewhere: it may be what killed it.
    """

    request: GenerationRequest
    stream_id: int = 0
    epoch: int = 0
    revision: str = ""
    prefix: tuple[int, ...] = ()
    time_left_s: float | None = None
    credits: int = 0
    coalesce_tokens: int = 0
    traceparent: str = ""
    choice: int = 0
    context_deaths: int = 0


def submission_from_proto(proto: engine_service_pb2.Submission) -> Submission:
    """A submission, checked.

    Raises:
        BadRequest: With `param`.
        Unsupported: It asks for something that no engine does.
    """
    for feature, asked in (
        ("tools", bool(proto.request.tools)),
        ("constraint", proto.request.HasField("constraint")),
    ):
        if asked:
            raise Unsupported(f"engines do not support {feature}; leave it out", feature=feature, param=feature)
    prefix: tuple[int, ...] = ()
    if proto.generated_prefix:
        if [p.choice for p in proto.generated_prefix] != [proto.choice]:
            raise BadRequest("generated_prefix is not one prefix of the choice that is submitted", param="generated_prefix")
        prefix = tuple(proto.generated_prefix[0].token_ids)
    return Submission(
        request=request_from_proto(proto.request),
        stream_id=proto.stream_id,
        epoch=proto.epoch,
        revision=proto.revision,
        prefix=prefix,
        time_left_s=seconds(proto.time_left) if proto.HasField("time_left") else None,
        credits=proto.credits,
        coalesce_tokens=proto.coalesce_tokens,
        traceparent=proto.traceparent,
        choice=proto.choice,
        context_deaths=proto.context_deaths,
    )
