"""Which variants to prepare for when nobody says: what is published, if the engine is told how to ask, else such as
`bitdelta compress` writes by default."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from bitdelta_core.delta.config import DeltaConfig
from bitdelta_core.delta.planning import CompressOptions
from bitdelta_core.delta.spec import TensorEntry
from bitdelta_core.models.config import ModelConfig
from bitdelta_core.models.parameters import EMBED, HEAD, Parameters

Published = Callable[[str], Sequence[DeltaConfig]]
"""The base's sha256 -> configs of variants of it, the likeliest to be asked for first: MOST are taken. May block."""
MOST = 2
"""Each takes as long to prepare for as the base itself"""
EMBEDDING_BITS = 4
"""Of an embedding and a head that changed in every row"""


@dataclass(frozen=True, slots=True)
class UsualDelta:
    """`models.variant.DeltaConfigLike` of a delta that changes every matrix."""

    tensors: Mapping[str, TensorEntry]
    config_overrides: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, model: ModelConfig) -> UsualDelta:
        options, found = CompressOptions(), {}
        for name, place in Parameters.of(model).linears.items():
            shape = (place.rows, place.columns)
            if name in (EMBED, HEAD):
                found[name] = TensorEntry(name=name, shape=shape, codec="quant", bits=EMBEDDING_BITS, rows=place.rows)
            else:
                found[name] = TensorEntry(
                    name=name,
                    shape=shape,
                    codec="bitdelta",
                    planes=options.bits,
                    scale_layout=options.scale_layout,
                )
        return cls(found)
