"""One token per row of logits: greedy, or drawn under temperature, min-p, top-k and top-p, with penalties. No sort."""

from __future__ import annotations

from typing import Literal

import torch

from kernels.sampling import reference
from kernels.sampling.rows import Sampled, SamplingRows, Wants
from kernels.sampling.workspace import Workspace

Impl = Literal["reference", "triton"]
MAX_VOCAB = 2**23
"""Sums of weights stay below 2^63."""


def sample(
    logits_SV: torch.Tensor,
    rows: SamplingRows,
    counts_QV: torch.Tensor | None,
    out: Sampled,
    workspace: Workspace | None,
    wants: Wants,
    *,
    impl: Impl | None = None,
) -> None:
    """Choose the next token of every row whose VOCAB is not 0, and count it where the row has counts.

    A row's token depends on its own logits and its own line of the table, on nothing else. With `triton` nothing is
    allocated and the host waits for nothing: it can be captured.

    Args:
        logits_SV: float32, rows may be strided; not changed. Columns beyond a row's VOCAB may hold anything.
        counts_QV: int32 [Q, >= V], see `rows.start_counts`; None when no row has penalties. Each row has its own of it.
        out: lines of rows that are left alone keep what they hold.
        workspace: for at least as many rows and columns; `reference` needs none.
        wants: at least what the rows want. `triton` answers rows that want more with `finite` = 0.
        impl: None: `triton` on a GPU, `reference` elsewhere.
    """
    assert logits_SV.dtype == torch.float32, logits_SV.dtype
    assert logits_SV.shape[0] == rows.fields_SF.shape[0] == out.words_4S.shape[1], "rows differ"
    assert logits_SV.shape[1] < MAX_VOCAB, f"a vocabulary of {logits_SV.shape[1]}"
    if (impl or ("triton" if logits_SV.is_cuda else "reference")) == "reference":
        reference.sample(logits_SV, rows, counts_QV, out)
        return
    from kernels.sampling import device

    assert workspace is not None, "the device kernels need a workspace"
    device.sample(logits_SV, rows, counts_QV, out, workspace, wants)
