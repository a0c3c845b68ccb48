"""The keys of `runtime_config` that the torch runtime knows, parsed once. Unknown keys are refused with the nearest known one."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Literal

from inference_runtime.errors import BadRequest

__all__ = ["Options", "parse_options"]

DTYPES = ("auto", "float32", "bfloat16")
LINEARS = ("auto", "packed", "plain")
#: Smallest sensible value of every whole-number option; 0 means "choose for me" where the default is 0.
MINIMA = {"kv_cache_tokens": 0, "max_step_tokens": 1, "threads": 0, "block_size": 1}


@dataclass(frozen=True, slots=True)
class Options:
    """Options of one replica.

    Args:
        dtype: Type of weights, activations and KV cache. auto: the checkpoint's, where the device computes in it.
        kv_cache_tokens: Tokens that the KV cache holds. 0: what `max_batch` full contexts need, within a bound of memory.
        max_step_tokens: Tokens one step computes at most; longer prompts are read in chunks, decoding goes on between them.
        threads: Threads of one operator on the CPU (a setting of the whole process). 0: all cores but one.
        block_size: Tokens of one KV block.
        linear: Linear layers on the CPU. packed: weights laid out for oneDNN; plain: torch's own; auto: packed where it works.
        revision: Revision of a model in the Hugging Face cache.
    """

    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    kv_cache_tokens: int = 0
    max_step_tokens: int = 1024
    threads: int = 0
    block_size: int = 16
    linear: Literal["auto", "packed", "plain"] = "auto"
    revision: str = "main"


def parse_options(options: Mapping[str, object]) -> Options:
    """The options as a value. Raises BadRequest with param runtime_config.<key>."""
    known = [f.name for f in fields(Options)]
    for key, value in options.items():
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known are: {', '.join(known)}"
            raise _refusal(key, f"runtime 'torch' has no option {key!r}; {hint}")
        if key in MINIMA:
            if not isinstance(value, int) or isinstance(value, bool) or value < MINIMA[key]:
                raise _refusal(key, f"option {key!r} is {value!r}; it must be a whole number of at least {MINIMA[key]}")
        elif not isinstance(value, str):
            raise _refusal(key, f"option {key!r} is {value!r}; it must be a text")
    parsed = Options(**options)  # type: ignore[arg-type]  # every value was checked above
    for key, value, allowed in (("dtype", parsed.dtype, DTYPES), ("linear", parsed.linear, LINEARS)):
        if value not in allowed:
            raise _refusal(key, f"option {key!r} is {value!r}; it must be one of {', '.join(allowed)}")
    return parsed


def _refusal(key: str, message: str) -> BadRequest:
    return BadRequest(message, param=f"runtime_config.{key}")
