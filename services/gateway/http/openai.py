"""OpenAI's requests: decode, check, turn into what an engine understands.

Checked while decoding (msgspec), so a good request pays nothing for it. A key that this version cannot honour is refused by name,
and so is one that nobody knows: a setting that looks set is set. Keys that change nothing about the answer are ignored.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from inference_runtime.errors import BadRequest, Unsupported
from inference_runtime.generation import MAX_CHOICES
from inference_runtime.v1 import engine_service_pb2, generation_pb2
from inference_runtime.wire import MAX_STOP_CHARS, MAX_STOPS, MAX_TOP_LOGPROBS

__all__ = ["Asked", "ChatRequest", "CompletionRequest", "parse_chat", "parse_completion"]

Submission = engine_service_pb2.Submission

Count = Annotated[int, Meta(ge=1, le=2**31 - 1)]
Token = Annotated[int, Meta(ge=0, le=2**32 - 1)]
Stop = Annotated[str, Meta(min_length=1, max_length=MAX_STOP_CHARS)]
Penalty = Annotated[float, Meta(ge=-2, le=2)]
Bias = Annotated[float, Meta(ge=-100, le=100)]
SEED_BITS = 2**64 - 1


class StreamOptions(msgspec.Struct, forbid_unknown_fields=True, gc=False):
    """`stream_options`. Obfuscation pads nothing here and may be asked for or not."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class _Common(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    model: Annotated[str, Meta(min_length=1)]
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Count | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    stop: Stop | Annotated[list[Stop], Meta(max_length=MAX_STOPS)] | None = None
    seed: Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)] | None = None
    n: Annotated[int, Meta(ge=1, le=MAX_CHOICES)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: dict[Token, Bias] | None = None
    # Beyond OpenAI: what engines offer besides.
    top_k: Annotated[int, Meta(ge=0, le=2**31 - 1)] | None = None
    min_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Meta(ge=0, le=10)] | None = None
    min_tokens: Annotated[int, Meta(ge=0, le=2**31 - 1)] | None = None
    ignore_eos: bool | None = None
    stop_token_ids: list[Token] | None = None
    # They change nothing about the answer.
    user: Any = None
    metadata: Any = None
    store: Any = None
    service_tier: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None
    prompt_cache_retention: Any = None


class Part(msgspec.Struct):
    """One piece of a message's content."""

    type: str
    text: str | None = None


class ChatMessage(msgspec.Struct, forbid_unknown_fields=True):
    """One turn."""

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | list[Part] | None = None
    name: str | None = None
    refusal: Any = None
    tool_calls: Any = None
    tool_call_id: Any = None
    function_call: Any = None
    audio: Any = None
    annotations: Any = None


class ChatRequest(_Common):
    """The body of POST /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], Meta(min_length=1)]
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    # They change the answer and this version cannot honour them: only their neutral values are taken.
    tools: Any = None
    tool_choice: Any = None
    parallel_tool_calls: Any = None
    functions: Any = None
    function_call: Any = None
    response_format: Any = None
    modalities: Any = None
    audio: Any = None
    prediction: Any = None
    reasoning_effort: Any = None
    verbosity: Any = None
    web_search_options: Any = None
    moderation: Any = None


class CompletionRequest(_Common):
    """The body of POST /v1/completions."""

    prompt: str | list[Token]
    logprobs: Annotated[int, Meta(ge=0, le=5)] | None = None
    best_of: Any = None
    echo: Any = None
    suffix: Any = None


_NEUTRAL: dict[str, tuple[object, ...]] = {
    "tools": (None, []),
    "tool_choice": (None, "none", "auto"),
    "functions": (None, []),
    "function_call": (None, "none", "auto"),
    "response_format": (None, {"type": "text"}),
    "modalities": (None, ["text"]),
    "audio": (None,),
    "prediction": (None,),
    "reasoning_effort": (None, "none"),
    "verbosity": (None, "medium"),
    "web_search_options": (None,),
    "moderation": (None,),
    "echo": (None, False),
    "suffix": (None, ""),
}
_NO_CHAT_EXTRAS = (None,) * 12
_ROLES = {
    "system": generation_pb2.ROLE_SYSTEM,
    "developer": generation_pb2.ROLE_SYSTEM,
    "user": generation_pb2.ROLE_USER,
    "assistant": generation_pb2.ROLE_ASSISTANT,
}
_MEDIA = {"image_url": "images", "input_audio": "sound", "file": "files"}

_chat_decoder = msgspec.json.Decoder(ChatRequest)
_completion_decoder = msgspec.json.Decoder(CompletionRequest)


class Asked:
    """A checked request: the submission for an engine, and how the client wants its answer."""

    __slots__ = ("include_usage", "logprobs", "model", "plain", "stream", "submission")

    def __init__(
        self, model: str, submission: Submission, *, stream: bool, include_usage: bool, logprobs: bool, plain: bool
    ) -> None:
        self.model, self.submission = model, submission
        self.stream, self.include_usage, self.logprobs = stream, include_usage, logprobs
        #: It asks for nothing that only some runtimes can do.
        self.plain = plain


def parse_chat(body: bytes) -> Asked:
    """A chat completion request.

    Raises:
        BadRequest: with `param` = the path of the field at fault.
        Unsupported: It asks for something that this version cannot do.
    """
    try:
        asked = _chat_decoder.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as err:
        raise _bad_body(err) from err
    if (
        asked.tools, asked.tool_choice, asked.functions, asked.function_call, asked.response_format, asked.modalities,
        asked.audio, asked.prediction, asked.reasoning_effort, asked.verbosity, asked.web_search_options, asked.moderation,
    ) != _NO_CHAT_EXTRAS:  # fmt: skip
        _refuse_extras(asked)
    submission = Submission()
    request = submission.request
    add = request.chat.messages.add
    for at, turn in enumerate(asked.messages):
        message = add()
        content = turn.content
        if (
            type(content) is str
            and turn.role in _ROLES
            and not (turn.tool_calls or turn.function_call or turn.refusal or turn.audio)
        ):
            message.role = _ROLES[turn.role]
            message.content.add().text = content
        else:
            _add_parts(message, turn, f"messages[{at}]")
        if turn.name:
            message.name = turn.name
    sampling = request.sampling
    _add_sampling(sampling, asked, asked.max_completion_tokens or asked.max_tokens)
    if asked.logprobs:
        sampling.top_logprobs = asked.top_logprobs or 0
    elif asked.top_logprobs is not None:
        raise BadRequest("top_logprobs needs logprobs to be true", param="top_logprobs", code="invalid_value")
    return _asked(asked, submission, bool(asked.logprobs))


def parse_completion(body: bytes) -> Asked:
    """A text completion request. Raises as `parse_chat` does."""
    try:
        asked = _completion_decoder.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as err:
        raise _bad_body(err) from err
    if (asked.echo, asked.suffix) != (None, None):
        _refuse_extras(asked)
    if asked.best_of is not None and asked.best_of != (asked.n or 1):
        raise Unsupported("best_of is not offered by this version beyond n; leave it out", param="best_of", feature="best_of")
    if asked.logprobs is not None:
        raise Unsupported("log-probabilities are served by /v1/chat/completions only", param="logprobs", feature="logprobs")
    submission = Submission()
    if isinstance(asked.prompt, str):
        submission.request.text = asked.prompt
    elif asked.prompt:
        submission.request.tokens.token_ids.extend(asked.prompt)
    else:
        raise BadRequest("prompt is an empty list of tokens; give at least one", param="prompt", code="invalid_value")
    _add_sampling(submission.request.sampling, asked, asked.max_tokens)
    return _asked(asked, submission, False)


def _asked(asked: _Common, submission: Submission, logprobs: bool) -> Asked:
    options = asked.stream_options
    if options is not None and not asked.stream:
        raise BadRequest("stream_options needs stream to be true", param="stream_options", code="invalid_value")
    submission.request.deployment = asked.model
    plain = not (
        logprobs
        or asked.presence_penalty
        or asked.frequency_penalty
        or asked.logit_bias
        or asked.min_p
        or asked.repetition_penalty
        or (asked.n or 1) > 1
    )
    return Asked(
        asked.model,
        submission,
        stream=bool(asked.stream),
        include_usage=options is not None and bool(options.include_usage),
        logprobs=logprobs,
        plain=plain,
    )


def _add_sampling(p: generation_pb2.SamplingParams, asked: _Common, max_tokens: int | None) -> None:
    """Set what was given. Ranges were checked while decoding, the same ones as in `wire.check_sampling`."""
    if max_tokens is not None:
        p.max_tokens = max_tokens
    if asked.temperature is not None:
        p.temperature = asked.temperature
    if asked.top_p is not None:
        p.top_p = asked.top_p
    if asked.seed is not None:
        p.seed = asked.seed & SEED_BITS
    if asked.n is not None and asked.n > 1:
        p.n = asked.n
    if asked.stop is not None:
        p.stop.extend((asked.stop,) if isinstance(asked.stop, str) else asked.stop)
    if asked.presence_penalty:
        p.presence_penalty = asked.presence_penalty
    if asked.frequency_penalty:
        p.frequency_penalty = asked.frequency_penalty
    if asked.logit_bias:
        for token_id, bias in asked.logit_bias.items():
            p.logit_bias.add(token_id=token_id, bias=bias)
    if asked.top_k:
        p.top_k = asked.top_k
    if asked.min_p is not None:
        p.min_p = asked.min_p
    if asked.repetition_penalty:
        p.repetition_penalty = asked.repetition_penalty
    if asked.min_tokens:
        if max_tokens is not None and asked.min_tokens > max_tokens:
            raise BadRequest("min_tokens must not be above max_tokens", param="min_tokens", code="invalid_value")
        p.min_tokens = asked.min_tokens
    if asked.ignore_eos:
        p.ignore_eos = True
    if asked.stop_token_ids:
        p.stop_token_ids.extend(asked.stop_token_ids)


def _add_parts(message: generation_pb2.Message, turn: ChatMessage, path: str) -> None:
    """A turn that is more than a plain string of a plain role."""
    if turn.role not in _ROLES:
        raise Unsupported(f"{path}.role: {turn.role!r} turns need tools, which this version does not offer", param=f"{path}.role")
    for name in ("tool_calls", "function_call", "refusal", "audio"):
        if getattr(turn, name):
            raise Unsupported(f"{path}.{name} is not offered by this version; leave it out", param=f"{path}.{name}")
    message.role = _ROLES[turn.role]
    content = turn.content
    if content is None:
        raise BadRequest(
            f"{path}.content is missing; give a string or a list of parts",
            param=f"{path}.content",
            code="missing_required_parameter",
        )
    if isinstance(content, str):
        message.content.add().text = content
        return
    if not content:
        raise BadRequest(
            f"{path}.content is an empty list; give at least one part", param=f"{path}.content", code="invalid_value"
        )
    for at, part in enumerate(content):
        where = f"{path}.content[{at}]"
        if part.type in _MEDIA:
            raise Unsupported(f"{where}: this version takes text only, no {_MEDIA[part.type]}", param=where, feature=part.type)
        if part.type != "text":
            raise BadRequest(f"{where}.type: {part.type!r} is not known; use 'text'", param=f"{where}.type", code="invalid_value")
        if part.text is None:
            raise BadRequest(f"{where}.text is missing", param=f"{where}.text", code="missing_required_parameter")
        message.content.add().text = part.text


def _refuse_extras(asked: _Common) -> None:
    for name, neutral in _NEUTRAL.items():
        if getattr(asked, name, None) not in neutral:
            raise Unsupported(f"{name} is not offered by this version; leave it out", param=name, feature=name)


# --- what a client did wrong, in its words ---------------------------------------------------------------------------------

_AT = re.compile(r" - at `(?:key` in `)?\$(?P<path>[^`]*)`$")
_WORDS = {
    "str": "a string", "int": "an integer", "float": "a number", "bool": "a boolean", "array": "an array", "object": "an object",
    "null": "null",
}  # fmt: skip


def _kinds(names: str) -> str:
    words = [_WORDS.get(name, name) for name in names.split(" | ")]
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"


def _bad_body(err: Exception) -> BadRequest:
    if not isinstance(err, msgspec.ValidationError):
        return BadRequest(f"the request body is not valid JSON: {err}", code="invalid_json")
    text = str(err)
    found = _AT.search(text)
    path = found["path"].lstrip(".") if found else ""
    what = text[: found.start()] if found else text
    if match := re.match(r"Object (missing required|contains unknown) field `(.*)`", what):
        param = f"{path}.{match[2]}" if path else match[2]
        if match[1] == "contains unknown":
            return BadRequest(f"unknown parameter: {param}; leave it out", param=param, code="unknown_parameter")
        return BadRequest(f"{param} is missing", param=param, code="missing_required_parameter")
    code = "invalid_value"
    if match := re.fullmatch(r"Expected `([^`]*)`, got `([^`]*)`", what):
        what, code = f"expected {_kinds(match[1])}, got {_kinds(match[2])}", "invalid_type"
    elif match := re.fullmatch(r"Expected `(\w+)`( of length)? ([<>]=?) ([-\d.e+]+)", what):
        kind, of_length, sign, bound = match.groups()
        word = {"<=": "at most", ">=": "at least", "<": "below", ">": "above"}[sign]
        what = f"expected {_WORDS.get(kind, kind)}{' of length' if of_length else ''} {word} {bound}"
    elif what.startswith("Invalid enum value"):
        what = "the value is not one of those that are known"
    if not path:
        return BadRequest(f"the request body: {what}", code=code)
    return BadRequest(f"{path}: {what}", param=path, code=code)
