"""A delta's table row and bytes mean what the delta means: read back by the definitions of `Field`."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from bitdelta_core.delta.spec import TensorEntry
from bitdelta_core.errors import DeltaFormatError
from bitdelta_core.models.decoder import Decoder
from bitdelta_core.models.device.bitplanes import bit_planes
from bitdelta_core.models.device.kinds import StepKinds
from bitdelta_core.models.device.layout import OFFSETS, DeviceLayout, empty_rows
from bitdelta_core.models.device.targets import misfit, targets_of
from kernels.delta_linear.reference import unpack_values
from kernels.device import NONE, UNIT, Field, Kinds
from tests.tiny import make_base
from tests.unit.device_filled import Filled, check
from tests.unit.models_harness import FakeDelta, base_state
from tests.unit.test_models_variants import EMBED, HEAD, KINDS, TABLES, grown_rows, random_delta

CONFIG = {"hidden_size": 44, "intermediate_size": 96, "attention_bias": True, "mlp_bias": True}


@pytest.mark.parametrize("kind", KINDS)
def test_linears(tmp_path: Path, kind: str) -> None:
    decoder = Decoder.load(make_base(tmp_path / "base", **CONFIG))
    base = base_state(tmp_path / "base")
    filled = check(decoder, random_delta(base, 3, kind, None, tied=False), base)
    kinds = {
        "sign": Kinds(signs=True),
        "sign-row": Kinds(signs=True),
        "sign-row-col-2-planes": Kinds(signs=True, columns=True, planes=2),
        "sign-3-planes": Kinds(signs=True, planes=3),
        "lora": Kinds(rank=16),
        "dense": Kinds(dense=True),
        "dropout-1": Kinds(compact=1),
        "dropout-2-row": Kinds(signs=True, planes=3),
        "dropout-4": Kinds(signs=True, planes=5),
    }
    assert filled.layout.kinds == StepKinds(kinds[kind])


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("table", TABLES)
def test_tables(tmp_path: Path, table: str, tied: bool) -> None:
    decoder = Decoder.load(make_base(tmp_path / "base", tie_word_embeddings=tied, **CONFIG))
    base = base_state(tmp_path / "base")
    filled = check(decoder, random_delta(base, 2, "sign", table, tied=tied), base)
    grown = "shape" in TABLES[table]
    outputs = filled.table[:, Field.OUTPUTS]
    assert outputs[-2:].tolist() == [TABLES[table]["shape"][0] if grown else 0] * 2
    assert (outputs[:-2] == 0).all()
    expected = {
        "rows": Kinds(rows=True),
        "rows-grown": Kinds(rows=True),
        "quant4": Kinds(signs=True, planes=4),
        "quant2-grown": Kinds(signs=True, planes=2, rows=True),
        "quant8": Kinds(signs=True, planes=8),
        "dense-grown": Kinds(dense=True),
        "sign": Kinds(signs=True, columns=True),
    }
    assert filled.layout.kinds == StepKinds(Kinds(signs=True), expected[table], expected[table])


@pytest.mark.parametrize("table", ["rows", "quant4", "dense-grown"])
def test_smaller_vocabulary(tmp_path: Path, table: str) -> None:
    """Outputs beyond it are the base's: whoever reads logits masks them."""
    decoder = Decoder.load(make_base(tmp_path / "base", **CONFIG))
    base, delta = base_state(tmp_path / "base"), FakeDelta(config_overrides={"vocab_size": 250})
    fields = {**TABLES[table], "shape": (250, 44)}
    if table == "quant4":
        fields["rows"] = 250
    for name in (EMBED, HEAD):
        delta.add(base, name, torch.Generator().manual_seed(1), **fields)
    filled = Filled(decoder, delta)
    merged = {n: t[:250] for n, t in base.items() if n in (EMBED, HEAD)}
    for name, target in ((EMBED, "embed"), (HEAD, "head")):
        own = filled.matrix(targets_of(decoder.config)[target], base[name])
        assert own.shape[0] == 258
        expected = delta.merged(merged | {n: t for n, t in base.items() if n not in merged})[name]
        torch.testing.assert_close(own[:250], expected, rtol=1e-5, atol=1e-6)
        assert torch.equal(own[250:], base[name][250:])


def test_untied_variant_of_a_tied_base(tmp_path: Path) -> None:
    decoder = Decoder.load(make_base(tmp_path / "base", tie_word_embeddings=True, **CONFIG))
    base = base_state(tmp_path / "base")
    for own_head in (False, True):
        delta = random_delta(base, 2, "lora", "quant4", tied=True)
        delta.config_overrides["tie_word_embeddings"] = False
        if own_head:
            delta.add(base, HEAD, torch.Generator().manual_seed(1), codec="dense")
        filled = check(decoder, delta, base, untied=True)
        assert bool((filled.table[-1, OFFSETS] != NONE).any()) == own_head


def mixed_delta(base: dict[str, torch.Tensor]) -> FakeDelta:
    """Every member of a fused linear has another codec, other planes and other scales."""
    generator, delta = torch.Generator().manual_seed(5), FakeDelta()
    attention, mlp = "model.layers.{}.self_attn.{}_proj.weight", "model.layers.{}.mlp.{}_proj.weight"
    delta.add(base, attention.format(0, "q"), generator, codec="bitdelta", planes=3, scale_layout="row")
    delta.add(base, attention.format(0, "k"), generator, codec="lora", rank=17, scaling=0.3)
    delta.add(base, attention.format(0, "v"), generator, codec="bitdelta", planes=1, scale_layout="row_col")
    delta.add(base, attention.format(1, "q"), generator, codec="dense")
    delta.add(base, attention.format(1, "k"), generator, codec="bitdelta", planes=2)
    delta.add(base, attention.format(1, "v"), generator, codec="lora", rank=2)
    delta.add(base, mlp.format(0, "gate"), generator, codec="lora", rank=20)
    delta.add(base, mlp.format(0, "up"), generator, codec="lora", rank=3, scaling=2.0)
    delta.add(base, mlp.format(1, "gate"), generator, codec="bitdelta")
    delta.add(base, mlp.format(1, "up"), generator, **KINDS["dropout-2-row"])
    return delta


def test_dropout_beside_column_scales(tmp_path: Path) -> None:
    """Column scales and a zero term exclude each other."""
    decoder = Decoder.load(make_base(tmp_path / "base", **CONFIG))
    base, delta, generator = base_state(tmp_path / "base"), FakeDelta(), torch.Generator().manual_seed(5)
    name = "model.layers.1.mlp.{}_proj.weight"
    delta.add(base, name.format("gate"), generator, **KINDS["dropout-4"])
    delta.add(base, name.format("up"), generator, codec="bitdelta", scale_layout="row_col")
    filled = check(decoder, delta, base)
    assert filled.layout.kinds == StepKinds(Kinds(signs=True, columns=True, dense=True))


def test_members_of_different_codecs(tmp_path: Path) -> None:
    decoder = Decoder.load(make_base(tmp_path / "base", **CONFIG))
    base = base_state(tmp_path / "base")
    filled = check(decoder, mixed_delta(base), base)
    assert filled.layout.kinds == StepKinds(Kinds(signs=True, columns=True, planes=3, rank=32, dense=True))


@pytest.mark.parametrize("mask_rows", [1, 64])
def test_dropout_over_many_rows(tmp_path: Path, mask_rows: int) -> None:
    """More rows than are expanded at a time, the last mask block cut short."""
    decoder = Decoder.load(make_base(tmp_path / "base", num_hidden_layers=1, intermediate_size=304))
    base, delta = base_state(tmp_path / "base"), FakeDelta()
    for name in ("gate", "up"):
        fields = {**KINDS["dropout-2-row"], "mask_rows": mask_rows}
        delta.add(base, f"model.layers.0.mlp.{name}_proj.weight", torch.Generator().manual_seed(1), **fields)
    check(decoder, delta, base)


WIDE = {"hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 1, "num_hidden_layers": 1}


@pytest.mark.parametrize("mask_rows", [16, 64])
@pytest.mark.parametrize("bits", [1, 2, 4])
def test_masks_of_blocks_stay_compact(tmp_path: Path, bits: int, mask_rows: int) -> None:
    """In masks of 64 too where k and v begin inside a block of 64; the bytes are counted, to the byte."""
    decoder = Decoder.load(make_base(tmp_path / "base", intermediate_size=96, **WIDE))
    base, delta = base_state(tmp_path / "base"), FakeDelta()
    fields = {"codec": "deltadq", "alpha": 4, "group": 16, "bits": bits, "scale_layout": "row", "seed": 2**32 - 1}
    for name in ("q", "k", "v"):
        fields |= {"mask_rows": mask_rows}
        delta.add(base, f"model.layers.0.self_attn.{name}_proj.weight", torch.Generator().manual_seed(1), **fields)
    delta.add(base, "model.layers.0.mlp.up_proj.weight", torch.Generator().manual_seed(2), **fields)
    filled = check(decoder, delta, base)
    # v begins at 80 and up at 96, inside blocks of 64.
    assert filled.layout.kinds == StepKinds(Kinds(compact=bits))
    expected = 0
    for blocks in (6, 12):  # of 16 outputs, whose 32 kept inputs take one tile column
        expected += blocks * bits * 512 + -(-blocks * (16 * 4 + 256) // UNIT) * UNIT
    assert filled.layout.nbytes == expected


def test_masks_of_64_outputs(tmp_path: Path) -> None:
    decoder = Decoder.load(make_base(tmp_path / "base", intermediate_size=128, **WIDE))
    base, delta = base_state(tmp_path / "base"), FakeDelta()
    fields = {"codec": "deltadq", "alpha": 8, "group": 32, "bits": 2, "mask_rows": 64, "seed": 4}
    for name in ("gate", "up"):
        delta.add(base, f"model.layers.0.mlp.{name}_proj.weight", torch.Generator().manual_seed(1), **fields)
    filled = check(decoder, delta, base)
    assert filled.layout.kinds == StepKinds(Kinds(compact=2, tall=True))
    assert filled.layout.nbytes == 16 * 2 * 512 + 16 * 64 + 4 * 256


def test_forms_that_do_not_go_together(tmp_path: Path) -> None:
    """Members of another form, embedding and head are expanded to planes."""
    decoder = Decoder.load(make_base(tmp_path / "base", intermediate_size=96, **WIDE))
    base, delta = base_state(tmp_path / "base"), FakeDelta()
    fields = {"codec": "deltadq", "alpha": 4, "group": 16, "bits": 2, "mask_rows": 16, "seed": 4}
    others = {"q": {}, "k": {"bits": 4}, "v": {"mask_rows": 1}}
    for name, other in others.items():
        named = f"model.layers.0.self_attn.{name}_proj.weight"
        delta.add(base, named, torch.Generator().manual_seed(1), **{**fields, **other})
    delta.add(base, HEAD, torch.Generator().manual_seed(1), **fields)
    filled = check(decoder, delta, base)
    assert filled.layout.kinds == StepKinds(Kinds(signs=True, planes=5, compact=2), head=Kinds(signs=True, planes=3))


def test_what_equals_the_base_has_no_parts(tmp_path: Path) -> None:
    decoder = Decoder.load(make_base(tmp_path / "base", **CONFIG))
    layout = DeviceLayout.plan(FakeDelta(), decoder.config, torch.float32)
    assert (layout.nbytes, layout.kinds, layout.vectors_at(0)) == (0, StepKinds(), None)
    assert torch.equal(layout.row(512), empty_rows(len(targets_of(decoder.config))))


def test_regions_are_aligned_disjoint_and_written_whole(tmp_path: Path) -> None:
    """Filling over zeros and over ones gives the same bytes, but for the padding between regions."""
    decoder = Decoder.load(make_base(tmp_path / "base", **CONFIG))
    base = base_state(tmp_path / "base")
    delta = mixed_delta(base)
    for name, table in ((EMBED, "rows-grown"), (HEAD, "quant2-grown")):
        delta.add(base, name, torch.Generator().manual_seed(1), **TABLES[table] | {"shape": (263, 44)})
        grown_rows(TABLES[table] | {"shape": (263, 44)}, delta, name)
    delta.config_overrides["vocab_size"] = 263
    layout = DeviceLayout.plan(delta, decoder.config, torch.float32)
    fills = [torch.full((layout.nbytes,), value, dtype=torch.uint8) for value in (0, 255)]
    for buffer in fills:
        layout.fill(delta, buffer, decoder)
    regions = [r for part in layout.parts for r in (getattr(part, name) for name in type(part).__slots__)]
    regions = sorted((r for r in regions if hasattr(r, "nbytes")), key=lambda r: r.start)
    assert all(r.start % UNIT == 0 for r in regions)
    assert all(a.start + a.nbytes <= b.start for a, b in pairwise(regions))
    for r in regions:
        assert torch.equal(*(buffer[r.start : r.start + r.nbytes] for buffer in fills))


@pytest.mark.parametrize("kind", [*KINDS, "quant"])
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_fill_refuses_values_that_are_not_finite(tmp_path: Path, kind: str, poison: float) -> None:
    decoder = Decoder.load(make_base(tmp_path / "base", num_hidden_layers=1, intermediate_size=96))
    name = HEAD if kind == "quant" else "model.layers.0.mlp.up_proj.weight"
    fields = TABLES["quant4"] if kind == "quant" else KINDS[kind]
    delta = FakeDelta()
    delta.add(base_state(tmp_path / "base"), name, torch.Generator().manual_seed(1), **fields)
    part = {"bitdelta": "scale", "lora": "lora_B", "dense": "value", "quant": "scale", "deltadq": "scale"}[
        fields["codec"]
    ]
    delta.parts[name][part].view(-1)[0] = poison
    with pytest.raises(DeltaFormatError, match=name):
        Filled(decoder, delta)


@pytest.mark.parametrize(
    "overrides", [{"num_hidden_layers": 2}, {"tie_word_embeddings": True}, {"vocab_size": 261}, {"vocab_size": 600}]
)
def test_plan_refuses(tmp_path: Path, overrides: dict[str, Any]) -> None:
    decoder = Decoder.load(make_base(tmp_path / "base", num_hidden_layers=1, intermediate_size=96))
    with pytest.raises(
        DeltaFormatError, match=r"config override|model\.embed_tokens\.weight: vocab_size grows|vocab_size 600"
    ):
        DeviceLayout.plan(FakeDelta(config_overrides=overrides), decoder.config, torch.float32)


@pytest.mark.parametrize(
    ("fields", "message"),
    [({"codec": "bitdelta", "planes": 9}, "9 sign planes"), ({"codec": "lora", "rank": 513}, "rank 513")],
)
def test_plan_refuses_more_than_kernels_take(tmp_path: Path, fields: dict[str, Any], message: str) -> None:
    decoder = Decoder.load(make_base(tmp_path / "base", num_hidden_layers=1, intermediate_size=96))
    name = "model.layers.0.mlp.up_proj.weight"
    delta = FakeDelta(tensors={name: TensorEntry(name=name, shape=(96, 48), **fields)})
    with pytest.raises(DeltaFormatError, match=f"{name}: {message}"):
        DeviceLayout.plan(delta, decoder.config, torch.float32)


def test_plan_refuses_a_codec_that_it_does_not_know(tmp_path: Path) -> None:
    decoder = Decoder.load(make_base(tmp_path / "base", num_hidden_layers=1, intermediate_size=96))
    name = "model.layers.0.mlp.up_proj.weight"
    entry = TensorEntry(name=name, shape=(96, 48), codec="later")  # pyright: ignore[reportArgumentType]
    with pytest.raises(DeltaFormatError, match=f"{name}: codec later"):
        DeviceLayout.plan(FakeDelta(tensors={name: entry}), decoder.config, torch.float32)


def test_plan_refuses_an_entry_without_a_place(tmp_path: Path) -> None:
    decoder = Decoder.load(make_base(tmp_path / "base", num_hidden_layers=1, intermediate_size=96))
    name = "model.layers.7.mlp.up_proj.weight"
    delta = FakeDelta(tensors={name: TensorEntry(name=name, shape=(96, 48), codec="dense")})
    with pytest.raises(DeltaFormatError, match=name):
        DeviceLayout.plan(delta, decoder.config, torch.float32)


def test_misfit_names_what_is_not_aligned(tmp_path: Path) -> None:
    fitting = Decoder.load(make_base(tmp_path / "a", num_hidden_layers=1, intermediate_size=96)).config
    assert misfit(fitting) is None
    assert [t.index for t in targets_of(fitting).values()] == list(range(6))
    assert "88 outputs of gate" in str(misfit(Decoder.load(make_base(tmp_path / "b", num_hidden_layers=1)).config))


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_bit_planes(bits: int) -> None:
    generator = torch.Generator().manual_seed(bits)
    for rows, inputs in ((1, 8), (3, 44), (5, 301)):
        q_Nk = torch.randint(0, 256, (rows, -(-inputs * bits // 8)), dtype=torch.uint8, generator=generator)
        kept = q_Nk.clone()
        values_NK = unpack_values(q_Nk, bits)[:, :inputs].long()
        planes_PNk = bit_planes(q_Nk, bits, inputs)
        assert planes_PNk.shape == (bits, rows, -(-inputs // 8))
        for p in range(bits):
            assert torch.equal(unpack_values(planes_PNk[p], 1)[:, :inputs].long(), values_NK >> p & 1)
        assert torch.equal(q_Nk, kept)
