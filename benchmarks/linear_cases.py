"""Decode-sized linears as the benchmarks time and check them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import gpu_timing
import torch
from gpu_timing import Call
from kernel_worlds import Bulk, Mix, Parts, Rows, batches, bulk

from kernels.delta_linear import wide
from kernels.delta_linear.choice import Config, candidates, choose
from kernels.delta_linear.device import delta_linear, partials_of
from kernels.device import Kinds, Planes, Target
from kernels.planes import prepare_planes

LIMIT = 6e-3
"""Of the relative error against float64 with bfloat16 inputs that are exact: accumulation, and the planes' rounding."""
SIGNS = Parts(planes=1)
CHECKED = 4
"""Segments compared with float64; each needs its whole difference unpacked."""


@dataclass(frozen=True)
class LinearCase:
    """One linear, one batch shape."""

    target: Target
    rows: int
    variants: int
    mix: Mix = "distinct"
    parts: Parts = SIGNS

    @property
    def kinds(self) -> Kinds:
        if self.mix == "base":
            return Kinds()
        kinds = self.parts.kinds()
        return replace(kinds, single=kinds.signs and self.mix == "distinct" and self.rows == self.variants)


class LinearRun:
    """The tensors of a case: as many sets as keep everything out of the cache."""

    def __init__(self, case: LinearCase, made: Bulk, weights: list[torch.Tensor]) -> None:
        self.case = case
        self.bulk = made
        self.weights = weights
        device, dtype, target = gpu_timing.device(), made.dtype, case.target
        self.x_TK = torch.randn(case.rows, target.inputs, device=device).to(dtype)
        count = max(1, min(8, made.entries // max(1, case.variants)))
        self.batches = batches(case.mix, case.rows, case.variants, made.entries, count)
        self.planes = [self._planes(b) for b in self.batches]
        room = wide.workspace_bytes(target, case.rows, case.kinds, dtype)
        self.workspace = torch.empty(room, dtype=torch.uint8, device=device)

    @cached_property
    def nbytes(self) -> int:
        """What one product must read: the base's weights once, each variant's parts once."""
        variants = 0 if self.case.mix == "base" else self.case.variants
        return self.weights[0].nbytes + variants * self.bulk.bytes_per_entry

    def candidates(self) -> list[Config]:
        if gpu_timing.device().type == "cpu":
            return [self.chosen]
        return candidates(self.case.target, self.case.rows, self.case.kinds)

    @property
    def chosen(self) -> Config:
        chosen = choose(self.case.target, self.case.rows, self.case.kinds, gpu_timing.device())
        return chosen if gpu_timing.device().type == "cuda" else Config("unpack")

    def calls(self, config: Config) -> list[Call]:
        """Our product, with one set of tensors after another."""
        out = partials_of(
            self.case.target, self.case.rows, self.case.kinds, self.bulk.dtype, gpu_timing.device(), config=config
        )
        count = max(len(self.weights), len(self.batches))
        return [self._call(i, config, out) for i in range(count)]

    def _call(self, i: int, config: Config, out) -> Call:
        batch, weight = self.batches[i % len(self.batches)], self.weights[i % len(self.weights)]
        planes = self.planes[i % len(self.batches)]

        def call() -> None:
            delta_linear(
                self.x_TK,
                planes,
                weight,
                self.case.target,
                self.bulk.deltas,
                batch.segments_G4,
                self.case.kinds,
                out,
                self.workspace,
                config=config,
            )

        return call

    def cublas(self) -> list[Call]:
        """The base product alone."""
        out = torch.empty(self.case.rows, self.case.target.outputs, dtype=self.bulk.dtype, device=self.x_TK.device)
        return [lambda w=w: torch.mm(self.x_TK, w.T, out=out) for w in self.weights]

    def error(self, config: Config) -> float:
        """The largest relative error of the sum of all partials over the first segments."""
        kinds = self.case.kinds
        out = partials_of(self.case.target, self.case.rows, kinds, self.bulk.dtype, gpu_timing.device(), config=config)
        out.base_STN.fill_(float("nan"))
        if out.delta_TN is not None:
            out.delta_TN.fill_(float("nan"))
        self._call(0, config, out)()
        batch, worst = self.batches[0], 0.0
        for entry, start, stop in batch.segments[:CHECKED]:
            weight = self.weights[0].double()
            if entry > 0:
                weight = weight + self.bulk.matrix(entry)
            expected = self.x_TK[start:stop].double() @ weight.T
            found = out.base_STN[:, start:stop].double().sum(0)
            if entry > 0 and out.delta_TN is not None:
                found = found + out.delta_TN[start:stop].double()
            worst = max(worst, gpu_timing.relative_error(found, expected))
        return worst

    def _planes(self, batch: Rows) -> Planes | None:
        kinds, target = self.case.kinds, self.case.target
        if not kinds.signs:
            return None
        planes = Planes.empty(kinds.sets(target), self.case.rows, target.inputs, gpu_timing.device())
        prepare_planes(self.x_TK, planes, target, self.bulk.deltas, batch.entry_T, kinds)
        return planes


def weights_of(target: Target, dtype: torch.dtype) -> list[torch.Tensor]:
    """As many copies of a base weight as a cache cannot hold."""
    device, count = gpu_timing.device(), gpu_timing.copies(target.outputs * target.inputs * dtype.itemsize)
    scale = target.inputs**-0.5
    return [(torch.randn(target.outputs, target.inputs, device=device) * scale).to(dtype) for _ in range(count)]


def pool_of(target: Target, parts: Parts, variants: int, dtype: torch.dtype) -> Bulk:
    """Enough variants for `variants` at a time, out of the cache."""
    one = bulk(target, parts, 1, dtype).bytes_per_entry
    entries = max(variants, min(4 * variants, gpu_timing.copies(one)) if variants > 1 else gpu_timing.copies(one))
    return bulk(target, parts, min(entries, 256), dtype)
