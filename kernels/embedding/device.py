"""Embedding rows on a device: the base's row plus the row's own variant's difference, or that variant's own row."""

# Launch options are no parameters of kernels:
# pyright: reportCallIssue=false

from __future__ import annotations

import torch
import triton

from kernels import launches
from kernels.device import DeviceDeltas, Kinds, Target
from kernels.embedding.triton_embed import embed_kernel
from kernels.rows import check_contiguous

_WIDTH = 1024
"""Columns of each program."""


def embed(
    tokens_T: torch.Tensor,
    source_T: torch.Tensor,
    sampled_S: torch.Tensor,
    weight_VK: torch.Tensor,
    target: Target,
    deltas: DeviceDeltas,
    entry_T: torch.Tensor,
    out_TK: torch.Tensor,
    kinds: Kinds,
) -> None:
    """out = the embedding of each row's token, rounded once, to out's dtype.

    Args:
        source_T: >= 0: the token is sampled[source], not tokens.
        weight_VK: the base's table. A token from V on is of a variant whose deltas have that row; nothing checks it.
        target: the embedding's place in the tables, which a tied head has too.
        kinds: of deltas that this target may have.
    """
    rows, inputs = out_TK.shape
    assert tokens_T.shape == source_T.shape == entry_T.shape == (rows,)
    assert weight_VK.shape == (target.outputs, inputs)
    assert target.inputs == inputs
    check_contiguous(tokens_T, source_T, sampled_S, weight_VK, entry_T, out_TK)
    width = min(_WIDTH, max(256, triton.next_power_of_2(inputs)))
    slab = deltas.slab
    # Launched plainly: it is the first of a step.
    embed_kernel[(rows, triton.cdiv(inputs, width))](
        tokens_T, source_T, sampled_S, weight_VK, slab.view(weight_VK.dtype), slab.view(torch.float32),
        slab.view(torch.int32), deltas.table_EJF, entry_T, out_TK, weight_VK.shape[0], target.index,
        deltas.table_EJF.shape[1], K=inputs, KS=width, SIGNS=kinds.signs, COLUMNS=kinds.columns, RANK=kinds.low_rank,
        BYTES=kinds.byte_rank > 0, DENSE=kinds.dense, ROWS=kinds.rows, PDL=launches.early(out_TK), num_warps=4,
    )  # fmt: skip
