"""What a decoder needs to know of a Hugging Face config.json, and nothing else.

Families: llama, mistral, qwen2, qwen3 (dense). A field that would change the computation and that the decoder does not
do is refused by name; fields that only concern training or transformers itself are not looked at.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from bitdelta_core.errors import CheckpointError
from bitdelta_core.models.rope import RopeConfig

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
SHAPE_FIELDS = (
    "family",
    "hidden_size",
    "intermediate_size",
    "num_layers",
    "num_heads",
    "num_kv_heads",
    "head_dim",
    "qkv_bias",
    "o_bias",
    "mlp_bias",
    "qk_norm",
    "windows",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """One dense decoder-only transformer. Names are Hugging Face's where it has the same thing."""

    family: str
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_position_embeddings: int
    rms_norm_eps: float
    tie_word_embeddings: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    windows: tuple[int | None, ...]
    """Per layer: how many positions a row sees, itself included; None: all."""
    rope: RopeConfig
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    raw: Mapping[str, Any]
    """config.json itself: what overrides apply to."""

    @property
    def context_len(self) -> int:
        """Longest sequence, prompt and answer together; dynamic rope stretches it by its factor."""
        return int(self.max_position_embeddings * (self.rope.factor if self.rope.kind == "dynamic" else 1))

    @property
    def kv_row(self) -> tuple[int, int, int]:
        """Shape of what one token leaves in one layer's cache: K and V, heads, head size."""
        return 2, self.num_kv_heads, self.head_dim

    @property
    def qkv_rows(self) -> tuple[int, int, int]:
        """Outputs of q, k and v."""
        return self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim, self.num_kv_heads * self.head_dim

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> ModelConfig:
        """Read a config.json.

        Raises:
            CheckpointError: an architecture or a setting that is not supported, or a field that is missing or absurd.
        """
        return _read(config)

    def with_overrides(self, overrides: Mapping[str, Any]) -> ModelConfig:
        """The config of a variant: top-level keys of config.json replaced; `{"$absent": true}` removes a key.

        Raises:
            CheckpointError: the result is not supported, or is of another shape than the base (a delta cannot
                change the number or the sizes of layers, nor tie a head that the base keeps apart).
        """
        removed = {key for key, value in overrides.items() if value == {"$absent": True}}
        raw = {k: v for k, v in {**self.raw, **overrides}.items() if k not in removed}
        config = _read(raw)
        for name in SHAPE_FIELDS:
            if getattr(config, name) != getattr(self, name):
                raise CheckpointError(
                    f"config override changes {name} from {getattr(self, name)} to {getattr(config, name)}: "
                    "a variant has its base's architecture"
                )
        if config.tie_word_embeddings and not self.tie_word_embeddings:
            raise CheckpointError("config override tie_word_embeddings=true: the base keeps its head apart")
        return config


def _read(raw: Mapping[str, Any]) -> ModelConfig:
    family = raw.get("model_type")
    if family not in FAMILIES:
        raise CheckpointError(f"config.json: model_type {family!r} is not supported, only {', '.join(FAMILIES)}")
    _refuse_unsupported(raw)
    heads = _positive(raw, "num_attention_heads")
    hidden = _positive(raw, "hidden_size")
    layers = _positive(raw, "num_hidden_layers")
    kv_heads = _positive(raw, "num_key_value_heads", 8 if family == "mistral" else heads)
    head_dim = _positive(raw, "head_dim", 128 if family == "qwen3" else hidden // heads)
    max_positions = _positive(raw, "max_position_embeddings", _DEFAULT_POSITIONS[family])
    if heads % kv_heads:
        raise CheckpointError(
            f"config.json: num_attention_heads={heads} is no multiple of num_key_value_heads={kv_heads}"
        )
    if head_dim % 2:
        raise CheckpointError(f"config.json: head_dim={head_dim} is odd, rotary embeddings need pairs")
    bias = bool(raw.get("attention_bias", False)) and family in ("llama", "qwen3")
    return ModelConfig(
        family=family,
        hidden_size=hidden,
        intermediate_size=_positive(raw, "intermediate_size"),
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        vocab_size=_positive(raw, "vocab_size"),
        max_position_embeddings=max_positions,
        rms_norm_eps=_number(raw, "rms_norm_eps", 1e-6),
        tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
        qkv_bias=bias or family == "qwen2",
        o_bias=bias,
        mlp_bias=bool(raw.get("mlp_bias", False)) and family == "llama",
        qk_norm=family == "qwen3",
        windows=_windows(raw, family, layers),
        rope=RopeConfig.from_hf(raw, head_dim=head_dim, max_positions=max_positions),
        bos_token_id=raw.get("bos_token_id"),
        eos_token_ids=_token_ids(raw.get("eos_token_id")),
        raw=dict(raw),
    )


_DEFAULT_POSITIONS = {"llama": 2048, "mistral": 4096 * 32, "qwen2": 32768, "qwen3": 32768}


def _refuse_unsupported(raw: Mapping[str, Any]) -> None:
    if raw.get("hidden_act", "silu") != "silu":
        raise CheckpointError(f"config.json: hidden_act {raw['hidden_act']!r} is not supported, only 'silu'")
    if raw.get("quantization_config"):
        raise CheckpointError("config.json: quantization_config is not supported: give an unquantised checkpoint")


def _positive(raw: Mapping[str, Any], name: str, default: int | None = None) -> int:
    value = raw.get(name)
    value = default if value is None else value
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise CheckpointError(f"config.json: {name} must be a positive integer, got {value!r}")
    return value


def _number(raw: Mapping[str, Any], name: str, default: float) -> float:
    value = raw.get(name, default)
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < float("inf"):
        raise CheckpointError(f"config.json: {name} must be a positive number, got {value!r}")
    return float(value)


def _windows(raw: Mapping[str, Any], family: str, layers: int) -> tuple[int | None, ...]:
    """Mistral: one window everywhere. Qwen: those layers that layer_types, or else max_window_layers, says."""
    if family == "llama":
        return (None,) * layers
    size = raw.get("sliding_window", 4096)
    if family != "mistral" and not raw.get("use_sliding_window", False):
        size = None
    if size is not None:
        size = _positive(raw, "sliding_window", 4096)
    if family == "mistral":
        return (size,) * layers
    types = raw.get("layer_types")
    if types is None:
        first = raw.get("max_window_layers", 28)
        return tuple(size if size is not None and i >= first else None for i in range(layers))
    known = {"full_attention", "sliding_attention"}
    if not isinstance(types, list) or len(types) != layers or not known.issuperset(types):
        raise CheckpointError(f"config.json: layer_types must name {layers} layers of {sorted(known)}, got {types!r}")
    if size is None and "sliding_attention" in types:
        raise CheckpointError("config.json: layer_types has sliding_attention, but there is no sliding_window in use")
    return tuple(size if kind == "sliding_attention" else None for kind in types)


def _token_ids(value: Any) -> tuple[int, ...]:
    if value is None:
        return ()
    return tuple(value) if isinstance(value, list) else (value,)
