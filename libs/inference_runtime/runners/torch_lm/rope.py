"""Rotary positions as complex numbers: one table, one product per layer.

Pairs of a head's elements are turned by an angle that grows with the position. Llama pairs element i with i + head_dim / 2; we
store query and key weights so that pairs lie side by side, and then a pair is one complex number. Source: RoFormer
(arXiv 2104.09864); llama3 scaling: the Llama 3 report (arXiv 2407.21783).
"""

from __future__ import annotations

import math

import torch

from inference_runtime.runners.torch_lm.config import ModelConfig, RopeScaling

__all__ = ["pair_up", "rope_table", "rotate"]


def rope_table(config: ModelConfig, positions: int, device: torch.device) -> torch.Tensor:
    """Rotations by position: complex64 [positions, 1, head_dim / 2] on device."""
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.int64).float() / config.head_dim
    frequencies = scaled(1.0 / config.rope_theta**exponents, config.rope_scaling)
    angles = torch.outer(torch.arange(positions, dtype=torch.float32), frequencies)
    return torch.complex(angles.cos(), angles.sin()).unsqueeze(1).to(device)


def scaled(frequencies: torch.Tensor, scaling: RopeScaling) -> torch.Tensor:
    """Frequencies [head_dim / 2], float32, stretched for a longer context."""
    if scaling.kind == "default":
        return frequencies
    if scaling.kind == "linear":
        return frequencies / scaling.factor
    # llama3: slow rotations are stretched by the factor, fast ones stay, those between are blended.
    wavelengths = 2 * math.pi / frequencies
    turns = scaling.original_context_tokens / wavelengths
    kept = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    kept = kept.clamp(0.0, 1.0)
    return kept * frequencies + (1 - kept) * frequencies / scaling.factor


def pair_up(rows: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Reorder rows [heads x head_dim, …] of a query or key projection: from halves to neighbouring pairs."""
    heads = rows.shape[0] // head_dim
    return rows.view(heads, 2, head_dim // 2, -1).transpose(1, 2).reshape(rows.shape)


def rotate(queries_keys: torch.Tensor, rotations: torch.Tensor) -> None:
    """Turn [tokens, heads, head_dim] in place by rotations [tokens, 1, head_dim / 2], complex64."""
    pairs = queries_keys.view(*queries_keys.shape[:-1], -1, 2)
    if pairs.dtype == torch.float32:
        torch.view_as_complex(pairs).mul_(rotations)
    else:
        pairs.copy_(torch.view_as_real(torch.view_as_complex(pairs.float()).mul_(rotations)))
