"""Whether linears by `gluon_ring` come out right on this device with this compiler."""

from __future__ import annotations

from functools import lru_cache

import torch

from kernels.delta_linear import gluon_ring
from kernels.delta_linear.gluon_rows import several_rows
from kernels.delta_linear.self_check import TOLERANCE, SelfCheck, sign_deltas
from kernels.device import Kinds, Partials, Target, segment_table
from kernels.planes import planes_reference, values

BASE_TOLERANCE = 1e-4
"""Of the base's products: sums in float32"""
_TARGETS = (Target(0, 200, 1104), Target(0, 200, 8200))
"""Columns that a warp has to itself, and that four share"""
_ROWS, _PROGRAMS = 5, 8
_ALONE, _TOGETHER = ((2, 0, 1), (1, 2, 3)), ((2, 0, 1), (1, 1, 5))
"""Runs of rows: one of each variant, and several"""


@lru_cache(maxsize=16)
def ring_check(device: torch.device) -> SelfCheck:
    """A few rows times a random base and two random variants, against float64. Compiles, syncs: before capture.

    Where it is not ok, `choose` takes the portable kernels. Whoever starts an engine logs the reason.
    """
    capability = torch.cuda.get_device_capability(device)
    if capability[0] != 9:
        return SelfCheck(False, f"capability {capability[0]}.{capability[1]}: linears by the portable kernels")
    base, signs = (max(errors) for errors in zip(*(ring_errors(device, t) for t in _TARGETS), strict=True))
    said = f"error {base:.1e} of the base's, {signs:.1e} of the signs' size"
    if not (base <= BASE_TOLERANCE and signs <= TOLERANCE):
        return SelfCheck(False, f"linears by the portable kernels; by Hopper's: {said}")
    return SelfCheck(True, f"linears by Hopper's kernel: {said}")


def ring_errors(device: torch.device, target: Target) -> tuple[float, float]:
    """Largest errors of the base's and the signs' products, as shares of their root mean square; inf if any is NaN."""
    gen = torch.Generator().manual_seed(torch.seed() % 2**32)
    sign_VNk = torch.randint(0, 256, (2, target.outputs, -(-target.inputs // 8)), dtype=torch.uint8, generator=gen)
    scale_VN = torch.rand(2, target.outputs, generator=gen)
    x_TK = torch.randn(_ROWS, target.inputs, generator=gen).to(torch.bfloat16)
    weight_NK = torch.randn(target.outputs, target.inputs, generator=gen).to(torch.bfloat16)
    planes = planes_reference(x_TK[None].float().to(device))
    given = [planes.words_CTW, planes.scale_CT, planes.sum_CT, 0, 0]
    bits = (sign_VNk[..., None] >> torch.arange(8)) & 1
    matrix_VNK = (bits.flatten(2)[..., : target.inputs].double() * 2 - 1) * scale_VN.double()[..., None]
    q_TK = values(planes, target.inputs)[0].double().cpu()
    expected_TN, base, signs = x_TK.double() @ weight_NK.double().T, 0.0, 0.0
    for runs in (_ALONE, _TOGETHER):
        segments = torch.tensor(segment_table(runs), dtype=torch.int32, device=device)
        out, single = _poisoned(target, device), runs is _ALONE
        (gluon_ring.ring if single else several_rows)(
            x_TK.to(device), given, weight_NK.to(device), target, sign_deltas(sign_VNk, scale_VN, target, device),
            segments, Kinds(signs=True, single=single), out, (0, 0), programs=_PROGRAMS, sharing=_PROGRAMS,
        )  # fmt: skip
        assert out.delta_TN is not None
        expected = torch.cat([q_TK[start:stop] @ matrix_VNK[entry - 1].T for entry, start, stop in runs])
        signs = max(signs, _error(torch.cat([out.delta_TN[start:stop] for _, start, stop in runs]), expected))
        base = max(base, _error(out.base_STN.sum(0), expected_TN))
    return base, signs


def _poisoned(target: Target, device: torch.device) -> Partials:
    return Partials(
        torch.full((_PROGRAMS, _ROWS, target.outputs), torch.nan, device=device),
        torch.full((_ROWS, target.outputs), torch.nan, device=device),
    )


def _error(found: torch.Tensor, expected: torch.Tensor) -> float:
    largest = (found.double().cpu() - expected).abs().max().nan_to_num(torch.inf, posinf=torch.inf)
    return float(largest / expected.square().mean().sqrt())
