"""The codec: what goes onto the wire comes back equal, and what the wire cannot hold is refused."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from inference_runtime import wire
from inference_runtime.deployment import DeploymentSpec, Serving, Timeouts
from inference_runtime.errors import BadRequest
from inference_runtime.generation import (
    ChatPrompt,
    GenerationRequest,
    Media,
    Message,
    Priority,
    Role,
    SamplingParams,
    TextPart,
    TextPrompt,
    TokenLogprob,
    TokenPrompt,
    TopLogprob,
    Usage,
)
from inference_runtime.runner import Capabilities
from inference_runtime.v1 import generation_pb2

text = st.text(max_size=40)
uint32 = st.integers(0, 2**32 - 1)
#: Values that a 32-bit float holds exactly, so that equality is equality.
unit = st.integers(1, 256).map(lambda i: i / 256)

media = st.builds(
    Media, st.sampled_from(["image", "audio", "file"]), mime_type=text, data=st.binary(max_size=20), hint=text
) | st.builds(Media, st.sampled_from(["image", "audio", "file"]), mime_type=text, url=st.text(min_size=1, max_size=20), hint=text)
messages = st.lists(
    st.builds(Message, st.sampled_from(Role), st.lists(st.builds(TextPart, text) | media, max_size=3).map(tuple), text),
    min_size=1,
    max_size=3,
).map(tuple)
prompts = st.builds(ChatPrompt, messages) | st.builds(TextPrompt, text) | st.builds(TokenPrompt, st.lists(uint32).map(tuple))
samplings = st.builds(
    SamplingParams,
    max_tokens=uint32.filter(lambda n: n > 10),
    temperature=st.none() | unit,
    top_p=st.none() | unit,
    top_k=uint32,
    min_p=st.none() | unit,
    stop=st.lists(st.text(min_size=1, max_size=8), max_size=4).map(tuple),
    stop_token_ids=st.lists(uint32, max_size=4).map(tuple),
    presence_penalty=unit,
    frequency_penalty=unit,
    repetition_penalty=unit,
    seed=st.none() | st.integers(0, 2**64 - 1),
    logit_bias=st.dictionaries(uint32, unit, max_size=3),
    top_logprobs=st.none() | st.integers(0, 20),
    n=st.integers(1, 8),
    min_tokens=st.integers(0, 10),
    ignore_eos=st.booleans(),
)
requests = st.builds(
    GenerationRequest,
    request_id=text,
    deployment=text,
    prompt=prompts,
    sampling=samplings,
    priority=st.sampled_from(Priority),
    tenant=text,
    idempotent=st.booleans(),
    idempotency_key=text,
)


@given(requests)
def test_a_request_survives_the_wire(request_: GenerationRequest) -> None:
    """M08: every role, part and sampling parameter comes back as it went."""
    raw = wire.request_to_proto(request_).SerializeToString()
    assert wire.request_from_proto(generation_pb2.GenerationRequest.FromString(raw)) == request_


@given(st.integers(0, 2**31), st.binary(max_size=8), unit, st.integers(0, 5))
def test_usage_and_logprobs_survive_the_wire(count: int, token: bytes, logprob: float, top: int) -> None:
    """M09: counts and log-probabilities come back as they went."""
    usage = Usage(count, count, count, count)
    assert wire.usage_from_proto(wire.usage_to_proto(usage)) == usage
    value = TokenLogprob(count, token, -logprob, tuple(TopLogprob(i, token, -logprob) for i in range(top)))
    assert wire.logprob_from_proto(wire.logprob_to_proto(value)) == value


def test_a_deployment_survives_the_wire() -> None:
    """Integers in runtime_config stay integers, though the wire's Struct has none."""
    spec = DeploymentSpec(
        name="a",
        model="demo",
        runtime="scripted",
        replicas=3,
        runtime_config={"tokens": 64, "pace_s": 0.5, "nested": {"list": [1, 2.5, "x", True, None]}},
        serving=Serving(max_concurrent=4, queue_capacity=0, on_capacity_exhausted="reject", max_context_tokens=99),
        timeouts=Timeouts(first_chunk_s=1.5, next_chunk_s=2.5, total_s=20),
        accelerators=1,
        node_labels={"zone": "b"},
    )
    back = wire.spec_from_proto(wire.spec_to_proto(spec))
    assert back == spec
    assert isinstance(back.runtime_config["tokens"], int)


def test_capabilities_survive_the_wire() -> None:
    every = Capabilities(False, False, True, True, True, 4, True, True, True, True)
    assert wire.capabilities_from_proto(wire.capabilities_to_proto(every)) == every


@pytest.mark.parametrize(
    ("sampling", "param"),
    [
        (SamplingParams(temperature=2.5), "temperature"),
        (SamplingParams(temperature=-0.1), "temperature"),
        (SamplingParams(top_p=0), "top_p"),
        (SamplingParams(min_p=1.5), "min_p"),
        (SamplingParams(presence_penalty=3), "presence_penalty"),
        (SamplingParams(n=9), "n"),
        (SamplingParams(top_logprobs=21), "top_logprobs"),
        (SamplingParams(stop=("",)), "stop"),
        (SamplingParams(stop=("x",) * 17), "stop"),
        (SamplingParams(max_tokens=3, min_tokens=4), "min_tokens"),
        (SamplingParams(logit_bias={1: 101}), "logit_bias"),
    ],
)
def test_a_value_outside_its_range_names_its_parameter(sampling: SamplingParams, param: str) -> None:
    """One validator stands behind HTTP, gRPC and Execute."""
    with pytest.raises(BadRequest) as caught:
        wire.sampling_from_proto(wire.sampling_to_proto(sampling))
    assert caught.value.param == param


def test_a_request_without_a_prompt_is_refused() -> None:
    with pytest.raises(BadRequest, match="no prompt"):
        wire.request_from_proto(generation_pb2.GenerationRequest())
    empty = generation_pb2.GenerationRequest()
    empty.chat.SetInParent()
    with pytest.raises(BadRequest, match="messages is empty"):
        wire.request_from_proto(empty)
