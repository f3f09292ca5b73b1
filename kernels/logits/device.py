"""Logits from a head's partial products, in one launch."""

# A launch is no call to Python:
# pyright: reportCallIssue=false

from __future__ import annotations

import torch
import triton

from kernels import launches
from kernels.device import Partials
from kernels.logits.triton_logits import logits_kernel
from kernels.rows import check_contiguous, partial_arguments

_WIDTH = 1024


def logits(partials: Partials, entry_L: torch.Tensor, vocab_E: torch.Tensor, out_LV: torch.Tensor) -> None:
    """out = partials summed, and -inf from vocab[entry] on, as `reference.logits` says.

    Args:
        vocab_E: int32. How many columns are each entry's.
        out_LV: float32.
    """
    rows, columns = out_LV.shape
    assert entry_L.shape == (rows,)
    assert out_LV.dtype == torch.float32
    check_contiguous(entry_L, vocab_E, out_LV)
    added, constants = partial_arguments(partials, rows, columns)
    pdl = launches.early(out_LV)
    logits_kernel[(rows, triton.cdiv(columns, _WIDTH))](
        *added, entry_L, vocab_E, out_LV, rows, columns, WIDTH=_WIDTH, **constants, PDL=pdl, num_warps=4,
        **launches.options(pdl),
    )  # fmt: skip
