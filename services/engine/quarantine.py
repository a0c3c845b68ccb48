"""Requests that kill contexts, remembered by fingerprint and refused for a while. Pure: times are passed in."""

from __future__ import annotations

import hashlib
import sys
from array import array
from collections import OrderedDict
from collections.abc import Callable, Sequence

from inference_runtime.generation import SamplingParams

__all__ = ["QUARANTINE_S", "Quarantine", "fingerprint"]

#: Time for which a request is refused, seconds: long enough for a client's retries to end, short enough to try once
#: more after a repair.
QUARANTINE_S = 600.0
#: Fingerprints kept. Beyond it the oldest goes.
MAX_FINGERPRINTS = 1024


def fingerprint(revision: str, prompt_token_ids: Sequence[int], sampling: SamplingParams) -> bytes:
    """What makes two requests the same for a device: the model, the prompt, and which kernels the sampling needs.

    Seed, limits and stop strings are left out, and so are the values of parameters that only scale: changing them does not make
    another request of it.
    """
    s = sampling
    kernels = (
        s.temperature == 0,
        s.top_p is not None,
        s.top_k > 0,
        s.min_p is not None,
        bool(s.presence_penalty or s.frequency_penalty),
        s.repetition_penalty not in (0.0, 1.0),
        s.top_logprobs,
        sorted(s.logit_bias),
    )
    tokens = array("I", prompt_token_ids)
    if sys.byteorder == "big":
        tokens.byteswap()
    digest = hashlib.sha256(f"{revision}|{kernels!r}|".encode())
    digest.update(tokens.tobytes())
    return digest.digest()


class Quarantine:
    """Fingerprints of requests that were found to kill contexts. False while it holds none, which is nearly always."""

    def __init__(self) -> None:
        self._until_s: OrderedDict[bytes, float] = OrderedDict()  # oldest first
        #: Called with what was found here.
        self.on_found: Callable[[bytes], None] = lambda key: None

    def __len__(self) -> int:
        return len(self._until_s)

    def add(self, key: bytes, now_s: float) -> None:
        """Refuse this one from now on: it was found here."""
        self.learn(key, now_s)
        self.on_found(key)

    def forget(self, key: bytes) -> None:
        """Refuse it no more. No-op for one that is not refused."""
        self._until_s.pop(key, None)

    def learn(self, key: bytes, now_s: float) -> None:
        """Refuse this one from now on: it was found elsewhere."""
        self._until_s.pop(key, None)
        self._until_s[key] = now_s + QUARANTINE_S
        if len(self._until_s) > MAX_FINGERPRINTS:
            self._until_s.popitem(last=False)

    def left_s(self, key: bytes, now_s: float) -> float:
        """Seconds for which a request is still refused; 0.0 for one that is not."""
        while self._until_s and next(iter(self._until_s.values())) <= now_s:
            self._until_s.popitem(last=False)
        return max(0.0, self._until_s.get(key, now_s) - now_s)
