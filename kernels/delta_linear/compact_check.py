"""Whether products with kept values come out right on this device with this compiler: `self_check` is of signs."""

# Triton's launchers take options that a kernel's signature does not have:
# pyright: reportCallIssue=false, reportArgumentType=false

from __future__ import annotations

from functools import lru_cache

import torch

from kernels import kept
from kernels.delta_linear import table_reference
from kernels.delta_linear.self_check import SelfCheck, native_b1
from kernels.delta_linear.triton_compact import compact_kernel
from kernels.delta_linear.triton_parts import table_arguments
from kernels.device import FIELDS, NONE, UNIT, DeviceDeltas, Field, Target, segment_table

TOLERANCE = 1e-3
"""Largest error as a share of the products' root mean square: rounding of x to 16 bits"""
_SEGMENTS = ((1, 0, 1), (2, 1, 4))
_ROWS = 4


@lru_cache(maxsize=16)
def compact_check(device: torch.device) -> SelfCheck:
    """Products of random rows with random kept values, against float64. Compiles, syncs: before capture."""
    if not native_b1(torch.cuda.get_device_capability(device)):
        return SelfCheck(False, "no binary tensor core: kept values are unpacked")
    error = max(compact_error(device, bits, tiles) for bits, tiles in ((1, 1), (2, 4)))
    if not error <= TOLERANCE:
        return SelfCheck(False, f"kept values: off by {error:.1e} of the products' size: they are unpacked")
    return SelfCheck(True, f"kept values: error {error:.1e} of the products' size")


def compact_error(device: torch.device, bits: int, tiles: int) -> float:
    """Largest error of the kernel as a share of the products' root mean square; NaN if any is."""
    gen = torch.Generator().manual_seed(torch.seed() % 2**32)
    target = Target(0, 200, 1500)
    deltas = random_deltas(target, kept.Form(bits, 16, 4, 64), 2, device, gen)
    segments = torch.tensor(segment_table(_SEGMENTS), dtype=torch.int32, device=device)
    x_TK = torch.randn(_ROWS, target.inputs, generator=gen).to(torch.float16).to(device)
    out_TN = torch.full((_ROWS, target.outputs), torch.nan, device=device)
    compact_kernel[(5,)](
        x_TK, x_TK.stride(0), *table_arguments(deltas, target), segments, out_TN, target.outputs, target.outputs,
        -(-target.outputs // (64 * tiles)), K=target.inputs, BITS=bits, TILES=tiles, WARPS=4, ADD=False, EARLY=False,
        PDL=False, num_warps=4,
    )  # fmt: skip
    matrices = {e: table_reference.matrix(deltas, target, e, x_TK.dtype).double() for e in (1, 2)}
    expected = torch.cat([x_TK[start:stop].double() @ matrices[entry].T for entry, start, stop in _SEGMENTS])
    return float((out_TN - expected).abs().max() / expected.square().mean().sqrt())


def random_deltas(
    target: Target, form: kept.Form, variants: int, device: torch.device, gen: torch.Generator
) -> DeviceDeltas:
    """Entries 1 to `variants` keep random values of random inputs."""
    regions: list[torch.Tensor] = []
    table = torch.zeros(variants + 1, 1, FIELDS, dtype=torch.int32)
    table[:, :, [Field.SIGN, Field.SCALE, Field.COL, Field.ZERO, Field.DENSE, Field.KEPT, Field.INPUTS]] = NONE
    at = 0
    for e in range(1, variants + 1):
        for field, part in zip((Field.KEPT, Field.INPUTS), random_parts(target, form, gen), strict=True):
            table[e, 0, field] = at // UNIT
            regions.append(torch.nn.functional.pad(part, (0, -part.numel() % UNIT)))
            at += regions[-1].numel()
        table[e, 0, Field.FORM] = form.code
    slab = torch.cat(regions).to(device)
    return DeviceDeltas(slab, table.to(device), torch.zeros(variants + 1, dtype=torch.int32, device=device))


def random_parts(target: Target, form: kept.Form, gen: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Bytes of KEPT and of INPUTS."""
    n, k = target.outputs, target.inputs
    values = form.values(k)
    q_NV = torch.randint(0, 1 << form.bits, (n, values), dtype=torch.uint8, generator=gen)
    packed = torch.empty(form.tile_shape(n, k), dtype=torch.int32)
    kept.pack_values(q_NV, form, packed)
    groups = values // form.kept
    order = torch.rand(form.blocks(n), groups, form.group, generator=gen).argsort(2)[..., : form.kept]
    columns = (order + torch.arange(groups)[:, None] * form.group).flatten(1)
    inputs = torch.empty(form.input_shape(n, k), dtype=torch.uint8)
    kept.pack_inputs(columns, form, inputs)
    step = torch.nn.functional.pad(torch.rand(n, generator=gen) * 0.01, (0, -n % 16))
    return packed.view(torch.uint8).flatten(), torch.cat([step.view(torch.uint8), inputs.flatten()])
