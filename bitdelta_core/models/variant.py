"""The compute form of one variant: everything that its rows need beside the base, and how it gets into the slab.

From a delta to slab bytes: which tensors in which form at which offset (pure), filling them, and viewing them.

Forms: signs and quantised differences stay packed, or one byte per value where `expand` is chosen (CPUs: 8, 4, 2 or 1
times the packed bytes, several times faster). The sign matrices of a fused linear become one. Low-rank factors carry
the adapter's scaling in B. Whole matrices become differences to the base. Rows and vectors are whole values.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch

from bitdelta_core.delta.spec import TensorEntry
from bitdelta_core.delta.spectral import values_of
from bitdelta_core.delta.together import FactorsTogether
from bitdelta_core.errors import CheckpointError, DeltaFormatError
from bitdelta_core.models import forms
from bitdelta_core.models.config import ModelConfig
from bitdelta_core.models.forms import Form, Member, Region
from bitdelta_core.models.parameters import EMBED, HEAD, NO_PARAMETERS, Parameters, Place
from bitdelta_core.models.share import WHOLE, Share
from kernels.deltas import Placed

ALIGNMENT = 256


@dataclass(frozen=True, kw_only=True, slots=True)
class VariantWeights:
    """One variant, ready to compute with. `VariantLayout` makes them."""

    config: ModelConfig
    """The base's config with the delta's overrides (rope, context length, vocabulary)."""
    linears: Mapping[str, tuple[Placed, ...]]
    """Target (`3.qkv`, `embed`, `head`; see `parameters.Place`) -> its deltas. What equals the base is absent."""
    vectors: torch.Tensor | None
    """All 1-D parameters (norms, biases), whole values, in the order of `Parameters.vectors`. None: as in the base."""


class DeltaConfigLike(Protocol):
    """What planning needs of a delta's config."""

    @property
    def tensors(self) -> Mapping[str, TensorEntry]: ...

    @property
    def config_overrides(self) -> Mapping[str, Any]: ...


class BaseWeights(Protocol):
    """What filling needs of the base."""

    def linear_weight(self, name: str) -> torch.Tensor:
        """The base's matrix of that parameter, on any device."""
        ...

    @property
    def vectors_V(self) -> torch.Tensor: ...


@dataclass(frozen=True, slots=True)
class VariantLayout:
    """Where everything of one variant lies inside its extent. Offsets are multiples of 256 bytes."""

    config: ModelConfig
    nbytes: int
    forms: tuple[tuple[str, int, Form], ...]
    """(target, first row in the fused linear, form)"""
    vectors: Region | None
    vector_entries: tuple[TensorEntry, ...]
    _parameters: Parameters

    @classmethod
    def plan(
        cls,
        delta: DeltaConfigLike,
        base_config: ModelConfig,
        dtype: torch.dtype,
        device: torch.device | str,
        *,
        expand: bool | None = None,
    ) -> VariantLayout:
        """Work out the layout from the delta's entries alone; nothing is read.

        Args:
            dtype: what the decoder computes in.
            device: where the extent will be. Decides `expand` when that is None: on a CPU, yes.
            expand: signs and quantised differences as one byte per value.

        Raises:
            DeltaFormatError: an entry names no parameter of the base, has another shape, or a codec out of place; or a
                config override that is not supported.
        """
        config = variant_config(delta, base_config)
        parameters = Parameters.of(config)
        expand = torch.device(device).type == "cpu" if expand is None else expand
        arena = Arena()
        linears, vectors = split_entries(delta.tensors, parameters)
        planned = tuple(
            (target, members[0].place.start, form)
            for target, members in linears.items()
            for members, form in forms.plan(members, dtype, expand, arena.take)
        )
        block = arena.take((parameters.vector_elements,), dtype) if vectors else None
        return cls(config, arena.nbytes, planned, block, vectors, parameters)

    @property
    def coded_values(self) -> int:
        """How many integers filling has to decode."""
        return sum(self._coded())

    def _coded(self) -> list[int]:
        return [sum(map(values_of, forms.spectral_entries([form]))) for _, _, form in self.forms]

    def fill(self, reader: forms.Reader, buffer: torch.Tensor, base: BaseWeights, share: Share = WHOLE) -> None:
        """Write every tensor into `buffer` (uint8 [nbytes], host memory), or a share of them.

        Raises:
            DeltaFormatError: a value that is not finite, naming the parameter.
        """
        mine = [form for _, _, form in self.forms[share.of(self._coded())]]
        together = FactorsTogether(reader, forms.spectral_entries(mine))
        for form in mine:
            form.fill(together, buffer, base.linear_weight)
        if self.vectors is not None and share.index == 0:
            fill_vectors(reader, self.vectors.view(buffer), base.vectors_V, self.vector_entries, self._parameters)

    def for_use(self) -> VariantLayout:
        """Without what only `fill` needs."""
        return replace(self, vector_entries=(), _parameters=NO_PARAMETERS)

    def view(self, extent: torch.Tensor) -> VariantWeights:
        """The variant's tensors inside `extent` (uint8 [>= nbytes], aligned to 256 bytes): views, no copies."""
        assert extent.data_ptr() % ALIGNMENT == 0 or extent.device.type == "cpu", "extent is not aligned"
        linears: dict[str, tuple[Placed, ...]] = defaultdict(tuple)
        for target, start, form in self.forms:
            linears[target] += ((start, form.view(extent)),)
        if self.config.tie_word_embeddings and "embed" in linears:
            linears["head"] = linears["embed"]
        vectors = self.vectors.view(extent) if self.vectors is not None else None
        return VariantWeights(config=self.config, linears=dict(linears), vectors=vectors)


def variant_config(delta: DeltaConfigLike, base_config: ModelConfig) -> ModelConfig:
    """Raises DeltaFormatError for a config override that is not supported."""
    try:
        return base_config.with_overrides(delta.config_overrides)
    except CheckpointError as error:
        raise DeltaFormatError(f"config override: {error}") from error


class Arena:
    """Hands out aligned regions from the front."""

    def __init__(self) -> None:
        self.nbytes = 0

    def take(self, shape: Sequence[int], dtype: torch.dtype) -> Region:
        region = Region(self.nbytes, tuple(shape), dtype)
        self.nbytes += -(-region.nbytes // ALIGNMENT) * ALIGNMENT
        return region


def fill_vectors(
    reader: forms.Reader,
    block_V: torch.Tensor,
    base_V: torch.Tensor,
    entries: Sequence[TensorEntry],
    parameters: Parameters,
) -> None:
    """The base's block of vectors, with those of `entries` in place of its own."""
    block_V.copy_(base_V)
    for entry in entries:
        span = parameters.vectors[entry.name]
        block_V[span.start : span.stop].copy_(reader.part(entry, "value"))
        forms.check_finite(block_V[span.start : span.stop], entry, "value")


def split_entries(
    entries: Mapping[str, TensorEntry], parameters: Parameters
) -> tuple[dict[str, list[Member]], tuple[TensorEntry, ...]]:
    """Entries of matrices by target in row order, and entries of vectors."""
    linears: dict[str, list[Member]] = defaultdict(list)
    vectors = []
    for name, entry in entries.items():
        if (span := parameters.vectors.get(name)) is not None:
            if entry.codec != "dense" or entry.shape != (span.stop - span.start,):
                raise DeltaFormatError(f"{name}: expected dense [{span.stop - span.start}], got {_text(entry)}")
            vectors.append(entry)
        elif (place := parameters.linears.get(name)) is not None:
            _check_linear(entry, place)
            linears[place.target].append(Member(entry, place))
        else:
            raise DeltaFormatError(f"{name}: no parameter of this architecture has that name")
    for members in linears.values():
        members.sort(key=lambda member: member.place.start)
    return linears, tuple(vectors)


def _check_linear(entry: TensorEntry, place: Place) -> None:
    if entry.shape != (place.rows, place.columns):
        raise DeltaFormatError(f"{entry.name}: expected [{place.rows}, {place.columns}], got {_text(entry)}")
    if entry.codec in ("rows", "quant") and entry.name not in (EMBED, HEAD):
        raise DeltaFormatError(f"{entry.name}: codec {entry.codec} is for embeddings and heads only")


def _text(entry: TensorEntry) -> str:
    return f"{entry.codec} {list(entry.shape)}"
