"""Launches the kernels. No allocation, no wait: only what `Wants` and the shapes say."""

from __future__ import annotations

import torch
import triton

from kernels.sampling.rows import Sampled, SamplingRows, Wants
from kernels.sampling.triton_sample import best_kernel, mass_kernel, rank_kernel, weigh_kernel
from kernels.sampling.triton_truncate import gather_kernel
from kernels.sampling.workspace import BINS, LISTED, SLICE, Workspace

BLOCK = 1024
CHUNK = 512
"""Divides BINS"""
LAUNCH = {"num_warps": 4, "enable_fp_fusion": False}


def sample(
    logits_SV: torch.Tensor,
    rows: SamplingRows,
    counts_QV: torch.Tensor | None,
    out: Sampled,
    workspace: Workspace,
    wants: Wants,
) -> None:
    """As `kernels.sampling.sample`."""
    count, width = logits_SV.shape
    grid = (triton.cdiv(width, SLICE), count)
    w = workspace
    assert w.best_SB.shape[0] >= count, f"{count} rows, but the workspace has room for {w.best_SB.shape[0]}"
    assert w.best_SB.shape[1] >= grid[0], f"{width} columns are too many for the workspace"
    assert logits_SV.stride(1) == 1, "the columns of a row must be adjacent"
    assert rows.fields_SF.is_contiguous()
    assert out.words_4S.is_contiguous()
    counts = rows.fields_SF if counts_QV is None else counts_QV
    given = (logits_SV, counts, rows.fields_SF)
    strides = (logits_SV.stride(0), counts.stride(0), width)
    has_counts, padded = counts_QV is not None, triton.next_power_of_2(grid[0])
    slices, histogram = w.best_SB.stride(0), (w.count_SH, w.weight_SH)
    state, tickets, words = w.state_SX, w.tickets_SX, out.words_4S
    best_kernel[grid](
        *given, words, w.best_SB, w.where_SB, w.sum_SB, *histogram, state, tickets, count, *strides, slices,
        has_counts, wants.random, wants.truncated, wants.ranks, SLICE, BLOCK, padded, BINS, **LAUNCH,
    )  # fmt: skip
    if not wants.random:
        return
    weigh_kernel[grid](
        *given, words, w.mass_SB, *histogram, state, tickets, count, *strides, slices,
        has_counts, wants.truncated, SLICE, BLOCK, padded, BINS, CHUNK, **LAUNCH,
    )  # fmt: skip
    if wants.truncated:
        gather_kernel[grid](
            *given, w.logit_SL, w.id_SL, state, tickets, *strides, has_counts, SLICE, BLOCK, BINS, LISTED, **LAUNCH
        )
        mass_kernel[grid](
            *given, words, w.mass_SB, state, tickets, count, *strides, slices,
            has_counts, SLICE, BLOCK, padded, BINS, **LAUNCH,
        )  # fmt: skip
    if wants.ranks:
        rank_kernel[grid](*given, words, state, count, *strides, has_counts, SLICE, BLOCK, **LAUNCH)
