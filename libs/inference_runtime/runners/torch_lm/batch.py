"""One step's chunks as tensors: what the scheduler decided, in the form that the model computes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from inference_runtime.runners.torch_lm.kv_cache import KVCache
from inference_runtime.runners.torch_lm.scheduler import Chunk

__all__ = ["Batch", "DecodeGroup", "Segment", "make_batch"]

#: Sequences are attended to together while the longest has at most this many times the tokens of the shortest: beyond it the
#: padding costs more than a second call.
LONGEST_TO_SHORTEST = 2


@dataclass(frozen=True, slots=True)
class DecodeGroup:
    """Sequences that compute one token each, rows `first` … `last` - 1 of the batch, attended to in one call.

    `block_rows` is what `KVCache.read` gathers, `tokens` how many tokens of it count. `mask` [sequences, 1, 1, tokens] adds -inf
    behind the end of shorter sequences; None when all are equally long.
    """

    first: int
    last: int
    block_rows: torch.Tensor
    tokens: int
    mask: torch.Tensor | None


@dataclass(frozen=True, slots=True)
class Segment:
    """A chunk of several tokens of one sequence, rows `first` … `last` - 1 of the batch, after `start` computed tokens.

    Without computed tokens `block_rows` and `mask` are None and attention is causal; with them `mask` is bool
    [last - first, start + last - first], True where a token may look.
    """

    first: int
    last: int
    start: int
    block_rows: torch.Tensor | None
    mask: torch.Tensor | None


@dataclass(frozen=True, slots=True)
class Batch:
    """Tensors of one step, all on the model's device.

    ids, positions: [tokens] int64. token_rows: [tokens x kv_heads] int64, where keys and values go. groups, then segments: how
    rows are attended to; together they cover all rows. draw_rows: [draws] int64, rows whose logits are wanted.
    """

    ids: torch.Tensor
    positions: torch.Tensor
    token_rows: torch.Tensor
    groups: tuple[DecodeGroup, ...]
    segments: tuple[Segment, ...]
    draw_rows: torch.Tensor


def make_batch(chunks: Sequence[Chunk], cache: KVCache, dtype: torch.dtype, device: torch.device) -> tuple[Batch, list[Chunk]]:
    """The step as tensors, and the chunks that draw a token in the order of the logits."""
    singles = sorted((c for c in chunks if c.end - c.start == 1), key=lambda c: c.end)
    longer = [c for c in chunks if c.end - c.start > 1]
    ids: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    draw_rows: list[int] = []
    segments: list[Segment] = []
    for chunk in (*singles, *longer):
        first, block_size, blocks = len(ids), cache.block_size, chunk.sequence.block_ids
        ids += chunk.sequence.tokens[chunk.start : chunk.end]
        positions += range(chunk.start, chunk.end)
        slots += [blocks[p // block_size] * block_size + p % block_size for p in range(chunk.start, chunk.end)]
        if chunk.draws:
            draw_rows.append(len(ids) - 1)
        if chunk.end - chunk.start > 1:
            segments.append(_segment(chunk, first, cache, device))

    def indexes(values: list[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int64, device=device)

    batch = Batch(
        ids=indexes(ids),
        positions=indexes(positions),
        token_rows=cache.token_rows(indexes(slots)),
        groups=tuple(_groups(singles, cache, dtype, device)),
        segments=tuple(segments),
        draw_rows=indexes(draw_rows),
    )
    return batch, [c for c in (*singles, *longer) if c.draws]


def _groups(singles: Sequence[Chunk], cache: KVCache, dtype: torch.dtype, device: torch.device) -> list[DecodeGroup]:
    """Chunks of one token, shortest sequence first, cut where the lengths grow too far apart."""
    groups: list[DecodeGroup] = []
    first = 0
    while first < len(singles):
        limit = max(singles[first].end, cache.block_size) * LONGEST_TO_SHORTEST
        last = first + 1
        while last < len(singles) and singles[last].end <= limit:
            last += 1
        groups.append(_group(singles[first:last], first, cache, dtype, device))
        first = last
    return groups


def _group(members: Sequence[Chunk], first: int, cache: KVCache, dtype: torch.dtype, device: torch.device) -> DecodeGroup:
    lengths, longest = [c.end for c in members], members[-1].end
    width = -(-longest // cache.block_size)
    tables = [(c.sequence.block_ids + [0] * width)[:width] for c in members]
    mask = None
    if lengths[0] != longest:
        ends = torch.tensor(lengths, device=device).unsqueeze(1)
        mask = torch.zeros(len(members), longest, dtype=dtype, device=device)
        mask.masked_fill_(torch.arange(longest, device=device) >= ends, float("-inf"))
        mask = mask.view(len(members), 1, 1, longest)
    rows = cache.block_rows(torch.tensor(tables, dtype=torch.int64, device=device))
    return DecodeGroup(first, first + len(members), rows, longest, mask)


def _segment(chunk: Chunk, first: int, cache: KVCache, device: torch.device) -> Segment:
    last = first + chunk.end - chunk.start
    if chunk.start == 0:
        return Segment(first, last, 0, None, None)
    blocks = chunk.sequence.block_ids[: -(-chunk.end // cache.block_size)]
    rows = cache.block_rows(torch.tensor([blocks], dtype=torch.int64, device=device))
    may_look = torch.ones(chunk.end - chunk.start, chunk.end, dtype=torch.bool, device=device).tril(chunk.start)
    return Segment(first, last, chunk.start, rows, may_look)
