"""Distillation: exact gradients, only the scales move, padding does not count, the loss falls, resuming."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from shutil import copytree, ignore_patterns

import pytest
import torch
from torch import nn
from torch.nn import functional

from bitdelta_core.checkpoint import Checkpoint
from bitdelta_core.delta import compress as room
from bitdelta_core.delta.bitdelta import encode, unpack
from bitdelta_core.delta.calibration import Batches, read_calibration, sequences
from bitdelta_core.delta.compress import compress, delta_config, plan, stream
from bitdelta_core.delta.distill import Distillation, DistillOptions, prepare, tokenise
from bitdelta_core.delta.format import open_delta
from bitdelta_core.delta.planning import CompressOptions
from bitdelta_core.delta.signlinear import SignLinear
from bitdelta_core.delta.spec import ScaleLayout, TensorEntry
from bitdelta_core.delta.writer import DeltaWriter
from bitdelta_core.errors import CheckpointError, InvalidRequest
from tests.tiny import make_base, make_finetune, make_tokenizer

LAYOUTS: list[ScaleLayout] = ["tensor", "row", "row_col"]
QUICK = DistillOptions(steps=12, batch=2, length=24, lr=0.02)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("base") / "base")


@pytest.fixture(scope="module")
def fine(base: Path) -> Path:
    return make_finetune(base, base.parent / "fine", scale=0.2, new_tokens=("<|x|>",))


def dense_weight(layer: SignLinear) -> torch.Tensor:
    """The layer's weight as one differentiable expression: what its output must be a plain linear map of."""
    weight = layer.linear.weight
    for p in range(layer.entry.planes):
        plane = unpack(layer.sign_PNk[p], weight.shape[1]).to(weight.dtype)
        factors = {name: layer.initial[name][p] * layer.factors[name][p] for name in layer.initial}
        plane = plane * factors["scale"]
        plane = plane * factors["row"].unsqueeze(1) if "row" in factors else plane
        weight = weight + (plane * factors["col"] if "col" in factors else plane)
    return weight


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("planes", [1, 3])
def test_gradients_equal_those_of_the_dense_equivalent(layout: ScaleLayout, planes: int) -> None:
    """To the scales and to the input: the sign branch is in the chain."""
    torch.manual_seed(0)
    n, k = 7, 13
    w = torch.randn(n, k)
    entry = TensorEntry(
        name="w", shape=(n, k), codec="bitdelta", dtype=torch.float32, planes=planes, scale_layout=layout
    )
    _, parts = encode(w, w + 0.3 * torch.randn(n, k), entry)
    linear = nn.Linear(k, n)
    linear.weight.data.copy_(w)
    layer = SignLinear(linear, entry, parts)
    x = torch.randn(2, 5, k, requires_grad=True)
    wanted_of = [x, *layer.factors.values()]
    outer = torch.randn(2, 5, n)
    got = layer(x)
    want = functional.linear(x, dense_weight(layer), linear.bias)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    got_grads = torch.autograd.grad((got * outer).sum(), wanted_of)
    want_grads = torch.autograd.grad((want * outer).sum(), wanted_of)
    for a, b in zip(got_grads, want_grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_gradient_to_the_input_agrees_with_finite_differences() -> None:
    torch.manual_seed(1)
    w = torch.randn(4, 6)
    entry = TensorEntry(name="w", shape=(4, 6), codec="bitdelta", dtype=torch.float32, scale_layout="row_col")
    _, parts = encode(w, w + torch.randn(4, 6), entry)
    layer = SignLinear(nn.Linear(6, 4), entry, parts).double()
    layer.initial = {name: value.double() for name, value in layer.initial.items()}
    x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, (x,))


def distillation(base: Path, fine: Path, work: Path, options: DistillOptions) -> Distillation:
    checkpoint = Checkpoint(base)
    source = plan(checkpoint, fine, CompressOptions())
    config = delta_config(checkpoint, source)
    writer = DeltaWriter(work, source.entries)
    stream(source, writer)
    tuned = Checkpoint(fine)
    batches = tokenise(checkpoint, tuned, read_calibration(None), options)
    return prepare(checkpoint, tuned, config, writer, batches, torch.device("cpu"))


def test_only_the_scales_are_trained_and_padding_does_not_count(base: Path, fine: Path, tmp_path: Path) -> None:
    run = distillation(base, fine, tmp_path / "d", QUICK)
    frozen = {n: p.detach().clone() for n, p in run.student.named_parameters() if "factors" not in n}
    initial = [scale.detach().clone() for scale in run.scales]
    list(run.run(QUICK))
    after = dict(run.student.named_parameters())
    assert all(torch.equal(after[name], value) for name, value in frozen.items())
    assert all(not torch.equal(now, before) for now, before in zip(run.scales, initial, strict=True))
    ids = torch.randint(0, 256, (2, 9))
    alone = run.loss(ids, torch.ones(2, 9, dtype=torch.bool))
    padded = torch.cat([ids, torch.full((2, 5), 33)], 1)
    mask = torch.cat([torch.ones(2, 9), torch.zeros(2, 5)], 1).bool()
    torch.testing.assert_close(run.loss(padded, mask), alone)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_distilling_lowers_the_loss_and_changes_scales_alone(
    layout: ScaleLayout, base: Path, fine: Path, tmp_path: Path
) -> None:
    coding = CompressOptions(scale_layout=layout, bits=2)
    plain = open_delta(compress(base, fine, tmp_path / "plain", coding))
    trained = open_delta(compress(base, fine, tmp_path / "trained", coding, distillation=QUICK))
    noted = trained.config.provenance["distillation"]
    assert noted["loss_after"] < 0.95 * noted["loss_before"]
    changed = set()
    for entry in plain.config.tensors.values():
        for part in entry.parts():
            if not torch.equal(plain.part(entry, part), trained.part(entry, part)):
                changed.add(part)
    scales = {"tensor": {"scale"}, "row": {"scale", "row"}, "row_col": {"scale", "row", "col"}}[layout]
    assert changed == scales


def test_training_is_done_once_however_often_resumed(
    base: Path, fine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted half-way through putting the trained scales in place, it ends in the same bytes, untrained."""
    whole = compress(base, fine, tmp_path / "whole", distillation=QUICK)
    overwrite = DeltaWriter.overwrite

    def torn(self: DeltaWriter, parts: dict[str, torch.Tensor]) -> None:
        overwrite(self, dict(list(parts.items())[:5]))
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(DeltaWriter, "overwrite", torn)
        with pytest.raises(KeyboardInterrupt):
            compress(base, fine, tmp_path / "torn", distillation=QUICK)
    monkeypatch.setattr(room, "prepare", lambda *args: pytest.fail("trained twice"))
    resumed = compress(base, fine, tmp_path / "torn", distillation=QUICK)
    assert {f.name: f.read_bytes() for f in resumed.iterdir()} == {f.name: f.read_bytes() for f in whole.iterdir()}


def test_calibration_files(base: Path, fine: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(fine)
    plain = sequences(b"abcdefghij" * 3, tokenizer, length=11, jsonl=False)
    assert [len(ids) for ids in plain] == [11, 11, 11]
    assert all(ids[0] == tokenizer.bos_token_id for ids in plain)
    asked = {"prompt": "one", "completion": " two"}
    lines = [{"text": "hello"}, {"messages": [{"role": "user", "content": "hi"}]}, asked]
    text = "\n".join(json.dumps(line) for line in lines).encode()
    decoded = [tokenizer.decode(ids) for ids in sequences(text, tokenizer, length=64, jsonl=True)]
    assert "hello" in decoded[0]
    assert decoded[1] == "<|user|>hi\n"
    assert decoded[2] == f"{tokenizer.bos_token}one two{tokenizer.eos_token}"
    for bad in (b"", b'{"other": 1}', b'{"prompt": "alone"}', b"no json", b"\xff\xfe", b'{"messages": [1]}'):
        with pytest.raises(InvalidRequest, match="calibration"):
            sequences(bad, tokenizer, length=8, jsonl=True)
    for file, named in ((tmp_path / "x.csv", ".jsonl"), (tmp_path / "none.txt", "cannot be read")):
        with pytest.raises(InvalidRequest, match=named):
            compress(base, fine, tmp_path / "d", distillation=DistillOptions(calibration=file))


def test_batches_pad_mask_and_repeat() -> None:
    batches = iter(Batches([[1, 2, 3], [4], [5, 6]], size=2))
    seen: list[int] = []
    for _ in range(3):
        ids, mask = next(batches)
        assert ids.shape == mask.shape
        assert (ids[~mask] == 0).all()
        seen += ids[mask].tolist()
    assert sorted(seen) == sorted([1, 2, 3, 4, 5, 6] * 2)


def test_batches_are_parted_and_put_beside_others() -> None:
    practice, held_out = Batches([[n, n] for n in range(9)], size=4, seed=3).parted(4)
    assert held_out == Batches([[0, 0], [4, 4], [8, 8]], size=4, seed=3)
    assert sorted(practice.found + held_out.found) == [[n, n] for n in range(9)]
    both = practice.beside(Batches([[100] * 5, [101] * 6, [102] * 7, [103]], size=9))
    assert both == Batches([*practice.found, [100] * 5, [101] * 6, [102] * 7], size=4, seed=3), "11 tokens: one more"
    assert practice.beside(Batches([[104] * 90], size=9)).found[-1] == [104] * 64
    assert practice.beside(Batches([[100]], size=1)).found == [*practice.found, [100]]


def test_training_that_diverges_leaves_the_scales_as_they_were(base: Path, fine: Path, tmp_path: Path) -> None:
    wild = DistillOptions(steps=6, batch=1, length=16, lr=1e30)
    plain = open_delta(compress(base, fine, tmp_path / "plain"))
    kept = open_delta(compress(base, fine, tmp_path / "wild", distillation=wild))
    noted = kept.config.provenance["distillation"]
    assert noted["loss_after"] == noted["loss_before"]
    for entry in plain.config.tensors.values():
        assert all(torch.equal(plain.part(entry, part), kept.part(entry, part)) for part in entry.parts())


def test_the_same_seed_trains_the_same_scales(base: Path, fine: Path, tmp_path: Path) -> None:
    once, again, other = (
        compress(base, fine, tmp_path / name, distillation=replace(QUICK, seed=seed)) / "delta.safetensors"
        for name, seed in (("once", 3), ("again", 3), ("other", 4))
    )
    assert once.read_bytes() == again.read_bytes()
    assert once.read_bytes() != other.read_bytes()


def test_tokenizers_that_do_not_serve_are_named_before_anything_is_written(
    base: Path, fine: Path, tmp_path: Path
) -> None:
    def bare(source: Path) -> Path:
        return copytree(source, tmp_path / source.name, ignore=ignore_patterns("tokenizer*", "chat_template*"))

    with pytest.raises(CheckpointError, match="no tokenizer"):
        compress(bare(base), bare(fine), tmp_path / "out", distillation=QUICK)
    make_tokenizer(tmp_path / "fine", extra=tuple(f"<|{i}|>" for i in range(9)))
    text = tmp_path / "text.txt"
    text.write_text("words <|8|>")
    with pytest.raises(CheckpointError, match="token 266, its embedding has 259 rows"):
        compress(base, tmp_path / "fine", tmp_path / "out", distillation=replace(QUICK, calibration=text))
    talk = tmp_path / "talk.jsonl"
    talk.write_text('{"messages": [{"role": "user", "content": "hi"}]}')
    with pytest.raises(InvalidRequest, match="no chat template"):
        compress(
            base, copytree(base, tmp_path / "plain"), tmp_path / "out", distillation=replace(QUICK, calibration=talk)
        )
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("wrong", [{"steps": 0}, {"batch": 0}, {"length": 1}, {"lr": 0.0}, {"lr": float("nan")}])
def test_options_out_of_range(base: Path, fine: Path, tmp_path: Path, wrong: dict[str, float]) -> None:
    with pytest.raises(InvalidRequest, match=next(iter(wrong))):
        compress(base, fine, tmp_path / "d", distillation=DistillOptions(**wrong))  # pyright: ignore
    with pytest.raises(InvalidRequest, match="no scales"):
        compress(base, fine, tmp_path / "d", CompressOptions(codec="dense"), distillation=QUICK)


def test_default_calibration_text_is_there_and_plain() -> None:
    text = read_calibration(None)
    assert 60_000 < len(text) < 100_000
    text.decode("ascii")
