"""A decode-sized linear with every variant's delta: base partials, and delta partials of the variants' rows."""

# Triton's launchers take options that a kernel's signature does not have:
# pyright: reportCallIssue=false, reportArgumentType=false

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
import triton

from kernels import launches
from kernels.delta_linear import wide
from kernels.delta_linear.choice import Config, Impl, choose
from kernels.delta_linear.compact import compact
from kernels.delta_linear.gluon_ring import MAX_ROWS, ring
from kernels.delta_linear.gluon_rows import several_rows
from kernels.delta_linear.triton_flat import flat_kernel, sign_kernel
from kernels.delta_linear.triton_parts import table_arguments
from kernels.delta_linear.triton_unpack import unpack_kernel
from kernels.device import SEGMENT_ROWS, DeviceDeltas, Kinds, Partials, Planes, Target

__all__ = ["delta_linear", "partials_of"]
_WIDER: Mapping[Impl, Impl] = {"ring": "flat", "stream": "signs"}
"""What takes x of more than 16 bits, and leaves the same; and more rows of the base alone"""
UNPACKED_TILES = 4
"""Of 16 outputs, of a program that unpacks signs"""


def partials_of(
    target: Target,
    rows: int,
    kinds: Kinds,
    dtype: torch.dtype,
    device: torch.device | str,
    *,
    width: int | None = None,
    config: Config | None = None,
) -> Partials:
    """Allocates what `delta_linear` writes. `width`: columns, where a variant may have more outputs than the base."""
    config, width = config or choose(target, rows, kinds, device), width or target.outputs
    shape = (config.split(target, width, device), rows, width)
    base_STN = torch.empty(shape, dtype=config.base_dtype(dtype), device=device)
    delta_TN = torch.empty((rows, width), dtype=torch.float32, device=device) if has_deltas(kinds) else None
    return Partials(base_STN, delta_TN)


def has_deltas(kinds: Kinds) -> bool:
    return kinds.signs or kinds.compact > 0 or kinds.low_rank or kinds.dense or kinds.rows


def delta_linear(
    x_TK: torch.Tensor,
    planes: Planes | None,
    weight_NK: torch.Tensor,
    target: Target,
    deltas: DeviceDeltas,
    segments_G4: torch.Tensor,
    kinds: Kinds,
    out: Partials,
    workspace: torch.Tensor,
    *,
    impl: Impl | None = None,
    config: Config | None = None,
) -> None:
    """x W^T as base partials, and for every row of every segment x D^T of its variant in delta.

    Safe to capture: it allocates nothing, and what it launches depends on shapes and kinds alone. Rows in no segment
    are not written in delta where there are signs or factors; base columns from the weight's N on are 0.

    Args:
        planes: of x, for this target; None where no kind has signs.
        out: what `partials_of` or `Config.split` and `Config.base_dtype` say.
        workspace: uint8, `wide.workspace_bytes`; used by low-rank parts only.
        impl, config: for tests and measurements; impl replaces the configuration's.
    """
    config = config or choose(target, x_TK.shape[0], kinds, x_TK.device)
    if impl:
        config = replace(config, impl=impl)
    if x_TK.dtype.itemsize > 2:
        config = replace(config, impl=_WIDER.get(config.impl, config.impl))
    _check(x_TK, planes, weight_NK, target, kinds, out, config)
    if segments_G4.shape[0] == 0:
        kinds = Kinds()  # rows of the base alone, in a step that is not captured; delta is not written
        if x_TK.shape[0] > MAX_ROWS:
            config = replace(config, impl=_WIDER.get(config.impl, config.impl))
    if kinds.compact and not kinds.signs:  # its end hides behind the base's first requests
        assert out.delta_TN is not None
        compact(x_TK, target, deltas, segments_G4, kinds, out.delta_TN, add=False)
    width, device = out.base_STN.shape[2], x_TK.device

    def by_ring(sharing: int) -> None:
        several = kinds.signs and x_TK.shape[0] > 1 and not kinds.single
        (several_rows if several else ring)(
            x_TK, plane_arguments(planes if kinds.signs else None), weight_NK, target, deltas, segments_G4, kinds, out,
            member_tiles(target, width), programs=config.programs(device), sharing=sharing,
        )  # fmt: skip

    match config.impl:
        case "ring":
            by_ring(config.sharing(target, width, device))
        case "flat":
            _flat(x_TK, planes, weight_NK, target, deltas, segments_G4, kinds, out, config)
        case "stream" | "signs" | "unpack":
            # Signs first: they start before their predecessor has ended, which cuBLAS's kernels do not let them.
            if kinds.signs and config.impl == "stream":
                by_ring(0)
            elif kinds.signs and config.impl == "signs":
                _signs(planes, target, deltas, segments_G4, kinds, out, config)
            elif kinds.signs:
                _unpack(x_TK, target, deltas, segments_G4, kinds, out)
            _base(x_TK, weight_NK, out.base_STN[0])
    if has_deltas(kinds):
        _others(x_TK, target, deltas, segments_G4, kinds, out, workspace)


def _others(
    x_TK: torch.Tensor,
    target: Target,
    deltas: DeviceDeltas,
    segments_G4: torch.Tensor,
    kinds: Kinds,
    out: Partials,
    workspace: torch.Tensor,
) -> None:
    """Deltas that are no signs. All but low-rank ones add, so somebody must have written before."""
    assert out.delta_TN is not None
    written = kinds.signs or kinds.compact > 0
    if kinds.compact and kinds.signs:
        compact(x_TK, target, deltas, segments_G4, kinds, out.delta_TN, add=True)
    if kinds.low_rank:
        wide.low_rank(
            x_TK, target, deltas, segments_G4, kinds.rank, out.delta_TN, workspace, byte_rank=kinds.byte_rank,
            add=written,
        )  # fmt: skip
    elif not written:
        out.delta_TN.zero_()
    if kinds.dense:
        wide.dense(x_TK, target, deltas, segments_G4, out.delta_TN)
    if kinds.rows:
        wide.replace_rows(x_TK, target, deltas, segments_G4, out)


def _base(x_TK: torch.Tensor, weight_NK: torch.Tensor, out_TN: torch.Tensor) -> None:
    outputs = weight_NK.shape[0]
    torch.mm(x_TK, weight_NK.T, out=out_TN[:, :outputs])
    if out_TN.shape[1] > outputs:
        out_TN[:, outputs:].zero_()


def _flat(
    x_TK: torch.Tensor,
    planes: Planes | None,
    weight_NK: torch.Tensor,
    target: Target,
    deltas: DeviceDeltas,
    segments_G4: torch.Tensor,
    kinds: Kinds,
    out: Partials,
    config: Config,
) -> None:
    rows, width, programs = x_TK.shape[0], out.base_STN.shape[2], config.programs(x_TK.device)
    pdl = launches.early(x_TK)
    words, scale, total, *strides = plane_arguments(planes if kinds.signs else None)
    flat_kernel[(programs,)](
        x_TK, weight_NK, out.base_STN, *table_arguments(deltas, target), segments_G4, words, scale, total, *strides,
        out.delta_TN, rows, target.outputs, width, *member_tiles(target, width),
        SHARING=config.sharing(target, width, x_TK.device), K=target.inputs, SPLIT=out.base_STN.shape[0],
        BN=config.outputs, BK=config.inner, STAGES=config.stages, BT=max(16, triton.next_power_of_2(rows)),
        **sign_constants(target, rows, kinds, config, programs, pdl), **options(config, pdl),
    )  # fmt: skip


def _signs(
    planes: Planes | None,
    target: Target,
    deltas: DeviceDeltas,
    segments_G4: torch.Tensor,
    kinds: Kinds,
    out: Partials,
    config: Config,
) -> None:
    assert out.delta_TN is not None
    rows, width = out.delta_TN.shape
    pdl, programs = launches.early(out.delta_TN), config.programs(out.delta_TN.device)
    sign_kernel[(programs,)](
        *table_arguments(deltas, target), segments_G4, *plane_arguments(planes), out.delta_TN, target.outputs, width,
        *member_tiles(target, width), **sign_constants(target, rows, kinds, config, programs, pdl),
        **options(config, pdl),
    )  # fmt: skip


def _unpack(
    x_TK: torch.Tensor, target: Target, deltas: DeviceDeltas, segments_G4: torch.Tensor, kinds: Kinds, out: Partials
) -> None:
    assert out.delta_TN is not None
    width = out.delta_TN.shape[1]
    blocks, first, second = member_blocks(target, width, kinds, UNPACKED_TILES)
    unpack_kernel[(blocks, segments_G4.shape[0])](
        x_TK, *table_arguments(deltas, target), segments_G4, out.delta_TN, target.outputs, width, first, second,
        2 * target.tiles[1], K=target.inputs, KB=target.tiles[1], TILES=UNPACKED_TILES, ROWS=16, COLUMNS=kinds.columns,
        MEMBERS=len(target.members) if kinds.columns else 1, MANY=kinds.planes > 1, num_warps=8,
    )  # fmt: skip


def member_tiles(target: Target, width: int) -> tuple[int, int]:
    """The first tiles of the second and third member, all where there are none."""
    assert len(target.members) <= 3, f"{len(target.members)} members, kernels take 3"
    first, second = [*(start // 16 for start in target.members[1:]), *[triton.cdiv(width, 16)] * 2][:2]
    return first, second


def member_blocks(target: Target, width: int, kinds: Kinds, tiles: int) -> tuple[int, int, int]:
    """How many blocks of so many tiles there are, and the first tiles of the second and third member.

    Members matter only where they have column scales of their own.
    """
    last = triton.cdiv(width, 16)
    starts = [start // 16 for start in target.members] if kinds.columns else [0]
    blocks = sum(triton.cdiv(end - start, tiles) for start, end in zip(starts, [*starts[1:], last], strict=True))
    first, second = ([*starts[1:], last, last])[:2]
    return blocks, first, second


def plane_arguments(planes: Planes | None) -> list[torch.Tensor | int | None]:
    """WORDS, XSCALE, XSUM, words_stride, scale_stride"""
    if planes is None:
        return [None, None, None, 0, 0]
    tensors = (planes.words_CTW, planes.scale_CT, planes.sum_CT)
    return [*tensors, planes.words_CTW.stride(0), planes.scale_CT.stride(0)]


def sign_constants(
    target: Target, rows: int, kinds: Kinds, config: Config, programs: int, pdl: bool
) -> Mapping[str, int]:
    return {
        "PROGRAMS": programs,
        "KB": target.tiles[1],
        "TILES": config.tiles,
        "SPREAD": config.spread,
        "DEPTH": config.depth,
        "WARPS": config.warps,
        "MEMBERS": len(target.members) if kinds.columns else 1,
        "COLUMNS": kinds.columns,
        "MANY": kinds.planes > 1,
        "LONGEST": 1 if rows == 1 or kinds.single else SEGMENT_ROWS,
        "PDL": pdl,
    }


def options(config: Config, pdl: bool) -> Mapping[str, int]:
    found = {"num_warps": config.warps, **launches.options(pdl)}
    if config.registers:
        found["maxnreg"] = config.registers
    return found


def _check(
    x_TK: torch.Tensor,
    planes: Planes | None,
    weight_NK: torch.Tensor,
    target: Target,
    kinds: Kinds,
    out: Partials,
    config: Config,
) -> None:
    rows, base = x_TK.shape[0], out.base_STN
    assert x_TK.is_contiguous()
    assert weight_NK.is_contiguous()
    assert weight_NK.shape == (target.outputs, target.inputs) == (target.outputs, x_TK.shape[1])
    assert base.is_contiguous()
    split = config.split(target, base.shape[2], x_TK.device)
    assert base.shape[:2] == (split, rows), f"base partials {list(base.shape)}, {split} of {rows} rows"
    assert base.shape[2] >= target.outputs
    assert base.dtype == config.base_dtype(x_TK.dtype), f"base partials of {base.dtype} for {config.impl}"
    assert has_deltas(kinds) == (out.delta_TN is not None), "delta partials are there if and only if there are deltas"
    if out.delta_TN is not None:
        assert out.delta_TN.is_contiguous()
        assert out.delta_TN.shape == base.shape[1:]
    if kinds.signs and config.impl != "unpack":
        assert planes is not None, "signs take planes of x"
        assert planes.words_CTW.shape[0] >= kinds.sets(target)
        assert planes.words_CTW.shape[1:] == (rows, target.tiles[1] * 128)
        assert planes.words_CTW[0].is_contiguous()
