"""A secret that cannot print, be formatted, pickled or compared in variable time."""

from __future__ import annotations

import hmac
from typing import NoReturn, Self

__all__ = ["SecretStr"]


class SecretStr:
    """Holds a string that leaves only through `reveal()`.

    `repr`, `str`, `format` and JSON encoders see a mask; pickling and copying raise. Two secrets compare in constant time.
    """

    __slots__ = ("_value",)

    def __init__(self, value: str) -> None:
        self._value = value

    def reveal(self) -> str:
        """The secret itself. Call it only where it goes onto a wire."""
        return self._value

    def __bool__(self) -> bool:
        return bool(self._value)

    def __repr__(self) -> str:
        return "SecretStr(***)" if self._value else "SecretStr('')"

    __str__ = __repr__

    def __format__(self, spec: str) -> str:
        return repr(self)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, SecretStr):
            return NotImplemented
        return hmac.compare_digest(self._value.encode(), other._value.encode())

    def __hash__(self) -> int:
        return hash((SecretStr, self._value))

    def __copy__(self) -> Self:
        return self

    def __deepcopy__(self, memo: object) -> Self:
        return self  # nobody can change it, so a copy of what holds it may share it

    def __reduce__(self) -> NoReturn:
        raise TypeError("a secret cannot be pickled or copied")
