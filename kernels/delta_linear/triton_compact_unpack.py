"""Kept values unpacked: products on chips without `mma.b1`, and their sum with a dense matrix, for prefill.

Grid of both: [tile rows, ...]. Correct everywhere and fast nowhere: every value is cut out of its words one by one.
"""

# Triton's language is not Python's:
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportIndexIssue=false, reportOperatorIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.delta_linear import triton_parts as parts
from kernels.delta_linear.triton_parts import FORM, INPUTS, KEPT, OUTPUTS
from kernels.device import DeviceDeltas, Target


@triton.jit
def _shape(TABLE, at, base_outputs, K: tl.constexpr):
    """(outputs, tile rows, columns of tiles, bits, log2 tile rows of a mask block, log2 group, log2 kept of it)."""
    form = tl.load(TABLE + at + FORM)
    group, kept = (form >> 8) & 15, (form >> 12) & 15
    outputs = tl.load(TABLE + at + OUTPUTS)
    outputs = tl.where(outputs > 0, outputs, base_outputs)
    columns = tl.where(form > 0, ((((K - 1) >> group) + 1 << kept) + 255) >> 8, 0)
    return outputs, (outputs + 15) // 16, columns, form & 15, (form >> 4) & 15, group, kept


@triton.jit
def _inputs(SLAB, TABLE, at, tile, tiles, columns, c, tall, group, kept):
    """Which inputs the 256 columns of a tile are, K or more where there is none."""
    column = tl.arange(0, 256)
    lane = 16 * (column // 128) + 4 * (column // 8 % 4) + column // 32 % 4
    scales = parts.part(SLAB, TABLE, at, INPUTS, tl.float32)
    places = (scales + tiles * 16).to(tl.pointer_type(tl.uint8))
    place = tl.load(places + (((tile >> tall) * columns + c) * 32 + lane) * 8 + column % 8)
    number = c * 256 + column % 8 * 32 + lane
    return ((number >> kept) << group) + place.to(tl.int32)


@triton.jit
def _values(SLAB, TABLE, at, tile, columns, c, bits):
    """float32 [16, 256] of a tile, in half steps."""
    row, column = tl.arange(0, 16)[:, None], tl.arange(0, 256)[None, :]
    word = (row % 8 * 4 + column // 32 % 4) * 4 + row // 8 + column // 128 * 2
    words = parts.part(SLAB, TABLE, at, KEPT, tl.int32)
    q = tl.zeros((16, 256), tl.int32)
    for p in range(bits):
        found = tl.load(words + ((tile * bits + p) * columns + c) * 128 + word)
        q += ((found >> (column % 32)) & 1) << p
    return (2 * q - ((1 << bits) - 1)).to(tl.float32)


@triton.jit
def compact_unpack_kernel(
    X, x_stride, SLAB, TABLE, table_stride, SEGMENTS, OUT, base_outputs, width, K: tl.constexpr, ADD: tl.constexpr
):
    """Grid [tiles of OUT, segments]; else as `triton_compact.compact_kernel`."""
    entry, start, stop = parts.segment(SEGMENTS, tl.program_id(1))
    tile, at = tl.program_id(0), entry * table_stride
    outputs, tiles, columns, bits, tall, group, kept = _shape(TABLE, at, base_outputs, K)
    columns = tl.where(tile < tiles, columns, 0)
    n = tile * 16 + tl.arange(0, 16)
    outputs = tl.where(columns > 0, outputs, 0)
    step = tl.load(parts.part(SLAB, TABLE, at, INPUTS, tl.float32) + n, mask=n < outputs, other=0.0)
    for row in range(start, stop):
        y = tl.zeros((16,), tl.float32)
        for c in range(columns):
            k = _inputs(SLAB, TABLE, at, tile, tiles, columns, c, tall, group, kept)
            x = tl.load(X + row * x_stride + k, mask=k < K, other=0.0).to(tl.float32)
            y += tl.sum(_values(SLAB, TABLE, at, tile, columns, c, bits) * x[None, :], 1)
        out = OUT + row * width + n
        if ADD:
            y = y * step + tl.load(out, mask=n < outputs, other=0.0)
            tl.store(out, y, mask=n < outputs)
        else:
            tl.store(out, tl.where(n < outputs, y * step, 0.0), mask=n < width)


@triton.jit(do_not_specialize=["first", "last"])
def add_kept_kernel(SLAB, TABLE, OUT, first, last, base_outputs, K: tl.constexpr):
    """OUT[n - first] += D[n] for n in first .. last, a multiple of 16. TABLE points at the entry's own row."""
    tile, c = first // 16 + tl.program_id(0), tl.program_id(1)
    outputs, tiles, columns, bits, tall, group, kept = _shape(TABLE, 0, base_outputs, K)
    if (tile < tiles) & (c < columns):
        n = tile * 16 + tl.arange(0, 16)
        step = tl.load(parts.part(SLAB, TABLE, 0, INPUTS, tl.float32) + n, mask=n < outputs, other=0.0)
        k = _inputs(SLAB, TABLE, 0, tile, tiles, columns, c, tall, group, kept)
        at = OUT + (n - first)[:, None].to(tl.int64) * K + k[None, :]
        mask = (n < tl.minimum(outputs, last))[:, None] & (k < K)[None, :]
        d = _values(SLAB, TABLE, 0, tile, columns, c, bits) * step[:, None]
        total = tl.load(at, mask=mask, other=0.0).to(tl.float32) + d
        tl.store(at, total.to(OUT.dtype.element_ty), mask=mask)


def compact_unpack(
    x_TK: torch.Tensor, target: Target, deltas: DeviceDeltas, segments_G4: torch.Tensor, delta_TN: torch.Tensor,
    *, add: bool,
) -> None:  # fmt: skip
    width = delta_TN.shape[1]
    compact_unpack_kernel[(triton.cdiv(width, 16), segments_G4.shape[0])](
        x_TK, x_TK.stride(0), *parts.table_arguments(deltas, target), segments_G4, delta_TN, target.outputs, width,
        K=target.inputs, ADD=add, num_warps=8,
    )  # fmt: skip


def add_kept(
    target: Target, deltas: DeviceDeltas, entry: int, out_RK: torch.Tensor, *, rows: tuple[int, int]
) -> None:  # fmt: skip
    """out += what the entry keeps in outputs rows[0] .. rows[1], which are out's rows; each element rounded once more.

    Args:
        rows: the first is a multiple of 16.
    """
    first, last = rows
    assert first % 16 == 0
    assert out_RK.is_contiguous()
    # Of tile columns there are most where all inputs are kept.
    grid = (triton.cdiv(last - first, 16), triton.cdiv(target.inputs + 255, 256))
    add_kept_kernel[grid](
        deltas.slab, deltas.table_EJF[entry, target.index], out_RK, first, last, target.outputs, K=target.inputs,
        num_warps=4,
    )  # fmt: skip
