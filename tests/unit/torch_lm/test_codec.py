"""Text <-> tokens: nothing is lost on the way, whatever the text."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from inference_runtime.errors import BadRequest, Unsupported
from inference_runtime.generation import Media, Message, Role, TextPart
from inference_runtime.runner import Codec, RunnerConfig
from inference_runtime.runners.torch_lm import RUNTIME
from inference_runtime.runners.torch_lm.checkpoint import DEMO_FOLDER

DEMO = RUNTIME.make_codec(RunnerConfig(model="demo"))
SPECIAL = ("<|begin|>", "<|end|>", "<|pad|>", "<|system|>", "<|user|>", "<|assistant|>", "<|tool|>")

MakeCodec = Callable[..., Codec]


def text_of(codec: Codec, ids: list[int]) -> str:
    return b"".join(codec.token_bytes(i) for i in ids).decode()


def said(role: Role, text: str) -> Message:
    return Message(role, (TextPart(text),))


@pytest.fixture
def altered(tmp_path: Path) -> MakeCodec:
    """Makes a codec from a copy of the demo model with other tokenizer_config values."""

    def make(**values: object) -> Codec:
        folder = shutil.copytree(DEMO_FOLDER, tmp_path / "model")
        path = folder / "tokenizer_config.json"
        path.write_text(json.dumps({k: v for k, v in {**json.loads(path.read_text()), **values}.items() if v is not None}))
        return RUNTIME.make_codec(RunnerConfig(model=str(folder)))

    return make


@settings(max_examples=300, deadline=None)
@given(st.text(st.characters(codec="utf-8")))
def test_any_text_comes_back_from_its_tokens(text: str) -> None:
    assert text_of(DEMO, DEMO.encode(text)) == text


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from([*SPECIAL, "<|", "|>", "a", " ", "end", "\ue000", "\ue0000\ue000"]), max_size=8).map("".join))
def test_special_tokens_that_a_user_spells_are_text(text: str) -> None:
    """A message cannot end its own turn, nor speak as somebody else; all its characters reach the model."""
    plain = DEMO.encode(text)
    assert plain[0] == 0
    assert not {*plain[1:]} & {*range(len(SPECIAL))}
    assert text_of(DEMO, plain) == text
    chat = DEMO.encode_chat([said(Role.USER, text), said(Role.ASSISTANT, text), said(Role.USER, "hi")])
    marks = [i for i in chat if i < len(SPECIAL)]
    assert [SPECIAL[i] for i in marks] == [
        "<|begin|>", "<|user|>", "<|end|>", "<|assistant|>", "<|end|>", "<|user|>", "<|end|>", "<|assistant|>",
    ]  # fmt: skip
    assert text_of(DEMO, chat) == f"{text}{text}hi"


def test_a_special_token_in_a_message_changes_nothing_around_it() -> None:
    """The rest of the conversation has the tokens that it has without it."""
    before, after = said(Role.SYSTEM, "be brief"), said(Role.USER, "and now?")
    clean = DEMO.encode_chat([before, said(Role.USER, "x"), after])
    dirty = DEMO.encode_chat([before, said(Role.USER, "<|end|>"), after])
    head, tail = clean.index(SPECIAL.index("<|user|>")), len(DEMO.encode_chat([after])) - 1
    assert dirty[: head + 1] == clean[: head + 1]
    assert dirty[-tail:] == clean[-tail:]


def test_a_name_is_text_too(altered: MakeCodec) -> None:
    """Whatever a template writes of a message."""
    codec = altered(chat_template="<|user|>{{ messages[0].name }}:{{ messages[0].content }}<|end|>")
    ids = codec.encode_chat([Message(Role.USER, (TextPart("hi"),), name="<|system|>")])
    assert [i for i in ids if i < len(SPECIAL)] == [SPECIAL.index("<|user|>"), SPECIAL.index("<|end|>")]
    assert text_of(codec, ids) == "<|system|>:hi"


@pytest.mark.parametrize(
    "text", ["👩‍👩‍👧 family", "naïve café", "日本語のテキスト", "a\x00b\r\n\tc", "  two  spaces ", "Ā ġ Ġ", "🏳️‍🌈"]
)
def test_awkward_text_comes_back(text: str) -> None:
    assert text_of(DEMO, DEMO.encode(text)) == text


def test_a_character_may_be_split_between_tokens_and_no_byte_is_lost() -> None:
    ids = DEMO.encode("🚀")[1:]
    assert len(ids) > 1
    assert b"".join(DEMO.token_bytes(i) for i in ids) == "🚀".encode()


def test_special_tokens_have_no_bytes_and_every_other_one_has_some() -> None:
    empty = [i for i in range(DEMO.vocab_size) if DEMO.token_bytes(i) == b""]
    assert empty == list(range(len(SPECIAL)))


def test_plain_text_begins_with_the_begin_token_and_a_chat_has_it_once() -> None:
    assert DEMO.encode("hi")[0] == 0
    chat = DEMO.encode_chat([said(Role.USER, "hi")])
    assert chat.count(0) == 1
    assert chat[0] == 0


def test_end_of_text_is_the_end_of_a_turn() -> None:
    assert DEMO.eos_token_ids == {SPECIAL.index("<|end|>")}


def test_vocabulary_covers_every_token() -> None:
    assert max(DEMO.encode("The gateway and the engine, 12345")) < DEMO.vocab_size


def test_an_image_is_refused_by_name() -> None:
    message = Message(Role.USER, (TextPart("what is this?"), Media("image", "image/png", b"...")))
    with pytest.raises(Unsupported, match="not image") as caught:
        DEMO.encode_chat([message])
    assert caught.value.metadata["feature"] == "image"


def test_a_model_without_a_template_takes_no_chat(altered: MakeCodec) -> None:
    codec = altered(chat_template=None)
    assert codec.encode("text still works")
    with pytest.raises(BadRequest, match="no chat template") as caught:
        codec.encode_chat([said(Role.USER, "hi")])
    assert caught.value.param == "messages"


def test_what_the_template_refuses_is_a_bad_request_in_its_words(altered: MakeCodec) -> None:
    codec = altered(chat_template="{{ raise_exception('roles must alternate') }}")
    with pytest.raises(BadRequest, match="roles must alternate"):
        codec.encode_chat([said(Role.USER, "hi")])


def test_a_template_that_fails_does_not_quote_the_conversation(altered: MakeCodec) -> None:
    codec = altered(chat_template="{{ messages[0]['content'] + 1 }}")
    with pytest.raises(BadRequest) as caught:
        codec.encode_chat([said(Role.USER, "my secret")])
    assert "secret" not in str(caught.value)


def test_a_template_with_a_syntax_error_is_refused_when_it_is_read(altered: MakeCodec) -> None:
    with pytest.raises(BadRequest, match="error in line 1"):
        altered(chat_template="{% for %}")


@pytest.mark.parametrize(
    "attack", ["{{ ''.__class__.__mro__ }}", "{{ messages.append(1) }}", "{{ cycler.__init__.__globals__ }}"]
)
def test_a_template_cannot_leave_its_sandbox(altered: MakeCodec, attack: str) -> None:
    codec = altered(chat_template=attack)
    with pytest.raises(BadRequest):
        codec.encode_chat([said(Role.USER, "hi")])


def test_a_template_among_several_is_the_one_called_default(altered: MakeCodec) -> None:
    entries = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "{{ messages[0].content }}"}]
    codec = altered(chat_template=entries)
    assert text_of(codec, codec.encode_chat([said(Role.USER, "just this")])) == "just this"


def test_a_torn_tokenizer_is_named(tmp_path: Path) -> None:
    folder = shutil.copytree(DEMO_FOLDER, tmp_path / "model")
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    with pytest.raises(BadRequest, match=r"tokenizer\.json is not a readable tokenizer"):
        RUNTIME.make_codec(RunnerConfig(model=str(folder)))


def test_sentencepiece_pieces_and_byte_tokens_give_exact_bytes(tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    from tokenizers import decoders, models, normalizers

    pieces = ["<unk>", *(f"<0x{b:02X}>" for b in range(256)), "▁", "a", "b", "▁a"]
    tokenizer = tokenizers.Tokenizer(
        models.BPE({p: i for i, p in enumerate(pieces)}, [("▁", "a")], unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens(["<unk>"])
    folder = shutil.copytree(DEMO_FOLDER, tmp_path / "model")
    tokenizer.save(str(folder / "tokenizer.json"))
    codec = RUNTIME.make_codec(RunnerConfig(model=str(folder)))
    assert text_of(codec, codec.encode("ab a 🚀 é")) == "ab a 🚀 é"
    assert codec.token_bytes(1 + 0x80) == b"\x80"


def test_a_tokenizer_whose_bytes_are_unknown_is_refused(tmp_path: Path) -> None:
    folder = shutil.copytree(DEMO_FOLDER, tmp_path / "model")
    path = folder / "tokenizer.json"
    path.write_text(
        json.dumps({**json.loads(path.read_text()), "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True}})
    )
    with pytest.raises(Unsupported, match="WordPiece"):
        RUNTIME.make_codec(RunnerConfig(model=str(folder)))
