"""Text <-> tokens for one checkpoint: its tokenizer, its chat template, the exact bytes of each token. No torch in here.

Lives in the engine's stable tier. A codec is immutable after it was made, so any thread may use it. Special tokens come from the
chat template and the tokenizer alone: a user who spells one gets its characters. Otherwise a message could end its own turn and
speak as the system.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from tokenizers import Tokenizer

from inference_runtime.errors import BadRequest, Unsupported
from inference_runtime.generation import Media, Message, Role
from inference_runtime.runners.torch_lm.chat_template import ChatTemplate, read_chat_template
from inference_runtime.runners.torch_lm.checkpoint import Checkpoint
from inference_runtime.runners.torch_lm.config import read_model_config

__all__ = ["TokenizerCodec", "make_codec"]

ROLE_NAMES = {Role.SYSTEM: "system", Role.USER: "user", Role.ASSISTANT: "assistant", Role.TOOL: "tool"}
#: SentencePiece writes a space as this character (U+2581).
SPACE_MARK = "\u2581"
#: Characters without a meaning of their own. One that a conversation does not hold stands, on the way through the template,
#: around the number of a special token that somebody spelled.
PRIVATE_USE = range(0xE000, 0xF900)


class TokenizerCodec:
    """A `Codec` on a tokenizer.json of the byte-level or the SentencePiece kind with byte fallback."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        template: ChatTemplate | None,
        table: Sequence[bytes],
        eos_token_ids: frozenset[int],
        max_token_bytes: int = 0,
    ) -> None:
        self._tokenizer = tokenizer
        self._template = template
        self._special = {t.content: i for i, t in tokenizer.get_added_tokens_decoder().items() if t.special and t.content}
        spellings = sorted(self._special, key=len, reverse=True)  # of two that begin alike, the longer one is meant
        self._spelled = re.compile("|".join(map(re.escape, spellings))) if spellings else None
        self._literal = tokenizer
        if spellings:
            self._literal = Tokenizer.from_str(tokenizer.to_str())
            self._literal.encode_special_tokens = True  # their spellings are text like any other
        self._table = table
        self._eos_token_ids = eos_token_ids
        self._max_token_bytes = max_token_bytes

    @property
    def max_token_bytes(self) -> int:
        """Length of the longest token; 0 for a tokenizer that rewrites text before it cuts it."""
        return self._max_token_bytes

    @property
    def vocab_size(self) -> int:
        """Number of token ids of the model."""
        return len(self._table)

    @property
    def eos_token_ids(self) -> frozenset[int]:
        """Tokens that end a text."""
        return self._eos_token_ids

    def encode_chat(self, messages: Sequence[Message]) -> list[int]:
        """Tokens of a conversation by the checkpoint's chat template, with the start of the model's turn.

        Raises:
            BadRequest: The checkpoint has no chat template, or the template refuses the conversation.
            Unsupported: A message holds more than text.
        """
        if self._template is None:
            raise BadRequest("this model has no chat template; use completions instead of chat", param="messages")
        turns = [_as_dict(message) for message in messages]
        spelled = self._spelled
        if spelled is None or not any(spelled.search(text) for turn in turns for text in turn.values()):
            return _encode(self._tokenizer, self._template.render(turns), add_special_tokens=False)
        return self._encode_spelled(self._template, turns, spelled)

    def _encode_spelled(self, template: ChatTemplate, turns: list[dict[str, str]], spelled: re.Pattern[str]) -> list[int]:
        """A conversation in which somebody spells special tokens: those are put aside while the template writes its own."""
        aside: list[str] = []
        mark = _unused(text for turn in turns for text in turn.values())

        def put_aside(found: re.Match[str]) -> str:
            aside.append(found[0])
            return f"{mark}{len(aside) - 1}{mark}"

        def bring_back(found: re.Match[str]) -> str:
            return aside[int(found[1])]

        text = template.render([{key: spelled.sub(put_aside, value) for key, value in turn.items()} for turn in turns])
        placeholder = re.compile(f"{mark}([0-9]+){mark}")
        ids: list[int] = []
        at = 0
        for special in spelled.finditer(text):
            ids += self._encode_literal(placeholder.sub(bring_back, text[at : special.start()]))
            ids.append(self._special[special[0]])
            at = special.end()
        return ids + self._encode_literal(placeholder.sub(bring_back, text[at:]))

    def _encode_literal(self, text: str) -> list[int]:
        return _encode(self._literal, text, add_special_tokens=False) if text else []

    def encode(self, text: str) -> list[int]:
        """Tokens of plain text, with the begin-of-text token where the tokenizer adds one."""
        return _encode(self._literal, text, add_special_tokens=True)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of a token; b"" for special tokens and for ids without a token."""
        return self._table[token_id]


def _encode(tokenizer: Tokenizer, text: str, *, add_special_tokens: bool) -> list[int]:
    # A batch of one: tokenizers holds the interpreter's lock all through `encode`, and lets it go for a batch.
    ids: list[int] = tokenizer.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids
    return ids


def _unused(texts: Iterable[str]) -> str:
    """A character for private use that none of these texts holds."""
    held = set().union(*texts)
    free = next((chr(c) for c in PRIVATE_USE if chr(c) not in held), None)
    if free is None:
        raise BadRequest("the conversation holds every character that is for private use; leave some out", param="messages")
    return free


def make_codec(checkpoint: Checkpoint) -> TokenizerCodec:
    """Read tokenizer.json, the chat template and the ends of text. Raises BadRequest or Unsupported."""
    path = checkpoint.path("tokenizer.json")
    description = checkpoint.json("tokenizer.json")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as err:  # tokenizers raises Exception itself
        raise BadRequest(f"{path} is not a readable tokenizer: {err}", param="model", file=str(path)) from err
    vocab_size = max(read_model_config(checkpoint).vocab_size, tokenizer.get_vocab_size())
    return TokenizerCodec(
        tokenizer,
        read_chat_template(checkpoint),
        _byte_table(tokenizer, description, vocab_size),
        checkpoint.generation_defaults().eos_token_ids,
        0 if description.get("normalizer") else max(len(piece.encode()) for piece in tokenizer.get_vocab(with_added_tokens=True)),
    )


def _as_dict(message: Message) -> dict[str, str]:
    for part in message.content:
        if isinstance(part, Media):
            raise Unsupported(
                f"this model reads text only, not {part.kind}", feature=part.kind, runtime="torch", param="messages"
            )
    value: dict[str, str] = {"role": ROLE_NAMES[message.role], "content": message.text}
    return value | {"name": message.name} if message.name else value


def _byte_table(tokenizer: Tokenizer, description: Mapping[str, object], vocab_size: int) -> list[bytes]:
    """Bytes of every id, [vocab_size]."""
    kinds = _decoder_kinds(description.get("decoder"))
    if "ByteLevel" in kinds:
        characters = _byte_level_characters()

        def to_bytes(piece: str) -> bytes:
            return b"".join(characters[c] if c in characters else c.encode() for c in piece)
    elif "ByteFallback" in kinds:

        def to_bytes(piece: str) -> bytes:
            if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
                return bytes([int(piece[3:5], 16)])
            return piece.replace(SPACE_MARK, " ").encode()
    else:
        raise Unsupported(
            f"the tokenizer decodes by {' + '.join(sorted(kinds)) or 'nothing'}; known are ByteLevel and ByteFallback",
            feature="tokenizer",
            runtime="torch",
        )
    table = [b""] * vocab_size
    added = tokenizer.get_added_tokens_decoder()
    for piece, token_id in tokenizer.get_vocab(with_added_tokens=True).items():
        if token_id not in added:
            table[token_id] = to_bytes(piece)
        elif not added[token_id].special:
            table[token_id] = piece.encode()
    return table


def _decoder_kinds(decoder: object) -> set[str]:
    if not isinstance(decoder, dict):
        return set()
    inner = decoder.get("decoders", [])
    return {str(decoder.get("type"))}.union(*(_decoder_kinds(d) for d in inner)) - {"Sequence"}


def _byte_level_characters() -> dict[str, bytes]:
    """GPT-2's table: printable bytes stand for themselves, the others for the characters from U+0100 on, in order."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in set(printable)]
    return {chr(b): bytes([b]) for b in printable} | {chr(0x100 + i): bytes([b]) for i, b in enumerate(others)}
