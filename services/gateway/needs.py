"""What a request needs that not every runtime offers. Decided before a replica is asked, so that the refusal names the field."""

from __future__ import annotations

from typing import NamedTuple

from inference_runtime.errors import Unsupported
from inference_runtime.v1 import common_pb2, generation_pb2

__all__ = ["Need", "needs_of", "unmet"]


class Need(NamedTuple):
    """Something that not every runtime can do."""

    capability: str  #: field of Capabilities
    param: str  #: request field that asks for it
    what: str  #: for people
    at_least: int = 1  #: what the field must say; True is 1


def needs_of(sampling: generation_pb2.SamplingParams) -> list[Need]:
    """What a replica must be able to do for these parameters."""
    needs = []
    if sampling.HasField("top_logprobs"):
        needs.append(Need("logprobs", "logprobs", "log-probabilities"))
    for param in ("presence_penalty", "frequency_penalty"):
        if getattr(sampling, param):
            needs.append(Need("penalties", param, "penalties"))
    if sampling.repetition_penalty not in (0.0, 1.0):
        needs.append(Need("penalties", "repetition_penalty", "penalties"))
    if sampling.logit_bias:
        needs.append(Need("logit_bias", "logit_bias", "a bias of single tokens"))
    if sampling.min_p:
        needs.append(Need("min_p", "min_p", "min_p"))
    if sampling.n > 1:
        needs.append(Need("max_choices", "n", f"{sampling.n} choices of one request", sampling.n))
    return needs


def unmet(need: Need, capabilities: common_pb2.Capabilities, deployment: str, runtime: str) -> Unsupported | None:
    """The refusal of a need by a replica that lacks it; None where it does not."""
    if getattr(capabilities, need.capability) >= need.at_least:
        return None
    return Unsupported(
        f"the runtime of deployment {deployment!r} ({runtime}) does not offer {need.what}; leave {need.param} out",
        param=need.param,
        feature=need.capability,
        runtime=runtime,
    )
