"""OpenAI's requests: what is taken, what is refused and with which words."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from inference_runtime import generation as g
from inference_runtime.errors import BadRequest, InferenceError, Unsupported
from inference_runtime.wire import check_sampling, request_from_proto, request_to_proto
from services.gateway.http.errors import error_parts
from services.gateway.http.openai import Asked, parse_chat, parse_completion

USER = {"role": "user", "content": "hi"}


def chat(**fields: Any) -> Asked:
    return parse_chat(json.dumps({"model": "demo", "messages": [USER], **fields}).encode())


def refusal(body: bytes | dict[str, Any]) -> InferenceError:
    with pytest.raises(InferenceError) as caught:
        parse_chat(body if isinstance(body, bytes) else json.dumps(body).encode())
    return caught.value


def test_a_request_becomes_the_same_submission_that_the_codec_makes() -> None:
    asked = chat(
        messages=[
            {"role": "developer", "content": "be brief"},
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "name": "ann"},
            {"role": "assistant", "content": "c"},
        ],
        max_completion_tokens=9, temperature=0.5, top_p=0.25, top_k=4, min_p=0.125, stop=["x", "y"], seed=11,
        presence_penalty=1, frequency_penalty=-1, repetition_penalty=1.5, logit_bias={"5": -100, "6": 2.5}, n=3,
        logprobs=True, top_logprobs=3, min_tokens=2, ignore_eos=True, stop_token_ids=[1, 2],
    )  # fmt: skip
    value = g.GenerationRequest(
        request_id="",
        deployment="demo",
        prompt=g.ChatPrompt(
            (
                g.Message(g.Role.SYSTEM, (g.TextPart("be brief"),)),
                g.Message(g.Role.USER, (g.TextPart("a"), g.TextPart("b")), "ann"),
                g.Message(g.Role.ASSISTANT, (g.TextPart("c"),)),
            )
        ),
        sampling=g.SamplingParams(
            max_tokens=9, temperature=0.5, top_p=0.25, top_k=4, min_p=0.125, stop=("x", "y"), seed=11, presence_penalty=1,
            frequency_penalty=-1, repetition_penalty=1.5, logit_bias={5: -100, 6: 2.5}, top_logprobs=3, n=3, min_tokens=2,
            ignore_eos=True, stop_token_ids=(1, 2),
        ),
    )  # fmt: skip
    assert request_from_proto(asked.submission.request) == request_from_proto(request_to_proto(value))


def test_what_is_not_given_stays_absent() -> None:
    sampling = request_from_proto(chat().submission.request).sampling
    assert sampling == g.SamplingParams()


@given(
    st.fixed_dictionaries(
        {},
        optional={
            "temperature": st.floats(-1, 3), "top_p": st.floats(-0.5, 1.5), "min_p": st.floats(-0.5, 1.5),
            "top_k": st.integers(-2, 5),
            "presence_penalty": st.floats(-3, 3), "frequency_penalty": st.floats(-3, 3), "repetition_penalty": st.floats(-1, 11),
            "stop": st.lists(st.text(max_size=2), max_size=6), "max_tokens": st.integers(1, 9), "min_tokens": st.integers(0, 12),
        },
    )
)  # fmt: skip
def test_the_ranges_are_those_of_every_other_door(fields: dict[str, Any]) -> None:
    """wire.check_sampling rules; the decoder's own bounds must not differ from it."""
    values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}
    try:
        check_sampling(g.SamplingParams(**values))
    except BadRequest:
        with pytest.raises(BadRequest):
            chat(**fields)
    else:
        chat(**fields)


def test_a_negative_seed_is_a_seed() -> None:
    assert chat(seed=-1).submission.request.sampling.seed == 2**64 - 1


WRONG: list[tuple[dict[str, Any], str, str]] = [
    ({"messages": [USER]}, "model", "missing_required_parameter"),
    ({"model": "demo"}, "messages", "missing_required_parameter"),
    ({"model": 3, "messages": [USER]}, "model", "invalid_type"),
    ({"model": "", "messages": [USER]}, "model", "invalid_value"),
    ({"model": "demo", "messages": []}, "messages", "invalid_value"),
    ({"model": "demo", "messages": "hi"}, "messages", "invalid_type"),
    ({"model": "demo", "messages": [3]}, "messages[0]", "invalid_type"),
    ({"model": "demo", "messages": [{"content": "x"}]}, "messages[0].role", "missing_required_parameter"),
    ({"model": "demo", "messages": [{"role": "king", "content": "x"}]}, "messages[0].role", "invalid_value"),
    ({"model": "demo", "messages": [{"role": "user"}]}, "messages[0].content", "missing_required_parameter"),
    ({"model": "demo", "messages": [{"role": "user", "content": 3}]}, "messages[0].content", "invalid_type"),
    ({"model": "demo", "messages": [{"role": "user", "content": []}]}, "messages[0].content", "invalid_value"),
    (
        {"model": "demo", "messages": [USER, {"role": "user", "content": [{"type": "text"}]}]},
        "messages[1].content[0].text",
        "missing_required_parameter",
    ),
    (
        {"model": "demo", "messages": [{"role": "user", "content": [{"type": "smell"}]}]},
        "messages[0].content[0].type",
        "invalid_value",
    ),
    ({"model": "demo", "messages": [{"role": "user", "content": "x", "mood": 1}]}, "messages[0].mood", "unknown_parameter"),
    ({"model": "demo", "messages": [USER], "temperatur": 1}, "temperatur", "unknown_parameter"),
    ({"model": "demo", "messages": [USER], "temperature": "hot"}, "temperature", "invalid_type"),
    ({"model": "demo", "messages": [USER], "temperature": 2.5}, "temperature", "invalid_value"),
    ({"model": "demo", "messages": [USER], "top_p": 0}, "top_p", "invalid_value"),
    ({"model": "demo", "messages": [USER], "max_tokens": 0}, "max_tokens", "invalid_value"),
    ({"model": "demo", "messages": [USER], "max_tokens": 1.5}, "max_tokens", "invalid_type"),
    ({"model": "demo", "messages": [USER], "max_tokens": 10**30}, "max_tokens", "invalid_value"),
    ({"model": "demo", "messages": [USER], "max_tokens": True}, "max_tokens", "invalid_type"),
    ({"model": "demo", "messages": [USER], "n": 9}, "n", "invalid_value"),
    ({"model": "demo", "messages": [USER], "n": 0}, "n", "invalid_value"),
    ({"model": "demo", "messages": [USER], "n": "two"}, "n", "invalid_type"),
    ({"model": "demo", "messages": [USER], "stop": [1]}, "stop[0]", "invalid_type"),
    ({"model": "demo", "messages": [USER], "stop": ["x"] * 5}, "stop", "invalid_value"),
    ({"model": "demo", "messages": [USER], "stop": ""}, "stop", "invalid_value"),
    ({"model": "demo", "messages": [USER], "stream": "yes"}, "stream", "invalid_type"),
    ({"model": "demo", "messages": [USER], "stream_options": {"include_usage": True}}, "stream_options", "invalid_value"),
    (
        {"model": "demo", "messages": [USER], "stream": True, "stream_options": {"usage": True}},
        "stream_options.usage",
        "unknown_parameter",
    ),
    ({"model": "demo", "messages": [USER], "top_logprobs": 2}, "top_logprobs", "invalid_value"),
    ({"model": "demo", "messages": [USER], "min_tokens": 5, "max_tokens": 4}, "min_tokens", "invalid_value"),
]


@pytest.mark.parametrize(("body", "param", "code"), WRONG, ids=lambda x: x if isinstance(x, str) else "")
def test_a_wrong_field_is_named(body: dict[str, Any], param: str, code: str) -> None:
    error = refusal(body)
    assert error.http_status == 400
    parts = error_parts(error)
    assert (parts["param"], parts["code"], parts["type"]) == (param, code, "invalid_request_error")
    assert parts["message"]
    assert "`" not in parts["message"]


@pytest.mark.parametrize(
    "body", [b"", b"{", b"null", b"[]", b"\xff\xfe", b'{"model": "a', b'{"model":"a","messages":' + b"[" * 200_000, b"{}{}"]
)
def test_a_body_that_is_no_request_is_refused_without_a_crash(body: bytes) -> None:
    error = refusal(body)
    assert isinstance(error, BadRequest)
    assert error.http_status == 400


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("tools", [{"type": "function"}]),
        ("tool_choice", "required"),
        ("functions", [{}]),
        ("response_format", {"type": "json_object"}),
        ("modalities", ["audio"]),
        ("audio", {"voice": "x"}),
        ("prediction", {}),
        ("reasoning_effort", "high"),
        ("web_search_options", {}),
    ],
)
def test_what_would_change_the_answer_and_is_not_offered_is_refused_by_name(field: str, value: Any) -> None:
    """Trap 34: nothing that looks set is silently ignored."""
    error = refusal({"model": "demo", "messages": [USER], field: value})
    assert isinstance(error, Unsupported)
    assert error_parts(error)["param"] == field
    assert error_parts(error)["code"] == "unsupported"


@pytest.mark.parametrize(
    "fields",
    [
        {"user": "ann"}, {"metadata": {"a": "b"}}, {"store": True}, {"service_tier": "auto"}, {"safety_identifier": "x"},
        {"prompt_cache_key": "x"}, {"n": 1}, {"tools": []}, {"tool_choice": "auto"}, {"response_format": {"type": "text"}},
        {"modalities": ["text"]}, {"logprobs": False}, {"parallel_tool_calls": True}, {"stop": None}, {"temperature": None},
    ],
)  # fmt: skip
def test_what_changes_nothing_is_taken(fields: dict[str, Any]) -> None:
    assert chat(**fields).model == "demo"


@pytest.mark.parametrize("kind", ["image_url", "input_audio", "file"])
def test_trap_36_media_parts_are_refused_by_name(kind: str) -> None:
    """Trap 36: the original answered 422 to any parts; text parts work here and others say why not."""
    error = refusal({"model": "demo", "messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": kind}]}]})
    assert isinstance(error, Unsupported)
    assert error.param == "messages[0].content[1]"


def test_tool_turns_are_refused_by_name() -> None:
    assert refusal({"model": "demo", "messages": [{"role": "tool", "content": "x"}]}).param == "messages[0].role"
    turn = {"role": "assistant", "content": None, "tool_calls": [{"id": "x"}]}
    assert refusal({"model": "demo", "messages": [turn]}).param == "messages[0].tool_calls"


def test_a_message_that_this_gateway_answered_can_be_sent_back() -> None:
    turn: dict[str, Any] = {
        "role": "assistant",
        "content": "x",
        "refusal": None,
        "tool_calls": None,
        "audio": None,
        "annotations": [],
    }
    assert len(chat(messages=[turn, USER]).submission.request.chat.messages) == 2


def test_a_completion_takes_text_or_tokens() -> None:
    asked = parse_completion(b'{"model":"demo","prompt":"once","max_tokens":3}')
    assert asked.submission.request.text == "once"
    assert asked.submission.request.sampling.max_tokens == 3
    assert list(parse_completion(b'{"model":"demo","prompt":[1,2]}').submission.request.tokens.token_ids) == [1, 2]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": []}, "prompt"),
        ({"prompt": ["a", "b"]}, "prompt[0]"),
        ({"echo": True}, "echo"),
        ({"best_of": 2}, "best_of"),
        ({"suffix": "x"}, "suffix"),
        ({"logprobs": 2}, "logprobs"),
    ],
)
def test_a_completion_that_is_not_offered_is_refused_by_name(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(InferenceError) as caught:
        parse_completion(json.dumps({"model": "demo", "prompt": "x", **fields}).encode())
    assert caught.value.param == param
