"""Low-rank factors of bytes (codec `auto`): the two launches alone in every setting, and in a linear beside signs.

Each is checked against float64 before it is timed. The fastest setting of each shape is printed and, with
`ops.py --file`, filed where `kernels.delta_linear.low_rank_choice.choose_bytes` looks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, replace
from typing import Any

import gpu_timing
import torch
import tuning
from gpu_timing import Call
from kernel_worlds import Bulk, Parts, batches, targets_of
from linear_cases import LIMIT, LinearCase, LinearRun, pool_of, weights_of
from synthetic import Shape

from kernels.delta_linear import low_rank_choice
from kernels.delta_linear.low_rank_choice import LowRankConfig
from kernels.delta_linear.triton_low_rank import low_rank
from kernels.device import SEGMENT_ROWS, Target

OPS = ("qkv", "down")
PARTS = (Parts(planes=1), Parts(byte_rank=256), Parts(rank=256), Parts(byte_rank=1024))
"""16 bits up to the rank that adapters may have"""
VARIANTS = (1, 16, 64)
"""Distinct ones, a row each"""
FACTOR_LIMIT = 1e-2
"""Of the delta alone: x A^T is rounded to 16 bits between the launches"""
CHECKED = 3
"""Variants compared with float64"""


class FactorRun:
    """The tensors of one linear: as many sets as keep everything out of the cache."""

    def __init__(self, target: Target, made: Bulk, variants: int) -> None:
        self.target, self.bulk, self.rank = target, made, made.parts.kinds().byte_rank
        device, count = gpu_timing.device(), max(1, min(8, made.entries // variants))
        self.batches = batches("distinct", variants, variants, made.entries, count)
        self.x_TK = torch.randn(variants, target.inputs, device=device).to(made.dtype)
        self.delta_TN = torch.zeros(variants, target.outputs, device=device)
        floats = low_rank_choice.workspace_floats(target, variants, 0, self.rank)
        self.workspace = torch.empty(4 * floats, dtype=torch.uint8, device=device)

    @property
    def nbytes(self) -> int:
        return len(self.x_TK) * self.bulk.bytes_per_entry

    def candidates(self) -> list[LowRankConfig]:
        rows = len(self.x_TK)
        found = low_rank_choice.byte_candidates(self.target, rows, rows, self.rank)
        return found[:1] if gpu_timing.device().type == "cpu" else found

    def calls(self, config: LowRankConfig) -> list[Call]:
        return [lambda s=b.segments_G4: self._add(s, config) for b in self.batches]

    def _add(self, segments_G4: torch.Tensor, config: LowRankConfig) -> None:
        low_rank(
            self.x_TK, self.target, self.bulk.deltas, segments_G4, 0, self.delta_TN, self.workspace,
            byte_rank=self.rank, config=config,
        )  # fmt: skip

    def error(self, config: LowRankConfig) -> float:
        """The largest relative error of a variant's row."""
        self.workspace.fill_(255)
        self.delta_TN.zero_()
        batch = self.batches[0]
        self._add(batch.segments_G4, config)
        found = [
            gpu_timing.relative_error(
                self.delta_TN[start:stop], self.x_TK[start:stop].double() @ self.bulk.matrix(entry).T
            )
            for entry, start, stop in (*batch.segments[:CHECKED], batch.segments[-1])
        ]
        return max(found)


def factors(session: Any, name: str, shape: Shape) -> None:
    """B rows of B variants."""
    filed: tuning.Filed = {}
    for op in OPS:
        target = replace(targets_of(shape)[op], index=0)
        weights = weights_of(target, session.dtype)
        for parts, variants, made in _pools(session, target):
            if session.clock.spent():
                return
            case = {"model": name, "op": op, "rows": variants, "variants": variants}
            case |= {"planes": parts.planes, "rank": parts.rank, "byte_rank": parts.byte_rank}
            if parts.byte_rank and (found := _fastest(session, case, FactorRun(target, made, variants))):
                key = low_rank_choice.byte_key(target, variants, parts.kinds().byte_rank, SEGMENT_ROWS)
                filed[key] = asdict(found)
            _time_linear(session, case, LinearRun(LinearCase(target, variants, variants, parts=parts), made, weights))
    if session.file:
        tuning.file("delta_linear", filed)


def _pools(session: Any, target: Target) -> Iterator[tuple[Parts, int, Bulk]]:
    for parts in (PARTS[0], Parts(byte_rank=24)) if session.dry else PARTS:
        for variants in (2,) if session.dry else VARIANTS:
            yield parts, variants, pool_of(target, parts, variants, session.dtype)


def _fastest(session: Any, case: dict[str, Any], run: FactorRun) -> LowRankConfig | None:
    """Of the two launches alone; the rule's choice is printed first."""
    report, case = session.report, {"kernel": "factors", **case}
    times = tuning.timed(report, case, run, run.candidates(), limit=FACTOR_LIMIT, nbytes=run.nbytes)
    floor = run.nbytes / report.read_bytes_per_s * 1e6
    for config, us in times.items():
        print(f"    {us:8.1f} us  {floor / us:5.2f} of {floor:7.1f}  {config}", flush=True)
    return (tuning.best(times, 1) or [None])[0]


def _time_linear(session: Any, case: dict[str, Any], run: LinearRun) -> None:
    """Whole, with the rule's settings or those filed before."""
    config = run.chosen
    if session.report.check(str(case), run.error(config), LIMIT):
        us = gpu_timing.graph_us(run.calls(config))
        peers = {"cublas base": gpu_timing.graph_us(run.cublas())}
        session.report.row({"kernel": "linear", **case, "impl": config.impl}, us, nbytes=run.nbytes, peers_us=peers)
