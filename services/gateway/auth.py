"""API keys: who may ask."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Sequence

from inference_runtime.errors import Unauthorized
from inference_runtime.secret import SecretStr

__all__ = ["KeyRing"]


class KeyRing:
    """The keys that are accepted, as digests. An empty ring accepts everyone."""

    def __init__(self, keys: Sequence[SecretStr]) -> None:
        self._digests = [_digest(key.reveal().encode()) for key in keys]
        #: Everyone may ask.
        self.open = not self._digests

    def check(self, authorization: bytes, api_key: bytes = b"") -> str:
        """Whose request it is: "" for an open ring, else an id of the key that does not tell the key.

        Compares with every key, each in constant time, so that time tells nothing about them.

        Args:
            authorization: The `authorization` header, `Bearer KEY`.
            api_key: The `x-api-key` header, where the other is absent.

        Raises:
            Unauthorized: There is no key, or it is not one of ours.
        """
        if not self._digests:
            return ""
        scheme, _, given = authorization.partition(b" ")
        key = given.strip() if scheme.lower() == b"bearer" else api_key
        if not key:
            raise Unauthorized("no API key; send it as 'Authorization: Bearer KEY'")
        digest, found = _digest(key), False
        for known in self._digests:
            found |= hmac.compare_digest(digest, known)
        if not found:
            raise Unauthorized("the API key is not one of this gateway's keys")
        return digest.hex()[:16]


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
