"""`spectral` on a GPU: the stored integers where factors stay bytes, and what becomes of the others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from bitdelta_core.delta import spectral
from bitdelta_core.delta.spec import TensorEntry
from bitdelta_core.delta.spectral import Coded
from bitdelta_core.errors import DeltaFormatError
from bitdelta_core.models.decoder import Decoder
from bitdelta_core.models.device.kinds import StepKinds
from bitdelta_core.models.device.layout import DeviceLayout
from bitdelta_core.models.device.targets import targets_of
from bitdelta_core.models.parameters import Parameters
from kernels.device import BYTES, UNIT, Field, Kinds
from tests.tiny import make_base
from tests.unit.device_filled import Filled
from tests.unit.models_harness import FakeDelta, base_state
from tests.unit.test_models_variants import EMBED, HEAD

WIDE = {"hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 1, "num_hidden_layers": 1}
CPU = torch.device("cpu")
Q, K, V = (f"model.layers.0.self_attn.{name}_proj.weight" for name in "qkv")
GATE, UP, DOWN = (f"model.layers.0.mlp.{name}_proj.weight" for name in ("gate", "up", "down"))


def add_spectral(delta: FakeDelta, base: dict[str, torch.Tensor], name: str, rank: int, **fields: Any) -> Coded:
    """Random integers, of every size that is allowed."""
    generator = torch.Generator().manual_seed(len(delta.tensors))
    shape = fields.pop("shape", tuple(base[name].shape))
    rows = min(shape[0], base[name].shape[0])
    a_rK, b_rN = (
        torch.randint(-127, 128, (rank, side), generator=generator, dtype=torch.int8) for side in (shape[1], rows)
    )
    exponent = torch.randint(0, 24, (rank,), generator=generator, dtype=torch.uint8)
    coded = Coded(a_rK, b_rN, 1e-5, exponent)
    [parts] = spectral.parts_of([coded], CPU)
    parts["extra"] = torch.randn(shape[0] - rows, shape[1], generator=generator)
    size = {"code_bytes": parts["code"].numel(), "rows": rows, "dtype": torch.float32}
    entry = TensorEntry(name=name, shape=shape, codec="spectral", rank=rank, **size, **fields)
    assert entry.problem() is None
    delta.tensors[name], delta.parts[name] = entry, parts
    return coded


def tiny(tmp_path: Path, **config: Any) -> tuple[Decoder, dict[str, torch.Tensor]]:
    decoder = Decoder.load(make_base(tmp_path / "base", intermediate_size=96, **{**WIDE, **config}))
    return decoder, base_state(tmp_path / "base")


def check(filled: Filled, decoder: Decoder, name: str, coded: Coded) -> None:
    """The difference that the slab holds for one parameter."""
    place = Parameters.of(decoder.config).linears[name]
    target = targets_of(decoder.config)[place.target]
    own = filled.matrix(target, torch.zeros(target.outputs, target.inputs))[place.start : place.start + place.rows]
    torch.testing.assert_close(own, coded.matrix(), rtol=1e-4, atol=1e-5)


def test_fused_members_of_different_ranks(tmp_path: Path) -> None:
    """The integers bit for bit; what lies between them, and members without a delta, are zeros."""
    (decoder, base), delta = tiny(tmp_path), FakeDelta()
    q, v = add_spectral(delta, base, Q, 21), add_spectral(delta, base, V, 3)
    filled, target = Filled(decoder, delta), targets_of(decoder.config)["0.qkv"]
    assert (target.outputs, target.members) == (96, (0, 64, 80))
    assert filled.layout.kinds == StepKinds(Kinds(byte_rank=32))
    assert int(filled.table[target.index, Field.RANK]) == 32 + BYTES
    values = 3 * 32 * 128
    a = filled.part(target, Field.LORA_A, torch.int8, values).view(3, 32, 128)
    scales = (
        filled.part(target, Field.LORA_A, torch.uint8, values + 4 * 3 * 32)[values:].view(torch.float32).view(3, 32)
    )
    b = filled.part(target, Field.LORA_B, torch.int8, 96, 32)
    for m, coded, start, stop in ((0, q, 0, 64), (2, v, 80, 96)):
        r = coded.rank
        assert torch.equal(a[m, :r], coded.a_rK)
        assert torch.equal(b[start:stop, :r], coded.b_rN.T)
        assert torch.equal(scales[m, :r], spectral.component_scales(torch.tensor([coded.scale]), coded.exponent_r))
        for padding in (a[m, r:], b[start:stop, r:], scales[m, r:]):
            assert not padding.any()
    for absent in (a[1], b[64:80], scales[1]):
        assert not absent.any()
    check(filled, decoder, Q, q)
    check(filled, decoder, V, v)


def test_bytes_are_counted(tmp_path: Path) -> None:
    (decoder, base), delta = tiny(tmp_path), FakeDelta()
    add_spectral(delta, base, DOWN, 20)
    assert Filled(decoder, delta).layout.nbytes == -(-32 * (96 + 4) // UNIT) * UNIT + 32 * 128


def test_full_rank_is_still_smaller_than_the_difference(tmp_path: Path) -> None:
    (decoder, base), delta = tiny(tmp_path), FakeDelta()
    down = add_spectral(delta, base, DOWN, 96)
    filled = Filled(decoder, delta)
    assert filled.layout.kinds == StepKinds(Kinds(byte_rank=96))
    check(filled, decoder, DOWN, down)


@pytest.mark.parametrize(("rank", "kinds"), [(48, Kinds(byte_rank=48)), (64, Kinds(dense=True))])
def test_mostly_padding_is_not_worth_it(tmp_path: Path, rank: int, kinds: Kinds) -> None:
    """q alone: zeros for k and v, 384 of 480 values a component, against twice 96 x 128 bytes."""
    (decoder, base), delta = tiny(tmp_path), FakeDelta()
    add_spectral(delta, base, Q, rank)
    assert DeviceLayout.plan(delta, decoder.config, torch.bfloat16).kinds == StepKinds(kinds)


def test_beside_an_adapter_factors_are_16_bits(tmp_path: Path) -> None:
    (decoder, base), delta = tiny(tmp_path), FakeDelta()
    q = add_spectral(delta, base, Q, 21)
    delta.add(base, K, torch.Generator().manual_seed(1), codec="lora", rank=4)
    filled = Filled(decoder, delta)
    assert filled.layout.kinds == StepKinds(Kinds(rank=32))
    check(filled, decoder, Q, q)


def test_beside_signs(tmp_path: Path) -> None:
    (decoder, base), delta = tiny(tmp_path), FakeDelta()
    gate = add_spectral(delta, base, GATE, 10)
    delta.add(base, UP, torch.Generator().manual_seed(1), codec="bitdelta")
    filled = Filled(decoder, delta)
    assert filled.layout.kinds == StepKinds(Kinds(signs=True, byte_rank=16))
    check(filled, decoder, GATE, gate)


def test_grown_embedding_and_head(tmp_path: Path) -> None:
    """Integers for the rows that the base has, whole rows beyond."""
    (decoder, base), delta = tiny(tmp_path), FakeDelta(config_overrides={"vocab_size": 263})
    tables = {name: add_spectral(delta, base, name, 17, shape=(263, 128)) for name in (EMBED, HEAD)}
    filled = Filled(decoder, delta)
    expected = Kinds(byte_rank=32, rows=True)
    assert filled.layout.kinds == StepKinds(Kinds(), expected, expected)
    for target, (name, coded) in zip(("embed", "head"), tables.items(), strict=True):
        found = filled.matrix(targets_of(decoder.config)[target], base[name])
        torch.testing.assert_close(found[:258] - base[name], coded.matrix(), rtol=1e-5, atol=1e-6)
        assert torch.equal(found[258:], delta.parts[name]["extra"])


def test_filling_writes_every_byte(tmp_path: Path) -> None:
    (decoder, base), delta = tiny(tmp_path), FakeDelta()
    for name in (Q, V, UP, DOWN):
        add_spectral(delta, base, name, 13)
    layout = DeviceLayout.plan(delta, decoder.config, torch.float32)
    fills = [torch.full((layout.nbytes,), value, dtype=torch.uint8) for value in (0, 255)]
    for buffer in fills:
        layout.fill(delta, buffer, decoder)
    for part in layout.parts:
        for region in (getattr(part, name) for name in ("a", "b")):
            assert torch.equal(*(buffer[region.start : region.start + region.nbytes] for buffer in fills))


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize("beside", [False, True], ids=["bytes", "16 bits"])
def test_refuses_scales_that_are_not_finite(tmp_path: Path, poison: float, beside: bool) -> None:
    (decoder, base), delta = tiny(tmp_path), FakeDelta()
    add_spectral(delta, base, UP, 5)
    if beside:
        delta.add(base, GATE, torch.Generator().manual_seed(1), codec="lora", rank=4)
    delta.parts[UP]["scale"][0] = poison
    with pytest.raises(DeltaFormatError, match=f"{UP}.scale has a value that is not finite in torch.float32"):
        Filled(decoder, delta)
