"""The tensors of the KV cache and the arithmetic of their rows.

Keys and values of a layer are each [blocks, kv_heads, block_size, head_dim]: a head's tokens of one block lie together, so that
gathering a sequence's blocks head by head gives attention one contiguous run per head.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from inference_runtime.runners.torch_lm.config import ModelConfig

__all__ = ["KVCache"]


class KVCache:
    """Keys and values of all layers. Block 0 stays zero.

    Args:
        config: The model's sizes.
        blocks: Blocks beside block 0.
        block_size: Tokens of a block.
        dtype: Type of the elements.
        device: Where they lie. On the CPU untouched blocks take no memory.
    """

    def __init__(self, config: ModelConfig, blocks: int, block_size: int, dtype: torch.dtype, device: torch.device) -> None:
        self.block_size, self.kv_heads, self.head_dim = block_size, config.kv_heads, config.head_dim
        shape = (blocks + 1, config.kv_heads, block_size, config.head_dim)
        self.keys = [_zeros(shape, dtype, device) for _ in range(config.layers)]
        self.values = [_zeros(shape, dtype, device) for _ in range(config.layers)]
        self._heads = torch.arange(config.kv_heads, device=device)

    def token_rows(self, slots: torch.Tensor) -> torch.Tensor:
        """Rows, [tokens x kv_heads] int64, that `write` puts tokens into; slots [tokens] = block x block_size + offset."""
        block, offset = slots.div(self.block_size, rounding_mode="floor"), slots.remainder(self.block_size)
        rows = (block.unsqueeze(1) * self.kv_heads + self._heads) * self.block_size + offset.unsqueeze(1)
        return rows.flatten()

    def block_rows(self, tables: torch.Tensor) -> torch.Tensor:
        """Rows, [sequences x kv_heads x blocks] int64, that `read` gathers; tables [sequences, blocks] int64."""
        return (tables.unsqueeze(1) * self.kv_heads + self._heads.view(1, -1, 1)).flatten()

    def write(self, layer: int, rows: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Store keys and values, each [tokens, kv_heads, head_dim], in `token_rows`."""
        self.keys[layer].view(-1, self.head_dim).index_copy_(0, rows, keys.reshape(-1, self.head_dim))
        self.values[layer].view(-1, self.head_dim).index_copy_(0, rows, values.reshape(-1, self.head_dim))

    def read(self, layer: int, rows: torch.Tensor, sequences: int, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of whole block tables, each [sequences, kv_heads, tokens, head_dim], a view of a gathered copy."""
        row_size = self.block_size * self.head_dim
        keys = self.keys[layer].view(-1, row_size).index_select(0, rows)
        values = self.values[layer].view(-1, row_size).index_select(0, rows)
        shape = (sequences, self.kv_heads, -1, self.head_dim)
        return keys.view(shape)[:, :, :tokens], values.view(shape)[:, :, :tokens]

    def erase(self, block_ids: Sequence[int]) -> None:
        """Zero blocks: a value that is not a number would spread through padding to the block's next owner."""
        for layer in (*self.keys, *self.values):
            layer[list(block_ids)] = 0


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    count = int(np.prod(shape)) * dtype.itemsize  # numpy asks the system for zero pages, which come when they are touched
    return torch.from_numpy(np.zeros(count, dtype=np.uint8)).view(dtype).view(shape)
