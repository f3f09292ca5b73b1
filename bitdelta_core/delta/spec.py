"""What a delta says of each parameter that differs from the base: codec, shape, and the parts that store it.

A part is one tensor of `delta.safetensors`, named `<parameter>.<part>`. `parts()` derives every part's dtype and shape
from the entry alone, so a file is valid exactly when its header equals what the entries promise.
The parts of a codec are the fields of its compute form in `kernels.deltas`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

Codec = Literal["bitdelta", "lora", "dense", "rows", "quant", "deltadq", "spectral"]
DeltaCodec = Literal["bitdelta", "lora", "dense", "rows", "quant", "deltadq", "spectral", "auto"]
"""Of a whole delta: that of its linears; auto: chosen per parameter."""
ScaleLayout = Literal["tensor", "row", "row_col"]
FORMAT_VERSION = 2
"""The newest that this code reads and writes."""
FIRST_VERSION: dict[str, int] = {"deltadq": 2, "spectral": 2, "auto": 2}
"""The format version that brought a codec; 1 where it is not listed."""

_USED: dict[str, tuple[str, ...]] = {
    "bitdelta": ("planes", "scale_layout"),
    "lora": ("rank", "scaling"),
    "dense": (),
    "rows": ("rows",),
    "quant": ("bits", "rows"),
    "deltadq": ("alpha", "bits", "group", "mask_rows", "scale_layout", "seed"),
    "spectral": ("code_bytes", "rank", "rows"),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorEntry:
    """One changed parameter. Fields that a codec does not use keep their defaults."""

    name: str
    """The Hugging Face parameter name, `model.layers.0.mlp.up_proj.weight`."""
    shape: tuple[int, ...]
    """Shape in the fine-tune."""
    codec: Codec
    dtype: torch.dtype = torch.bfloat16
    """Of the fine-tune's own tensor; restoring gives this dtype back. lora: of the factors as the adapter has them
    (restoring gives the base's dtype back)."""
    planes: int = 1
    """bitdelta: how many sign planes, each coding the residual of those before it."""
    scale_layout: ScaleLayout = "tensor"
    """bitdelta: one scale per plane, or times one per row, or times one per row and one per column.
    deltadq: one scale, or times one per row."""
    rank: int = 0
    """lora, spectral"""
    scaling: float = 1.0
    """lora: D = scaling * B A"""
    rows: int = 0
    """rows: how many whole rows are stored. quant, spectral: how many rows at the start are coded as differences; the
    rest is stored whole (a vocabulary that grew)."""
    bits: int = 4
    """quant: 2, 4 or 8. deltadq: 1, 2 or 4"""
    group: int = 0
    """deltadq: inputs in one group, a power of two"""
    alpha: int = 1
    """deltadq: one of alpha inputs is kept, a power of two, at most the group"""
    mask_rows: int = 1
    """deltadq: so many neighbouring outputs share their masks"""
    seed: int = 0
    """deltadq: of the masks, 32 bits"""
    code_bytes: int = 0
    """spectral: of the factors, entropy-coded"""

    def used_fields(self) -> tuple[str, ...]:
        """The fields beyond shape, codec and dtype that this codec uses."""
        return _USED[self.codec]

    def problem(self) -> str | None:
        """What makes this entry impossible, or None."""
        if any(side < 0 for side in self.shape):
            return f"negative side in shape {list(self.shape)}"
        if self.codec != "dense" and len(self.shape) != 2:
            return f"codec {self.codec} needs a matrix, the shape is {list(self.shape)}"
        if self.codec in ("rows", "quant", "spectral") and self.rows > self.shape[0]:
            return f"{self.rows} rows stored of {self.shape[0]}"
        if self.codec in ("lora", "spectral") and self.rank < 1:
            return f"rank {self.rank}, expected 1 or more"
        if self.codec == "spectral" and self.rank > min(self.rows, self.shape[1]):
            return f"rank {self.rank} of {self.rows} rows and {self.shape[1]} columns"
        if self.codec == "quant" and self.bits == 1:
            return "bits 1, expected 2, 4 or 8"
        return self._dropout_problem() if self.codec == "deltadq" else None

    @property
    def padded_columns(self) -> int:
        """deltadq: inputs, filled up to whole groups."""
        return -(-self.shape[1] // self.group) * self.group

    @property
    def kept(self) -> int:
        """deltadq: values stored per row."""
        return self.padded_columns // self.alpha

    def parts(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Part name -> (dtype, shape)."""
        match self.codec:
            case "bitdelta":
                return self._sign_parts()
            case "lora":
                n, k = self.shape
                return {"lora_A": (self.dtype, (self.rank, k)), "lora_B": (self.dtype, (n, self.rank))}
            case "dense":
                return {"value": (self.dtype, self.shape)}
            case "rows":
                return {"index": (torch.int32, (self.rows,)), "value": (self.dtype, (self.rows, *self.shape[1:]))}
            case "quant":
                n, k = self.shape
                return {
                    "q": (torch.uint8, (self.rows, -(-k * self.bits // 8))),
                    "scale": (torch.float32, (self.rows,)),
                    "extra": (self.dtype, (n - self.rows, k)),
                }
            case "deltadq":
                n, _ = self.shape
                row = {"row": (torch.float16, (n,))} if self.scale_layout == "row" else {}
                code = (torch.uint8, (n, -(-self.kept * self.bits // 8)))
                return {"code": code, "scale": (torch.float32, (1,)), **row}
            case "spectral":
                return {
                    "code": (torch.uint8, (self.code_bytes,)),
                    "scale": (torch.float32, (1,)),
                    "exponent": (torch.uint8, (self.rank,)),
                    "spread": (torch.uint8, (2, self.rank)),
                    "extra": (self.dtype, (self.shape[0] - self.rows, self.shape[1])),
                }

    def _sign_parts(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        n, k = self.shape
        parts = {
            "sign": (torch.uint8, (self.planes, n, -(-k // 8))),
            "scale": (torch.float32, (self.planes,)),
        }
        if self.scale_layout != "tensor":
            parts["row"] = (torch.float16, (self.planes, n))
        if self.scale_layout == "row_col":
            parts["col"] = (torch.float16, (self.planes, k))
        return parts

    def _dropout_problem(self) -> str | None:
        for name, value in (("group", self.group), ("alpha", self.alpha)):
            if value < 1 or value & (value - 1) or value > 2**24:
                return f"{name} {value}, expected a power of two"
        if self.alpha > self.group:
            return f"alpha {self.alpha} in groups of {self.group}"
        if self.bits == 8 or self.scale_layout == "row_col":
            return f"deltadq with bits {self.bits} and scale_layout {self.scale_layout}"
        return None

    def part_name(self, part: str) -> str:
        return f"{self.name}.{part}"
