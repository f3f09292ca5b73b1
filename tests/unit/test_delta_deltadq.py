"""Codec deltadq: masks from counters, exact shares, values, sizes, the group's choice, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from bitdelta_core.checkpoint import Checkpoint
from bitdelta_core.delta import deltadq, dropout
from bitdelta_core.delta.codecs import decode_parts, encode
from bitdelta_core.delta.compress import compress
from bitdelta_core.delta.dropout import RATIOS, DropoutOptions
from bitdelta_core.delta.format import open_delta
from bitdelta_core.delta.inspect import summarise
from bitdelta_core.delta.pairing import Pairing
from bitdelta_core.delta.planning import CompressOptions
from bitdelta_core.delta.restore import restore
from bitdelta_core.delta.spec import TensorEntry
from bitdelta_core.delta.verify import verify
from bitdelta_core.errors import DeltaFormatError, InvalidRequest
from tests.tiny import make_base, make_finetune
from tests.unit.by_the_book import kept_columns

UP = "model.layers.0.mlp.up_proj.weight"


def planned(n: int, k: int, group: int, alpha: int, **fields: object) -> TensorEntry:
    entry = TensorEntry(
        name="w",
        shape=(n, k),
        codec="deltadq",
        dtype=torch.float32,
        group=group,
        alpha=alpha,
        **{"bits": 2, "seed": 7, **fields},  # pyright: ignore[reportArgumentType]
    )
    assert entry.problem() is None
    return entry


def by_the_book(entry: TensorEntry, row: int) -> list[int]:
    return kept_columns(row, entry.shape[1], entry.group, entry.alpha, entry.mask_rows, entry.seed)


@pytest.mark.parametrize("mask_rows", [1, 16, 64])
@pytest.mark.parametrize(("k", "group", "alpha"), [(48, 16, 4), (13, 8, 8), (44, 4, 2), (256, 256, 32)])
def test_masks_follow_from_counters_and_are_shared_by_blocks(k: int, group: int, alpha: int, mask_rows: int) -> None:
    entry = planned(70, k, group, alpha, mask_rows=mask_rows)
    kept = deltadq.kept_columns(entry)
    for row in (0, 1, 17, 69):
        assert kept[row // mask_rows].tolist() == by_the_book(entry, row)
    shares = torch.zeros(len(kept), entry.padded_columns // group).scatter_add_(
        1, kept // group, torch.ones(kept.shape)
    )
    assert bool((shares == group // alpha).all()), "every group keeps exactly its share"
    assert all(len(set(row)) == len(row) for row in kept.tolist()), "nothing is kept twice"
    assert torch.equal(deltadq.kept_columns(entry, 1, 2), kept[1:2]), "a block can be remade alone"


@pytest.mark.parametrize("size", [2, 4, 32, 1024])
def test_permutation_is_one_and_uniform(size: int) -> None:
    keys = torch.arange(4000).unsqueeze(1)
    got = deltadq.permute(deltadq._mix(keys), torch.arange(size), size)
    assert torch.equal(got.sort(1).values, torch.arange(size).expand(4000, size))
    first = torch.bincount(got[:, 0] * 32 // max(size, 32), minlength=min(size, 32)).float()
    assert (first / first.mean() - 1).abs().max() < 0.5, "where the first kept one falls"


def test_no_two_groups_or_seeds_share_a_mask() -> None:
    a, b = (deltadq.kept_columns(planned(64, 512, 64, 8, seed=seed)) for seed in (1, 2))
    shapes = {tuple((row % 64).tolist()) for row in torch.cat([a, b]).view(-1, 8)}
    assert len(shapes) > 0.98 * 2 * 64 * 8


@pytest.mark.parametrize("layout", ["tensor", "row"])
@pytest.mark.parametrize("bits", [1, 2, 4])
@pytest.mark.parametrize(("n", "k", "group", "alpha"), [(1, 4, 4, 4), (17, 13, 8, 4), (33, 64, 32, 2), (5, 48, 8, 1)])
def test_kept_values_come_back_and_others_are_the_base(
    n: int, k: int, group: int, alpha: int, bits: int, layout: str
) -> None:
    generator = torch.Generator().manual_seed(n)
    base = torch.randn(n, k, generator=generator)
    difference = 0.1 * torch.randn(n, k, generator=generator)
    entry = planned(n, k, group, alpha, bits=bits, scale_layout=layout)
    stored, parts = encode(entry, base, base + difference)
    assert {name: (t.dtype, tuple(t.shape)) for name, t in parts.items()} == stored.parts()
    got = decode_parts(entry, parts, base) - base
    for row in range(n):
        kept = [c for c in by_the_book(entry, row) if c < k]
        dropped = [c for c in range(k) if c not in kept]
        assert bool((got[row, dropped] == 0).all())
        scale = float(parts["scale"][0]) * (float(parts["row"][row]) if layout == "row" else 1.0)
        wanted, top = alpha * difference[row, kept], (2**bits - 1) / 2 * scale
        assert bool((got[row, kept] - wanted.clamp(-top, top)).abs().max() <= scale * 0.5001 + 1e-6)


def test_dropping_keeps_the_expectation() -> None:
    base, difference = torch.zeros(64, 256), torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    mean = torch.zeros(64, 256)
    for seed in range(200):
        entry = planned(64, 256, 32, 4, bits=4, seed=seed)
        mean += decode_parts(entry, encode(entry, base, difference)[1], base) / 200
    assert torch.corrcoef(torch.stack([mean.flatten(), difference.flatten()]))[0, 1] > 0.98
    assert abs(float((mean * difference).sum() / difference.square().sum()) - 1) < 0.02


def test_a_difference_of_zero_stays_finite() -> None:
    base = torch.randn(4, 16, generator=torch.Generator().manual_seed(3))
    for bits in (1, 2, 4):
        entry = planned(4, 16, 8, 4, bits=bits, scale_layout="row")
        assert torch.equal(decode_parts(entry, encode(entry, base, base)[1], base), base)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("base") / "base", hidden_size=128, intermediate_size=256)


@pytest.fixture(scope="module")
def fine(base: Path) -> Path:
    return make_finetune(base, base.parent / "fine", only="proj")


@pytest.mark.parametrize("ratio", RATIOS)
def test_ratios_by_the_papers_count_and_by_every_byte(ratio: int, base: Path, fine: Path, tmp_path: Path) -> None:
    options = CompressOptions(codec="deltadq", dropout=DropoutOptions.for_ratio(ratio, group=32))
    delta = compress(base, fine, tmp_path / "delta", options)
    verify(base, delta)
    summary = summarise(open_delta(delta))
    assert (summary.format_version, summary.codec) == (2, "deltadq")
    assert summary.linear_value_ratio == ratio
    weights = sum(e.shape[0] * e.shape[1] for e in open_delta(delta).config.tensors.values())
    stored = sum(e.shape[0] * (-(-e.kept * e.bits // 8) + 2) + 4 for e in open_delta(delta).config.tensors.values())
    assert summary.linear_bits_per_weight == pytest.approx(8 * stored / weights)
    assert summary.bytes_by_kind["linears"] == stored


def test_the_group_is_chosen_on_the_attention_of_the_first_layers(base: Path, fine: Path, tmp_path: Path) -> None:
    made = [
        compress(base, fine, tmp_path / name, CompressOptions(codec="deltadq", dropout=DropoutOptions(alpha=4)))
        for name in ("a", "b")
    ]
    files = [{f.name: f.read_bytes() for f in delta.iterdir()} for delta in made]
    assert files[0] == files[1], "deterministic"
    recorded = open_delta(made[0]).config.provenance["options"]["dropout"]
    entry = open_delta(made[0]).config.tensors[UP]
    assert recorded["group"] in (4, 8, 16, 32, 64, 128, 256)
    assert entry.group == min(recorded["group"], 128)


def test_the_proxy_takes_the_group_that_errs_least(base: Path, fine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only with groups of 16 do the masks leave everything as it is: the choice must fall on it."""
    pairing = Pairing(Checkpoint(base), Checkpoint(fine))

    def decoded(pairing: Pairing, name: str, options: DropoutOptions) -> torch.Tensor:
        return (pairing.fine_tensor if options.group == 16 else pairing.base_tensor)(name).float()

    monkeypatch.setattr(dropout, "_decoded", decoded)
    batches = [(torch.tensor([[256, 72, 105, 33]]), torch.ones(1, 4, dtype=torch.bool))]
    assert dropout.choose_group(pairing, DropoutOptions(alpha=4), batches).group == 16  # pyright: ignore[reportArgumentType]


def test_restoring_lies_nearer_to_the_fine_tune_with_more_bits(base: Path, fine: Path, tmp_path: Path) -> None:
    wanted, before = Checkpoint(fine).get(UP), Checkpoint(base).get(UP)
    errors = []
    for alpha in (1, 2):
        options = DropoutOptions(alpha=alpha, value_bits=4, group=64)
        delta = compress(base, fine, tmp_path / f"d{alpha}", CompressOptions(codec="deltadq", dropout=options))
        errors.append((Checkpoint(restore(base, delta, tmp_path / f"r{alpha}")).get(UP) - wanted).norm())
    assert errors[0] < 0.15 * (wanted - before).norm()
    assert errors[1] < 1.2 * (wanted - before).norm(), "unbiased dropping of half adds as much noise as it keeps"


@pytest.mark.parametrize(
    "field", [{"group": 12}, {"alpha": 3}, {"alpha": 64, "group": 32}, {"bits": 8}, {"scale_layout": "row_col"}]
)
def test_impossible_entries(field: dict[str, object], base: Path, fine: Path, tmp_path: Path) -> None:
    options = CompressOptions(codec="deltadq", dropout=DropoutOptions(alpha=4, group=32))
    delta = compress(base, fine, tmp_path / "delta", options)
    body = json.loads((delta / "delta_config.json").read_text())
    body["tensors"][UP] |= field
    (delta / "delta_config.json").write_text(json.dumps(body))
    with pytest.raises(DeltaFormatError, match=UP):
        open_delta(delta)


def test_a_codec_newer_than_its_format_version(base: Path, fine: Path, tmp_path: Path) -> None:
    options = CompressOptions(codec="deltadq", dropout=DropoutOptions(group=32))
    delta = compress(base, fine, tmp_path / "delta", options)
    body = json.loads((delta / "delta_config.json").read_text())
    body["format_version"] = 1
    (delta / "delta_config.json").write_text(json.dumps(body))
    with pytest.raises(DeltaFormatError, match="deltadq in format version 1"):
        open_delta(delta)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"alpha": 3}, "alpha"),
        ({"alpha": 8, "group": 4}, "group"),
        ({"group": 24}, "group"),
        ({"mask_rows": 8}, "mask_rows"),
        ({"seed": -1}, "seed"),
    ],
)
def test_options_out_of_range(fields: dict[str, int], named: str, base: Path, fine: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match=named):
        compress(base, fine, tmp_path / "d", CompressOptions(codec="deltadq", dropout=DropoutOptions(**fields)))  # pyright: ignore[reportArgumentType]


def test_dropout_and_another_codec_do_not_go_together(base: Path, fine: Path, tmp_path: Path) -> None:
    for options in (CompressOptions(dropout=DropoutOptions()), CompressOptions(codec="deltadq")):
        with pytest.raises(InvalidRequest, match="either both or none"):
            compress(base, fine, tmp_path / "d", options)
    with pytest.raises(InvalidRequest, match="ratio"):
        DropoutOptions.for_ratio(100)
