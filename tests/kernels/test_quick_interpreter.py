"""What `quick_interpreter` leaves out is not missed: functions within functions, failures, the language afterwards."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import triton
import triton.language as tl

from tests.kernels.device_harness import DEVICE

pytestmark = pytest.mark.skipif(DEVICE.type == "cuda", reason="the interpreter's")
NAMES = [(tl, "load"), (tl, "sum"), (tl.core, "load"), (tl.core, "reduce"), (tl.tensor, "__add__"), (tl.math, "exp")]


@triton.jit
def _inner(x):
    return tl.sum(tl.exp(x), 0)  # of Triton's own functions, which see other modules than ours do


@triton.jit
def _outer(x):
    return _inner(x) + tl.cdiv(7, 2) + tl.zeros((1,), tl.float32)


@triton.jit
def kernel(x_ptr, out_ptr, most, COUNT: tl.constexpr):
    at = tl.arange(0, COUNT)
    tl.store(out_ptr + tl.arange(0, 1), _outer(tl.load(x_ptr + at)))
    tl.store(out_ptr + 1 + tl.arange(0, 1), tl.full((1,), 0, tl.float32) + (most + 1 < most))


@triton.jit
def failing(x_ptr):
    tl.static_assert(_inner(tl.load(x_ptr + tl.arange(0, 4))) is None, "on purpose")


def launch(x: torch.Tensor) -> list[float]:
    out = torch.full((2,), torch.nan)
    kernel[(1,)](x, out, 2**31 - 1, COUNT=len(x))  # pyright: ignore[reportArgumentType]
    return out.tolist()


def found() -> list[Any]:
    return [getattr(*name) for name in NAMES]


def test_the_language_is_whole_after_every_launch() -> None:
    x, before = torch.zeros(4), found()
    assert launch(x) == [8, 1], "int32 wraps as on a device"
    assert found() == before
    with pytest.raises(Exception, match="on purpose"):
        failing[(1,)](x)
    assert found() == before
    assert launch(x[:2]) == [6, 1], "another shape"
    assert launch(x) == [8, 1]
