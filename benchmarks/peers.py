"""What the benchmarks compare with: the published way to multiply 1-bit deltas, and one full model per variant.

`published_` follows the kernel that BitDelta's authors describe and publish (arXiv 2402.10193, section 3.3), in our own
words: one batch entry per row, sign words packed along K and loaded once per sign, expanded to +-1 and multiplied by a
row padded to 16; the base product, the scale and the sum are launches of their own.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import gpu_timing
import torch
import triton
import triton.language as tl

Settings = tuple[int, int, int, int]
"""BN, BK, stages, warps"""
CONFIGS: tuple[Settings, ...] = ((256, 64, 3, 4), (128, 32, 4, 2), (64, 32, 4, 2), (32, 32, 4, 2))
"""The shapes that the published kernel tunes over."""


@triton.jit
def _batched_signs(X, SIGNS, OUT, N, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """OUT[b] = X[b] (1 x K) times the signs (K x N) of batch entry b, bit k % 32 of word [k // 32, n]."""
    b = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    row = X + b * K + k[None, :] + tl.zeros((BM, 1), tl.int32)
    words = SIGNS + b * (K // 32) * N + (k[:, None] // 32) * N + n[None, :]
    total = tl.zeros((BM, BN), tl.float32)
    for _ in range(0, K, BK):
        sign = ((tl.load(words) >> (k % 32)[:, None]) & 1) * 2 - 1
        x = tl.load(row)
        total += tl.dot(x, sign.to(x.dtype))
        row += BK
        words += BK // 32 * N
    m = tl.arange(0, BM)[:, None]
    tl.store(OUT + b * N + m * 0 + n[None, :], total.to(OUT.dtype.element_ty), mask=m == 0)


@dataclass(frozen=True)
class Published:
    """One linear with a stack of per-row sign matrices."""

    weight_NK: torch.Tensor
    words_BkN: torch.Tensor
    """int32 [rows, K / 32, N]"""
    scale_B1: torch.Tensor
    """Compute dtype [rows, 1]"""
    config: Settings = CONFIGS[0]

    def __call__(self, x_BK: torch.Tensor, out_BN: torch.Tensor, delta_BN: torch.Tensor) -> torch.Tensor:
        (rows, inner), columns = x_BK.shape, out_BN.shape[1]
        block_n, block_k, stages, warps = self.config
        torch.mm(x_BK, self.weight_NK.T, out=out_BN)
        _batched_signs[(columns // block_n, rows)](
            x_BK, self.words_BkN, delta_BN, columns, inner, 16, block_n, block_k, num_stages=stages, num_warps=warps
        )
        return out_BN.add_(delta_BN * self.scale_B1)


def pack_words(sign_NK: torch.Tensor) -> torch.Tensor:
    """bool [N, K] -> int32 [K / 32, N]."""
    n, k = sign_NK.shape
    shifted = sign_NK.view(n, k // 32, 32).long() << torch.arange(32, device=sign_NK.device)
    return shifted.sum(-1).to(torch.int32).T.contiguous()


@lru_cache(maxsize=16)
def published_error(config: Settings, dtype: torch.dtype, device: torch.device) -> float:
    """Relative, of three rows with signs of their own against the definition in float64."""
    rows, outputs, inputs = 3, 512, 256
    generator = torch.Generator(device).manual_seed(1)
    sign_BNK = torch.rand(rows, outputs, inputs, generator=generator, device=device) < 0.5
    x_BK, weight_NK, scale_B1 = (
        torch.randn(shape, generator=generator, device=device).to(dtype)
        for shape in ((rows, inputs), (outputs, inputs), (rows, 1))
    )
    found, delta = (torch.full((rows, outputs), float("nan"), dtype=dtype, device=device) for _ in range(2))
    Published(weight_NK, torch.stack([pack_words(sign) for sign in sign_BNK]), scale_B1, config)(x_BK, found, delta)
    own_BNK = weight_NK.double() + scale_B1.double()[:, :, None] * (sign_BNK.double() * 2 - 1)
    return gpu_timing.relative_error(found, torch.einsum("bk,bnk->bn", x_BK.double(), own_BNK))


def naive(x_BK: torch.Tensor, weights_BNK: torch.Tensor, out_BN: torch.Tensor) -> torch.Tensor:
    """Every row times the matrix of a model of its own, one product after the other."""
    for b in range(x_BK.shape[0]):
        torch.mm(x_BK[b : b + 1], weights_BNK[b].T, out=out_BN[b : b + 1])
    return out_BN
