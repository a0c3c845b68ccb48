"""The shape of a Llama model, parsed from config.json. Everything past it trusts these values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from inference_runtime.errors import BadRequest, Unsupported
from inference_runtime.runners.torch_lm.checkpoint import Checkpoint

__all__ = ["ModelConfig", "RopeScaling", "read_model_config"]

ARCHITECTURE = "LlamaForCausalLM"


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """How rotary frequencies are stretched: `kind` is "default", "linear" or "llama3" (Llama 3.1, section 3.4 of its report)."""

    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_context_tokens: int = 8192


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Sizes of a Llama model; `heads` are query heads, `kv_heads` those of keys and values."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    context_tokens: int
    norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling
    tied_embeddings: bool
    attention_bias: bool
    mlp_bias: bool
    dtype: str

    def kv_token_bytes(self, element_bytes: int) -> int:
        """Bytes of keys and values that one token takes in all layers."""
        return 2 * self.layers * self.kv_heads * self.head_dim * element_bytes


def read_model_config(checkpoint: Checkpoint) -> ModelConfig:
    """Parse config.json. Raises BadRequest for a missing or wrong key, Unsupported for what this runtime cannot compute."""
    values = checkpoint.json("config.json")
    _refuse_foreign(values)
    path = str(checkpoint.folder / "config.json")

    def whole(key: str, default: int | None = None) -> int:
        value = values.get(key)
        value = default if value is None else value
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise BadRequest(f"{path}: {key} is {value!r}; it must be a positive whole number", param="model", file=path)
        return value

    def real(source: Mapping[str, object], key: str, default: float) -> float:
        value = source.get(key, default)
        if not isinstance(value, int | float) or value <= 0:
            raise BadRequest(f"{path}: {key} is {value!r}; it must be a positive number", param="model", file=path)
        return float(value)

    hidden_size, heads = whole("hidden_size"), whole("num_attention_heads")
    kv_heads, head_dim = whole("num_key_value_heads", heads), whole("head_dim", hidden_size // heads)
    if heads % kv_heads or head_dim % 2:
        raise BadRequest(f"{path}: {heads} heads of {head_dim} do not fit {kv_heads} key heads", param="model", file=path)
    rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise BadRequest(f"{path}: rope_parameters must be an object", param="model", file=path)
    kind = str(rope.get("rope_type", rope.get("type", "default")))
    if kind not in ("default", "linear", "llama3"):
        raise Unsupported(
            f"{path}: rope scaling {kind!r}; known are default, linear, llama3", feature="rope_scaling", runtime="torch"
        )
    context_tokens = whole("max_position_embeddings", 2048)
    original = rope.get("original_max_position_embeddings", context_tokens)
    return ModelConfig(
        vocab_size=whole("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=whole("intermediate_size"),
        layers=whole("num_hidden_layers"),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        context_tokens=context_tokens,
        norm_eps=real(values, "rms_norm_eps", 1e-6),
        rope_theta=real(rope, "rope_theta", real(values, "rope_theta", 10000.0)),
        rope_scaling=RopeScaling(
            kind=kind,
            factor=real(rope, "factor", 1.0),
            low_freq_factor=real(rope, "low_freq_factor", 1.0),
            high_freq_factor=real(rope, "high_freq_factor", 4.0),
            original_context_tokens=original if isinstance(original, int) else context_tokens,
        ),
        tied_embeddings=bool(values.get("tie_word_embeddings", False)),
        attention_bias=bool(values.get("attention_bias", False)),
        mlp_bias=bool(values.get("mlp_bias", False)),
        dtype=str(values.get("dtype") or values.get("torch_dtype") or "float32"),
    )


def _refuse_foreign(values: Mapping[str, object]) -> None:
    """Refuse a model that would load and answer wrongly."""
    architectures = values.get("architectures")
    name = architectures[0] if isinstance(architectures, list) and architectures else values.get("model_type", "unnamed")
    if name not in (ARCHITECTURE, "llama"):
        raise Unsupported(
            f"runtime 'torch' runs {ARCHITECTURE}; this checkpoint is {name}",
            feature="architecture",
            runtime="torch",
            architecture=str(name),
        )
    if values.get("quantization_config"):
        raise Unsupported("runtime 'torch' runs no quantised checkpoints", feature="quantization", runtime="torch")
    if values.get("hidden_act", "silu") != "silu":
        raise Unsupported(
            f"runtime 'torch' knows the activation silu; this checkpoint has {values['hidden_act']}",
            feature="hidden_act",
            runtime="torch",
        )
