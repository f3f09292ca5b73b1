"""What a delta weighs and where the bytes are. Every byte of the directory is counted, in decimal units."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from bitdelta_core.delta.format import EMBEDDING, HEAD, DeltaReader
from bitdelta_core.delta.planning import entry_bytes
from bitdelta_core.delta.spec import TensorEntry

KINDS: tuple[str, ...] = ("linears", "embeddings", "norms", "biases", "tokenizer", "metadata")


@dataclass(frozen=True, kw_only=True, slots=True)
class Summary:
    """The facts of one delta."""

    path: str
    format_version: int
    codec: str
    base_sha256: str
    base_model_name_or_path: str
    nbytes: int
    """Every file of the directory."""
    bytes_by_kind: Mapping[str, int]
    """By KINDS; they add up to `nbytes`. metadata: delta_config.json, headers, index, generation config."""
    tensors_by_codec: Mapping[str, int]
    linear_bits_per_weight: float | None
    """Of the linears that the delta changes; None when it changes none."""
    linear_value_ratio: float | None
    """Codec deltadq: 16 bits per weight of the linears over the bits of the kept values alone, as its paper counts; no
    scales, no metadata. None where another codec holds a linear."""
    bits_per_weight: float | None
    """Every byte over every parameter of the fine-tune; None when the fine-tune's size is not recorded."""
    finetune_bytes_16bit: int | None
    """As the writer recorded it; not checked."""
    ratio: float | None
    """finetune_bytes_16bit / nbytes."""
    config_overrides: Mapping[str, Any]
    provenance: Mapping[str, Any]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def summarise(delta: DeltaReader) -> Summary:
    """The facts of an opened delta."""
    config = delta.config
    entries = list(config.tensors.values())
    full = config.provenance.get("finetune_bytes_16bit")
    full = full if isinstance(full, int) and full > 0 else None
    linears = [entry for entry in entries if kind(entry) == "linears"]
    weights = sum(math.prod(entry.shape) for entry in linears)
    by_kind = _bytes_by_kind(delta)
    return Summary(
        path=str(delta.path),
        format_version=config.format_version,
        codec=config.codec,
        base_sha256=config.base_sha256,
        base_model_name_or_path=config.base_model_name_or_path,
        nbytes=delta.nbytes,
        bytes_by_kind=by_kind,
        tensors_by_codec={c: sum(e.codec == c for e in entries) for c in sorted({e.codec for e in entries})},
        linear_bits_per_weight=8 * by_kind["linears"] / weights if weights else None,
        linear_value_ratio=_value_ratio(linears),
        bits_per_weight=16 * delta.nbytes / full if full else None,
        finetune_bytes_16bit=full,
        ratio=full / delta.nbytes if full else None,
        config_overrides=config.config_overrides,
        provenance=config.provenance,
    )


def _value_ratio(linears: Sequence[TensorEntry]) -> float | None:
    if not linears or any(entry.codec != "deltadq" for entry in linears):
        return None
    return 16 * sum(math.prod(e.shape) for e in linears) / sum(e.shape[0] * e.kept * e.bits for e in linears)


def kind(entry: TensorEntry) -> str:
    """Which of KINDS a parameter is."""
    if entry.name in (EMBEDDING, HEAD):
        return "embeddings"
    if len(entry.shape) == 2:
        return "linears"
    return "biases" if entry.name.endswith(".bias") else "norms"


def _bytes_by_kind(delta: DeltaReader) -> dict[str, int]:
    sizes: dict[str, int] = dict.fromkeys(KINDS, 0)
    for entry in delta.config.tensors.values():
        sizes[kind(entry)] += entry_bytes(entry)
    sizes["tokenizer"] = sum(delta.config.files[name].nbytes for name in delta.config.tokenizer_files)
    sizes["metadata"] = delta.nbytes - sum(sizes.values())
    return sizes
