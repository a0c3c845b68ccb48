"""What `-o yaml` writes, read back by a YAML reader that is not ours."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from inference_runtime.cli.output import render

yaml: Any = pytest.importorskip("yaml")

SCALARS = st.none() | st.booleans() | st.integers(-(10**12), 10**12) | st.text(st.characters(codec="ascii"))
KEYS = st.text("abc-: #", max_size=5)
DOCUMENTS = st.recursive(SCALARS, lambda inner: st.lists(inner) | st.dictionaries(KEYS, inner), max_leaves=12)


@given(DOCUMENTS)
def test_yaml_and_json_say_the_same(document: object) -> None:
    assert yaml.safe_load(render(document, "yaml")) == document
    assert json.loads(render(document, "json")) == document


@pytest.mark.parametrize("text", ["no", "1e3", "2026-01-01", "", "a: b", "- a", "#", "null", "~"])
def test_a_string_stays_a_string(text: str) -> None:
    assert yaml.safe_load(render({"a": [text]}, "yaml")) == {"a": [text]}
