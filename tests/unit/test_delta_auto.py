"""Codec auto: budgets kept to the byte, what they buy, interruption, growth, and what is refused."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from bitdelta_core.checkpoint import Checkpoint
from bitdelta_core.delta import allocation, auto, feedback, refine, sensitivity, spectral
from bitdelta_core.delta.auto_options import AutoOptions
from bitdelta_core.delta.calibration import Batches
from bitdelta_core.delta.distill import DistillOptions
from bitdelta_core.delta.format import DeltaReader, open_delta
from bitdelta_core.delta.inspect import summarise
from bitdelta_core.delta.moments import Metric
from bitdelta_core.delta.refine import Bench, SpectralLinear
from bitdelta_core.delta.restore import open_for, restore
from bitdelta_core.delta.verify import compare, verify
from bitdelta_core.errors import DeltaFormatError, InvalidRequest
from tests.tiny import make_base, make_finetune
from tests.unit.by_the_book import coded_integers

UP = "model.layers.0.mlp.up_proj.weight"
EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
PLAIN = {"calibrate": False}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("base") / "base", num_hidden_layers=1)


@pytest.fixture(scope="module")
def fine(base: Path) -> Path:
    return make_finetune(base, base.parent / "fine", scale=0.3, new_tokens=("<|x|>",))


def compressed(base: Path, fine: Path, out: Path, **fields: object) -> DeltaReader:
    delta = auto.compress(base, fine, out, AutoOptions(**{**PLAIN, **fields}))  # pyright: ignore[reportArgumentType]
    verify(base, delta)
    return open_delta(delta)


def error(base: Path, delta: DeltaReader, fine: Path) -> float:
    return sum(e.relative_error for e in compare(base, delta.path, fine))


@pytest.mark.parametrize("fields", [{}, {"calibrate": True, "texts": 4, "length": 32}], ids=["data-free", "calibrated"])
def test_bits_are_kept_and_more_of_them_come_nearer(base: Path, fine: Path, tmp_path: Path, fields: dict) -> None:
    errors = []
    for bits in (0.3, 1.0, 4.0):
        delta = compressed(base, fine, tmp_path / f"{bits}", bits=bits, **fields)
        entries = [e for e in delta.config.tensors.values() if len(e.shape) == 2]
        stored = sum(
            delta.part(e, part).nbytes for e in entries for part in e.parts() if part not in ("extra", "value")
        )
        budget = bits * sum(
            258 * 48 if e.name in (EMBED, HEAD) else e.shape[0] * e.shape[1] for e in all_matrices(base)
        )
        assert 0.7 * budget <= 8 * stored <= budget, "neither over the budget nor far below"
        errors.append(error(base, delta, fine))
    assert errors[1] > 2 * errors[2]
    assert fields or errors[0] > errors[1], "calibrated errors are weighed, which a plain distance does not see"


def all_matrices(base: Path) -> list:
    from types import SimpleNamespace

    own = Checkpoint(base)
    return [SimpleNamespace(name=n, shape=own.shape(n)) for n in own.names if len(own.shape(n)) == 2]


@pytest.mark.parametrize("limit", [28_000, 33_000])
def test_max_bytes_counts_every_file(base: Path, fine: Path, tmp_path: Path, limit: int) -> None:
    delta = compressed(base, fine, tmp_path / "d", max_bytes=limit)
    size = sum(file.stat().st_size for file in delta.path.iterdir())
    assert size == delta.nbytes == summarise(delta).nbytes
    assert 0.6 * limit < size <= limit


def test_what_matters_more_gets_more(tmp_path: Path) -> None:
    """A matrix of which errors cost a hundred times as much as of its equal is stored nearly exactly before it."""
    difference = torch.randn(40, 60, generator=torch.Generator().manual_seed(0))
    dear, cheap = Metric(100 * torch.eye(60)), Metric(torch.eye(60))
    spectra = {n: allocation.decompose(difference, m, Metric(), 40) for n, m in (("dear", dear), ("cheap", cheap))}
    found = allocation.fit({n: lambda s=s: s for n, s in spectra.items()}, 1.0 * 2 * 2400)
    errors = {}
    for name, coded in found.coding.items():
        errors[name] = (difference - (coded.matrix() if coded else 0)).square().mean().item()
    assert errors["dear"] < 0.7 * errors["cheap"]


def test_errors_are_kept_out_of_directions_that_the_inputs_have(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(allocation, "OWN", 0.0)
    generator = torch.Generator().manual_seed(1)
    difference = torch.randn(30, 50, generator=generator)
    inputs = torch.randn(500, 50, generator=generator) * torch.logspace(0, -3, 50)
    lost = {}
    for name, metric in (("blind", Metric()), ("seeing", Metric(inputs.T @ inputs / 500))):
        spectrum = allocation.decompose(difference, metric, Metric(), 30)
        coded = allocation.fit({"w": lambda s=spectrum: s}, 1.0 * 1500).coding["w"]
        assert coded is not None
        lost[name] = (inputs @ (difference - coded.matrix()).T).square().sum().item()
    assert lost["seeing"] < 0.6 * lost["blind"]


def test_errors_are_kept_out_of_directions_that_the_difference_has(monkeypatch: pytest.MonkeyPatch) -> None:
    """Text knows nothing of them: they are where training went."""
    generator = torch.Generator().manual_seed(1)
    strong = torch.randn(80, 6, generator=generator)
    difference = torch.randn(60, 6, generator=generator) @ strong.T + 2 * torch.randn(60, 80, generator=generator)
    text = Metric(torch.eye(80))
    lost = {}
    for own in (0.0, allocation.OWN):
        monkeypatch.setattr(allocation, "OWN", own)
        spectrum = allocation.decompose(difference, text, Metric(), 60)
        coded = allocation.fit({"w": lambda s=spectrum: s}, 0.5 * 4800).coding["w"]
        assert coded is not None
        lost[own] = ((difference - coded.matrix()) @ torch.linalg.qr(strong).Q).square().sum().item()
    assert lost[allocation.OWN] < 0.7 * lost[0.0]


def test_second_moments_are_those_of_autograd(base: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval().requires_grad_(False)
    batches = Batches([[256, 72, 105, 33, 10], [256, 65, 66, 67]], 2, seed=3)
    got = dict(sensitivity.measure(model, [UP, EMBED, HEAD], batches, 2))
    again = dict(sensitivity.measure(model, [UP], batches, 2))
    assert torch.equal(got[UP][0].moment, again[UP][0].moment)
    seen: list[torch.Tensor] = []
    hook = model.get_submodule(UP.removesuffix(".weight")).register_forward_hook(
        lambda m, args, out: seen.append(args[0])
    )
    masks, frequency = [], torch.zeros(258)
    for _, (ids, mask) in zip(range(2), batches, strict=False):
        model(input_ids=ids, attention_mask=mask.long())
        masks.append(mask)
        frequency += torch.bincount(ids[mask], minlength=258)
    hook.remove()
    rows = torch.cat([x[mask] for x, mask in zip(seen, masks, strict=True)])
    torch.testing.assert_close(got[UP][0].moment, rows.T @ rows / len(rows), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(got[EMBED][1].moment, frequency / len(rows))
    assert got[HEAD][1].moment.shape == (258,)
    assert (torch.linalg.eigvalsh(got[UP][1].moment) > -1e-6).all()


def test_equal_runs_give_equal_bytes_and_an_interrupted_one_goes_on(
    base: Path, fine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = compressed(base, fine, tmp_path / "a", bits=0.5)
    calls = 0
    own = auto.Run._decompose

    def failing(self: auto.Run, *args: object) -> object:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise KeyboardInterrupt
        return own(self, *args)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(auto.Run, "_decompose", failing)
    with pytest.raises(KeyboardInterrupt):
        compressed(base, fine, tmp_path / "b", bits=0.5)
    second = compressed(base, fine, tmp_path / "b", bits=0.5)
    assert calls == 4 + 9 - 3, "the three that were done are not done again"
    assert {f.name: f.read_bytes() for f in first.path.iterdir()} == {
        f.name: f.read_bytes() for f in second.path.iterdir()
    }
    assert {p.name for p in tmp_path.iterdir()} == {"a", "b"}, "nothing is left lying about"


def test_training_is_kept_only_where_it_helps(base: Path, tmp_path: Path) -> None:
    fine = make_finetune(base, tmp_path / "fine", scale=0.3, only="proj")
    asked = tmp_path / "asked.txt"
    asked.write_text("What is written here is all that there is to learn from. " * 40)
    reading = {"calibrate": True, "texts": 4, "length": 24, "bits": 0.6}
    plain = compressed(base, fine, tmp_path / "plain", **reading)
    for name, lr, helps in (("gentle", 0.05, True), ("wild", 50.0, False)):
        training = DistillOptions(steps=60, batch=4, lr=lr)
        delta = compressed(base, fine, tmp_path / name, **reading, examples=asked, distill=training)
        measured, options = (delta.config.provenance[key] for key in ("measured", "options"))
        assert (measured["kl_trained"] < 0.5 * measured["kl_untrained"]) == helps
        assert options["examples"] == "asked.txt"
        assert options["training"] == {"steps": 60, "batch": 4, "lr": lr}
        same = (
            delta.part(delta.config.tensors[UP], "code").tolist()
            == plain.part(plain.config.tensors[UP], "code").tolist()
        )
        assert same != helps
        assert summarise(delta).bytes_by_kind["linears"] * 8 <= 0.6 * 48 * (48 * 2 + 32 * 2 + 88 * 3)


def test_training_fills_its_budget_and_no_more(base: Path, tmp_path: Path) -> None:
    """Away from where it starts, three quarters of it, and held back however far values would go."""
    fine = make_finetune(base, tmp_path / "fine", scale=0.3, only="proj")
    text = [[1, *range(start, start + 20)] for start in range(5, 90)]
    teacher, student = (AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval() for path in (fine, fine))
    own, new = Checkpoint(base), Checkpoint(fine)
    differences = {name: (new.get(name) - own.get(name)).float() for name in own.names if "proj" in name}
    spectra = {name: allocation.decompose(d, Metric(), Metric(), 48) for name, d in differences.items()}
    loads = {name: (lambda found=found: found) for name, found in spectra.items()}
    budget = 0.5 * sum(found.numel for found in spectra.values())
    delta = allocation.unaided(loads, refine.START * budget)
    starts = {name: allocation.scaled(found, delta) for name, found in spectra.items()}
    bench = Bench(teacher, student, {n: own.get(n) for n in spectra}, Batches(text, 4))
    begun = sum(allocation.code_bits(start.rounded()) for start in starts.values() if start)
    assert begun == pytest.approx(refine.START * budget, rel=0.1)
    trained = bench.train(refine.Training(starts, {}, budget), DistillOptions(steps=150, lr=0.05), Batches(text, 4))
    assert 1.02 * begun < sum(map(allocation.code_bits, trained.values())) <= 1.05 * budget


def test_gradients_pass_the_rounding(base: Path) -> None:
    linear = torch.nn.Linear(6, 5)
    start = allocation.Scaled(
        torch.tensor([[1.2, 0.4, -2.3, 0, 2.8, 0.1]]),
        torch.tensor([[2.1, 0.3, -0.9, 0, 1.4]]),
        0.5,
        torch.tensor([3], dtype=torch.uint8),
    )
    layer, coded = SpectralLinear(linear, start), start.rounded()
    assert coded is not None
    assert coded.a_rK.tolist() == [[1, 0, -2, 0, 3, 0]]
    x = torch.randn(7, 6, generator=torch.Generator().manual_seed(0), requires_grad=True)
    layer(x).square().sum().backward()
    weight = (linear.weight.detach() + coded.matrix()).requires_grad_(True)
    x2 = x.detach().clone().requires_grad_(True)
    torch.nn.functional.linear(x2, weight, linear.bias).square().sum().backward()
    torch.testing.assert_close(x.grad, x2.grad)
    scale = 0.5 * 2 ** (-3 / 8)
    torch.testing.assert_close(layer.a.grad, scale * (coded.b_rN.float() @ weight.grad))
    torch.testing.assert_close(layer.b.grad, scale * (coded.a_rK.float() @ weight.grad.T))


def test_fidelity_that_is_asked_for_is_reached(base: Path, fine: Path, tmp_path: Path) -> None:
    sizes = {}
    for wanted in (0.5, 0.95):
        fields = {"calibrate": True, "texts": 4, "length": 24, "min_fidelity": wanted}
        delta = compressed(base, fine, tmp_path / f"{wanted}", **fields)
        sizes[wanted] = delta.nbytes
        options = AutoOptions(calibrate=True, texts=4, length=24, min_fidelity=wanted)
        batches = auto.tokenise(Checkpoint(base), Checkpoint(fine), auto.read_calibration(None), options.reading)
        teacher, student = (AutoModelForCausalLM.from_pretrained(fine, dtype=torch.float32).eval() for _ in range(2))
        restored = restore(base, delta.path, tmp_path / f"r{wanted}")
        names = [n for n in Checkpoint(fine).names if len(Checkpoint(fine).shape(n)) == 2]
        wide = {
            n: torch.cat([Checkpoint(base).get(n), Checkpoint(fine).get(n)[len(Checkpoint(base).get(n)) :]])
            for n in names
        }
        kl_base = Bench(teacher, student, wide, batches).kl({})
        kl = Bench(teacher, student, {n: Checkpoint(restored).get(n) for n in names}, batches).kl({})
        assert 1 - kl / kl_base >= wanted - 1e-3
    assert sizes[0.5] < sizes[0.95]


def test_few_changed_rows_are_stored_whole_and_unchanged_matrices_not_at_all(base: Path, tmp_path: Path) -> None:
    fine = make_finetune(base, tmp_path / "fine", only="mlp", new_tokens=("<|x|>", "<|y|>"))
    tensors = compressed(base, fine, tmp_path / "d", bits=2.0).config.tensors
    assert {tensors[name].codec for name in (EMBED, HEAD)} == {"rows"}
    assert {tensors[name].rows for name in (EMBED, HEAD)} == {2}
    assert {n for n, e in tensors.items() if e.codec == "spectral"} == {
        UP.replace("up", p) for p in ("up", "gate", "down")
    }


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_grown_vocabularies_come_back(tied: bool, tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", num_hidden_layers=1, tie_word_embeddings=tied)
    fine = make_finetune(base, tmp_path / "fine", scale=0.3, new_tokens=("<|x|>", "<|y|>"))
    delta = compressed(base, fine, tmp_path / "d", bits=4.0, calibrate=True, texts=4, length=24)
    assert (HEAD in delta.config.tensors) != tied
    assert delta.config.tensors[EMBED].rows == 258
    back = Checkpoint(restore(base, delta.path, tmp_path / "back"))
    assert torch.equal(back.get(EMBED)[258:], Checkpoint(fine).get(EMBED)[258:])
    assert all(e.relative_error < 0.9 for e in compare(base, delta.path, fine))


def test_the_page_is_enough_to_read_the_code(base: Path, fine: Path, tmp_path: Path) -> None:
    delta = compressed(base, fine, tmp_path / "d", bits=0.7)
    page = (Path(__file__).parents[2] / "docs" / "delta-format.md").read_text()
    decays = [int(n) for line in re.findall(r"^    ((?:\d{6,}, ){7}\d{6,})$", page, re.M) for n in line.split(", ")]
    assert len(decays) == 40
    entry = delta.config.tensors[UP]
    (n, k), r = entry.shape, entry.rank
    spread = delta.part(entry, "spread").tolist()
    classes = [c for c in spread[0] for _ in range(k)] + [c for c in spread[1] for _ in range(n)]
    values = np.array(coded_integers(delta.part(entry, "code").numpy().tobytes(), classes, decays), float)
    scale = float(delta.part(entry, "scale")) * 2 ** (-delta.part(entry, "exponent").numpy().astype(float) / 8)
    mine = (values[k * r :].reshape(r, n).T * scale) @ values[: k * r].reshape(r, k)
    back = Checkpoint(restore(base, delta.path, tmp_path / "back")).get(UP).numpy()
    np.testing.assert_allclose(Checkpoint(base).get(UP).numpy() + mine, back, rtol=1e-5, atol=1e-6)


def test_a_code_that_does_not_decode_names_its_tensor(base: Path, fine: Path, tmp_path: Path) -> None:
    delta = compressed(base, fine, tmp_path / "d", bits=0.7)
    entry = delta.config.tensors[UP]
    file, extent = delta.extent(entry, "code")
    raw = bytearray((delta.path / file).read_bytes())
    raw[extent.start + 9] ^= 4
    (delta.path / file).write_bytes(raw)
    reader = open_for(Checkpoint(base), delta.path)
    with pytest.raises(DeltaFormatError, match=re.escape(f"{UP}.code")):
        spectral.factors(entry, reader.parts(entry))


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({}, "one of bits"),
        ({"bits": 1.0, "max_bytes": 10**6}, "one of bits"),
        ({"bits": 0.01}, "bits must be"),
        ({"min_fidelity": 1.0, "calibrate": True}, "min_fidelity must be"),
        ({"min_fidelity": 0.9}, "without calibration text there is no min_fidelity"),
        ({"bits": 1.0, "examples": Path("some.txt")}, "without calibration text there is no examples"),
        ({"bits": 1.0, "distill": DistillOptions(steps=0)}, "distill steps must be"),
        ({"bits": 1.0, "texts": 0}, "texts must be"),
        ({"max_bytes": 2000}, "takes up to"),
    ],
)
def test_options_that_are_refused(base: Path, fine: Path, tmp_path: Path, fields: dict, named: str) -> None:
    with pytest.raises(InvalidRequest, match=named):
        compressed(base, fine, tmp_path / "d", **fields)
    assert not list(tmp_path.iterdir())


def test_auto_in_format_version_1(base: Path, fine: Path, tmp_path: Path) -> None:
    delta = compressed(base, fine, tmp_path / "d", bits=0.7).path
    body = json.loads((delta / "delta_config.json").read_text())
    assert (body["format_version"], body["codec"]) == (2, "auto")
    (delta / "delta_config.json").write_text(json.dumps(body | {"format_version": 1}))
    with pytest.raises(DeltaFormatError, match="codec auto in format version 1"):
        open_delta(delta)


def test_a_rank_above_both_sides(base: Path, fine: Path, tmp_path: Path) -> None:
    delta = compressed(base, fine, tmp_path / "d", bits=0.7).path
    body = json.loads((delta / "delta_config.json").read_text())
    body["tensors"][UP]["rank"] = 49
    (delta / "delta_config.json").write_text(json.dumps(body))
    with pytest.raises(DeltaFormatError, match="rank 49 of 88 rows and 48 columns"):
        open_delta(delta)


def moment(size: int, seed: int) -> torch.Tensor:
    inputs = torch.randn(3 * size, size, generator=torch.Generator().manual_seed(seed)) * torch.logspace(0, -1, size)
    mixed = inputs @ torch.randn(size, size, generator=torch.Generator().manual_seed(seed + 1))
    return mixed.T @ mixed / len(mixed)


def test_feedback_takes_back_what_rounding_cost() -> None:
    """Sides longer than a block; the errors left weigh less than those of rounding each value for itself."""
    values = 2 * torch.randn(5, 150, generator=torch.Generator().manual_seed(0))
    factor = torch.linalg.cholesky(moment(150, 1) + 0.1 * torch.eye(150))
    plain, fed = (feedback.rounded([values], [f])[0] for f in (None, factor))
    assert torch.equal(plain, values.round().to(torch.int8))
    lost = [((values - q) @ factor).square().sum().item() for q in (plain, fed)]
    assert lost[1] < 0.6 * lost[0]


def test_feedback_of_several_is_that_of_each() -> None:
    sides = [3 * torch.randn(rank, 70, generator=torch.Generator().manual_seed(rank)) for rank in (1, 4, 9)]
    factors = [torch.linalg.cholesky(moment(70, seed) + torch.eye(70)) for seed in (1, 2, 3)]
    together = feedback.rounded(sides, factors)
    for side, factor, found in zip(sides, factors, together, strict=True):
        assert torch.equal(feedback.rounded([side], [factor])[0], found)
    assert feedback.rounded([], []) == []


def test_what_is_kept_is_about_what_the_factors_give_back() -> None:
    difference = torch.randn(60, 80, generator=torch.Generator().manual_seed(2))
    spectrum = allocation.decompose(difference, Metric(), Metric(), 60)
    factor_k, factor_n = (factor.float() for factor in spectrum.factors if factor is not None)

    def weighed(matrix: torch.Tensor) -> float:
        return (factor_n.T @ matrix @ factor_k).square().sum().item()

    for bits in (1.0, 2.0):
        found = allocation.fit({"w": lambda: spectrum}, bits * 4800)
        coded = found.coding["w"]
        assert coded is not None
        left = 1 - weighed(difference - coded.matrix()) / weighed(difference)
        assert allocation.kept(spectrum, found.delta) == pytest.approx(left, abs=0.12)
