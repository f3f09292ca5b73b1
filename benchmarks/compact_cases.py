"""Linears whose variants keep few inputs (codec `deltadq`, masks of blocks of outputs), beside signs in the same run.

Each is checked against float64 in every setting that is tried. Only what is right is timed; the fastest setting of
each shape is printed and, with `ops.py --file`, filed where `kernels.delta_linear.compact.choose` looks.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict, replace
from typing import Any

import gpu_timing
import torch
import tuning
from gpu_timing import Call
from kernel_worlds import Bulk, Parts, batches, bulk, targets_of
from linear_cases import LIMIT, SIGNS, LinearCase, LinearRun, pool_of, weights_of
from synthetic import Shape

from kernels.delta_linear.choice import Config, choose
from kernels.delta_linear.compact import CompactConfig, candidates, compact, key
from kernels.delta_linear.device import delta_linear
from kernels.device import Kinds, Partials, Target
from kernels.kept import Form

OPS = ("qkv", "o", "gate_up", "down")
VARIANTS = (1, 8, 16, 64)
"""Distinct ones, a row each"""
FORMS = {
    "0.125 bits": Form(2, 32, 2, 64),
    "0.25 bits": Form(2, 32, 4, 64),
    "0.125 bits, masks of 16": Form(2, 32, 2, 16),
}
LAYERS = 32
FORM_LIMIT = 2e-3
"""Of the delta alone: rounding of x to 16 bits"""
CHECKED = 3
"""Variants compared with float64"""


class CompactRun:
    """The tensors of one linear and form: as many sets as keep everything out of the cache."""

    def __init__(self, target: Target, made: Bulk, weights: list[torch.Tensor], variants: int) -> None:
        self.target, self.bulk, self.weights, self.kinds = target, made, weights, made.parts.kinds()
        device, count = gpu_timing.device(), max(1, min(8, made.entries // variants))
        self.batches = batches("distinct", variants, variants, made.entries, count)
        self.x_TK = torch.randn(variants, target.inputs, device=device).to(made.dtype)
        self.delta_TN = torch.empty(variants, target.outputs, device=device)
        self.base = choose(target, variants, Kinds(), device)
        if device.type == "cpu":
            self.base = Config("unpack")
        shape = (self.base.split(target, target.outputs, device), variants, target.outputs)
        out = torch.empty(shape, dtype=self.base.base_dtype(made.dtype), device=device)
        self.nothing, self.out = torch.empty(0, dtype=torch.uint8, device=device), Partials(out, None)

    @property
    def nbytes(self) -> int:
        return len(self.x_TK) * self.bulk.bytes_per_entry

    def candidates(self) -> list[CompactConfig]:
        if gpu_timing.device().type == "cpu":
            return [CompactConfig("unpack")]
        return candidates(self.kinds)

    def calls(self, config: CompactConfig) -> list[Call]:
        """The deltas alone."""
        return [lambda s=b.segments_G4: self._deltas(s, config) for b in self.batches]

    def linears(self, config: CompactConfig | None) -> list[Call]:
        """Deltas and base, as a decode step has them; without a configuration the base alone."""
        count = max(len(self.weights), len(self.batches))
        return [self._linear(i, config) for i in range(count)]

    def _linear(self, i: int, config: CompactConfig | None) -> Call:
        segments, weight = self.batches[i % len(self.batches)].segments_G4, self.weights[i % len(self.weights)]

        def call() -> None:
            if config is not None:
                self._deltas(segments, config)
            delta_linear(
                self.x_TK, None, weight, self.target, self.bulk.deltas, segments, Kinds(), self.out, self.nothing,
                config=self.base,
            )  # fmt: skip

        return call

    def _deltas(self, segments_G4: torch.Tensor, config: CompactConfig) -> None:
        compact(
            self.x_TK, self.target, self.bulk.deltas, segments_G4, self.kinds, self.delta_TN, add=False, config=config
        )  # fmt: skip

    def error(self, config: CompactConfig) -> float:
        """The largest relative error of a variant's row."""
        self.delta_TN.fill_(torch.nan)
        batch = self.batches[0]
        self._deltas(batch.segments_G4, config)
        found = [
            gpu_timing.relative_error(
                self.delta_TN[start:stop], self.x_TK[start:stop].double() @ self.bulk.matrix(entry).T
            )
            for entry, start, stop in (*batch.segments[:CHECKED], batch.segments[-1])
        ]
        return max(found) if not self.delta_TN.isnan().any() else float("nan")


def compact_linears(session: Any, name: str, shape: Shape) -> None:
    """B rows of B variants: kept values and base, signs and base, base alone; then what a step's linears add up to."""
    totals: dict[tuple[int, str], dict[str, float]] = defaultdict(lambda: defaultdict(float))
    filed: tuning.Filed = {}
    for op in OPS:
        target = replace(targets_of(shape)[op], index=0)
        weights = weights_of(target, session.dtype)
        counts = (2,) if session.dry else VARIANTS
        signs = _signs_us(session, target, weights, counts)
        for label, form in FORMS.items():
            made = _pool(target, Parts(kept=form), max(counts), session.dtype)
            for variants in counts:
                if session.clock.spent():
                    return
                run = CompactRun(target, made, weights, variants)
                case = {"kernel": "compact", "model": name, "op": op, "variants": variants, "form": label}
                winner, times = _fastest(session, case, run)
                if winner is None:
                    continue
                filed[key(target, variants, run.kinds)] = asdict(winner)
                peers = {"signs": signs[variants], "delta alone": times[winner], "base": _us(run.linears(None))}
                us, nbytes = _us(run.linears(winner)), run.nbytes + weights[0].nbytes
                session.report.row({**case, "settings": str(asdict(winner))}, us, nbytes=nbytes, peers_us=peers)
                floor = nbytes / session.report.read_bytes_per_s * 1e6
                for column, value in (("us", us), ("signs", signs[variants]), ("floor", floor)):
                    totals[variants, label][column] += value
            del made
    _show(name, totals)
    if session.file:
        tuning.file("delta_linear", filed)


def _us(calls: list[Call]) -> float:
    return gpu_timing.graph_us(calls, replays=5, target_us=1500)


def _signs_us(session: Any, target: Target, weights: list[torch.Tensor], counts: tuple[int, ...]) -> dict[int, float]:
    """Of the linear with one plane of signs for every variant, checked."""
    made, found = pool_of(target, SIGNS, max(counts), session.dtype), {}
    for variants in counts:
        run = LinearRun(LinearCase(target, variants, variants), made, weights)
        right = session.report.check(f"signs {target} {variants}", run.error(run.chosen), LIMIT)
        found[variants] = _us(run.calls(run.chosen)) if right else float("nan")
    return found


def _pool(target: Target, parts: Parts, variants: int, dtype: torch.dtype) -> Bulk:
    """Enough variants for `variants` at a time, and one after another, out of the cache."""
    one = bulk(target, parts, 1, dtype).bytes_per_entry
    return bulk(target, parts, min(max(variants, gpu_timing.copies(one)), 512), dtype)


def _fastest(
    session: Any, case: dict[str, Any], run: CompactRun
) -> tuple[CompactConfig | None, dict[CompactConfig, float]]:
    report = session.report
    times = tuning.timed(report, case, run, run.candidates(), limit=FORM_LIMIT, nbytes=run.nbytes)
    for config, us in times.items():
        floor = run.nbytes / report.read_bytes_per_s * 1e6
        print(f"    {us:8.1f} us  {floor / us:5.2f} of {floor:7.1f}  {config}", flush=True)
    return (tuning.best(times, 1) or [None])[0], times


def _show(name: str, totals: dict[tuple[int, str], dict[str, float]]) -> None:
    print(f"\n{name}, {LAYERS} layers, ms of linears in a step")
    print(f"{'variants':>8} {'form':<26} {'kept':>8} {'floor':>8} {'fraction':>8} {'signs':>8} {'times':>6}")
    for line in _lines(totals):
        print(line, flush=True)


def _lines(totals: dict[tuple[int, str], dict[str, float]]) -> Iterator[str]:
    for (variants, label), sums in sorted(totals.items()):
        us, floor, signs = (sums[column] * LAYERS / 1000 for column in ("us", "floor", "signs"))
        yield f"{variants:>8} {label:<26} {us:8.2f} {floor:8.2f} {floor / us:8.2f} {signs:8.2f} {signs / us:6.2f}"
