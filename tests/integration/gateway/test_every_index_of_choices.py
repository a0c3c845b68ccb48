"""Two choices, a stop string, a seed: the engine is lost at every token of the 64; the answer is the undisturbed one each time.

`test_every_index.py` breaks single answers; here the whole session to an engine goes, with whatever choices are on it.
"""

from __future__ import annotations

import json
from typing import Any

import pytest

from inference_runtime.runners.scripted import ScriptedCodec
from inference_runtime.testing.scripted import expected_text, expected_tokens, user_says
from tests.integration.gateway.conftest import Gateway, Start
from tests.integration.gateway.peer import deployment_route, until
from tests.integration.gateway.test_choices import STOP, choices_of, parts
from tests.integration.gateway.test_every_index import PROMPT, SEED, TOKENS, breaking

#: Tokens of each choice: the stop string ends the second within its 59th.
LENGTHS = (TOKENS, 59)
FIELDS: dict[str, Any] = {
    "messages": [{"role": "user", "content": PROMPT}],
    "max_tokens": TOKENS,
    "seed": SEED,
    "n": 2,
    "stop": [STOP],
}


def truth() -> dict[int, tuple[str, list[str]]]:
    """Text and finish reason of each choice, from the tokens alone."""
    first, second = (expected_text(user_says(PROMPT), SEED, choice, TOKENS) for choice in (0, 1))
    assert STOP not in first
    return {0: (first, ["length"]), 1: (second.partition(STOP)[0], ["stop"])}


async def ask(gateway: Gateway, stream: bool) -> tuple[dict[int, tuple[str, list[str]]], dict[str, int]]:
    """Text and finish reasons of each choice, and the usage; fails where it is not a proper answer."""
    more: dict[str, Any] = {"stream": True, "stream_options": {"include_usage": True}} if stream else {}
    response = await gateway.chat(**FIELDS, **more)
    assert response.status_code == 200, response.text
    if not stream:
        answer = response.json()
        return {c["index"]: (c["message"]["content"], [c["finish_reason"]]) for c in answer["choices"]}, answer["usage"]
    texts = {
        k: ("".join(c["delta"].get("content") or "" for c in v), [c["finish_reason"] for c in v if c["finish_reason"]])
        for k, v in choices_of(response).items()
    }
    return texts, json.loads(parts(response.text)[-2])["usage"]


@pytest.mark.parametrize("stream", [True, False], ids=["streamed", "whole"])
async def test_trap_08_choices_survive_the_loss_of_an_engine_at_any_token(start: Start, stream: bool) -> None:
    """Trap 8: at every token of the longer choice; each choice whole, once, and in its place."""
    lost = [expected_tokens(user_says(PROMPT), SEED, choice, TOKENS) for choice in (0, 1)]
    prompt_tokens = len(ScriptedCodec().encode_chat(user_says(PROMPT)))
    codec, broken = ScriptedCodec(), 0
    async with breaking("a", codec, lambda: None) as a, breaking("b", codec, lambda: None) as b:
        a.cut_stream = b.cut_stream = True
        async with start(limits={"move_floor": 1000}) as gateway:
            await gateway.route(deployment_route(a.replica("demo"), b.replica("demo")))
            for k in range(TOKENS):
                a.break_choice_at = b.break_choice_at = {0: k, 1: k}
                await until(lambda: all(t.usable for t in gateway.worker.table.targets.values()), "sessions")
                texts, usage = await ask(gateway, stream)
                assert texts == truth(), f"lost at token {k}"
                assert usage["completion_tokens"] == sum(LENGTHS), f"lost at token {k}"
                assert usage["prompt_tokens"] == prompt_tokens
                prefixes = [*a.prefixes[:], *b.prefixes[:]]
                a.prefixes.clear()
                b.prefixes.clear()
                assert prefixes or k > max(LENGTHS) - 1, f"nothing was lost at token {k}"
                assert all(p in (t[: len(p)] for t in lost) for p in prefixes), f"went on from something else at token {k}"
                broken += bool(prefixes)
    assert broken >= TOKENS
