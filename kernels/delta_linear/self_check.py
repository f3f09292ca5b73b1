"""Whether the binary tensor core does on this device, with this compiler, what the sign kernels rely on.

They pass Triton's registers to `mma.m16n8k256` as they are, which is right as long as Triton gives each lane four words
that follow each other. That is a property of a compiler and a chip, so it is tried, not assumed.
"""

# Triton's launchers take options that a kernel's signature does not have:
# pyright: reportCallIssue=false, reportArgumentType=false

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch

from kernels import fragments
from kernels.delta_linear.triton_flat import sign_kernel
from kernels.delta_linear.triton_parts import table_arguments
from kernels.device import FIELDS, NONE, UNIT, DeviceDeltas, Field, Target, segment_table
from kernels.planes import planes_reference, values

TOLERANCE = 1e-5
"""Largest error as a share of the products' root mean square: they are integers, exact but for one scaling."""
_ROWS = 14
_SEGMENTS = ((1, 0, 1), (2, 1, 4), (1, 4, 14))


@dataclass(frozen=True, slots=True)
class SelfCheck:
    ok: bool
    reason: str
    """For a log: what was tried and seen"""


@lru_cache(maxsize=16)
def self_check(device: torch.device) -> SelfCheck:
    """Products with random signs of 1, 3 and 10 rows of two variants, against float64. Compiles, syncs: before capture.

    Where it is not ok, `choose` takes the kernels that unpack signs. Whoever starts an engine logs the reason.
    """
    capability = torch.cuda.get_device_capability(device)
    if not native_b1(capability):
        return SelfCheck(
            False, f"capability {capability[0]}.{capability[1]} has no binary tensor core: signs are unpacked"
        )
    error = max(product_error(device, *shape) for shape in ((4, 1, 4), (2, 4, 4), (4, 4, 8)))
    if not error <= TOLERANCE:
        return SelfCheck(False, f"binary tensor core is off by {error:.1e} of the products' size: signs are unpacked")
    return SelfCheck(True, f"binary tensor core: error {error:.1e} of the products' size")


def native_b1(capability: tuple[int, int]) -> bool:
    """Chips before 8.0 have no m16n8k256, those from 10.0 on no binary tensor core."""
    return (8, 0) <= capability < (10, 0)


def product_error(device: torch.device, tiles: int, spread: int, warps: int) -> float:
    """Largest error of the sign kernel with such tiles as a share of the products' root mean square; NaN if any is."""
    gen = torch.Generator().manual_seed(torch.seed() % 2**32)
    target = Target(0, 72, 2 * 256 * warps - 300)
    sign_VNk = torch.randint(0, 256, (2, target.outputs, -(-target.inputs // 8)), dtype=torch.uint8, generator=gen)
    scale_VN = torch.rand(2, target.outputs, generator=gen)
    deltas = sign_deltas(sign_VNk, scale_VN, target, device)
    planes = planes_reference(torch.randn(1, _ROWS, target.inputs, generator=gen).to(device))
    segments = torch.tensor(segment_table(_SEGMENTS), dtype=torch.int32, device=device)
    out_TN = torch.full((_ROWS, target.outputs), torch.nan, device=device)
    sign_kernel[(2,)](
        *table_arguments(deltas, target), segments, planes.words_CTW, planes.scale_CT, planes.sum_CT, 0, 0, out_TN,
        target.outputs, target.outputs, 0, 0, PROGRAMS=2, KB=target.tiles[1], TILES=tiles, SPREAD=spread, DEPTH=3,
        WARPS=warps, MEMBERS=1, COLUMNS=False, MANY=False, LONGEST=8, PDL=False, num_warps=warps,
    )  # fmt: skip
    x_TK = values(planes, target.inputs)[0].double().cpu()
    bits = (sign_VNk[..., None] >> torch.arange(8)) & 1
    matrix_VNK = (bits.flatten(2)[..., : target.inputs].double() * 2 - 1) * scale_VN.double()[..., None]
    expected = torch.cat([x_TK[start:stop] @ matrix_VNK[entry - 1].T for entry, start, stop in _SEGMENTS])
    return float((out_TN.cpu() - expected).abs().max() / expected.square().mean().sqrt())


def sign_deltas(sign_VNk: torch.Tensor, scale_VN: torch.Tensor, target: Target, device: torch.device) -> DeviceDeltas:
    """Two variants, entries 1 and 2."""
    high, wide = target.tiles
    words = torch.empty(2, high, wide, 32, 4, dtype=torch.int32)
    fragments.pack(sign_VNk, words)
    scale = torch.nn.functional.pad(scale_VN, (0, high * 16 - target.outputs))
    signs, scales = words.flatten(1).view(torch.uint8), scale.view(torch.uint8)
    room = -(-scales.shape[1] // UNIT) * UNIT
    slab = torch.cat([signs.flatten(), torch.nn.functional.pad(scales, (0, room - scales.shape[1])).flatten()])
    table = torch.zeros(3, 1, FIELDS, dtype=torch.int32)
    table[:, :, [Field.SIGN, Field.SCALE, Field.COL, Field.ZERO]] = NONE
    for v in range(2):
        table[v + 1, 0, Field.SIGN] = v * signs.shape[1] // UNIT
        table[v + 1, 0, Field.SCALE] = (2 * signs.shape[1] + v * room) // UNIT
        table[v + 1, 0, Field.PLANES] = 1
    return DeviceDeltas(slab.to(device), table.to(device), torch.zeros(3, dtype=torch.int32, device=device))
