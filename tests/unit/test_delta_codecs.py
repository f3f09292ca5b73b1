"""Every codec against first principles: exactness, optimal scales, bit order, odd sizes."""

from __future__ import annotations

import itertools

import pytest
import torch

from bitdelta_core.delta import bitdelta, quant
from bitdelta_core.delta.codecs import decode_parts, encode
from bitdelta_core.delta.rows import changed_rows
from bitdelta_core.delta.spec import ScaleLayout, TensorEntry

SIZES = [(1, 1), (3, 8), (16, 48), (5, 13), (33, 31)]
LAYOUTS: list[ScaleLayout] = ["tensor", "row", "row_col"]


def pair(n: int, k: int, *, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(n, k, generator=generator)
    return base, base + 0.05 * torch.randn(n, k, generator=generator) * torch.rand(n, 1, generator=generator)


def coded(entry: TensorEntry, base: torch.Tensor, fine: torch.Tensor) -> torch.Tensor:
    """Decode what was encoded, with the parts checked against what the entry promises."""
    stored, parts = encode(entry, base, fine)
    assert {name: (t.dtype, tuple(t.shape)) for name, t in parts.items()} == stored.parts()
    return decode_parts(stored, parts, base)


def sign_entry(n: int, k: int, layout: ScaleLayout = "tensor", planes: int = 1) -> TensorEntry:
    return TensorEntry(
        name="w", shape=(n, k), codec="bitdelta", dtype=torch.float32, scale_layout=layout, planes=planes
    )


@pytest.mark.parametrize(("n", "k"), SIZES)
def test_bits_stand_lsb_first_with_zero_padding(n: int, k: int) -> None:
    bits = torch.rand(n, k, generator=torch.Generator().manual_seed(1)) < 0.5
    packed = bitdelta.pack(bits)
    assert packed.shape == (n, -(-k // 8))
    for row in range(n):
        for byte in range(packed.shape[1]):
            expected = sum(int(bits[row, 8 * byte + j]) << j for j in range(8) if 8 * byte + j < k)
            assert int(packed[row, byte]) == expected
    assert torch.equal(bitdelta.unpack(packed, k), bits.float() * 2 - 1)


def test_zero_counts_as_plus_one() -> None:
    _, parts = encode(sign_entry(1, 3), torch.tensor([[1.0, 1.0, 1.0]]), torch.tensor([[1.0, 0.0, 2.0]]))
    assert int(parts["sign"][0, 0, 0]) == 0b101


@pytest.mark.parametrize(("n", "k"), SIZES)
def test_one_scale_is_the_mean_and_row_scales_are_row_means(n: int, k: int) -> None:
    base, fine = pair(n, k)
    magnitude = (fine - base).abs()
    _, tensor_parts = encode(sign_entry(n, k), base, fine)
    torch.testing.assert_close(tensor_parts["scale"], magnitude.mean().reshape(1))
    _, row_parts = encode(sign_entry(n, k, "row"), base, fine)
    torch.testing.assert_close(
        row_parts["scale"] * row_parts["row"][0].float(), magnitude.mean(1), rtol=1e-3, atol=1e-6
    )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_scales_are_optimal(layout: ScaleLayout) -> None:
    """No other scales of the same layout do better: nudging any one of them only adds error."""
    base, fine = pair(12, 20)
    entry = sign_entry(12, 20, layout)
    _, parts = encode(entry, base, fine)
    best = (decode_parts(entry, parts, base) - fine).square().sum()
    for part in ("scale", "row", "col"):
        for factor in (0.97, 1.03):
            if part in parts:
                nudged = parts[part].clone()
                nudged[0, ...] *= factor
                assert (decode_parts(entry, {**parts, part: nudged}, base) - fine).square().sum() > best


def test_richer_layouts_and_more_planes_only_help() -> None:
    base, fine = pair(40, 56)
    errors = [(coded(sign_entry(40, 56, layout), base, fine) - fine).norm() for layout in LAYOUTS]
    assert errors[0] > errors[1] > errors[2]
    by_planes = [(coded(sign_entry(40, 56, "row", planes), base, fine) - fine).norm() for planes in (1, 2, 3, 4)]
    assert all(later < 0.75 * earlier for earlier, later in itertools.pairwise(by_planes))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_difference_of_zero_stays_zero(layout: ScaleLayout) -> None:
    base, _ = pair(6, 10)
    assert torch.equal(coded(sign_entry(6, 10, layout, 2), base, base.clone()), base)


@pytest.mark.parametrize("size", [1e-7, 1e-3, 1e3])
def test_relative_error_does_not_depend_on_the_size_of_the_difference(size: float) -> None:
    base = torch.zeros(16, 24)
    fine = pair(16, 24)[1] * size
    for layout in LAYOUTS:
        relative = (coded(sign_entry(16, 24, layout), base, fine) - fine).norm() / fine.norm()
        reference = (coded(sign_entry(16, 24, layout), base, fine / size) - fine / size).norm() / (fine / size).norm()
        torch.testing.assert_close(relative, reference, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("extra", [0, 3])
@pytest.mark.parametrize(("n", "k"), SIZES)
def test_quant_codes_differences_and_keeps_new_rows(n: int, k: int, bits: int, extra: int) -> None:
    base, fine = pair(n, k)
    fine = torch.cat([fine, torch.randn(extra, k, generator=torch.Generator().manual_seed(5))])
    entry = TensorEntry(name="w", shape=(n + extra, k), codec="quant", dtype=torch.float32, rows=n, bits=bits)
    got = coded(entry, base, fine)
    assert torch.equal(got[n:], fine[n:])
    zero_error = (fine[:n] - base).square().sum(1)
    assert ((got[:n] - fine[:n]).square().sum(1) <= zero_error * 1.0001).all()


def test_quant_error_falls_with_bits_and_beats_plain_rounding() -> None:
    base, fine = pair(64, 96)
    difference = fine - base
    errors = {}
    for bits in (2, 4, 8):
        entry = TensorEntry(name="w", shape=(64, 96), codec="quant", dtype=torch.float32, rows=64, bits=bits)
        errors[bits] = ((coded(entry, base, fine) - fine).norm() / difference.norm()).item()
        top = 2 ** (bits - 1)
        step = difference.abs().amax(1, keepdim=True) / max(top - 1, 1)
        plain = (difference / step).round().clamp(-top, top - 1) * step
        assert errors[bits] <= ((plain - difference).norm() / difference.norm()).item()
    assert errors[2] < 0.6
    assert errors[4] < 0.12
    assert errors[8] < 0.01


def test_quant_packs_first_code_lowest() -> None:
    assert quant.pack(torch.tensor([[1, 2, 3]], dtype=torch.uint8), 2).tolist() == [[1 | 2 << 2 | 3 << 4]]
    assert quant.pack(torch.tensor([[7, 9, 15]], dtype=torch.uint8), 4).tolist() == [[7 | 9 << 4, 15]]


@pytest.mark.parametrize("rows_after", [7, 10, 14])
def test_rows_are_exact_whatever_the_vocabulary_does(rows_after: int) -> None:
    base, _ = pair(10, 6)
    fine = torch.cat([base, torch.ones(4, 6)])[:rows_after].clone()
    fine[2] += 1
    index = changed_rows(base, fine)
    assert index.tolist() == [2, *range(10, rows_after)]
    entry = TensorEntry(name="w", shape=(rows_after, 6), codec="rows", dtype=torch.float32, rows=len(index))
    assert torch.equal(coded(entry, base, fine), fine)


def test_dense_is_exact() -> None:
    base, fine = pair(4, 5)
    entry = TensorEntry(name="w", shape=(4, 5), codec="dense", dtype=torch.float32)
    assert torch.equal(coded(entry, base, fine), fine)
