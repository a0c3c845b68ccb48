"""Linear layers: torch's own, and weights laid out once for oneDNN, which is faster on the CPU for few rows."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

__all__ = ["Linear", "can_pack", "make_linear", "packed_linear", "plain_linear"]

#: A linear layer: [rows, inputs] -> [rows, outputs], dtype and device of its weight.
Linear = Callable[[torch.Tensor], torch.Tensor]
#: Rows that oneDNN chooses its layout for. 32 costs a single stream nothing; 1 costs a batch of 32 half its speed.
ROWS_HINT = 32


def can_pack(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether weights of this type can be packed on this device and machine."""
    if device.type != "cpu" or not torch._C._has_mkldnn or not hasattr(torch.ops.mkldnn, "_reorder_linear_weight"):
        return False
    return dtype == torch.float32 or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def plain_linear(weight: torch.Tensor, bias: torch.Tensor | None) -> Linear:
    """`F.linear` on weight [outputs, inputs] and bias [outputs]."""

    def apply(x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, weight, bias)

    return apply


def packed_linear(weight: torch.Tensor, bias: torch.Tensor | None) -> Linear:
    """The same product on a packed copy of the weight [outputs, inputs], cpu; results differ in the last bits."""
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, ROWS_HINT if weight.dtype == torch.float32 else None)
    run = torch.ops.mkldnn._linear_pointwise.default  # the overload itself: looking it up costs as much as a small product

    def apply(x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = run(x, packed, bias, "none", [], "")
        return out

    return apply


def make_linear(weight: torch.Tensor, bias: torch.Tensor | None, *, packed: bool) -> Linear:
    """A linear layer on weight [outputs, inputs] and bias [outputs]."""
    return packed_linear(weight, bias) if packed else plain_linear(weight.contiguous(), bias)
