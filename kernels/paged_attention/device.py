"""Attention over the paged cache on a GPU: `decode` for one row of each sequence, `prefill` for chunks of prompts.

Cache of one layer: [blocks, 2, G, block_size, D], so that the keys of a block and head, and its values, are one piece.
Scores are scaled by D^-1/2; softmax and sums are float32. What lies in cache slots beyond a context, in blocks that a
sequence does not have, or in block tables beyond a context, is never read.
"""

# Launch options are no parameters of kernels:
# pyright: reportCallIssue=false

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton

from kernels import launches
from kernels.device import DeviceDeltas, Kinds, Planes, Target
from kernels.paged_attention.choice import (
    MOST_SPLITS,
    Chip,
    DecodeConfig,
    PrefillConfig,
    choose_decode,
    choose_prefill,
    split_rows,
)
from kernels.paged_attention.triton_decode import decode_kernel
from kernels.paged_attention.triton_prefill import prefill_kernel
from kernels.planes import prepare_planes
from kernels.rotary.device import Turn, rope_and_cache, turn_arguments

MAX_ROWS = 256
"""Of a decode step, and most prompts of one prefill."""
MOST_PREFILL_SPLITS = 16
_LEAST = 4
"""Tiles of keys that are worth a program of their own in prefill"""
_UNBOUNDED = 2**30
_NO_TURN = [*[None] * 8, 0.0, 0, 0, 0], {"SPLIT": 0, "HAS_DELTA": False, "HAS_BIAS": False, "HAS_NORM": False}
"""In place of `turn_arguments`"""


@dataclass(frozen=True, slots=True)
class Workspace:
    """Of `decode`, for all layers and sizes of graphs. Between launches only `arrived` holds something: zeros."""

    partial: torch.Tensor
    """float32 [rows * splits * H * D]"""
    stats: torch.Tensor
    """float32 [rows * splits * H * 2]"""
    arrived: torch.Tensor
    """int32 [rows * G]"""

    @property
    def tensors(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return self.partial, self.stats, self.arrived

    @classmethod
    def empty(cls, rows: int, heads: int, kv_heads: int, head_dim: int, device: torch.device | str) -> Workspace:
        """For steps of up to `rows` rows with default configurations."""
        units = heads * split_rows(rows)
        return cls(
            torch.empty(units * head_dim, dtype=torch.float32, device=device),
            torch.empty(units * 2, dtype=torch.float32, device=device),
            torch.zeros(rows * kv_heads, dtype=torch.int32, device=device),
        )


def workspace_bytes(rows: int, heads: int, kv_heads: int, head_dim: int) -> int:
    return 4 * (heads * split_rows(rows) * (head_dim + 2) + rows * kv_heads)


def decode(
    q_THD: torch.Tensor,
    cache_B2GSD: torch.Tensor,
    block_tables_SM: torch.Tensor,
    context_lens_S: torch.Tensor,
    window: int | None,
    out_TC: torch.Tensor,
    planes: Planes | None,
    target: Target | None,
    deltas: DeviceDeltas,
    entry_T: torch.Tensor,
    kinds: Kinds,
    workspace: Workspace,
    *,
    turn: Turn | None = None,
    config: DecodeConfig | None = None,
) -> None:
    """Attention of row t to the first context_lens[t] tokens of sequence t, its own K and V among them.

    Graph-safe. A row's result depends on the row and the configuration alone, to the bit.

    Args:
        context_lens_S: 0 for padding, which gives zeros.
        window: how many tokens a row sees, itself included; None: all.
        out_TC: compute dtype [T, H * D].
        planes: of `out` for `target`, the next linear; None: it needs none.
        turn: q, k and v are still to be made; q_THD is for q and may be left unwritten. None: q_THD and the cache have
            them.
    """
    rows, heads, dim = q_THD.shape
    _, two, kv_heads, block_size, cache_dim = cache_B2GSD.shape
    assert (two, cache_dim) == (2, dim), f"cache {tuple(cache_B2GSD.shape)} and queries of {dim}"
    assert out_TC.shape == (rows, heads * dim)
    assert context_lens_S.shape == (rows,), f"{rows} rows, {context_lens_S.shape[0]} contexts: one row of each sequence"
    assert rows <= MAX_ROWS
    assert (planes is None) == (target is None), "planes are for a target"
    _check_cache(cache_B2GSD, heads)
    group = heads // kv_heads
    config = config or choose_decode(rows, kv_heads, group, dim, q_THD.device)
    assert config.splits <= MOST_SPLITS
    assert config.chunk % config.tile == 0
    assert config.direct or config.programs
    assert rows * config.splits * heads * dim <= workspace.partial.numel(), "the workspace is for fewer rows or splits"
    assert rows * kv_heads <= workspace.arrived.numel()
    assert all(t.is_contiguous() for t in (q_THD, cache_B2GSD, block_tables_SM, context_lens_S, out_TC))
    if turn is not None and not config.turn:
        rope_and_cache(turn, deltas, entry_T, q_THD, cache_B2GSD)
        turn = None
    padded_group = triton.next_power_of_2(group)
    pdl = launches.early(q_THD)
    before, constants = _NO_TURN
    if turn is not None:
        before, constants = turn_arguments(turn, deltas, entry_T, q_THD, kv_heads)
    grid = (kv_heads, rows, config.splits)  # splits that no context has come last
    decode_kernel[grid if config.direct else (min(config.programs, math.prod(grid)),)](
        q_THD, cache_B2GSD, block_tables_SM, context_lens_S, out_TC, *workspace.tensors, *before, rows,
        block_tables_SM.shape[1], window or _UNBOUNDED, config.chunk, config.splits, _scale(dim), KV_HEADS=kv_heads,
        GROUP=group, GP=max(16, padded_group), D=dim, DP=_padded_dim(dim), BLOCK=block_size,
        ROWS=1 if config.direct else padded_rows(rows), TILE=config.tile, RP=padded_group,
        STEP=max(1, min(16, 8 * config.warps // padded_group)), DIRECT=config.direct, HELD=config.stages == 1,
        TURN=turn is not None, **constants, PDL=pdl, num_warps=config.warps, num_stages=config.stages,
        **launches.options(pdl), **({"maxnreg": config.registers} if config.registers else {}),
    )  # fmt: skip
    if planes is not None and target is not None:
        prepare_planes(out_TC, planes, target, deltas, entry_T, kinds)


def prefill(
    q_THD: torch.Tensor,
    cache_B2GSD: torch.Tensor,
    query_starts_S1: torch.Tensor,
    context_lens_S: torch.Tensor,
    block_tables_SM: torch.Tensor,
    window: int | None,
    out_TC: torch.Tensor,
    max_query: int,
    *,
    workspace: Workspace | None = None,
    config: PrefillConfig | None = None,
) -> None:
    """Causal attention of rows query_starts[s]:query_starts[s+1] to the context_lens[s] tokens of which they are the
    last. K and V of all of them are in the cache.

    Args:
        window: how many tokens a row sees, itself included; None: all.
        out_TC: compute dtype [T, H * D]. Rows of no sequence stay as they are.
        max_query: at least the rows of every sequence.
        workspace: what `decode` has, if it is not running. With it, several programs share the keys of a tile where
            there are few tiles; how many depends on the batch, and the last bits of the result with it.
    """
    rows, heads, dim = q_THD.shape
    _, two, kv_heads, block_size, cache_dim = cache_B2GSD.shape
    sequences = context_lens_S.shape[0]
    assert (two, cache_dim) == (2, dim), f"cache {tuple(cache_B2GSD.shape)} and queries of {dim}"
    assert out_TC.shape == (rows, heads * dim)
    assert query_starts_S1.shape == (sequences + 1,)
    assert sequences <= MAX_ROWS, f"{sequences} prompts at once, at most {MAX_ROWS}"
    _check_cache(cache_B2GSD, heads)
    group = heads // kv_heads
    config = config or choose_prefill(max_query, group, dim, q_THD.device)
    assert all(t.is_contiguous() for t in (q_THD, cache_B2GSD, query_starts_S1, block_tables_SM, out_TC))
    positions = config.rows // group
    assert positions > 0, f"tiles of {config.rows} rows for groups of {group}"
    tiles = min(triton.cdiv(rows, positions) + sequences - 1, sequences * triton.cdiv(max_query, positions))
    splits = _prefill_splits(tiles * kv_heads, config.rows * dim, workspace, Chip.of(q_THD.device))
    partial, stats, arrived = (None, None, None) if workspace is None else workspace.tensors
    prefill_kernel[(kv_heads, tiles, splits)](
        q_THD, cache_B2GSD, block_tables_SM, query_starts_S1, context_lens_S, out_TC, partial, stats, arrived,
        sequences, block_tables_SM.shape[1], window or _UNBOUNDED, splits, _LEAST, _scale(dim), KV_HEADS=kv_heads,
        GROUP=group, D=dim, DP=_padded_dim(dim), BLOCK=block_size, ROWS=padded_rows(sequences), BM=config.rows,
        BN=config.tile, WINDOWED=window is not None, SPLIT=splits > 1, num_warps=config.warps,
        num_stages=config.stages,
    )  # fmt: skip


def _prefill_splits(programs: int, tile_elements: int, workspace: Workspace | None, chip: Chip) -> int:
    """So many that every multiprocessor has two programs, if the partial sums have room."""
    if workspace is None or programs > workspace.arrived.numel():
        return 1
    room = workspace.partial.numel() // (tile_elements * programs)  # the statistics are in proportion
    return max(1, min(MOST_PREFILL_SPLITS, 2 * chip.multiprocessors // programs, room))


def padded_rows(rows: int) -> int:
    """Few different ones: each is compiled."""
    return 16 if rows <= 16 else 64 if rows <= 64 else MAX_ROWS


def _padded_dim(head_dim: int) -> int:
    return max(16, triton.next_power_of_2(head_dim))


def _scale(head_dim: int) -> float:
    return head_dim**-0.5 * math.log2(math.e)


def _check_cache(cache_B2GSD: torch.Tensor, heads: int) -> None:
    _, _, kv_heads, block_size, dim = cache_B2GSD.shape
    assert heads % kv_heads == 0, f"{heads} heads in {kv_heads} groups"
    assert block_size in (8, 16, 32, 64, 128, 256), f"blocks of {block_size} tokens"
    assert dim in range(8, 257, 8), f"heads of {dim}"
