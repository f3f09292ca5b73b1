"""Rotary embedding on a device: each entry's frequencies in a table; one launch from the product q, k, v to the cache.

The table holds every kind that fixed frequencies and a scaling of cos and sin can express (default, linear, llama3,
yarn), and dynamic NTK, where the row at position p has the frequencies of length p + 1.

Not covered: frequencies that depend on the length of the whole prompt (longrope).
"""

# Launch options are no parameters of kernels:
# pyright: reportCallIssue=false

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton

from kernels import launches
from kernels.device import DeviceDeltas, Partials
from kernels.rotary.triton_cos_sin import cos_sin_kernel
from kernels.rotary.triton_rope_cache import rope_cache_kernel
from kernels.rows import check_contiguous, partial_arguments, span_start

_GROUP_PAIRS = 256
"""Pairs of q, k and v that one program turns."""


@dataclass(frozen=True, slots=True)
class RopeTables:
    """What each entry's rows are turned by."""

    values_EF: torch.Tensor
    """float32 [E, D/2 + 3]: rows as `row` makes them; NaN where no variant was ever put"""

    @classmethod
    def empty(cls, entries: int, head_dim: int, device: torch.device | str) -> RopeTables:
        return cls(torch.full((entries, head_dim // 2 + 3), torch.nan, device=device))

    @staticmethod
    def row(inv_freq_H: torch.Tensor, scaling: float = 1.0, dynamic: tuple[float, int] | None = None) -> torch.Tensor:
        """float32 [D/2 + 3] on the CPU, to be copied to `values_EF[entry]`.

        Args:
            scaling: what cos and sin are multiplied with (yarn's attention factor).
            dynamic: (factor, max_position_embeddings) of NTK by length; inv_freq are those within the latter.
        """
        growth, start = (dynamic[0] / dynamic[1], float(dynamic[1])) if dynamic else (0.0, 0.0)
        return torch.cat((inv_freq_H.float().cpu(), torch.tensor([scaling, growth, start])))


@dataclass(frozen=True, slots=True)
class Turn:
    """What q, k and v of some rows are made of; whoever needs q may do it (`paged_attention.device.decode`)."""

    partials: Partials
    """q, k, v, one after another"""
    spans: tuple[tuple[int, int] | None, tuple[int, int] | None, tuple[int, int] | None]
    """Of their biases (neighbours), of the weights of q's norm and of k's, in every entry's block of vectors"""
    eps: float
    cos_TH: torch.Tensor
    sin_TH: torch.Tensor
    kv_slots_T: torch.Tensor
    """block * block size + offset of each row"""


def cos_sin(
    positions_T: torch.Tensor, entry_T: torch.Tensor, tables: RopeTables, cos_TH: torch.Tensor, sin_TH: torch.Tensor
) -> None:
    """cos and sin, float32 [T, D/2], of each row's angles times its scaling. Once per step, for all layers."""
    rows, half = cos_TH.shape
    assert positions_T.shape == entry_T.shape == (rows,)
    assert sin_TH.shape == cos_TH.shape
    assert half > 1
    assert tables.values_EF.shape[1] == half + 3
    check_contiguous(positions_T, entry_T, tables.values_EF, cos_TH, sin_TH)
    pdl = launches.early(cos_TH)
    cos_sin_kernel[(rows,)](
        positions_T, entry_T, tables.values_EF, cos_TH, sin_TH, HALF=half, WIDTH=triton.next_power_of_2(half),
        PDL=pdl, num_warps=1, **launches.options(pdl),
    )  # fmt: skip


def rope_and_cache(
    turn: Turn, deltas: DeviceDeltas, entry_T: torch.Tensor, q_out_THD: torch.Tensor, cache_B2GSD: torch.Tensor
) -> None:
    """q, k, v = partials + bias; q and k normed per head where the model does, and turned; q out, k and v to the cache.

    Args:
        q_out_THD: compute dtype, as the cache is.
        cache_B2GSD: [blocks, K or V, kv_heads, block size, D]; only the rows' own slots are written.
    """
    rows, heads, dim = q_out_THD.shape
    kv_heads = cache_B2GSD.shape[2]
    assert cache_B2GSD.shape[1] == 2
    assert cache_B2GSD.shape[4] == dim
    assert cache_B2GSD.dtype == q_out_THD.dtype
    check_contiguous(q_out_THD, cache_B2GSD)
    total = heads + 2 * kv_heads
    width = triton.next_power_of_2(dim // 2)
    group = max(1, _GROUP_PAIRS // width)
    before, constants = turn_arguments(turn, deltas, entry_T, q_out_THD, kv_heads)
    pdl = launches.early(q_out_THD)
    rope_cache_kernel[(rows, triton.cdiv(total, group))](
        *before, q_out_THD, cache_B2GSD, rows, HEADS=heads, KV_HEADS=kv_heads, HALF=dim // 2,
        BLOCK_SIZE=cache_B2GSD.shape[3], GROUP=group, WIDTH=width, **constants, PDL=pdl, num_warps=1,
        **launches.options(pdl),
    )  # fmt: skip


def turn_arguments(
    turn: Turn, deltas: DeviceDeltas, entry_T: torch.Tensor, q_THD: torch.Tensor, kv_heads: int
) -> tuple[list[Any], dict[str, Any]]:
    """From BASE to k_norm, and the constants, of kernels that turn q, k and v."""
    rows, heads, dim = q_THD.shape
    columns, (bias, q_norm, k_norm) = (heads + 2 * kv_heads) * dim, turn.spans
    assert dim % 2 == 0
    assert entry_T.shape == turn.kv_slots_T.shape == (rows,)
    assert turn.cos_TH.shape == turn.sin_TH.shape == (rows, dim // 2)
    assert (q_norm is None) == (k_norm is None), "norms: both or none"
    check_contiguous(entry_T, turn.cos_TH, turn.sin_TH, turn.kv_slots_T)
    added, constants = partial_arguments(turn.partials, rows, columns)
    arguments = [
        *added, deltas.slab.view(q_THD.dtype), deltas.vectors_E, entry_T, turn.cos_TH, turn.sin_TH, turn.kv_slots_T,
        turn.eps, span_start(bias, columns), span_start(q_norm, dim), span_start(k_norm, dim),
    ]  # fmt: skip
    return arguments, {**constants, "HAS_BIAS": bias is not None, "HAS_NORM": q_norm is not None}
