"""Where each Hugging Face parameter lives in the decoder: in a fused linear, or in the block of vectors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from bitdelta_core.models.config import ModelConfig

EMBED, HEAD, FINAL_NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"


@dataclass(frozen=True, slots=True)
class Place:
    """Rows start:start+rows of the fused linear `target`."""

    target: str
    start: int
    rows: int
    columns: int


@dataclass(frozen=True, slots=True)
class Span:
    """Elements start:stop of the block that holds all of a model's 1-D parameters."""

    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Parameters:
    """All parameters of one architecture, in their order of use."""

    linears: Mapping[str, Place]
    vectors: Mapping[str, Span]

    @property
    def vector_elements(self) -> int:
        return max(span.stop for span in self.vectors.values())

    @classmethod
    def of(cls, config: ModelConfig) -> Parameters:
        linears: dict[str, Place] = {EMBED: Place("embed", 0, config.vocab_size, config.hidden_size)}
        if not config.tie_word_embeddings:
            linears[HEAD] = Place("head", 0, config.vocab_size, config.hidden_size)
        for layer in range(config.num_layers):
            linears |= dict(_linears(config, layer))
        vectors: dict[str, Span] = {}
        at = 0
        for name, size in _vectors(config):
            vectors[name] = Span(at, at + size)
            at += size
        return cls(linears, vectors)


NO_PARAMETERS = Parameters({}, {})


@dataclass(frozen=True, slots=True)
class LayerVectors:
    """Where one layer's vectors lie in the block; None: the architecture has no such vector."""

    input_norm: Span
    post_norm: Span
    q_norm: Span | None
    k_norm: Span | None
    qkv_bias: Span | None
    o_bias: Span | None
    gate_up_bias: Span | None
    down_bias: Span | None

    @classmethod
    def of(cls, parameters: Parameters, layer: int) -> LayerVectors:
        vectors, prefix = parameters.vectors, f"model.layers.{layer}."

        def span(first: str, last: str | None = None) -> Span | None:
            """Of one vector, or of neighbours from the first to the last."""
            if f"{prefix}{first}" not in vectors:
                return None
            return Span(vectors[f"{prefix}{first}"].start, vectors[f"{prefix}{last or first}"].stop)

        return cls(
            input_norm=vectors[f"{prefix}input_layernorm.weight"],
            post_norm=vectors[f"{prefix}post_attention_layernorm.weight"],
            q_norm=span("self_attn.q_norm.weight"),
            k_norm=span("self_attn.k_norm.weight"),
            qkv_bias=span("self_attn.q_proj.bias", "self_attn.v_proj.bias"),
            o_bias=span("self_attn.o_proj.bias"),
            gate_up_bias=span("mlp.gate_proj.bias", "mlp.up_proj.bias"),
            down_bias=span("mlp.down_proj.bias"),
        )


def _linears(config: ModelConfig, layer: int) -> Iterator[tuple[str, Place]]:
    hidden, inner = config.hidden_size, config.intermediate_size
    prefix, at = f"model.layers.{layer}.", 0
    for name, rows in zip("qkv", config.qkv_rows, strict=True):
        yield f"{prefix}self_attn.{name}_proj.weight", Place(f"{layer}.qkv", at, rows, hidden)
        at += rows
    yield f"{prefix}self_attn.o_proj.weight", Place(f"{layer}.o", 0, hidden, config.qkv_rows[0])
    yield f"{prefix}mlp.gate_proj.weight", Place(f"{layer}.gate_up", 0, inner, hidden)
    yield f"{prefix}mlp.up_proj.weight", Place(f"{layer}.gate_up", inner, inner, hidden)
    yield f"{prefix}mlp.down_proj.weight", Place(f"{layer}.down", 0, hidden, inner)


def _vectors(config: ModelConfig) -> Iterator[tuple[str, int]]:
    for layer in range(config.num_layers):
        prefix = f"model.layers.{layer}."
        yield f"{prefix}input_layernorm.weight", config.hidden_size
        if config.qkv_bias:
            for name, rows in zip("qkv", config.qkv_rows, strict=True):
                yield f"{prefix}self_attn.{name}_proj.bias", rows
        if config.qk_norm:
            yield f"{prefix}self_attn.q_norm.weight", config.head_dim
            yield f"{prefix}self_attn.k_norm.weight", config.head_dim
        if config.o_bias:
            yield f"{prefix}self_attn.o_proj.bias", config.hidden_size
        yield f"{prefix}post_attention_layernorm.weight", config.hidden_size
        if config.mlp_bias:
            yield f"{prefix}mlp.gate_proj.bias", config.intermediate_size
            yield f"{prefix}mlp.up_proj.bias", config.intermediate_size
            yield f"{prefix}mlp.down_proj.bias", config.hidden_size
    yield FINAL_NORM, config.hidden_size
