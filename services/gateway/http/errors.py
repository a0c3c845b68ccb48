"""Errors as OpenAI's clients expect them."""

from __future__ import annotations

import math

import msgspec

from inference_runtime.errors import InferenceError, Internal
from inference_runtime.rpc.status import INTERNAL_TEXT

__all__ = ["error_body", "error_headers", "error_parts"]

#: The request field behind a feature that a runtime lacks, where their names differ.
PARAM_OF_FEATURE = {
    "choices": "n",
    "max_choices": "n",
    "penalties": "presence_penalty",
    "chat": "messages",
    "completion": "prompt",
}


def error_parts(error: InferenceError) -> dict[str, str | None]:
    """message, type, param and code of an error. A fault of ours tells no more than that."""
    param = error.param
    if param is None and "feature" in error.metadata:
        feature = error.metadata["feature"]
        param = PARAM_OF_FEATURE.get(feature, feature)
    return {
        "message": INTERNAL_TEXT if type(error) is Internal else error.message,
        "type": error.http_type,
        "param": param,
        "code": error.metadata.get("code", error.http_code),
    }


def error_body(error: InferenceError) -> bytes:
    """`{"error": {…}}`."""
    return msgspec.json.encode({"error": error_parts(error)})


def error_headers(error: InferenceError) -> bytes:
    """Header lines that belong to an error: when to try again, how to authenticate."""
    lines = b""
    if error.retry_after_s is not None:
        lines += b"retry-after: %d\r\n" % max(1, math.ceil(error.retry_after_s))
    if error.http_status == 401:
        lines += b"www-authenticate: Bearer\r\n"
    return lines
