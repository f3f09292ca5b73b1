"""Launches the kernels. No allocation, no wait: what is launched follows from the shapes and from `Wants` alone."""

# pyright: reportArgumentType=false

from __future__ import annotations

import torch
import triton

from kernels import launches
from kernels.sampling.rows import Sampled, SamplingRows, Wants
from kernels.sampling.triton_sample import best_kernel, mass_kernel, rank_kernel, weigh_kernel
from kernels.sampling.triton_truncate import cut_kernel, gather_kernel
from kernels.sampling.workspace import BINS, Workspace

CHUNK = 512
"""Bins that are held at a time. Divides BINS."""


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
    w, config = workspace, workspace.config
    grid = (triton.cdiv(width, config.columns), count)
    assert w.best_SB.shape[0] >= count, f"{count} rows, but the workspace has room for {w.best_SB.shape[0]}"
    assert w.best_SB.shape[1] >= grid[0], f"{width} columns are too many for the workspace"
    assert logits_SV.stride(1) == 1, "the columns of a row must be adjacent"
    assert rows.fields_SF.is_contiguous()
    assert out.words_4S.is_contiguous()
    assert counts_QV is None or (
        counts_QV.dtype == torch.int32 and counts_QV.shape[1] >= width and counts_QV.stride(1) == 1
    )
    counts = rows.fields_SF if counts_QV is None else counts_QV  # a pointer that is not followed
    given, words = (logits_SV, counts, rows.fields_SF), out.words_4S
    strides = (logits_SV.stride(0), counts.stride(0), width)
    slices, histogram = w.best_SB.stride(0), (w.count_SH, w.weight_SH)
    found = (w.state_SX, w.level_SX)
    stages = (*found, w.tickets_SX)
    cut = {"HAS_COUNTS": counts_QV is not None, "BLOCK": config.columns}
    ended = {"PADDED": triton.next_power_of_2(grid[0])}
    # Fused multiply-adds round otherwise than the specification. Left to itself, ptxas saves registers until it spills.
    pdl = launches.early(logits_SV)
    launch = {"num_warps": config.warps, "enable_fp_fusion": False, "maxnreg": 168, "PDL": pdl, **launches.options(pdl)}
    best_kernel[grid](
        *given, words, w.best_SB, w.where_SB, w.sum_SB, *histogram, *stages, count, *strides, slices, **cut,
        **ended, RANDOM=wants.random, TRUNCATED=wants.truncated, RANKS=wants.ranks, BINS=BINS, **launch,
    )  # fmt: skip
    if not wants.random:
        return
    weigh_kernel[grid](
        *given, words, w.mass_SB, *histogram, *stages, count, *strides, slices, **cut,
        **ended, TRUNCATED=wants.truncated, BINS=BINS, CHUNK=CHUNK, **launch,
    )  # fmt: skip
    if wants.truncated:
        listed = {"BINS": BINS, "LISTED": config.listed}
        lists = (w.logit_SL, w.id_SL, *stages)
        gather_kernel[grid](*given, *lists, *strides, **cut, **listed, **launch)
        search = cut | {"BLOCK": config.searched}
        one = launch | {"num_warps": config.search_warps}
        cut_kernel[(count,)](*given, *lists, *strides, **search, **listed, **one)
        mass_kernel[grid](
            *given, words, w.mass_SB, *stages, count, *strides, slices, **cut, **ended, BINS=BINS, **launch
        )
    if wants.ranks:
        rank_kernel[grid](*given, words, *found, count, *strides, **cut, **launch)
