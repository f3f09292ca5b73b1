"""One dispatch from a codec's name to its module. Encoding and decoding run where the tensors lie, if that is
torch's default device as well; decoding is in fp32."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch

from bitdelta_core.delta import bitdelta, deltadq, dense, lora, quant, rows, spectral
from bitdelta_core.delta.format import DeltaReader, base_name
from bitdelta_core.delta.spec import TensorEntry


class Tensors(Protocol):
    """Anything that hands out the base's tensors by name: a `Checkpoint`."""

    def __contains__(self, name: str) -> bool: ...

    def get(self, name: str) -> torch.Tensor: ...


def encode(entry: TensorEntry, base: torch.Tensor, fine: torch.Tensor) -> tuple[TensorEntry, dict[str, torch.Tensor]]:
    """Code the fine-tune's tensor against the base's as `entry` plans it (but lora and spectral: those come coded)."""
    match entry.codec:
        case "bitdelta":
            return bitdelta.encode(base, fine, entry)
        case "dense":
            return dense.encode(base, fine, entry)
        case "rows":
            return rows.encode(base, fine, entry)
        case "quant":
            return quant.encode(base, fine, entry)
        case "deltadq":
            return deltadq.encode(base, fine, entry)
        case "lora" | "spectral":
            raise AssertionError(f"{entry.codec}: factors come from elsewhere, ready to store")


def decode_parts(entry: TensorEntry, parts: Mapping[str, torch.Tensor], base: torch.Tensor) -> torch.Tensor:
    """The fine-tune's tensor, fp32: what every codec means, exactly."""
    modules = {
        "bitdelta": bitdelta,
        "deltadq": deltadq,
        "dense": dense,
        "lora": lora,
        "quant": quant,
        "rows": rows,
        "spectral": spectral,
    }
    return modules[entry.codec].decode(entry, parts, base)


def decode(reader: DeltaReader, entry: TensorEntry, base: Tensors) -> torch.Tensor:
    """The fine-tune's tensor, fp32, of one entry of an opened delta."""
    return decode_parts(entry, reader.parts(entry), base.get(base_name(entry.name, base)))
