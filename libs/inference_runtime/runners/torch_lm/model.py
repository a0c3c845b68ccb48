"""A Llama model over a paged KV cache: tokens of many sequences in, logits of those that draw out.

All device code of the forward pass is here. Few operators per layer, because on small models each costs more than its work.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from inference_runtime.runner import LoadProgress
from inference_runtime.runners.torch_lm.batch import Batch
from inference_runtime.runners.torch_lm.checkpoint import Checkpoint
from inference_runtime.runners.torch_lm.config import ModelConfig
from inference_runtime.runners.torch_lm.kv_cache import KVCache
from inference_runtime.runners.torch_lm.linear import Linear, make_linear
from inference_runtime.runners.torch_lm.rope import pair_up, rope_table, rotate
from inference_runtime.runners.torch_lm.weights import WeightFiles

__all__ = ["LlamaModel", "load_model"]


@dataclass(frozen=True, slots=True)
class Layer:
    """One decoder layer. Norms are [hidden]; qkv: hidden -> (heads + 2 x kv_heads) x head_dim; gate_up: hidden -> 2 x inner."""

    attention_norm: torch.Tensor
    qkv: Linear
    out: Linear
    mlp_norm: torch.Tensor
    gate_up: Linear
    down: Linear


@dataclass(frozen=True, slots=True)
class LlamaModel:
    """Weights on one device. `rotations` is complex64 [context, 1, head_dim / 2], `embeddings` [vocabulary, hidden]."""

    config: ModelConfig
    embeddings: torch.Tensor
    layers: tuple[Layer, ...]
    norm: torch.Tensor
    head: Linear
    rotations: torch.Tensor

    def forward(self, batch: Batch, cache: KVCache) -> torch.Tensor:
        """Compute a step and fill the cache. Returns logits [draws, vocabulary], float32, on the device."""
        x = F.embedding(batch.ids, self.embeddings)
        rotations = self.rotations.index_select(0, batch.positions)
        for index, layer in enumerate(self.layers):
            x += layer.out(self._attend(index, layer.qkv(self._normed(x, layer.attention_norm)), rotations, batch, cache))
            gate, up = layer.gate_up(self._normed(x, layer.mlp_norm)).chunk(2, -1)
            x += layer.down(F.silu(gate).mul_(up))
        return self.head(self._normed(x.index_select(0, batch.draw_rows), self.norm)).float()

    def _normed(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, weight.shape, weight, self.config.norm_eps)

    def _attend(self, layer: int, qkv: torch.Tensor, rotations: torch.Tensor, batch: Batch, cache: KVCache) -> torch.Tensor:
        """Attention of all rows, [tokens, heads x head_dim]; qkv [tokens, (heads + 2 x kv_heads) x head_dim]."""
        heads, kv_heads, head_dim = self.config.heads, self.config.kv_heads, self.config.head_dim
        by_head = qkv.view(-1, heads + 2 * kv_heads, head_dim)
        rotate(by_head[:, : heads + kv_heads], rotations)
        queries, keys, values = torch.split(by_head, [heads, kv_heads, kv_heads], 1)
        cache.write(layer, batch.token_rows, keys, values)
        parts = []
        for group in batch.groups:
            count = group.last - group.first
            k, v = cache.read(layer, group.block_rows, count, group.tokens)
            q = queries[group.first : group.last].reshape(count, kv_heads, -1, head_dim)  # heads of one key head are its rows
            parts.append(F.scaled_dot_product_attention(q, k, v, attn_mask=group.mask).reshape(count, -1))
        for segment in batch.segments:
            rows, tokens = slice(segment.first, segment.last), segment.last - segment.first
            if segment.block_rows is None:
                k, v = keys[rows].transpose(0, 1).unsqueeze(0), values[rows].transpose(0, 1).unsqueeze(0)
            else:
                k, v = cache.read(layer, segment.block_rows, 1, segment.start + tokens)
            attended = F.scaled_dot_product_attention(
                queries[rows].transpose(0, 1).unsqueeze(0),
                k,
                v,
                attn_mask=segment.mask,
                is_causal=segment.mask is None,
                enable_gqa=heads != kv_heads,
            )
            parts.append(attended.squeeze(0).transpose(0, 1).reshape(tokens, -1))
        return parts[0] if len(parts) == 1 else torch.cat(parts)


def load_model(
    checkpoint: Checkpoint,
    config: ModelConfig,
    *,
    context_tokens: int,
    dtype: torch.dtype,
    device: torch.device,
    packed: bool,
    report: Callable[[LoadProgress], None],
) -> LlamaModel:
    """Read the weights, fuse and pack them. Raises BadRequest that names a file or tensor."""
    hidden, inner = config.hidden_size, config.intermediate_size
    queries, keys = config.heads * config.head_dim, config.kv_heads * config.head_dim
    with WeightFiles(checkpoint, dtype, device, report) as files:

        def linear(prefix: str, shapes: dict[str, tuple[int, int]], bias: bool, paired: tuple[str, ...] = ()) -> Linear:
            """The projections of `shapes` as one layer, in order; those in `paired` with rotary pairs side by side."""

            def row_order(name: str, rows: torch.Tensor) -> torch.Tensor:
                return pair_up(rows, config.head_dim) if name in paired else rows

            weights = [row_order(n, files.tensor(f"{prefix}.{n}.weight", *shape)) for n, shape in shapes.items()]
            biases = [row_order(n, files.tensor(f"{prefix}.{n}.bias", shape[0])) for n, shape in shapes.items()] if bias else []
            return make_linear(torch.cat(weights), torch.cat(biases) if bias else None, packed=packed)

        def layer(index: int) -> Layer:
            base = f"model.layers.{index}"
            qkv = {"q_proj": (queries, hidden), "k_proj": (keys, hidden), "v_proj": (keys, hidden)}
            return Layer(
                attention_norm=files.tensor(f"{base}.input_layernorm.weight", hidden),
                qkv=linear(f"{base}.self_attn", qkv, config.attention_bias, ("q_proj", "k_proj")),
                out=linear(f"{base}.self_attn", {"o_proj": (hidden, queries)}, config.attention_bias),
                mlp_norm=files.tensor(f"{base}.post_attention_layernorm.weight", hidden),
                gate_up=linear(f"{base}.mlp", {"gate_proj": (inner, hidden), "up_proj": (inner, hidden)}, config.mlp_bias),
                down=linear(f"{base}.mlp", {"down_proj": (hidden, inner)}, config.mlp_bias),
            )

        embeddings = files.tensor("model.embed_tokens.weight", config.vocab_size, hidden).clone()
        head = embeddings if config.tied_embeddings else files.tensor("lm_head.weight", config.vocab_size, hidden).clone()
        return LlamaModel(
            config=config,
            embeddings=embeddings,
            layers=tuple(layer(index) for index in range(config.layers)),
            norm=files.tensor("model.norm.weight", hidden).clone(),
            head=make_linear(head, None, packed=packed),
            rotations=rope_table(config, context_tokens, device),
        )
