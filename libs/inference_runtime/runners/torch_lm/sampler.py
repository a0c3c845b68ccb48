"""From logits to tokens: greedy, or one draw by the inverse of the cumulated distribution.

One uniform number per draw, in the order of the token ids: a difference in the last bits of the logits moves a boundary by as
much, and changes a token that rarely.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence as Items

import torch

from inference_runtime.runners.torch_lm.randomness import uniform
from inference_runtime.runners.torch_lm.sequence import Drawing, Sequence

__all__ = ["draw_tokens", "top_logprobs"]


def draw_tokens(logits: torch.Tensor, sequences: Items[Sequence]) -> list[int | None]:
    """The next token of each sequence; None where its logits are not numbers.

    Args:
        logits: [sequences, vocabulary], float32. Rows of sequences with penalties or barred tokens are changed in place.
        sequences: Their state before the draw.
    """
    for row, sequence in enumerate(sequences):
        adjust(logits[row], sequence)
    best, greedy = logits.max(-1)
    tokens: list[int | None] = greedy.tolist()
    rows = [i for i, sequence in enumerate(sequences) if not sequence.drawing.greedy]
    if rows:
        chosen = logits if len(rows) == len(sequences) else logits[rows]
        keys = [(s.drawing.seed, s.drawing.choice, s.output_tokens) for s in (sequences[i] for i in rows)]
        for i, token in zip(rows, sample(chosen, [sequences[i].drawing for i in rows], keys), strict=True):
            tokens[i] = token
    if not bool(best.isfinite().all()):
        tokens = [token if finite else None for token, finite in zip(tokens, best.isfinite().tolist(), strict=True)]
    return tokens


def adjust(row: torch.Tensor, sequence: Sequence) -> None:
    """Apply penalties, bias and barred tokens to one row of logits [vocabulary], in place.

    Repetition (CTRL, arXiv 1909.05858) counts prompt and output; presence and frequency count the output, like OpenAI's.
    """
    drawing = sequence.drawing
    if drawing.repetition_penalty != 1.0:
        seen = _indexes(row, list(set(sequence.tokens)))
        values = row[seen]
        row[seen] = torch.where(values > 0, values / drawing.repetition_penalty, values * drawing.repetition_penalty)
    if drawing.presence_penalty or drawing.frequency_penalty:
        counts = Counter(sequence.tokens[sequence.prompt_tokens :])
        times = torch.tensor(list(counts.values()), dtype=row.dtype, device=row.device)
        row[_indexes(row, list(counts))] -= drawing.presence_penalty + drawing.frequency_penalty * times
    if drawing.logit_bias:
        row[_indexes(row, list(drawing.logit_bias))] += torch.tensor(list(drawing.logit_bias.values()), device=row.device)
    if barred := sequence.barred_token_ids:
        row[_indexes(row, list(barred))] = float("-inf")


def sample(logits: torch.Tensor, drawings: Items[Drawing], keys: Items[tuple[int, int, int]]) -> list[int]:
    """Draw one token per row of logits [rows, vocabulary], float32, with the random number of its (seed, choice, index)."""

    def column(values: list[float]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.float64, device=logits.device).unsqueeze(1)

    temperatures = column([d.temperature for d in drawings]).float()
    weights = (logits / temperatures).softmax(-1).double()
    if any(d.top_k or d.top_p < 1.0 or d.min_p for d in drawings):
        weights = _narrowed(weights, drawings)
    cumulated = weights.cumsum(-1)
    targets = column([uniform(*key) for key in keys]) * cumulated[:, -1:]
    found = torch.searchsorted(cumulated, targets, right=True).squeeze(1)
    last = (weights > 0).long().cumsum(-1).argmax(-1)  # rounding may put a target at the very end: the last possible token
    tokens: list[int] = found.minimum(last).tolist()
    return tokens


def _narrowed(weights: torch.Tensor, drawings: Items[Drawing]) -> torch.Tensor:
    """Zero what top-k, then top-p, then min-p leave out; weights [rows, vocabulary], float64."""
    vocabulary = weights.shape[-1]

    def column(values: Items[float]) -> torch.Tensor:
        return torch.tensor(values, dtype=weights.dtype, device=weights.device).unsqueeze(1)

    ordered, order = weights.sort(stable=True, dim=-1, descending=True)
    ranks = torch.arange(vocabulary, device=weights.device)
    ordered = ordered.masked_fill(ranks >= column([d.top_k or vocabulary for d in drawings]), 0.0)
    total = ordered.sum(-1, keepdim=True)
    before = ordered.cumsum(-1) - ordered  # weight of all likelier tokens: the first token always stays
    top_p = column([d.top_p if d.top_p > 0 else 0.0 for d in drawings])
    ordered = ordered.masked_fill((before >= top_p * total) & (ranks > 0) & (top_p < 1.0), 0.0)
    ordered = ordered.masked_fill(ordered < column([d.min_p for d in drawings]) * ordered[:, :1], 0.0)
    return torch.zeros_like(weights).scatter_(-1, order, ordered)


def top_logprobs(row: torch.Tensor, token_id: int, count: int) -> tuple[float, list[tuple[int, float]]]:
    """Natural log-probability of a token, and the `count` likeliest tokens with theirs, of unadjusted logits [vocabulary]."""
    logprobs = row.log_softmax(-1)
    values, ids = logprobs.topk(min(count, row.shape[-1]))
    return float(logprobs[token_id]), list(zip(ids.tolist(), values.tolist(), strict=True))


def _indexes(row: torch.Tensor, ids: list[int]) -> torch.Tensor:
    return torch.tensor(ids, dtype=torch.int64, device=row.device)
