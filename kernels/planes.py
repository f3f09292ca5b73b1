"""Activations as bit planes, and what passes between fused kernels: helpers for whoever owns a row.

A row's producer (norm, SiLU x up, attention) quantises it while it is in registers. Grid: one program for each row and
each of several slices; every program recomputes the statistics of the whole row and writes its own slice, so that a
single row is not the serial work of one multiprocessor.

Error: x is rounded to multiples of max |x| / 32639, by at most half of one (half to +inf). A product with signs over K
inputs is then off by at most K max |x| / 65278 times its scale. Roundings are as good as independent: the error's root
mean square is sqrt(K / 12) max |x| / 32639 times the scale, that of products with random signs sqrt(sum x^2) >= max |x|
times it. So the error is at most sqrt(K / 12) / 32639 of the products' size (6e-4 for K = 4096), however far outliers
lie from the rest, and 4e-5 for normal x. NaN or inf in a row make that row's products wrong or NaN, and no other's.

Not covered: K above 65536, where the sums of products leave 32 bits.
"""

# Triton's language is not Python's:
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportIndexIssue=false, reportOperatorIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kernels import launches
from kernels.device import FIELDS, UNIT, DeviceDeltas, Field, Kinds, Planes, Target
from kernels.fragments import TILE_COLUMNS, tiles

LARGEST = 32639
MAX_INPUTS = 65536
_LARGEST = tl.constexpr(float(LARGEST))
_COL = tl.constexpr(int(Field.COL))
_PLANES = tl.constexpr(int(Field.PLANES))
_FIELDS = tl.constexpr(FIELDS)
_FLOATS = tl.constexpr(UNIT // 4)


@triton.jit
def sum_partials(BASE, DELTA, row, cols, mask, T, N, entry, SPLIT: tl.constexpr, HAS_DELTA: tl.constexpr):
    """float32: sum over s of BASE[s, row, cols], and DELTA[row, cols] where the row has an entry > 0.

    Args:
        mask: of cols' shape; 0 where it is not set.
        entry: the row's. Rows of entry 0 are never written in DELTA and never read here.
        T, N: rows and columns that both tensors have.
    """
    at = row.to(tl.int64) * N + cols
    total = tl.load(BASE + at, mask=mask, other=0.0).to(tl.float32)
    for s in tl.static_range(1, SPLIT):
        total += tl.load(BASE + (row + s * T).to(tl.int64) * N + cols, mask=mask, other=0.0).to(tl.float32)
    if HAS_DELTA:
        # Compared as a vector: the interpreter makes no mask of a vector and a scalar condition.
        has = tl.zeros_like(cols) + entry > 0
        total += tl.load(DELTA + at, mask=mask & has, other=0.0).to(tl.float32)
    return total


@triton.jit
def quantize(x, amax):
    """int32 in -32639 .. 32639 of float32 x with |x| <= amax (a scalar)."""
    return tl.floor(x * (_LARGEST / tl.maximum(amax, 1e-30)) + 0.5).to(tl.int32)


@triton.jit
def store_planes(q, WORDS, row_offset, first_block, blocks, KS: tl.constexpr):
    """Write the planes of q, int32 [KS], which are the columns from first_block * 256 on.

    Args:
        WORDS: `Planes.words_CTW`; the words of this row of this set begin at row_offset.
        blocks: B of the row. Blocks from there on are not written.
        KS: a power of two, at least 256.
    """
    shift = tl.arange(0, 8)
    # Two columns 8 apart in one word; then planes p and p + 8 of both are bits 0, 8, 16 and 24 of word >> p.
    pair = tl.reshape(q & 0xFFFF, (KS // 32, 2, 2, 8))
    pair = tl.sum(pair << (16 * tl.arange(0, 2))[None, None, :, None], 2)
    bits = (pair[:, None, :, :] >> shift[None, :, None, None]) & 0x01010101
    quad = tl.sum(bits << shift[None, None, None, :], 3)
    half = (16 * tl.arange(0, 2))[None, None, :]
    low = tl.sum(((quad & 0xFF) | ((quad >> 8) & 0xFF00)) << half, 2)
    high = tl.sum((((quad >> 8) & 0xFF) | ((quad >> 16) & 0xFF00)) << half, 2)
    group = tl.arange(0, KS // 32)[:, None]
    block = first_block + group // 8
    word = (shift[None, :] * 4 + group % 4) * 4 + (group % 8) // 4
    at = WORDS + row_offset + block * 128 + word
    tl.store(at, low, mask=block < blocks)
    tl.store(at + 2, high, mask=block < blocks)


@triton.jit
def store_row(
    x, part, WORDS, SCALE, SUM, FLOATS, TABLE_ROW, row, which, words_stride, scale_stride, blocks,
    MEMBERS: tl.constexpr, COLUMNS: tl.constexpr, KP: tl.constexpr, KS: tl.constexpr,
):  # fmt: skip
    """Every column set of one slice of one row; the first slice's program writes scale and sum.

    Args:
        x: float32 [KP], the whole row, zero beyond K. KP: a power of two, at least K.
        part: float32 [KS], its columns from which * KS on, zero beyond K; x itself where KS is KP.
        FLOATS: the slab as float32. TABLE_ROW: `table_EJF` at the row's entry and the target.
        words_stride, scale_stride: of the column sets of `words_CTW` and of `scale_CT` and `sum_CT`.
        blocks: B. MEMBERS: of the target. COLUMNS: whether any variant has column scales.
    """
    if COLUMNS:
        offset = tl.load(TABLE_ROW + _COL)
        columns = FLOATS + offset.to(tl.int64) * _FLOATS
        width = tl.where(offset >= 0, blocks * 256, 0)
        sets = tl.where(offset >= 0, tl.load(TABLE_ROW + _PLANES) * MEMBERS, 1)
        for c in range(sets):
            _store_set(
                x * tl.load(columns + c * blocks * 256 + tl.arange(0, KP), mask=tl.arange(0, KP) < width, other=1.0),
                part * _column_slice(columns + c * blocks * 256, width, which, KS),
                WORDS + c * words_stride, SCALE + c * scale_stride, SUM + c * scale_stride, row, which, blocks, KS,
            )  # fmt: skip
    else:
        _store_set(x, part, WORDS, SCALE, SUM, row, which, blocks, KS)


@triton.jit
def _column_slice(columns, width, which, KS: tl.constexpr):
    k = which * KS + tl.arange(0, KS)
    return tl.load(columns + k, mask=k < width, other=1.0)


@triton.jit
def _store_set(x, part, WORDS, SCALE, SUM, row, which, blocks, KS: tl.constexpr):
    amax = tl.max(tl.abs(x), 0)
    if which == 0:
        tl.store(SCALE + row, tl.maximum(amax, 1e-30) / _LARGEST)
        tl.store(SUM + row, tl.sum(quantize(x, amax), 0))
    store_planes(quantize(part, amax), WORDS, row * blocks * 128, which * (KS // 256), blocks, KS)


@triton.jit
def _prepare(
    X, WORDS, SCALE, SUM, FLOATS, TABLE, ENTRY, target, targets, K, words_stride, scale_stride, blocks,
    MEMBERS: tl.constexpr, COLUMNS: tl.constexpr, KP: tl.constexpr, KS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        gdc_launch_dependents()
    row = tl.program_id(0)
    which = tl.program_id(1)
    table_row = TABLE + (tl.load(ENTRY + row) * targets + target) * _FIELDS
    if PDL:
        gdc_wait()
    k = tl.arange(0, KP)
    x = tl.load(X + row * K + k, mask=k < K, other=0.0).to(tl.float32)
    k = which * KS + tl.arange(0, KS)
    part = tl.load(X + row * K + k, mask=k < K, other=0.0).to(tl.float32)
    store_row(
        x, part, WORDS, SCALE, SUM, FLOATS, table_row, row, which, words_stride, scale_stride, blocks,
        MEMBERS, COLUMNS, KP, KS,
    )  # fmt: skip


def slice_width(inputs: int, parts: int) -> int:
    """KS: the narrowest slice of which `parts` cover a row."""
    return max(TILE_COLUMNS, triton.next_power_of_2(-(-inputs // parts)))


def warps_of(width: int) -> int:
    """So that a program that holds a float32 row of this width (a power of two) has at most 32 elements in a lane."""
    return min(16, max(4, width // 1024))


def prepare_planes(
    x_TK: torch.Tensor,
    planes: Planes,
    target: Target,
    deltas: DeviceDeltas,
    entry_T: torch.Tensor,
    kinds: Kinds,
    *,
    parts: int = 8,
) -> None:
    """Planes of x's rows, times the column scales of each row's variant where it has any.

    For where x has no producer that does it. Column sets that no variant of `kinds` can have are not written, nor are
    sets other than 0 of rows without column scales.
    """
    rows, inputs = x_TK.shape
    assert x_TK.is_contiguous()
    assert inputs == target.inputs <= MAX_INPUTS, f"{inputs} inputs, the target has {target.inputs}"
    width, whole, table = slice_width(inputs, parts), triton.next_power_of_2(inputs), deltas.table_EJF
    pdl = launches.early(x_TK)
    _prepare[(rows, triton.cdiv(inputs, width))](
        x_TK, planes.words_CTW, planes.scale_CT, planes.sum_CT, deltas.slab.view(torch.float32), table, entry_T,
        target.index, table.shape[1], inputs, planes.words_CTW.stride(0), planes.scale_CT.stride(0),
        tiles(1, inputs)[1], MEMBERS=len(target.members), COLUMNS=kinds.columns, KP=max(whole, width),
        KS=width, PDL=pdl, num_warps=warps_of(whole), **launches.options(pdl),
    )  # fmt: skip


def planes_reference(x_CTK: torch.Tensor) -> Planes:
    """The specification: planes of float32 rows that already have their column scales."""
    sets, rows, inputs = x_CTK.shape
    largest = x_CTK.abs().amax(2).clamp_min(1e-30)
    per_unit = torch.full_like(largest, LARGEST) / largest  # not LARGEST / largest, which torch rounds twice
    q = (x_CTK * per_unit[..., None] + 0.5).floor().int()
    blocks = tiles(1, inputs)[1]
    bits = torch.nn.functional.pad(q, (0, blocks * TILE_COLUMNS - inputs)).view(sets, rows, blocks, 2, 4, 32, 1)
    planes = (bits >> torch.arange(16, device=q.device, dtype=torch.int32)) & 1  # C, T, B, khalf, q, i, plane
    words = (planes << torch.arange(32, device=q.device, dtype=torch.int32)[:, None]).sum(5, dtype=torch.int32)
    ordered = words.unflatten(5, (2, 8)).permute(0, 1, 2, 6, 4, 5, 3)  # C, T, B, plane % 8, q, plane // 8, khalf
    return Planes(ordered.reshape(sets, rows, blocks * 128), largest / LARGEST, q.sum(2, dtype=torch.int32))


def values(planes: Planes, inputs: int) -> torch.Tensor:
    """What planes stand for: float32 [C, T, K]."""
    sets, rows, width = planes.words_CTW.shape
    words = planes.words_CTW.view(sets, rows, width // 128, 8, 4, 2, 2).permute(0, 1, 2, 6, 4, 5, 3)
    bits = (words.flatten(5)[..., None] >> torch.arange(32, device=words.device, dtype=torch.int32)) & 1
    q = (bits << torch.arange(16, device=words.device, dtype=torch.int32)[:, None]).sum(5)
    q = (q - ((q & 0x8000) << 1)).flatten(2)[..., :inputs]
    return q.float() * planes.scale_CT[..., None]
