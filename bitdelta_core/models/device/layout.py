"""Where everything of one variant lies inside its extent of the slab, as kernels find it through the device tables.

The face of `models.variant.VariantLayout`; in place of views it gives the variant's table row.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from bitdelta_core.delta.spec import TensorEntry
from bitdelta_core.delta.spectral import values_of
from bitdelta_core.delta.together import FactorsTogether
from bitdelta_core.errors import DeltaFormatError
from bitdelta_core.models import forms
from bitdelta_core.models.config import ModelConfig
from bitdelta_core.models.device import parts
from bitdelta_core.models.device.kinds import StepKinds, union
from bitdelta_core.models.device.parts import Part
from bitdelta_core.models.device.targets import misfit, targets_of
from bitdelta_core.models.forms import Region
from bitdelta_core.models.parameters import EMBED, HEAD, NO_PARAMETERS, Parameters
from bitdelta_core.models.share import WHOLE, Share
from bitdelta_core.models.variant import (
    Arena,
    BaseWeights,
    DeltaConfigLike,
    fill_vectors,
    split_entries,
    variant_config,
)
from kernels.device import FIELDS, NONE, UNIT, Field, Kinds, Target

EXTRA_TOKENS = 256
"""How many tokens more than the base a variant may have: logits of all rows are that much wider."""
OFFSETS = (
    Field.SIGN,
    Field.SCALE,
    Field.COL,
    Field.ZERO,
    Field.LORA_A,
    Field.LORA_B,
    Field.DENSE,
    Field.ROW_INDEX,
    Field.ROW_VALUE,
    Field.KEPT,
    Field.INPUTS,
)
"""The fields that count UNITs from the start of the slab."""


def widest_vocabulary(base_config: ModelConfig) -> int:
    """Columns of logits: the largest vocabulary of any variant."""
    return base_config.vocab_size + EXTRA_TOKENS


def empty_rows(targets: int) -> torch.Tensor:
    """int32 [J, FIELDS]: no parts at all."""
    table_JF = torch.zeros((targets, FIELDS), dtype=torch.int32)
    table_JF[:, OFFSETS] = NONE
    return table_JF


@dataclass(frozen=True, slots=True, eq=False)
class DeviceLayout:
    """Offsets are multiples of UNIT bytes."""

    config: ModelConfig
    nbytes: int
    kinds: StepKinds
    parts: tuple[Part, ...]
    vectors: Region | None
    vector_entries: tuple[TensorEntry, ...]
    coded_values: int
    """How many integers filling has to decode"""
    _parameters: Parameters
    _table_JF: torch.Tensor
    """Offsets from the start of the extent."""

    @classmethod
    def plan(cls, delta: DeltaConfigLike, base_config: ModelConfig, dtype: torch.dtype) -> DeviceLayout:
        """Work out the layout from the delta's entries alone; nothing is read.

        Args:
            dtype: what the decoder computes in.

        Raises:
            DeltaFormatError: an entry names no parameter of the base, has another shape, or a codec out of place; a
                config override that is not supported; a vocabulary that grows without an embedding for it, or by more
                than EXTRA_TOKENS; more planes or a higher rank than kernels take.
        """
        assert misfit(base_config) is None, misfit(base_config)
        config = variant_config(delta, base_config)
        _check_growth(config, base_config, delta.tensors)
        parameters, targets = Parameters.of(config), targets_of(base_config)
        arena, rows_JF = Arena(), empty_rows(len(targets)).tolist()
        linears, vectors = split_entries(delta.tensors, parameters)
        planned: dict[str, list[Part]] = {}
        for name, members in linears.items():
            outputs, layer = _outputs(name, targets[name], config), name not in ("embed", "head")
            found = list(parts.plan(targets[name], outputs, members, dtype, arena.take, compact=layer))
            for field, value in (item for part in found for item in part.fields.items()):
                rows_JF[targets[name].index][field] = value
            planned[name] = found
        block = arena.take((parameters.vector_elements,), dtype) if vectors else None
        table_JF = torch.tensor(rows_JF, dtype=torch.int32)
        _finish_tables(table_JF, targets, config, base_config)
        kinds = _kinds(planned, config)
        planned_parts = tuple(part for found in planned.values() for part in found)
        coded = sum(map(_coded, planned_parts))
        return cls(config, arena.nbytes, kinds, planned_parts, block, vectors, coded, parameters, table_JF)

    def fill(self, reader: forms.Reader, buffer: torch.Tensor, base: BaseWeights, share: Share = WHOLE) -> None:
        """Write every tensor into `buffer` (uint8 [nbytes], host memory), or a share of them.

        Raises:
            DeltaFormatError: a value that is not finite, naming the parameter.
        """
        mine = self.parts[share.of([_coded(part) for part in self.parts])]
        together = FactorsTogether(reader, parts.spectral_entries(mine))
        for part in mine:
            part.fill(together, buffer, base.linear_weight)
        if self.vectors is not None and share.index == 0:
            fill_vectors(reader, self.vectors.view(buffer), base.vectors_V, self.vector_entries, self._parameters)

    def for_use(self) -> DeviceLayout:
        """Without what only `fill` needs."""
        return replace(self, parts=(), vector_entries=(), _parameters=NO_PARAMETERS)

    def row(self, extent_start: int) -> torch.Tensor:
        """int32 [J, FIELDS]: the variant's table row once its bytes are at `extent_start` (bytes) in the slab."""
        assert extent_start % UNIT == 0, f"extent at {extent_start}: not aligned to {UNIT}"
        row_JF = self._table_JF.clone()
        offsets = row_JF[:, OFFSETS]
        row_JF[:, OFFSETS] = torch.where(offsets == NONE, NONE, offsets + extent_start // UNIT)
        return row_JF

    def vectors_at(self, extent_start: int) -> int | None:
        """Offset in UNITs of the variant's block of vectors; None: as in the base."""
        return None if self.vectors is None else (extent_start + self.vectors.start) // UNIT


def _coded(part: Part) -> int:
    return sum(map(values_of, parts.spectral_entries([part])))


def _outputs(name: str, target: Target, config: ModelConfig) -> int:
    """The variant's N. A smaller vocabulary keeps the base's: its rows beyond are zeros, and their logits masked."""
    return max(target.outputs, config.vocab_size) if name in ("embed", "head") else target.outputs


def _finish_tables(
    table_JF: torch.Tensor, targets: Mapping[str, Target], config: ModelConfig, base_config: ModelConfig
) -> None:
    """Larger vocabularies; a tied head is the embedding."""
    embed, head = targets["embed"].index, targets["head"].index
    if config.vocab_size > base_config.vocab_size:
        table_JF[[embed, head], Field.OUTPUTS] = config.vocab_size
    if config.tie_word_embeddings:
        table_JF[head] = table_JF[embed]


def _kinds(planned: Mapping[str, Sequence[Part]], config: ModelConfig) -> StepKinds:
    def of(names: Iterable[str]) -> Kinds:
        return union([part.kinds for name in names for part in planned.get(name, ())])

    head = "embed" if config.tie_word_embeddings else "head"
    return StepKinds(of(name for name in planned if name not in ("embed", "head")), of(["embed"]), of([head]))


def _check_growth(config: ModelConfig, base_config: ModelConfig, entries: Mapping[str, TensorEntry]) -> None:
    if config.vocab_size <= base_config.vocab_size:
        return
    if config.vocab_size > widest_vocabulary(base_config):
        raise DeltaFormatError(
            f"vocab_size {config.vocab_size}: on a GPU at most {EXTRA_TOKENS} tokens more than the base's "
            f"{base_config.vocab_size}"
        )
    for name in (EMBED,) if config.tie_word_embeddings else (EMBED, HEAD):
        if name not in entries:
            raise DeltaFormatError(
                f"{name}: vocab_size grows from {base_config.vocab_size} to {config.vocab_size}, "
                "but no entry has the added rows"
            )
