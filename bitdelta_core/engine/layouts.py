"""What decides where a variant's tensors lie, small enough to be told to another process."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol, Self

import torch

from bitdelta_core.models import forms
from bitdelta_core.models.config import ModelConfig
from bitdelta_core.models.share import WHOLE, Share
from bitdelta_core.models.variant import BaseWeights, DeltaConfigLike, VariantLayout


class Layout(Protocol):
    """Where everything of a variant lies in its extent: `VariantLayout` or `DeviceLayout`."""

    @property
    def config(self) -> ModelConfig: ...

    @property
    def nbytes(self) -> int: ...

    @property
    def coded_values(self) -> int:
        """How many integers filling has to decode: what takes most of a long load."""
        ...

    def fill(self, reader: forms.Reader, buffer: torch.Tensor, base: BaseWeights, share: Share = WHOLE) -> None: ...

    def for_use(self) -> Self:
        """The same without what only filling needs: quick to send to another process."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class LayoutRule:
    """All that a layout depends on beside the variant."""

    decoder: Literal["device", "torch"]
    model: ModelConfig
    dtype: torch.dtype
    """What the decoder computes in"""
    device: str
    """Type of the device where extents are"""

    def plan(self, delta: DeltaConfigLike) -> Layout:
        """Raises DeltaFormatError."""
        if self.decoder == "torch":
            return VariantLayout.plan(delta, self.model, self.dtype, self.device)
        from bitdelta_core.models.device.layout import DeviceLayout

        return DeviceLayout.plan(delta, self.model, self.dtype)
