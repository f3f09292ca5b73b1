"""Codec `auto`: the most faithful delta that fits a budget, over all matrices at once.

Every changed matrix, embedding and head included, is decomposed where errors weigh what they cost (`sensitivity.py`,
`allocation.py`), and one budget is spread over all of them: what matters little gets no bytes at all. Vectors stay
whole, and embeddings of which few rows changed are stored as those rows. Where there are examples of what the variant
is asked, factors are trained on them (`refine.py`): calibration text in their place lost answers where we looked.
Memory: one matrix at a time, but calibration holds the model where there is room (else a layer: `streaming.py`),
choosing scales holds it twice where there is room, and so does training (and 16 bytes for each value that it trains);
OUT.stage holds the decompositions until the delta is done, and so does a GPU with room for twice as much, on which all
but reading and writing happens.
docs/fidelity.md has what this rests on.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch

from bitdelta_core.checkpoint import Checkpoint
from bitdelta_core.delta import allocation, refine, sensitivity, spectral
from bitdelta_core.delta.allocation import Fit, Spectrum
from bitdelta_core.delta.auto_options import AutoOptions
from bitdelta_core.delta.budget import Budget, Plan
from bitdelta_core.delta.calibration import Batches, read_calibration
from bitdelta_core.delta.codecs import encode
from bitdelta_core.delta.config import DeltaConfig
from bitdelta_core.delta.device import chosen_device, free_bytes
from bitdelta_core.delta.distill import tokenise
from bitdelta_core.delta.format import EMBEDDING, HEAD
from bitdelta_core.delta.lora import is_adapter
from bitdelta_core.delta.moments import Metric, Metrics, unknown
from bitdelta_core.delta.pairing import Pairing
from bitdelta_core.delta.refine import Bench, Coding, Training, fidelity
from bitdelta_core.delta.spec import TensorEntry
from bitdelta_core.delta.spectral import Coded
from bitdelta_core.delta.stage import Stage
from bitdelta_core.delta.streaming import Streamed
from bitdelta_core.delta.writer import SHARD_BYTES, DeltaWriter, check_absent
from bitdelta_core.errors import InvalidRequest

Progress = Callable[[int, int, str], None]
_HELD_OUT, _FEWEST = 8, 16
"""One of so many examples judges what came of the others; and how many there must be."""
_SEARCHES = 6
_POWERS = (0.0, 0.15, 0.3, 0.45, 0.6)
"""Of what a matrix keeps, by which its scale grows."""
_UNSEEN_POWER = 0.15
"""Where none can be tried: close to the best wherever we looked (docs/fidelity.md, memory)."""
_TRAINED_BYTES = 16
"""Of a value: itself, its gradient, and Adam's two moments, in fp32."""
Known = MutableMapping[str, Spectrum]


def compress(
    base_path: Path,
    finetune_path: Path,
    out: Path,
    options: AutoOptions,
    *,
    base_name: str | None = None,
    revision: str | None = None,
    shard_bytes: int = SHARD_BYTES,
    progress: Progress = lambda done, total, name: None,
    device: str | None = None,
    known: Known | None = None,
) -> Path:
    """Write the delta of a full fine-tune to `out`. An interrupted run goes on when started again.

    `device`: "cpu" or "cuda"; None: a GPU where there is one. `known`: decompositions of calls with the same models and
    text but other budgets, the largest first; they are added to it and stay in memory, instead of in OUT.stage.

    Raises:
        CheckpointError: a directory cannot be read, or the two do not belong together.
        InvalidRequest: `out` exists or cannot be written, the calibration text cannot be used, an option is out of
            range, the budget is too small for what must be stored whole, there is no such device, or the fine-tune is
            an adapter.
    """
    options.check()
    used = chosen_device(device)
    check_absent(out)
    if is_adapter(finetune_path):
        raise InvalidRequest(f"{finetune_path} is a PEFT adapter: it is taken as it is (codec lora)", param="codec")
    base, fine = Checkpoint(base_path), Checkpoint(finetune_path)
    pairing = Pairing(base, fine)
    pairing.check()
    if options.min_fidelity is not None and not sensitivity.has_room(fine, used, 2):
        raise InvalidRequest(
            f"min_fidelity needs {fine.path} twice in memory, for which there is no room: give bits or max_bytes",
            param="min_fidelity",
        )
    text = read_calibration(options.calibration) if options.calibrate else b""
    plan = Plan.of(pairing, options.budget)
    asked = read_calibration(options.examples) if options.examples else b""
    provenance = {"options": options.described(), "calibration_sha256": hashlib.sha256(text).hexdigest()}
    provenance |= {"examples_sha256": hashlib.sha256(asked).hexdigest()} if asked else {}
    config = plan.config(pairing, base_name=base_name, revision=revision, provenance=provenance)
    stage = Stage(out, hashlib.sha256(config.to_json()).hexdigest())
    batches = tokenise(base, fine, text, options.reading) if options.calibrate else None
    examples = _examples(base, fine, asked, options) if options.examples else None
    run = Run(pairing, options, plan, stage, batches, progress, used, known, examples)
    coding, measured = run.coding()
    config = replace(config, provenance={**config.provenance, "measured": measured}, format_version=0)
    written = _write(out, config, run, coding, shard_bytes)
    stage.remove()
    return written


def _examples(base: Checkpoint, fine: Checkpoint, text: bytes, options: AutoOptions) -> Batches:
    try:
        found = tokenise(base, fine, text, options.practising)
    except InvalidRequest as error:
        raise InvalidRequest(f"{options.examples}: {error}", param="examples") from error
    if len(found.found) < _FEWEST:
        raise InvalidRequest(
            f"{options.examples} has {len(found.found)} examples: give {_FEWEST} or more, better thousands",
            param="examples",
        )
    return found


@dataclass(frozen=True)
class Run:
    """The slow part of one compression."""

    pairing: Pairing
    options: AutoOptions
    plan: Plan
    stage: Stage
    batches: Batches | None
    progress: Progress
    device: torch.device
    known: Known | None = None
    examples: Batches | None = None
    _models: list[Any] = field(default_factory=list)

    def coding(self) -> tuple[Coding, dict[str, float]]:
        """The factors to store, and what was measured on the way."""
        for name, metrics in self._missing():
            found = self._decompose(name, *metrics)
            if self.known is None:
                self.stage.save(_file(name), _tensors(found))
            else:
                self.known[name] = found
            self.pairing.release()
        spectra = self._spectra()
        if self.options.min_fidelity is not None:
            found, budget = self._search(spectra)
        else:
            budget = self.plan.budget_bits
            found = allocation.fit(spectra, budget)
        coding = self._enlarged(spectra, found)
        trained = {name: load for name, load in spectra.items() if coding[name] and name not in (EMBEDDING, HEAD)}
        if self.examples is None or not trained:
            return coding, {}
        values = sum(coded.a_rK.numel() + coded.b_rN.numel() for name in trained if (coded := coding[name]))
        needed = _TRAINED_BYTES * values + 2 * self.pairing.fine.nbytes_16bit
        if needed > 0.8 * free_bytes(self.device):
            return coding, {"untrained_for_want_of_bytes": float(needed)}
        return self._trained(trained, coding, budget, self.examples)

    def _missing(self) -> Iterator[tuple[str, Metrics]]:
        """Matrices that no earlier run decomposed, with their metrics."""
        names = [name for name in self.plan.pool if not self._has(name)]
        for i, (name, metrics) in enumerate(self._measured(names)):
            self.progress(i, len(names), name)
            yield name, metrics

    def _has(self, name: str) -> bool:
        if self.known is None:
            return _file(name) in self.stage
        return name in self.known and len(self.known[name].s_r) >= self.plan.rank_limit(*self.plan.pool[name])

    def _measured(self, names: list[str]) -> Iterator[tuple[str, Metrics]]:
        if self.batches is None:
            return ((name, unknown(name, self.plan.pool[name][0])) for name in names)
        if not names:
            return iter(())
        count = max(1, self.options.texts // self.batches.size)
        if not self._has_room(1):
            return Streamed(self.pairing.fine, self.device).measure(names, self.batches, count)
        return sensitivity.measure(self._model(0), names, self.batches, count)

    def _decompose(self, name: str, inputs: Metric, outputs: Metric) -> Spectrum:
        base, fine = self.pairing.base_tensor(name), self.pairing.fine_tensor(name)
        common = min(base.shape[0], fine.shape[0])
        if outputs.moment is not None:
            outputs = Metric(outputs.moment[:common] if outputs.moment.ndim == 1 else outputs.moment)
        difference = fine[:common].to(self.device).float() - base[:common].to(self.device).float()
        return allocation.decompose(difference, inputs, outputs, self.plan.rank_limit(common, fine.shape[1]))

    def _spectra(self) -> dict[str, Callable[[], Spectrum]]:
        names = sorted(self.plan.pool, key=lambda name: (self.plan.pool[name], name))  # equals are rounded together
        if self.known is not None:
            return {name: partial(self.known.__getitem__, name) for name in names}
        read: Callable[[str], dict[str, torch.Tensor]] = partial(_staged, self.stage, self.device)
        size = sum((self.stage.path / f"{_file(name)}.safetensors").stat().st_size for name in names)
        read = cache(read) if size <= free_bytes(self.device) / 2 else read
        return {name: partial(_spectrum, read, name) for name in names}

    def _enlarged(self, spectra: Mapping[str, Callable[[], Spectrum]], found: Fit) -> Coding:
        """The coding with scales that make up for what each matrix lost, as far as that helps on calibration text."""
        if self.batches is None or not any(found.coding.values()):
            return found.coding
        kept = {name: allocation.kept(load(), found.delta) for name, load in spectra.items()}

        def with_power(power: float) -> Coding:
            return {n: c and replace(c, scale=c.scale * kept[n] ** -power) for n, c in found.coding.items()}

        if not self._has_room(2):
            return with_power(_UNSEEN_POWER)
        bench, best, least = self._bench(), found.coding, math.inf
        for power in _POWERS:
            coding = with_power(power)
            kl = bench.kl(coding)
            if not kl < least:
                break
            best, least = coding, kl
        return best

    def _search(self, spectra: Mapping[str, Callable[[], Spectrum]]) -> tuple[Fit, float]:
        """The smallest budget, in equal ratios between the least and the most, that reaches the fidelity."""
        bench, wanted = self._bench(), self.options.min_fidelity
        kl_base = bench.kl({})
        low, high = Budget.LEAST, Budget.MOST
        best = allocation.fit(spectra, high * self.plan.weights)
        for _ in range(_SEARCHES):
            middle = math.sqrt(low * high)
            found = allocation.fit(spectra, middle * self.plan.weights)
            if fidelity(bench.kl(found.coding), kl_base) >= wanted:  # pyright: ignore[reportOperatorIssue]
                high, best = middle, found
            else:
                low = middle
        return best, high * self.plan.weights

    def _trained(
        self, spectra: Mapping[str, Callable[[], Spectrum]], coding: Coding, budget: float, examples: Batches
    ) -> tuple[Coding, dict[str, float]]:
        """The better of `coding` and of trained factors in as many bits, judged on examples that were held out."""
        if "trained" in self.stage:
            return _unpacked(self.stage.load("trained"))
        assert self.batches is not None, "trained without text"
        practice, held_out = examples.parted(_HELD_OUT)
        bench, options = self._bench(held_out), self.options.distill
        rest = {name: coded for name, coded in coding.items() if name not in spectra}
        room = budget - sum(map(allocation.code_bits, rest.values()))
        delta = allocation.unaided(spectra, refine.START * room)
        starts = {name: allocation.scaled(load(), delta) for name, load in spectra.items()}
        training = Training(starts, rest, room, lambda step: self.progress(step, options.steps, "distillation"))
        trained = bench.train(training, options, practice.beside(self.batches))
        measured = {"kl_base": bench.kl({}), "kl_untrained": bench.kl(coding), "kl_trained": bench.kl(trained)}
        measured["trained_of_budget"] = sum(map(allocation.code_bits, trained.values())) / budget
        if measured["trained_of_budget"] <= 1 and measured["kl_trained"] < measured["kl_untrained"]:
            coding = trained
        measured = {key: value for key, value in measured.items() if math.isfinite(value)}
        self.stage.save("trained", _packed(coding, measured))
        return _unpacked(self.stage.load("trained"))

    def _bench(self, judged: Batches | None = None) -> Bench:
        """Judged on calibration text, where nothing else is given."""
        judged = judged or self.batches
        assert judged is not None, "judged without text"
        return Bench(self._model(0), self._model(1), {n: self._unchanged(n) for n in self.plan.pool}, judged)

    def _model(self, index: int) -> Any:
        while len(self._models) <= index:
            self._models.append(sensitivity.load_model(self.pairing.fine, self.device))
        return self._models[index]

    def _has_room(self, models: int) -> bool:
        """For so many in all."""
        return sensitivity.has_room(self.pairing.fine, self.device, models - len(self._models))

    def _unchanged(self, name: str) -> torch.Tensor:
        base, fine = self.pairing.base_tensor(name), self.pairing.fine_tensor(name)
        common = min(base.shape[0], fine.shape[0])
        return torch.cat([base[:common], fine[common:].to(base.dtype)])


def _write(out: Path, config: DeltaConfig, run: Run, coding: Coding, shard_bytes: int) -> Path:
    coded: dict[str, tuple[TensorEntry, dict[str, torch.Tensor]]] = {}
    stored = {name: factors for name, factors in coding.items() if factors is not None}
    all_parts = dict(zip(stored, spectral.parts_of(list(stored.values()), run.device), strict=True))
    for name, factors in coding.items():
        entry, parts = run.plan.entry(run.pairing, name, factors, all_parts.get(name, {}))
        if entry is not None:
            coded[name] = entry, parts
    entries = sorted([*run.plan.exact, *(entry for entry, _ in coded.values())], key=lambda entry: entry.name)
    config = replace(config, tensors={entry.name: entry for entry in entries}, format_version=0)
    stamp = hashlib.sha256(config.to_json()).hexdigest()
    writer = DeltaWriter(out, entries, fingerprint=stamp, shard_bytes=shard_bytes)
    for i, entry in enumerate(entries):
        run.progress(i, len(entries), entry.name)
        if entry.name in writer.done:
            continue
        own, new = run.pairing.base_tensor(entry.name), run.pairing.fine_tensor(entry.name)
        writer.put(entry, coded[entry.name][1] if entry.name in coded else encode(entry, own, new)[1])
        run.pairing.release()
    return writer.finish(config, run.plan.sidecars)


def _file(name: str) -> str:
    return f"spectrum-{name}"


def _tensors(spectrum: Spectrum) -> dict[str, torch.Tensor]:
    """Values as halves, of their row's largest: rounding to 127 steps is far coarser, and of a 7B it saves 20 GB."""
    found = {"s": spectrum.s_r.cpu(), "weights": torch.tensor(spectrum.weights, dtype=torch.float64)}
    for side, values in (("a", spectrum.a_rK), ("b", spectrum.b_rN)):
        most = values.abs().amax(1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
        found |= {side: (values / most).half().cpu(), f"{side}.most": most.cpu()}
    for side, factor in zip("ab", spectrum.factors, strict=True):
        found |= {} if factor is None else {f"{side}.factor": factor.cpu()}
    return found


def _staged(stage: Stage, device: torch.device, name: str) -> dict[str, torch.Tensor]:
    """As they were saved: half of what the spectrum takes, so that a GPU holds those of a whole 8B."""
    return {key: tensor.to(device) for key, tensor in stage.load(_file(name)).items()}


def _spectrum(read: Callable[[str], dict[str, torch.Tensor]], name: str) -> Spectrum:
    found = read(name)
    a, b = (found[side].float() * found[f"{side}.most"] for side in ("a", "b"))
    weights = found["weights"][0].item(), found["weights"][1].item()
    return Spectrum(a, b, found["s"], weights, (found.get("a.factor"), found.get("b.factor")))


def _packed(coding: Coding, measured: Mapping[str, float]) -> dict[str, torch.Tensor]:
    flat = {f"measured.{key}": torch.tensor(value, dtype=torch.float64) for key, value in measured.items()}
    for name, coded in coding.items():
        flat[f"{name}.present"] = torch.tensor(coded is not None)
        if coded is not None:
            flat |= {f"{name}.a": coded.a_rK, f"{name}.b": coded.b_rN, f"{name}.exponent": coded.exponent_r}
            flat[f"{name}.scale"] = torch.tensor(coded.scale, dtype=torch.float64)
    return flat


def _unpacked(flat: Mapping[str, torch.Tensor]) -> tuple[dict[str, Coded | None], dict[str, float]]:
    coding: dict[str, Coded | None] = {}
    for name in sorted(key.removesuffix(".present") for key in flat if key.endswith(".present")):
        coding[name] = None
        if flat[f"{name}.present"]:
            coding[name] = Coded(
                flat[f"{name}.a"], flat[f"{name}.b"], flat[f"{name}.scale"].item(), flat[f"{name}.exponent"]
            )
    return coding, {
        key.removeprefix("measured."): flat[key].item() for key in sorted(flat) if key.startswith("measured.")
    }
