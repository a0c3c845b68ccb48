"""Random numbers without state: each is a function of (seed, choice, index) alone.

So a draw is the same whatever else is in the batch, after a preemption, and on another machine that continues the answer.
Source: the finaliser of SplitMix64 (Steele, Lea, Flood, OOPSLA 2014), applied once per key part.
"""

from __future__ import annotations

__all__ = ["uniform"]

MASK = (1 << 64) - 1
#: The golden ratio in 64 bits: keeps a key part of 0 from leaving the state unchanged.
STRIDE = 0x9E3779B97F4A7C15
DOUBLE_BITS = 53


def uniform(seed: int, choice: int, index: int) -> float:
    """A number in [0, 1) for the token `index` of a choice."""
    state = 0
    for part in (seed, choice, index):
        state = _mixed((state ^ (part & MASK)) + STRIDE & MASK)
    return (state >> (64 - DOUBLE_BITS)) / (1 << DOUBLE_BITS)


def _mixed(x: int) -> int:
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & MASK
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & MASK
    return x ^ (x >> 31)
