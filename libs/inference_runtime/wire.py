"""Values <-> protos, in pairs: the only codec.

`x_to_proto` never fails; `x_from_proto` checks what the wire cannot express and raises BadRequest with `param`. Messages that are
used as they are (Replica, Engine, Assignment, frames) have no pair here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from google.protobuf import duration_pb2, json_format, struct_pb2

from inference_runtime import deployment as d
from inference_runtime import generation as g
from inference_runtime.errors import BadRequest
from inference_runtime.runner import Capabilities
from inference_runtime.v1 import common_pb2, deployment_pb2, generation_pb2

__all__ = [
    "capabilities_from_proto",
    "capabilities_to_proto",
    "check_sampling",
    "duration",
    "logprob_from_proto",
    "logprob_to_proto",
    "message_from_proto",
    "message_to_proto",
    "request_from_proto",
    "request_to_proto",
    "sampling_from_proto",
    "sampling_to_proto",
    "seconds",
    "spec_from_proto",
    "spec_to_proto",
    "usage_from_proto",
    "usage_to_proto",
]


def duration(value_s: float) -> duration_pb2.Duration:
    """Seconds as a Duration, to the nanosecond."""
    whole = int(value_s)
    return duration_pb2.Duration(seconds=whole, nanos=int((value_s - whole) * 1e9))


def seconds(value: duration_pb2.Duration) -> float:
    """A Duration as seconds."""
    return value.seconds + value.nanos / 1e9


# --- generation ------------------------------------------------------------------------------------------------------


def _part_to_proto(part: g.ContentPart) -> generation_pb2.ContentPart:
    if isinstance(part, g.TextPart):
        return generation_pb2.ContentPart(text=part.text)
    media = generation_pb2.Media(mime_type=part.mime_type, hint=part.hint)
    if part.url:
        media.url = part.url
    else:
        media.data = part.data
    proto = generation_pb2.ContentPart()
    getattr(proto, part.kind).CopyFrom(media)
    return proto


def _part_from_proto(proto: generation_pb2.ContentPart) -> g.ContentPart:
    kind = proto.WhichOneof("kind")
    if kind == "text":
        return g.TextPart(proto.text)
    if kind is None:
        raise BadRequest("a content part is empty; give it text or media", param="messages")
    media = getattr(proto, kind)
    return g.Media(kind, media.mime_type, media.data, media.url, media.hint)


def message_to_proto(message: g.Message) -> generation_pb2.Message:
    """One turn."""
    return generation_pb2.Message(
        role=message.role.value,  # type: ignore[arg-type]
        content=[_part_to_proto(p) for p in message.content],
        name=message.name,
    )


_ROLES: dict[int, g.Role] = {role.value: role for role in g.Role}


def message_from_proto(proto: generation_pb2.Message) -> g.Message:
    """One turn. Raises BadRequest for a role we do not know."""
    role = _ROLES.get(proto.role)
    if role is None:
        raise BadRequest(f"role {proto.role} is not known; use system, user, assistant or tool", param="messages")
    return g.Message(role, tuple([_part_from_proto(part) for part in proto.content]), proto.name)


def sampling_to_proto(s: g.SamplingParams) -> generation_pb2.SamplingParams:
    """Sampling parameters. None stays absent."""
    return generation_pb2.SamplingParams(
        max_tokens=s.max_tokens,
        temperature=s.temperature,
        top_p=s.top_p,
        top_k=s.top_k,
        min_p=s.min_p,
        stop=s.stop,
        stop_token_ids=s.stop_token_ids,
        presence_penalty=s.presence_penalty,
        frequency_penalty=s.frequency_penalty,
        repetition_penalty=s.repetition_penalty,
        seed=s.seed,
        logit_bias=[generation_pb2.LogitBias(token_id=t, bias=b) for t, b in s.logit_bias.items()],
        top_logprobs=s.top_logprobs,
        n=s.n,
        min_tokens=s.min_tokens,
        ignore_eos=s.ignore_eos,
    )


def sampling_from_proto(p: generation_pb2.SamplingParams) -> g.SamplingParams:
    """Sampling parameters, their ranges checked."""
    given: dict[str, Any] = {field.name: value for field, value in p.ListFields()}  # most requests set three of sixteen
    for name in ("stop", "stop_token_ids"):
        if name in given:
            given[name] = tuple(given[name])
    if "logit_bias" in given:
        given["logit_bias"] = {b.token_id: b.bias for b in p.logit_bias}
    sampling = g.SamplingParams(**given)
    check_sampling(sampling, given)
    return sampling


#: Bounds of one request, the same for HTTP, gRPC and Execute.
MAX_TOP_LOGPROBS = 20
MAX_STOPS = 4
MAX_STOP_CHARS = 256


#: What must hold, and how it is said, by the field that is at fault.
_RULES: dict[str, tuple[Callable[[g.SamplingParams], bool], str]] = {
    "temperature": (lambda s: s.temperature is None or 0 <= s.temperature <= 2, "must lie between 0 and 2"),
    "top_p": (lambda s: s.top_p is None or 0 < s.top_p <= 1, "must be above 0 and at most 1"),
    "min_p": (lambda s: s.min_p is None or 0 <= s.min_p <= 1, "must lie between 0 and 1"),
    "top_k": (lambda s: s.top_k >= 0, "must not be negative"),
    "max_tokens": (lambda s: s.max_tokens >= 0, "must not be negative"),
    "presence_penalty": (lambda s: -2 <= s.presence_penalty <= 2, "must lie between -2 and 2"),
    "frequency_penalty": (lambda s: -2 <= s.frequency_penalty <= 2, "must lie between -2 and 2"),
    "repetition_penalty": (lambda s: 0 <= s.repetition_penalty <= 10, "must lie between 0 and 10"),
    "n": (lambda s: 1 <= s.n <= g.MAX_CHOICES, f"must lie between 1 and {g.MAX_CHOICES}"),
    "top_logprobs": (
        lambda s: s.top_logprobs is None or s.top_logprobs <= MAX_TOP_LOGPROBS,
        f"must be at most {MAX_TOP_LOGPROBS}",
    ),
    "stop": (
        lambda s: len(s.stop) <= MAX_STOPS and all(0 < len(x) <= MAX_STOP_CHARS for x in s.stop),
        f"holds at most {MAX_STOPS} strings of 1 to {MAX_STOP_CHARS} characters",
    ),
    "min_tokens": (lambda s: not s.max_tokens or s.min_tokens <= s.max_tokens, "must not be above max_tokens"),
    "logit_bias": (lambda s: all(-100 <= b <= 100 for b in s.logit_bias.values()), "values must lie between -100 and 100"),
}


def check_sampling(s: g.SamplingParams, fields: Iterable[str] = tuple(_RULES)) -> None:
    """Refuse values outside their range. The one validator behind every door.

    Args:
        s: The parameters.
        fields: Those that were given. The others hold their defaults, which are good.

    Raises:
        BadRequest: With `param`.
    """
    for name in fields:
        rule = _RULES.get(name)
        if rule is not None and not rule[0](s):
            raise BadRequest(f"{name} {rule[1]}", param=name)


def request_to_proto(r: g.GenerationRequest) -> generation_pb2.GenerationRequest:
    """A request."""
    proto = generation_pb2.GenerationRequest(
        request_id=r.request_id,
        deployment=r.deployment,
        sampling=sampling_to_proto(r.sampling),
        priority=r.priority.value,  # type: ignore[arg-type]
        tenant=r.tenant,
        idempotent=r.idempotent,
        idempotency_key=r.idempotency_key,
    )
    match r.prompt:
        case g.ChatPrompt(messages):
            proto.chat.messages.extend(message_to_proto(m) for m in messages)
        case g.TextPrompt(text):
            proto.text = text
        case g.TokenPrompt(token_ids):
            proto.tokens.token_ids.extend(token_ids)
    return proto


_PRIORITIES: dict[int, g.Priority] = {priority.value: priority for priority in g.Priority}


def request_from_proto(p: generation_pb2.GenerationRequest) -> g.GenerationRequest:
    """A request, checked. Raises BadRequest with `param`."""
    prompt: g.Prompt
    match p.WhichOneof("prompt"):
        case "chat":
            if not p.chat.messages:
                raise BadRequest("messages is empty; give at least one", param="messages")
            prompt = g.ChatPrompt(tuple(message_from_proto(m) for m in p.chat.messages))
        case "text":
            prompt = g.TextPrompt(p.text)
        case "tokens":
            prompt = g.TokenPrompt(tuple(p.tokens.token_ids))
        case _:
            raise BadRequest("the request has no prompt; give chat, text or tokens", param="prompt")
    return g.GenerationRequest(
        request_id=p.request_id,
        deployment=p.deployment,
        prompt=prompt,
        sampling=sampling_from_proto(p.sampling),
        priority=_PRIORITIES.get(p.priority, g.Priority.NORMAL),
        tenant=p.tenant,
        idempotent=p.idempotent if p.HasField("idempotent") else True,
        idempotency_key=p.idempotency_key,
    )


def usage_to_proto(u: g.Usage) -> generation_pb2.Usage:
    """Token counts."""
    return generation_pb2.Usage(
        input_tokens=u.input_tokens,
        output_tokens=u.output_tokens,
        reasoning_tokens=u.reasoning_tokens,
        cached_input_tokens=u.cached_input_tokens,
    )


def usage_from_proto(p: generation_pb2.Usage) -> g.Usage:
    """Token counts."""
    return g.Usage(p.input_tokens, p.output_tokens, p.reasoning_tokens, p.cached_input_tokens)


def logprob_to_proto(x: g.TokenLogprob) -> generation_pb2.TokenLogprob:
    """Log-probability of one token."""
    top = [generation_pb2.TopLogprob(token_id=t.token_id, token=t.token, logprob=t.logprob) for t in x.top]
    return generation_pb2.TokenLogprob(token_id=x.token_id, token=x.token, logprob=x.logprob, top=top)


def logprob_from_proto(p: generation_pb2.TokenLogprob) -> g.TokenLogprob:
    """Log-probability of one token."""
    return g.TokenLogprob(p.token_id, p.token, p.logprob, tuple(g.TopLogprob(t.token_id, t.token, t.logprob) for t in p.top))


# --- deployments -----------------------------------------------------------------------------------------------------

_ISOLATIONS = {
    "auto": deployment_pb2.ISOLATION_UNSPECIFIED,
    "thread": deployment_pb2.ISOLATION_THREAD,
    "process": deployment_pb2.ISOLATION_PROCESS,
}
_POLICIES = {"queue": deployment_pb2.CAPACITY_POLICY_QUEUE, "reject": deployment_pb2.CAPACITY_POLICY_REJECT}


def spec_to_proto(spec: d.DeploymentSpec) -> deployment_pb2.DeploymentSpec:
    """A deployment as asked for."""
    config = struct_pb2.Struct()
    json_format.ParseDict(spec.runtime_config, config)
    return deployment_pb2.DeploymentSpec(
        name=spec.name,
        model=spec.model,
        runtime=spec.runtime,
        replicas=spec.replicas,
        runtime_config=config,
        serving=deployment_pb2.Serving(
            max_concurrent=spec.serving.max_concurrent,
            queue_capacity=spec.serving.queue_capacity,
            on_capacity_exhausted=_POLICIES[spec.serving.on_capacity_exhausted],
            max_context_tokens=spec.serving.max_context_tokens,
        ),
        timeouts=deployment_pb2.Timeouts(
            first_chunk=duration(spec.timeouts.first_chunk_s),
            next_chunk=duration(spec.timeouts.next_chunk_s),
            total=duration(spec.timeouts.total_s),
            disconnected=duration(spec.timeouts.disconnected_s),
        ),
        accelerators=spec.accelerators,
        node_labels=spec.node_labels,
        isolation=_ISOLATIONS[spec.isolation],
        memory_bytes=spec.memory_bytes,
        tolerations=spec.tolerations,
        spread_over=spec.spread_over,
    )


def _whole(value: object) -> object:
    """Struct has no integers: give back 64 for 64.0, in lists and tables too."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, list):
        return [_whole(v) for v in value]
    if isinstance(value, dict):
        return {k: _whole(v) for k, v in value.items()}
    return value


def spec_from_proto(p: deployment_pb2.DeploymentSpec) -> d.DeploymentSpec:
    """A deployment as asked for, checked. Raises BadRequest with `param`."""
    serving: dict[str, object] = {"max_context_tokens": p.serving.max_context_tokens}
    if p.serving.max_concurrent:
        serving["max_concurrent"] = p.serving.max_concurrent
    if p.serving.HasField("queue_capacity"):
        serving["queue_capacity"] = p.serving.queue_capacity
    if p.serving.on_capacity_exhausted == deployment_pb2.CAPACITY_POLICY_REJECT:
        serving["on_capacity_exhausted"] = "reject"
    timeouts: dict[str, object] = {}
    if p.timeouts.HasField("first_chunk"):
        timeouts["first_chunk_s"] = seconds(p.timeouts.first_chunk)
    if p.timeouts.HasField("next_chunk"):
        timeouts["next_chunk_s"] = seconds(p.timeouts.next_chunk)
    if p.timeouts.HasField("total"):
        timeouts["total_s"] = seconds(p.timeouts.total)
    if p.timeouts.HasField("disconnected"):
        timeouts["disconnected_s"] = seconds(p.timeouts.disconnected)
    try:
        config = _whole(json_format.MessageToDict(p.runtime_config))
    except (ValueError, json_format.SerializeToJsonError) as err:  # JSON has no NaN and no infinity
        raise BadRequest(f"deployment {p.name!r}: runtime_config: {err}", param="runtime_config") from err
    document: dict[str, object] = {
        "name": p.name,
        "model": p.model,
        "runtime": p.runtime,
        "replicas": p.replicas if p.HasField("replicas") else 1,
        "runtime_config": config,
        "serving": serving,
        "timeouts": timeouts,
        "accelerators": p.accelerators,
        "node_labels": dict(p.node_labels),
        "memory_bytes": p.memory_bytes,
        "tolerations": tuple(p.tolerations),
        "spread_over": p.spread_over or "zone",
        "isolation": next((name for name, value in _ISOLATIONS.items() if value == p.isolation), "auto"),
    }
    return d.parse_deployment(document, f"deployment {p.name!r}")


def capabilities_to_proto(c: Capabilities) -> common_pb2.Capabilities:
    """What a runner can do."""
    return common_pb2.Capabilities(
        chat=c.chat,
        completion=c.completion,
        logprobs=c.logprobs,
        seed=c.seed,
        resume=c.resume,
        max_choices=c.max_choices,
        deterministic=c.deterministic,
        penalties=c.penalties,
        logit_bias=c.logit_bias,
        min_p=c.min_p,
    )


def capabilities_from_proto(p: common_pb2.Capabilities) -> Capabilities:
    """What a runner can do."""
    return Capabilities(
        chat=p.chat,
        completion=p.completion,
        logprobs=p.logprobs,
        seed=p.seed,
        resume=p.resume,
        max_choices=p.max_choices,
        deterministic=p.deterministic,
        penalties=p.penalties,
        logit_bias=p.logit_bias,
        min_p=p.min_p,
    )
