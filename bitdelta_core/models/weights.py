"""The base's weights as the decoder holds them: fused matrices by target, and all vectors in one block."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch

from bitdelta_core.checkpoint import Checkpoint
from bitdelta_core.errors import CheckpointError
from bitdelta_core.models.config import ModelConfig
from bitdelta_core.models.parameters import EMBED, HEAD, Parameters


@dataclass(frozen=True, slots=True)
class Weights:
    """Read once, never written."""

    targets: Mapping[str, torch.Tensor]
    """Target -> [N, K]; `head` is `embed` where the base ties them."""
    vectors_V: torch.Tensor
    parameters: Parameters

    @classmethod
    def read(cls, checkpoint: Checkpoint, config: ModelConfig, *, device: torch.device, dtype: torch.dtype) -> Weights:
        """Raises CheckpointError when a tensor is missing, has another shape, or is not of the architecture."""
        weights = cls.empty(checkpoint, config, device=device, dtype=dtype)
        for name, out in weights.parts():
            out.copy_(_read(checkpoint, name))
        return weights

    @classmethod
    def empty(cls, checkpoint: Checkpoint, config: ModelConfig, *, device: torch.device, dtype: torch.dtype) -> Weights:
        """Not filled yet. Raises as `read`, which it leaves nothing but the values to."""
        parameters = Parameters.of(config)
        _check_names(checkpoint, parameters, config)
        rows = {place.target: place.start + place.rows for place in parameters.linears.values()}
        columns = {place.target: place.columns for place in parameters.linears.values()}
        targets = {t: torch.empty((n, columns[t]), device=device, dtype=dtype) for t, n in rows.items()}
        vectors = torch.empty(parameters.vector_elements, device=device, dtype=dtype)
        if config.tie_word_embeddings:
            targets["head"] = targets["embed"]
        weights = cls(targets, vectors, parameters)
        for name, out in weights.parts():
            _check_shape(checkpoint, name, tuple(out.shape))
        return weights

    def parts(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every Hugging Face parameter and its own part of the memory, contiguous."""
        for name, place in self.parameters.linears.items():
            yield name, self.targets[place.target][place.start : place.start + place.rows]
        for name, span in self.parameters.vectors.items():
            yield name, self.vectors_V[span.start : span.stop]

    def linear_weight(self, name: str) -> torch.Tensor:
        """The matrix of one Hugging Face parameter: a view. The head of a base that ties it is its embedding."""
        place = self.parameters.linears.get(name) or self.parameters.linears[EMBED]
        return self.targets[place.target][place.start : place.start + place.rows]


class MappedWeights:
    """What filling a delta needs of the base (`variant.BaseWeights`), on the CPU, from the checkpoint's mapped files:
    the values of `Weights`, read when they are asked for."""

    def __init__(self, checkpoint: Checkpoint, config: ModelConfig, dtype: torch.dtype) -> None:
        self._checkpoint = checkpoint
        self._parameters = Parameters.of(config)
        self._dtype = dtype

    def linear_weight(self, name: str) -> torch.Tensor:
        """See `Weights.linear_weight`. Not to be written to."""
        stored = name if name in self._parameters.linears else EMBED
        return _read(self._checkpoint, stored).to(self._dtype)

    @cached_property
    def vectors_V(self) -> torch.Tensor:
        vectors_V = torch.empty(self._parameters.vector_elements, dtype=self._dtype)
        for name, span in self._parameters.vectors.items():
            vectors_V[span.start : span.stop] = _read(self._checkpoint, name)
        return vectors_V


def _check_names(checkpoint: Checkpoint, parameters: Parameters, config: ModelConfig) -> None:
    known = {*parameters.linears, *parameters.vectors}
    if config.tie_word_embeddings:
        known.add(HEAD)
    for name in checkpoint.names:
        if name not in known and not name.endswith("rotary_emb.inv_freq"):
            raise CheckpointError(f"{checkpoint.path}: tensor {name} has no place in a {config.family} model")


def _check_shape(checkpoint: Checkpoint, name: str, shape: tuple[int, ...]) -> None:
    stored = checkpoint.shape(name)
    if stored != shape:
        raise CheckpointError(f"{checkpoint.path}: {name} has shape {list(stored)}, config.json says {list(shape)}")


def _read(checkpoint: Checkpoint, name: str) -> torch.Tensor:
    value = checkpoint.get(name)
    if not value.is_floating_point():
        raise CheckpointError(f"{checkpoint.path}: {name} is {value.dtype}, expected a floating type")
    return value
