"""Launches of the delta linear beside decode-sized sign planes."""

from __future__ import annotations

import torch
from triton.runtime import driver

from kernels.delta_linear import gluon_product, triton_dense, triton_low_rank, triton_merge, triton_product, triton_rows
from kernels.delta_linear.row_tiles import SIZES
from kernels.device import Kinds, Partials, Target
from tests.kernels.compile_harness import Case
from tests.kernels.meta import ints, meta, tables

QKV = Target(1, 12288, 4096, (0, 4096, 8192))
DOWN = Target(3, 4096, 11008)
SPACE = 2**24


def _space() -> torch.Tensor:
    return meta(SPACE, dtype=torch.uint8)


def _merge(target: Target, kinds: Kinds) -> None:
    weight = meta(target.outputs, target.inputs)
    triton_merge.merge(weight, target, tables(4), 2, kinds, torch.empty_like(weight))


def _product(target: Target, kinds: Kinds, config: triton_product.ProductConfig, base: bool = True) -> None:
    weight = meta(target.outputs, target.inputs) if base else None
    x, out = meta(512, target.inputs), meta(512, target.outputs)
    triton_product.product(x, weight, target, tables(4), ints(2, 4), kinds, out, _space(), config=config)


def _fused() -> None:
    """The largest tile that the chip's registers hold."""
    _product(QKV, SIGNS, triton_product.ProductConfig(256 if _capability() >= 90 else 128))


def _capability() -> int:
    return int(driver.active.get_current_target().arch)  # pyright: ignore


def _specialised(rows: int) -> None:
    x, out = meta(2048, QKV.inputs), meta(2048, QKV.outputs)
    weight = meta(QKV.outputs, QKV.inputs)
    gluon_product.product(x, weight, QKV, tables(4), ints(8, 4), out, rows=rows, programs=132)


def _low_rank(target: Target, rows: int, rank: int) -> None:
    x, delta = meta(rows, target.inputs), meta(rows, target.outputs, dtype=torch.float32)
    triton_low_rank.low_rank(x, target, tables(4), ints(rows, 4), rank, delta, _space())


def _bytes(target: Target, rows: int, byte_rank: int, *, words: int = 0, longest: int = 8) -> None:
    x, delta = meta(rows, target.inputs), meta(rows, target.outputs, dtype=torch.float32)
    triton_low_rank.low_rank(
        x, target, tables(4), ints(rows, 4), words, delta, _space(), byte_rank=byte_rank, longest=longest
    )


def _dense(target: Target, rows: int) -> None:
    x, delta = meta(rows, target.inputs), meta(rows, target.outputs, dtype=torch.float32)
    triton_dense.dense(x, target, tables(4), ints(rows, 4), delta)


def _rows() -> None:
    floats = meta(2, 16, 32064, dtype=torch.float32)
    triton_rows.replace_rows(
        meta(16, 4096),
        Target(3, 32000, 4096),
        tables(4),
        ints(16, 4),
        Partials(floats, meta(16, 32064, dtype=floats.dtype)),
    )


MIXED = triton_product.ProductConfig(128, stages=2)
SIGNS = Kinds(signs=True)
ASYNC = "LDGSTS.E.BYPASS.128"
BYTES = {80: ("HMMA.16816", "HFMA2.BF16", ASYNC), 90: ("MMA", "HADD2.BF16", ASYNC)}
"""Conversions by pairs of 16 bits"""
CASES = [
    Case("wide merge", lambda: _merge(QKV, SIGNS), {90: ("LDG.E.128", "STG.E.128")}),
    Case("wide merge, all", lambda: _merge(QKV, Kinds(True, True, 2, 64, True))),
    Case(
        "wide fused 256",
        _fused,
        {80: ("HMMA.16816.F32.BF16", ASYNC), 90: ("HGMMA.64x256x16.F32.BF16", "HADD2.BF16", ASYNC)},
    ),
    *(
        Case(
            f"wide specialised {rows}",
            lambda rows=rows: _specialised(rows),
            {90: (f"HGMMA.64x{rows}x16.F32.BF16", "UTMALDG.2D", "HADD2.BF16")},
            archs=(90,),
        )
        for rows in SIZES
    ),
    Case("wide split 64", lambda: _product(QKV, SIGNS, triton_product.ProductConfig(64), False), {90: ("HGMMA",)}),
    Case("wide fused, all", lambda: _product(DOWN, Kinds(True, True, 2, 64, True), MIXED)),
    Case("wide low rank 16", lambda: _low_rank(QKV, 16, 16), {90: ("HMMA", ASYNC)}),
    Case("wide low rank 512", lambda: _low_rank(DOWN, 64, 512), {90: ("HMMA", ASYNC)}),
    Case("byte factors 256", lambda: _bytes(QKV, 1, 256), BYTES),
    Case("byte factors 1024, many", lambda: _bytes(DOWN, 64, 1024), BYTES),
    Case("byte factors beside adapters", lambda: _bytes(QKV, 16, 512, words=64), BYTES),
    Case("byte factors, prefill", lambda: _bytes(QKV, 512, 256, longest=256), {90: ("HGMMA.64x64x16", ASYNC)}),
    # K is split most where outputs are few, and x A^T has as many parts.
    Case("byte factors, narrow prefill", lambda: _bytes(Target(3, 768, 2048), 64, 256, longest=64)),
    Case(
        "byte factors beside adapters, narrow prefill",
        lambda: _bytes(Target(3, 384, 1024), 64, 256, words=64, longest=64),
    ),
    Case("wide dense", lambda: _dense(DOWN, 8), {90: ("HMMA", ASYNC)}),
    Case("wide rows", _rows, {90: ("HMMA", ASYNC)}),
]
