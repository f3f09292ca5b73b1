"""The ways to compress that benchmarks/fidelity.py compares, and what each makes of one fine-tune.

All but `auto` store what is no linear alike: norms whole, embedding and head as changed rows or in 4 bits
(--embeddings), tokenizer files, metadata. `auto` has embedding and head in its budget, so that they take fewer bytes
wherever that is below 4 bits.
A baseline of `baselines.py` replaces the linears in that frame, by its own count of bytes.
"""

from __future__ import annotations

import argparse
import itertools
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import torch
from baselines import Baseline, Dare, DeltaCome, LowRank, Magnitude, Matrix, Whole, nbytes
from transformers import AutoModelForCausalLM

from bitdelta_core.checkpoint import Checkpoint
from bitdelta_core.delta import auto, spectral
from bitdelta_core.delta.allocation import Spectrum
from bitdelta_core.delta.auto_options import AutoOptions
from bitdelta_core.delta.calibration import read_calibration
from bitdelta_core.delta.codecs import decode_parts
from bitdelta_core.delta.compress import compress
from bitdelta_core.delta.distill import DistillOptions, tokenise
from bitdelta_core.delta.dropout import DropoutOptions
from bitdelta_core.delta.format import EMBEDDING, HEAD, DeltaReader, base_name
from bitdelta_core.delta.inspect import summarise
from bitdelta_core.delta.pairing import Pairing
from bitdelta_core.delta.planning import CompressOptions
from bitdelta_core.delta.restore import Variant, open_for
from bitdelta_core.delta.spectral import Coded

CODECS = ("dense", "auto", "deltadq", "bitdelta", "low-rank", "delta-come", "dare", "magnitude", "whole")
SIGNS = (("tensor", 1), ("row_col", 1), ("row_col", 2))
"""Scales and planes."""
CALIBRATION_BATCHES = 8
Weights = Callable[[str, torch.Tensor], torch.Tensor]


@dataclass(frozen=True, slots=True)
class Way:
    """One way to compress; what does not apply is None."""

    codec: str
    budget: float | None = None
    """Bits per weight: auto and the baselines."""
    scale: str | None = None
    bits: int | None = None
    """Sign planes, or bits of the whole model's values."""
    distill: bool | None = None
    ratio: int | None = None
    """deltadq: by the paper's count."""
    mask_rows: int | None = None
    calibrate: bool | None = None
    """auto: False weighs all errors alike. delta-come: GPTQ, or round-to-nearest."""
    group: int | None = None
    """whole: of how many weights; None: of an output's."""
    base: str | None = None
    """How the base under the delta is quantised."""

    @property
    def random(self) -> bool:
        """Whether it makes something else of every seed."""
        return self.codec in ("dare", "deltadq")

    @property
    def trains(self) -> bool:
        """Whether it takes far longer than to round and write: adapters, stored as they are, are spared it."""
        return self.codec == "auto" or bool(self.distill)

    @property
    def described(self) -> dict[str, Any]:
        return {key: value for key, value in asdict(self).items() if value is not None}


@dataclass(frozen=True, slots=True)
class Made:
    """A compressed fine-tune."""

    nbytes: int
    linear_nbytes: int
    linear: Weights
    """A linear's name and the base's fp32 weight, perhaps quantised -> the variant's, fp32."""
    other: Callable[[str], torch.Tensor]
    """Any other parameter."""
    training: Mapping[str, Any] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)


def ways(args: argparse.Namespace) -> Iterator[Way]:
    """The grid."""
    for codec in args.codecs:
        match codec:
            case "dense":
                yield Way("dense")
            case "auto":
                for calibrate in (None, False) if args.data_free else (None,):
                    yield from (Way("auto", budget=budget, calibrate=calibrate) for budget in _falling(args.budgets))
                if args.train_auto:
                    yield from (Way("auto", budget=budget, distill=True) for budget in _falling(args.budgets))
            case "deltadq":
                yield from (Way("deltadq", ratio=r, mask_rows=m) for r in args.ratios for m in args.mask_rows)
            case "bitdelta":
                yield from (Way("bitdelta", scale=scale, bits=bits) for scale, bits in SIGNS)
                if args.distill_steps:
                    yield from (Way("bitdelta", scale=scale, bits=bits, distill=True) for scale, bits in SIGNS[:2])
            case "delta-come":
                rounded = (False,) if args.no_gptq else (False, True)
                yield from [Way(codec, budget=b, calibrate=c) for c in rounded for b in args.baseline_budgets]
            case "whole":
                yield from (Way(codec, bits=bits, group=group) for bits in (8, 4) for group in (None, 128))
            case _:
                yield from (Way(codec, budget=budget) for budget in args.baseline_budgets)


def _falling(budgets: list[float]) -> list[float]:
    """Decompositions for the largest budget serve all others."""
    return sorted(budgets, reverse=True)


class Opened:
    """A delta that was written, its matrices restored on the device from what its files hold."""

    def __init__(self, base: Checkpoint, delta: Path, device: str) -> None:
        self.base = base
        self.device = torch.device(device)
        self.reader: DeltaReader = open_for(base, delta)
        self.variant = Variant(base, self.reader)

    @cached_property
    def codes(self) -> dict[str, Coded]:
        """All that are entropy-coded, decoded together."""
        entries = [e for e in self.reader.config.tensors.values() if e.codec == "spectral"]
        found = spectral.coded_of([(entry, self.reader.parts(entry)) for entry in entries], self.device)
        return {entry.name: coded for entry, coded in zip(entries, found, strict=True)}

    def linear(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """fp32: `weight` with the delta over it."""
        entry = self.reader.config.tensors.get(name)
        if entry is None:
            return weight
        if entry.codec == "spectral":
            return weight + self.codes[name].matrix()
        parts = {part: tensor.to(self.device) for part, tensor in self.reader.parts(entry).items()}
        with self.device:
            return decode_parts(entry, parts, weight)

    def other(self, name: str) -> torch.Tensor:
        """Any parameter, as a restored checkpoint has it."""
        entry = self.reader.config.tensors.get(name)
        if entry is None or entry.codec != "spectral":
            return self.variant.get(name)
        known = self.base.get(base_name(name, self.base))[: entry.rows].to(self.device).float()
        extra = self.reader.part(entry, "extra").to(self.device).float()
        return torch.cat([known + self.codes[name].matrix(), extra]).to(entry.dtype)


@dataclass
class Subject:
    """One fine-tune beside its base, and what several ways need of the two."""

    args: argparse.Namespace
    source: Path
    fine: Path
    """`source`, or what an adapter was restored to."""
    work: Path
    examples: Path | None = None
    """What `auto` is trained on."""
    _pairing: Pairing = field(init=False)
    _groups: dict[tuple[int, int | None], int] = field(default_factory=dict)
    """deltadq: (ratio, rows that share masks) -> the group size that the first seed chose."""
    _known: dict[bool, dict[str, Spectrum]] = field(default_factory=lambda: {True: {}, False: {}})
    """auto: decompositions, calibrated or not."""

    def __post_init__(self) -> None:
        self._pairing = Pairing(Checkpoint(self.args.base), Checkpoint(self.fine))

    @cached_property
    def frame(self) -> Made:
        """Everything but the linears, as it is stored beside a baseline's."""
        options = CompressOptions(scale_layout="tensor", embeddings=self.args.embeddings)
        made = compress(self.args.base, self.fine, self.work / "frame", options, device=self.args.device)
        return self._opened(made)

    @cached_property
    def linears(self) -> dict[str, tuple[int, ...]]:
        """Those that the fine-tune changed -> their shapes."""
        base = self._pairing.base
        found = {}
        for name in self._pairing.names:
            own, fine = self._pairing.base_tensor(name), self._pairing.fine_tensor(name)
            if name not in (EMBEDDING, HEAD) and fine.ndim == 2 and not torch.equal(own, fine):
                found[name] = base.shape(name)
        return found

    @property
    def linear_weights(self) -> int:
        return sum(map(prod, self.linears.values()))

    @property
    def nbytes_16bit(self) -> int:
        return self._pairing.fine.nbytes_16bit

    def dtype(self, name: str) -> torch.dtype:
        """Of the fine-tune's checkpoint."""
        return self._pairing.fine_tensor(name).dtype

    def base_weight(self, name: str) -> torch.Tensor:
        """fp32, on the device."""
        return self._pairing.base_tensor(name).to(self.args.device).float()

    @cached_property
    def matrices(self) -> dict[str, Matrix]:
        moments = moments_of(self._pairing.fine, list(self.linears), self.args) if self._calibrated else {}
        return {
            name: Matrix(
                name,
                self.base_weight(name),
                self._pairing.fine_tensor(name).to(self.args.device).float(),
                moments.get(name),
            )
            for name in self.linears
        }

    @property
    def _calibrated(self) -> bool:
        return "delta-come" in self.args.codecs and not self.args.no_gptq

    def make(self, way: Way, seed: int) -> Made:
        """Compress, and open what came out. It stays until the next call."""
        baseline = _baseline(way)
        return self._product(way, seed) if baseline is None else self._replaced(baseline, seed)

    def _replaced(self, baseline: Baseline, seed: int) -> Made:
        parts = {name: baseline.encode(matrix, seed) for name, matrix in self.matrices.items()}
        size = sum(map(nbytes, parts.values()))

        def linear(name: str, base: torch.Tensor) -> torch.Tensor:
            return base + baseline.difference(parts[name], self.matrices[name]) if name in parts else base

        total = self.frame.nbytes - self.frame.linear_nbytes + size
        return replace(self.frame, nbytes=total, linear_nbytes=size, linear=linear)

    def _product(self, way: Way, seed: int) -> Made:
        out = self.work / "delta"
        if out.exists():
            shutil.rmtree(out)
        training = DistillOptions(steps=max(1, self.args.distill_steps), batch=self.args.distill_batch)
        if way.codec == "lora":
            return self._opened(compress(self.args.base, self.source, out))
        if way.codec == "auto":
            examples = self.examples if way.distill else None
            options = AutoOptions(bits=way.budget, calibrate=way.calibrate is not False, examples=examples)
            known = self._known[options.calibrate]
            made = auto.compress(self.args.base, self.fine, out, options, device=self.args.device, known=known)
            return self._opened(made)
        coding: dict[str, Any] = {"codec": way.codec, "embeddings": self.args.embeddings}
        if way.codec == "bitdelta":
            coding |= {"scale_layout": way.scale, "bits": way.bits}
        if way.ratio:
            group = self._groups.get((way.ratio, way.mask_rows))
            coding["dropout"] = DropoutOptions.for_ratio(way.ratio, mask_rows=way.mask_rows, group=group, seed=seed)
        options = CompressOptions(**coding)
        how: dict[str, Any] = {"distillation": training if way.distill else None, "device": self.args.device}
        made = self._opened(compress(self.args.base, self.fine, out, options, **how))
        if way.ratio:
            self._groups[way.ratio, way.mask_rows] = made.options["dropout"]["group"]
        return made

    def _opened(self, delta: Path) -> Made:
        opened = Opened(self._pairing.base, delta, self.args.device)
        summary = summarise(opened.reader)
        provenance = summary.provenance
        return Made(
            nbytes=summary.nbytes,
            linear_nbytes=summary.bytes_by_kind["linears"],
            linear=opened.linear,
            other=opened.other,
            training=provenance.get("distillation") or provenance.get("measured"),
            options=provenance.get("options", {}),
        )


@torch.no_grad()
def moments_of(checkpoint: Checkpoint, names: list[str], args: argparse.Namespace) -> dict[str, torch.Tensor]:
    """Second moments of these linears' inputs on the calibration text that ships with bitdelta, for GPTQ."""
    batches = tokenise(checkpoint, checkpoint, read_calibration(None), DistillOptions(batch=8))
    model: Any = AutoModelForCausalLM.from_pretrained(checkpoint.path, dtype=torch.float32)
    model = model.to(args.device).eval()
    found = {name: torch.zeros(model.get_parameter(name).shape[1:] * 2, device=args.device) for name in names}
    mask = torch.empty(0, dtype=torch.bool)

    def add(name: str, inputs: torch.Tensor) -> None:
        rows = inputs[mask]
        found[name] += rows.T @ rows

    for name in names:
        linear = model.get_submodule(name.removesuffix(".weight"))
        linear.register_forward_pre_hook(lambda module, inputs, name=name: add(name, inputs[0]))
    for ids, real in itertools.islice(batches, CALIBRATION_BATCHES):
        mask = real.to(args.device)
        model(input_ids=ids.to(args.device), attention_mask=mask.long())
    return found


def _baseline(way: Way) -> Baseline | None:
    """None: a codec of the product."""
    match way.codec, way.budget:
        case "low-rank", float(bits):
            return LowRank(bits)
        case "delta-come", float(bits):
            return DeltaCome(bits, bool(way.calibrate))
        case "dare", float(bits):
            return Dare(bits)
        case "magnitude", float(bits):
            return Magnitude(bits)
        case "whole", _:
            assert way.bits is not None, "a whole model without bits"
            return Whole(way.bits, way.group)
    return None
