"""Who owns which block of the KV cache: a free list over block numbers. No tensor in here.

Block 0 is the null block: never owned and never written, so that padded block tables point at something that is all zeros.
"""

from __future__ import annotations

__all__ = ["BlockPool", "blocks_for"]

NULL_BLOCK = 0


def blocks_for(tokens: int, block_size: int) -> int:
    """Blocks that hold this many tokens."""
    return -(-tokens // block_size)


class BlockPool:
    """A fixed number of blocks, each free or owned once."""

    def __init__(self, count: int) -> None:
        """Make a pool of `count` blocks, numbered 1 … count."""
        self.count = count
        self._free = list(range(count, 0, -1))  # a stack: the block freed last is warm in the processor's cache
        self._is_free = [False] + [True] * count

    @property
    def free(self) -> int:
        """Blocks nobody owns."""
        return len(self._free)

    @property
    def use(self) -> float:
        """Share of the blocks that is owned, 0 to 1."""
        return 1.0 - len(self._free) / self.count

    def take(self, count: int) -> list[int]:
        """Own `count` blocks. The caller has checked `free`."""
        assert count <= len(self._free), f"{count} blocks asked of {len(self._free)} free"
        blocks = [self._free.pop() for _ in range(count)]
        for block in blocks:
            self._is_free[block] = False
        return blocks

    def give_back(self, blocks: list[int]) -> None:
        """Return blocks; the list is emptied, so that nobody can return them twice."""
        for block in reversed(blocks):
            assert not self._is_free[block], f"block {block} was returned twice"
            self._is_free[block] = True
            self._free.append(block)
        blocks.clear()

    def check_idle(self) -> None:
        """Every block is free exactly once: called whenever no sequence is left."""
        assert len(self._free) == self.count, f"{self.count - len(self._free)} of {self.count} KV blocks leaked"
        assert all(self._is_free[1:]), "the free list and the flags of the KV blocks differ"
