"""Activations as bit planes, and what passes between fused kernels: helpers for whoever owns a row.

The norm quantises its rows while they are in registers; what SiLU and attention leave is read once more by a launch of
its own. Grid: one program for each row and each of several slices; every program recomputes the statistics of the whole
row and writes its own slice, so that a single row is not the serial work of one multiprocessor.

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
FEW_ROWS = 32
"""Rows, up to which there are multiprocessors to spare for several programs a row"""
_SLICES = 8
"""Of each of few rows"""
_COLUMNS = 512
"""Of the row, for each warp: 16 in a thread"""
_MOST_WARPS = 16


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
def eights(first, KS: tl.constexpr):
    """[KS // 8, 4]: columns first + 8 i + 0..3, the first halves of eight columns each. A thread that loads 16 bytes of
    these and of those 4 further has all eight, which is what `store_planes` wants."""
    return first + tl.arange(0, KS // 8)[:, None] * 8 + tl.arange(0, 4)[None, :]


@triton.jit
def _byte_rows(q):
    """Of int32 [E, 4]: uint32 [E] of the four low bytes, and of the four next ones."""
    even, odd = tl.split(tl.reshape(q.to(tl.uint32, bitcast=True), (q.shape[0], 2, 2)))
    a, c = tl.split(even)
    b, d = tl.split(odd)
    low = (a & 0xFF) | ((b & 0xFF) << 8) | ((c & 0xFF) << 16) | (d << 24)
    high = ((a >> 8) & 0xFF) | (b & 0xFF00) | ((c & 0xFF00) << 8) | ((d & 0xFF00) << 16)
    return low, high


@triton.jit
def transposed(x, y):
    """8 x 8 bits, a byte a row, four rows in x and in y: rows become columns. (Warren, Hacker's Delight, 7-3.)"""
    t = (x ^ (x >> 7)) & 0x00AA00AA
    x = x ^ t ^ (t << 7)
    t = (y ^ (y >> 7)) & 0x00AA00AA
    y = y ^ t ^ (t << 7)
    t = (x ^ (x >> 14)) & 0x0000CCCC
    x = x ^ t ^ (t << 14)
    t = (y ^ (y >> 14)) & 0x0000CCCC
    y = y ^ t ^ (t << 14)
    t = (x ^ (y << 4)) & 0xF0F0F0F0
    return x ^ t, y ^ (t >> 4)


@triton.jit
def store_planes(first, second, WORDS, row_offset, first_block, blocks, KS: tl.constexpr):
    """Write the planes of KS columns of a row, from first_block * 256 on, in bytes: of eight columns, a thread has one
    byte of every plane, and those of its neighbours follow in memory. Nothing passes between threads.

    Args:
        first, second: q, int32 [KS // 8, 4], at columns `eights` and at those 4 further.
        WORDS: `Planes.words_CTW`; the words of this row of this set begin at row_offset.
        blocks: B of the row. Blocks from there on are not written.
        KS: a power of two, at least 256.
    """
    low_1, high_1 = _byte_rows(first)
    low_2, high_2 = _byte_rows(second)
    p0, p4 = transposed(low_1, low_2)
    p8, p12 = transposed(high_1, high_2)
    # Bit operators, which hide from the compiler that bytes follow one another: it would bring them together.
    i = tl.arange(0, KS // 8)
    block = first_block + (i >> 5)
    byte = (((i >> 2) & 3) << 4) | (((i >> 4) & 1) << 2) | (i & 3)
    at = WORDS.to(tl.pointer_type(tl.uint8)) + (row_offset + block * 128).to(tl.int64) * 4 + byte
    there = block < blocks
    for p in tl.static_range(4):
        tl.store(at + p * 64, (p0 >> (8 * p)).to(tl.uint8), mask=there)
        tl.store(at + p * 64 + 8, (p8 >> (8 * p)).to(tl.uint8), mask=there)
        tl.store(at + p * 64 + 256, (p4 >> (8 * p)).to(tl.uint8), mask=there)
        tl.store(at + p * 64 + 264, (p12 >> (8 * p)).to(tl.uint8), mask=there)


@triton.jit
def column_sets(TABLE_ROW, MEMBERS: tl.constexpr, COLUMNS: tl.constexpr):
    """How many column sets a row has planes of: one, unless its variant has column scales.

    Args:
        TABLE_ROW: `table_EJF` at the row's entry and the target. COLUMNS: whether any variant has column scales.
    """
    sets = 1
    if COLUMNS:
        sets = tl.where(tl.load(TABLE_ROW + _COL) >= 0, tl.load(TABLE_ROW + _PLANES) * MEMBERS, 1)
    return sets


@triton.jit
def columns_at(FLOATS, TABLE_ROW, c, k, BLOCKS: tl.constexpr, COLUMNS: tl.constexpr):
    """The column scales of set c at columns k, 1 where the row's variant has none. FLOATS: the slab as float32."""
    scales = 1.0
    if COLUMNS:
        offset = tl.load(TABLE_ROW + _COL)
        SET = FLOATS + offset.to(tl.int64) * _FLOATS + c * (BLOCKS * 256)
        scales = tl.load(SET + k, mask=k < tl.where(offset >= 0, BLOCKS * 256, 0), other=1.0)
    return scales


@triton.jit
def store_row(
    x, first, second, WORDS, SCALE, SUM, FLOATS, TABLE_ROW, row, part, words_stride, scale_stride,
    MEMBERS: tl.constexpr, COLUMNS: tl.constexpr, BLOCKS: tl.constexpr, KP: tl.constexpr, KS: tl.constexpr,
):  # fmt: skip
    """Every column set of one slice of one row; the first slice's program writes scale and sum.

    Args:
        x: float32 [KP], the whole row, zero beyond K. KP: a power of two, at least K.
        first, second: float32 [KS // 8, 4], its columns part * KS + `eights`, and those 4 further, zero beyond K.
        FLOATS: the slab as float32. TABLE_ROW: `table_EJF` at the row's entry and the target.
        words_stride, scale_stride: of the column sets of `words_CTW` and of `scale_CT` and `sum_CT`.
        MEMBERS: of the target. COLUMNS: whether any variant has column scales. BLOCKS: B.
    """
    k = tl.arange(0, KP)
    at = eights(part * KS, KS)
    for c in range(column_sets(TABLE_ROW, MEMBERS, COLUMNS)):
        scaled = x * columns_at(FLOATS, TABLE_ROW, c, k, BLOCKS, COLUMNS)
        amax = tl.max(tl.abs(scaled), 0)
        q1 = quantize(first * columns_at(FLOATS, TABLE_ROW, c, at, BLOCKS, COLUMNS), amax)
        q2 = quantize(second * columns_at(FLOATS, TABLE_ROW, c, at + 4, BLOCKS, COLUMNS), amax)
        store_planes(q1, q2, WORDS + c * words_stride, row * (BLOCKS * 128), part * (KS // 256), BLOCKS, KS)
        if part == 0:
            tl.store(SCALE + c * scale_stride + row, tl.maximum(amax, 1e-30) / _LARGEST)
            tl.store(SUM + c * scale_stride + row, tl.sum(quantize(scaled, amax), 0))


@triton.jit
def _prepare(
    X, WORDS, SCALE, SUM, FLOATS, TABLE, ENTRY, target, targets, words_stride, scale_stride,
    K: tl.constexpr, MEMBERS: tl.constexpr, COLUMNS: tl.constexpr, KP: tl.constexpr, KS: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Program (row, part): the whole row for its largest value, one slice of its planes."""
    if PDL:
        gdc_launch_dependents()
    row = tl.program_id(0)
    part = tl.program_id(1)
    table_row = TABLE + (tl.load(ENTRY + row) * targets + target) * _FIELDS
    if PDL:
        gdc_wait()
    X += row.to(tl.int64) * K
    k = tl.arange(0, KP)
    at = eights(part * KS, KS)
    first = tl.load(X + at, mask=at < K, other=0.0).to(tl.float32)
    second = tl.load(X + at + 4, mask=at + 4 < K, other=0.0).to(tl.float32)
    x = tl.load(X + k, mask=k < K, other=0.0).to(tl.float32)
    store_row(
        x, first, second, WORDS, SCALE, SUM, FLOATS, table_row, row, part, words_stride, scale_stride,
        MEMBERS, COLUMNS, (K + 255) // 256, KP, KS,
    )  # fmt: skip


def padded(columns: int) -> int:
    """KP: a tile that holds a row, and at least one block of planes."""
    return max(TILE_COLUMNS, triton.next_power_of_2(columns))


def slices(rows: int, inputs: int) -> tuple[int, int]:
    """(columns, warps) of a program that writes planes. Each goes over the whole row, which takes longer than its
    slice: with all loads of a thread under way at once, and of many rows few times."""
    row = padded(inputs)
    if rows > FEW_ROWS:
        warps = min(_MOST_WARPS, row // TILE_COLUMNS)
        return warps * TILE_COLUMNS, warps
    return max(TILE_COLUMNS, row // _SLICES), max(1, min(_MOST_WARPS, row // _COLUMNS))


def prepare_planes(
    x_TK: torch.Tensor,
    planes: Planes,
    target: Target,
    deltas: DeviceDeltas,
    entry_T: torch.Tensor,
    kinds: Kinds,
    *,
    parts: int | None = None,
) -> None:
    """Planes of x's rows, times the column scales of each row's variant where it has any.

    For where x has no producer that does it. Column sets that no variant of `kinds` can have are not written, nor are
    sets other than 0 of rows without column scales.

    Args:
        parts: about how many programs share a row; None: as `slices` says.
    """
    rows, inputs = x_TK.shape
    assert x_TK.is_contiguous()
    assert inputs == target.inputs <= MAX_INPUTS, f"{inputs} inputs, the target has {target.inputs}"
    (width, warps), table, pdl = slices(rows, inputs), deltas.table_EJF, launches.early(x_TK)
    width = width if parts is None else padded(triton.cdiv(inputs, parts))
    _prepare[(rows, triton.cdiv(inputs, width))](
        x_TK, planes.words_CTW, planes.scale_CT, planes.sum_CT, deltas.slab.view(torch.float32), table, entry_T,
        target.index, table.shape[1], planes.words_CTW.stride(0), planes.scale_CT.stride(0), K=inputs,
        MEMBERS=len(target.members), COLUMNS=kinds.columns, KP=max(width, padded(inputs)), KS=width, PDL=pdl,
        num_warps=warps, **launches.options(pdl),
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
