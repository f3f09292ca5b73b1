"""Rotary embedding on a device: each entry's frequencies in a table; one launch from the product q, k, v to the cache.

The table holds every kind that fixed frequencies and a scaling of cos and sin can express (default, linear, llama3,
yarn), and dynamic NTK, where the row at position p has the frequencies of length p + 1.

Not covered: frequencies that depend on the length of the whole prompt (longrope).
"""

# Launch options are no parameters of kernels:
# pyright: reportCallIssue=false

from __future__ import annotations

from dataclasses import dataclass

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
    partials_qkv: Partials,
    deltas: DeviceDeltas,
    spans: tuple[tuple[int, int] | None, tuple[int, int] | None, tuple[int, int] | None],
    eps: float,
    entry_T: torch.Tensor,
    cos_TH: torch.Tensor,
    sin_TH: torch.Tensor,
    kv_slots_T: torch.Tensor,
    q_out_THD: torch.Tensor,
    cache_B2GSD: torch.Tensor,
    heads: int,
    kv_heads: int,
) -> None:
    """q, k, v = partials + bias; q and k normed per head where the model does, and turned; q out, k and v to the cache.

    Args:
        spans: of q, k and v's biases (neighbours), of the weights of q's norm and of k's; in every entry's block of
            vectors. The norms: both or none.
        kv_slots_T: block * block size + offset of each row.
        q_out_THD: compute dtype, as the cache is.
        cache_B2GSD: [blocks, K or V, kv_heads, block size, D]; only the rows' own slots are written.
    """
    rows, _, dim = q_out_THD.shape
    bias, q_norm, k_norm = spans
    assert q_out_THD.shape == (rows, heads, dim)
    assert cache_B2GSD.shape[1:3] == (2, kv_heads)
    assert cache_B2GSD.shape[4] == dim
    assert cache_B2GSD.dtype == q_out_THD.dtype
    assert dim % 2 == 0
    assert entry_T.shape == kv_slots_T.shape == (rows,)
    assert cos_TH.shape == sin_TH.shape == (rows, dim // 2)
    assert (q_norm is None) == (k_norm is None)
    check_contiguous(entry_T, cos_TH, sin_TH, kv_slots_T, q_out_THD, cache_B2GSD)
    total = heads + 2 * kv_heads
    width = triton.next_power_of_2(dim // 2)
    group = max(1, _GROUP_PAIRS // width)
    added, added_constants = partial_arguments(partials_qkv, rows, total * dim)
    pdl = launches.early(q_out_THD)
    rope_cache_kernel[(rows, triton.cdiv(total, group))](
        *added, deltas.slab.view(q_out_THD.dtype), deltas.vectors_E, entry_T, cos_TH, sin_TH, kv_slots_T, q_out_THD,
        cache_B2GSD, eps, rows, span_start(bias, total * dim), span_start(q_norm, dim), span_start(k_norm, dim),
        HEADS=heads, KV_HEADS=kv_heads, HALF=dim // 2, BLOCK_SIZE=cache_B2GSD.shape[3], GROUP=group, WIDTH=width,
        **added_constants, HAS_BIAS=bias is not None, HAS_NORM=q_norm is not None, PDL=pdl, num_warps=1,
        **launches.options(pdl),
    )  # fmt: skip
