"""A checkpoint's chat template, compiled in jinja2's sandbox: the template comes from a file that somebody downloaded."""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from inference_runtime.errors import BadRequest
from inference_runtime.runners.torch_lm.checkpoint import Checkpoint

__all__ = ["ChatTemplate", "read_chat_template"]

TOKEN_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class TemplateRefusal(jinja2.TemplateError):
    """The template called `raise_exception`: this conversation is not one it can write."""


class GenerationTag(jinja2.ext.Extension):
    """`{% generation %} … {% endgeneration %}` marks the model's words for training; for us it is its content."""

    tags = {"generation"}  # noqa: RUF012  # as jinja2 declares it

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        """The nodes between the tags."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class ChatTemplate:
    """Conversations to text, the way transformers' `apply_chat_template` writes them."""

    def __init__(self, source: str, tokens: Mapping[str, str]) -> None:
        """Compile.

        Args:
            source: The template.
            tokens: Special tokens by name, as the template's variables: bos_token, eos_token …

        Raises:
            BadRequest: The template has a syntax error.
        """
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[GenerationTag, jinja2.ext.loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals |= {"raise_exception": _refuse, "strftime_now": _now}
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateSyntaxError as err:
            raise BadRequest(f"the chat template has an error in line {err.lineno}: {err.message}", param="model") from err
        self._tokens = dict(tokens)

    def render(self, messages: Sequence[Mapping[str, object]]) -> str:
        """The conversation as text, ending where the model's turn begins. Raises BadRequest when the template refuses it."""
        try:
            return self._template.render(
                messages=messages, tools=None, documents=None, add_generation_prompt=True, **self._tokens
            )
        except TemplateRefusal as err:
            raise BadRequest(f"the model's chat template refuses the conversation: {err.message}", param="messages") from err
        except (jinja2.TemplateError, TypeError, ValueError, LookupError) as err:  # its text may quote the conversation
            raise BadRequest(
                f"the model's chat template fails on the conversation ({type(err).__name__})", param="messages"
            ) from err


def read_chat_template(checkpoint: Checkpoint) -> ChatTemplate | None:
    """The template of chat_template.jinja, else of tokenizer_config.json; None when there is none."""
    config = checkpoint.optional_json("tokenizer_config.json")
    file = checkpoint.folder / "chat_template.jinja"
    source = file.read_text(encoding="utf-8") if file.is_file() else config.get("chat_template")
    if isinstance(source, list):  # several templates by name
        source = next((entry["template"] for entry in source if entry.get("name") == "default"), None)
    if not isinstance(source, str):
        return None
    tokens = {name: text for name in TOKEN_NAMES if (text := _token_text(config.get(name))) is not None}
    return ChatTemplate(source, tokens)


def _token_text(value: object) -> str | None:
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None


def _to_json(value: object, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)


def _refuse(message: str) -> NoReturn:
    raise TemplateRefusal(message)


def _now(layout: str) -> str:
    return datetime.datetime.now().strftime(layout)
