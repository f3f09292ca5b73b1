"""Root mean square normalisation (Zhang and Sennrich 2019), with one weight for all rows or one per row."""

from __future__ import annotations

from typing import Literal

import torch

from kernels.rms_norm import reference, torch_native

Impl = Literal["reference", "native"]


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, *, impl: Impl | None = None) -> torch.Tensor:
    """x [..., D] normalised over D; the weight broadcasts against x ([D], or [T, 1.., D] with one row per token).

    `native` serves every device and shape; it rounds to x's dtype before the weight, as transformers does.
    """
    run = reference.rms_norm if impl == "reference" else torch_native.rms_norm
    return run(x, weight, eps)
