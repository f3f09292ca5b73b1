"""Rows of several variants in one batch: each computed with its own weights, and with nobody else's."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from bitdelta_core.errors import DeltaFormatError
from bitdelta_core.models.decoder import Decoder
from bitdelta_core.models.variant import VariantLayout
from tests.tiny import make_base
from tests.unit.models_harness import (
    MIXES,
    FakeDelta,
    Running,
    Stepper,
    base_state,
    make_variant,
    oracle,
    slots_of_mix,
)

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
KINDS: dict[str, dict[str, Any]] = {
    "sign": {"codec": "bitdelta"},
    "sign-row": {"codec": "bitdelta", "scale_layout": "row"},
    "sign-row-col-2-planes": {"codec": "bitdelta", "scale_layout": "row_col", "planes": 2},
    "sign-3-planes": {"codec": "bitdelta", "planes": 3},
    "lora": {"codec": "lora", "rank": 3, "scaling": 1.7},
    "dense": {"codec": "dense"},
    "dropout-1": {"codec": "deltadq", "alpha": 2, "group": 4, "bits": 1, "mask_rows": 16, "seed": 5},
    "dropout-2-row": {"codec": "deltadq", "alpha": 4, "group": 8, "bits": 2, "scale_layout": "row", "seed": 6},
    "dropout-4": {"codec": "deltadq", "alpha": 2, "group": 16, "bits": 4, "seed": 7},
}
TABLES: dict[str, dict[str, Any]] = {
    "rows": {"codec": "rows", "rows": 9},
    "rows-grown": {"codec": "rows", "rows": 30, "shape": (261, 44)},
    "quant4": {"codec": "quant", "rows": 258, "bits": 4},
    "quant2-grown": {"codec": "quant", "rows": 258, "bits": 2, "shape": (263, 44)},
    "quant8": {"codec": "quant", "rows": 258, "bits": 8},
    "dense-grown": {"codec": "dense", "shape": (260, 44)},
    "sign": {"codec": "bitdelta", "scale_layout": "row_col"},
}
CONFIG = {"hidden_size": 44, "intermediate_size": 90, "num_hidden_layers": 2, "attention_bias": True, "mlp_bias": True}
TOLERANCE = {"rtol": 1e-3, "atol": 1e-4}


def grown_rows(spec: dict[str, Any], delta: FakeDelta, name: str) -> None:
    """A grown vocabulary stores every added row."""
    if spec["codec"] == "rows" and "shape" in spec:
        entry, added = delta.tensors[name], torch.arange(258, spec["shape"][0])
        index = delta.parts[name]["index"]
        index[-len(added) :] = added
        index[: -len(added)] = torch.randperm(258)[: entry.rows - len(added)].sort().values


def random_delta(base: dict[str, torch.Tensor], seed: int, kind: str, table: str | None, *, tied: bool) -> FakeDelta:
    """A change of most linears, all vectors of one layer, and the embedding (and head)."""
    generator = torch.Generator().manual_seed(seed)
    delta = FakeDelta()
    for i, name in enumerate(sorted(base)):
        if any(f"{linear}.weight" in name for linear in LINEARS) and (i + seed) % 5:
            delta.add(base, name, generator, **KINDS[kind])
        elif base[name].ndim == 1 and "layers.1" in name:
            delta.add(base, name, generator, codec="dense")
    if table is not None:
        for name in (EMBED,) if tied else (EMBED, HEAD):
            delta.add(base, name, generator, **TABLES[table])
            grown_rows(TABLES[table], delta, name)
        if "shape" in TABLES[table]:
            delta.config_overrides["vocab_size"] = TABLES[table]["shape"][0]
    return delta


def expected_logits(base: Path, delta: FakeDelta, tokens: list[int], *, untied: bool = False) -> torch.Tensor:
    model = oracle(base, delta.merged(base_state(base), untied=untied), delta.config_overrides)
    with torch.no_grad():
        return model(torch.tensor(tokens)[None]).logits[0]


def random_tokens(seed: int, count: int, vocabulary: int) -> list[int]:
    """Ends with the last ids of the vocabulary: those that growth added."""
    drawn = torch.randint(0, vocabulary, (count,), generator=torch.Generator().manual_seed(seed)).tolist()
    return [*drawn[:-2], vocabulary - 1, vocabulary - 2]


def check_one(tmp_path: Path, delta_of: Any, *, tied: bool, expand: bool, untied: bool = False) -> None:
    base = make_base(tmp_path / "base", tie_word_embeddings=tied, **CONFIG)
    delta = delta_of(base_state(base))
    decoder = Decoder.load(base)
    variant = make_variant(decoder, delta, expand=expand)
    tokens = random_tokens(1, 19, variant.config.vocab_size)
    (logits,) = Stepper(decoder, {4: variant}).run([Running(4, tokens)], (6, 1, 9))
    torch.testing.assert_close(logits, expected_logits(base, delta, tokens, untied=untied), **TOLERANCE)


@pytest.mark.parametrize("expand", [False, True], ids=["packed", "bytes"])
@pytest.mark.parametrize("kind", KINDS)
def test_linear_delta_equals_the_merged_model(tmp_path: Path, kind: str, expand: bool) -> None:
    check_one(tmp_path, lambda base: random_delta(base, 3, kind, None, tied=False), tied=False, expand=expand)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("expand", [False, True], ids=["packed", "bytes"])
@pytest.mark.parametrize("table", TABLES)
def test_embedding_and_head_delta_equals_the_merged_model(tmp_path: Path, table: str, expand: bool, tied: bool) -> None:
    check_one(tmp_path, lambda base: random_delta(base, 2, "sign", table, tied=tied), tied=tied, expand=expand)


@pytest.mark.parametrize("changed", [True, False], ids=["own-head", "head-as-in-base"])
def test_untied_variant_of_a_tied_base(tmp_path: Path, changed: bool) -> None:
    def delta_of(base: dict[str, torch.Tensor]) -> FakeDelta:
        delta = random_delta(base, 2, "lora", "quant4", tied=True)
        delta.config_overrides["tie_word_embeddings"] = False
        if changed:
            delta.add(base, HEAD, torch.Generator().manual_seed(1), **TABLES["dense-grown"] | {"shape": (258, 44)})
        return delta

    check_one(tmp_path, delta_of, tied=True, expand=True, untied=True)


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A base and one variant of each kind, with what each should answer to its own prompt, for every slot."""
    base = make_base(tmp_path_factory.mktemp("many") / "base", "qwen3", hidden_size=44, intermediate_size=90)
    state, decoder = base_state(base), Decoder.load(base)
    tables = ["rows-grown", "quant4", None, "quant2-grown", "dense-grown", None, "rows", None, "quant8"]
    deltas = [random_delta(state, i, k, t, tied=False) for i, (k, t) in enumerate(zip(KINDS, tables, strict=True))]
    deltas[2].config_overrides["rope_parameters"] = {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}
    deltas[4].config_overrides["rope_parameters"] = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0}
    deltas[5].tensors = {n: e for n, e in deltas[5].tensors.items() if len(e.shape) == 2}
    models = [oracle(base, d.merged(state), d.config_overrides) for d in [*deltas, FakeDelta()]]
    return decoder, [make_variant(decoder, d) for d in deltas], models


def answer(model: Any, tokens: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor(tokens)[None]).logits[0]


def prompts(slots: list[int], models: list[Any], seed: int) -> list[Running]:
    """One sequence per slot, of odd lengths; slot -1 is models[-1]."""
    lengths = [1 + (7 * i + 3) % 23 for i in range(len(slots))]
    return [
        Running(slot, random_tokens(seed + i, n + 2, models[slot].config.vocab_size))
        for i, (slot, n) in enumerate(zip(slots, lengths, strict=True))
    ]


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("count", [1, 3, 13], ids="S{}".format)
def test_mixed_batch(many: Any, mix: str, count: int) -> None:
    decoder, variants, models = many
    slots = slots_of_mix(mix, count, len(variants), torch.Generator().manual_seed(count))
    sequences = prompts(slots, models, seed=count)
    results = Stepper(decoder, dict(enumerate(variants))).run(sequences, (5, 1, 8, 1))
    for sequence, logits in zip(sequences, results, strict=True):
        expected = answer(models[sequence.slot], sequence.tokens)
        own = expected.shape[1]
        torch.testing.assert_close(logits[:, :own], expected, **TOLERANCE)
        assert (logits[:, own:] == -torch.inf).all()


def test_rows_do_not_depend_on_their_neighbours(many: Any) -> None:
    decoder, variants, models = many
    slots = slots_of_mix("distinct", 9, len(variants), torch.Generator())
    together = Stepper(decoder, dict(enumerate(variants))).run(prompts(slots, models, seed=1), (4, 1))
    for alone, logits in zip(prompts(slots, models, seed=1), together, strict=True):
        (single,) = Stepper(decoder, dict(enumerate(variants))).run([alone], (4, 1))
        torch.testing.assert_close(logits[:, : single.shape[1]], single, rtol=1e-4, atol=2e-5)


def test_permuted_slots_permute_the_answers(many: Any) -> None:
    """Were a row computed with another slot's weights, or a slot's number used for anything but finding them, the two
    runs would differ; and were slots ignored, answers of different variants would be alike."""
    decoder, variants, _ = many
    count = len(variants)
    tokens = random_tokens(9, 12, 258)
    first = Stepper(decoder, dict(enumerate(variants)))
    second = Stepper(decoder, {count + 3 - i: v for i, v in enumerate(variants)})
    a = first.run([Running(i, tokens) for i in range(count)], (5, 1))
    b = second.run([Running(count + 3 - i, tokens) for i in reversed(range(count))], (5, 1))[::-1]
    for i in range(count):
        torch.testing.assert_close(a[i], b[i], rtol=1e-4, atol=2e-5)
        for j in range(i):
            assert (a[i][:, :258] - a[j][:, :258]).abs().max() > 0.1


def test_bfloat16_bytes_packed_and_float32_agree(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", **CONFIG)
    delta = random_delta(base_state(base), 1, "sign-row", "quant4", tied=False)
    tokens = random_tokens(1, 19, 258)
    exact = expected_logits(base, delta, tokens)
    decoder = Decoder.load(base, dtype=torch.bfloat16)
    for expand in (False, True):
        variant = make_variant(decoder, delta, expand=expand)
        (near,) = Stepper(decoder, {0: variant}).run([Running(0, tokens)], (12, 1))
        assert (near - exact).norm() < 0.05 * exact.norm()


def test_regions_are_aligned_and_disjoint(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", **CONFIG)
    decoder = Decoder.load(base)
    delta = random_delta(base_state(base), 1, "sign-row-col-2-planes", "quant2-grown", tied=False)
    sizes = {}
    for expand in (False, True):
        variant = make_variant(decoder, delta, expand=expand)
        sizes[expand] = VariantLayout.plan(delta, decoder.config, torch.float32, "cpu", expand=expand).nbytes
        tensors = [t for placed in variant.linears.values() for _, d in placed for t in _tensors(d)]
        assert variant.vectors is not None
        spans = sorted((t.data_ptr(), t.data_ptr() + t.nbytes) for t in [*tensors, variant.vectors])
        assert all((start - spans[0][0]) % 256 == 0 for start, _ in spans)
        assert all(stop <= start for (_, stop), (start, _) in pairwise(spans))
    assert sizes[False] < sizes[True]


def _tensors(delta: Any) -> list[torch.Tensor]:
    values = [getattr(delta, name) for name in type(delta).__dataclass_fields__]
    return [value for value in values if isinstance(value, torch.Tensor)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_fill_refuses_values_that_are_not_finite(tmp_path: Path, kind: str, poison: float) -> None:
    base = make_base(tmp_path / "base", num_hidden_layers=1)
    decoder = Decoder.load(base)
    delta = FakeDelta()
    name = "model.layers.0.mlp.up_proj.weight"
    delta.add(base_state(base), name, torch.Generator().manual_seed(1), **KINDS[kind])
    part = {"bitdelta": "scale", "lora": "lora_B", "dense": "value", "deltadq": "scale"}[KINDS[kind]["codec"]]
    delta.parts[name][part].view(-1)[0] = poison
    with pytest.raises(DeltaFormatError, match=name):
        make_variant(decoder, delta)


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("model.layers.9.mlp.up_proj.weight", {"shape": (88, 48)}, "no parameter"),
        ("model.layers.0.mlp.up_proj.weight", {"shape": (88, 40)}, "expected"),
        ("model.layers.0.mlp.up_proj.weight", {"shape": (88, 48), "codec": "rows", "rows": 2}, "embeddings and heads"),
        ("model.norm.weight", {"shape": (47,)}, "expected"),
        (EMBED, {"shape": (259, 48)}, "expected"),
    ],
)
def test_plan_refuses_entries_that_do_not_fit(tmp_path: Path, name: str, fields: dict[str, Any], message: str) -> None:
    decoder = Decoder.load(make_base(tmp_path / "base", num_hidden_layers=1))
    base = {EMBED: torch.zeros(258, 48), name: torch.zeros(fields["shape"])}
    delta = FakeDelta()
    delta.add(base, name, torch.Generator().manual_seed(1), **{"codec": "dense", **fields})
    with pytest.raises(DeltaFormatError, match=message):
        VariantLayout.plan(delta, decoder.config, torch.float32, "cpu")


def test_plan_refuses_another_architecture(tmp_path: Path) -> None:
    decoder = Decoder.load(make_base(tmp_path / "base", num_hidden_layers=1))
    for overrides in ({"num_hidden_layers": 2}, {"model_type": "gpt2"}, {"tie_word_embeddings": True}):
        with pytest.raises(DeltaFormatError, match="config override"):
            VariantLayout.plan(FakeDelta(config_overrides=overrides), decoder.config, torch.float32, "cpu")
