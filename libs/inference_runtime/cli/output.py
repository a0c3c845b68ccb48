"""Documents for scripts: the same plain data as JSON or as YAML."""

from __future__ import annotations

import json
from collections.abc import Iterator

__all__ = ["FORMATS", "render"]

#: What `-o` takes.
FORMATS = ("table", "json", "yaml")


def render(document: object, form: str) -> str:
    """Plain data (dict, list, str, numbers, bool, None) as text of one of the two forms for scripts, "json" or "yaml".

    YAML 1.2 in block style. Every string is quoted, so that "no", "1e3" and "2026-01-01" stay strings in every reader.
    """
    return "\n".join(_yaml(document, "")) if form == "yaml" else json.dumps(document, indent=1)


def _yaml(value: object, indent: str) -> Iterator[str]:
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from _entry(f"{indent}{json.dumps(str(key))}:", inner, indent + "  ")
    elif isinstance(value, list | tuple) and value:
        for inner in value:
            yield from _entry(f"{indent}-", inner, indent + "  ")
    else:
        yield indent + json.dumps(value)


def _entry(head: str, value: object, indent: str) -> Iterator[str]:
    if isinstance(value, dict | list | tuple) and value:
        yield head
        yield from _yaml(value, indent)
    else:
        yield f"{head} {json.dumps(value)}"
