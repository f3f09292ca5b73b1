"""Finds the fastest settings of decode and prefill attention on this GPU and files them where the kernels look.

    python benchmarks/tune_attention.py [--shapes llama-2-7b llama-3.1-8b] [--rows 1 4 64] [--workers 12]

Decode: every code at one context, then the best few with other units of work at all contexts. Prefill: every code at a
prompt and at the last chunk of one. Processes of their own compile ahead into Triton's cache. Writes
`kernels/paged_attention/configs/<device>.json`, and every timing to benchmarks/results/tune_attention.jsonl.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import gpu_timing
import torch
from gpu_timing import Report
from synthetic import SHAPES

from kernels import configs
from kernels.device import DeviceDeltas, Kinds
from kernels.paged_attention import choice
from kernels.paged_attention.device import Workspace, decode, padded_rows, prefill

BLOCK = 16
CONTEXTS = (512, 1024, 4096)
CHUNKS = {"long": ((2048, 2048), (512, 4096)), "short": ((64, 4096), (16, 1024))}
"""(rows, context)"""
BEST = 3
LIMIT = 1.2e-2
Config = choice.DecodeConfig | choice.PrefillConfig


@dataclass(frozen=True)
class Case:
    """Attention of one layer's heads: decode of some rows, or a chunk of one prompt."""

    shape: str
    kind: str
    rows: int
    context: int
    dtype: torch.dtype = torch.bfloat16

    @property
    def heads(self) -> tuple[int, int, int]:
        """K/V heads, query heads of each, and their size."""
        shape = SHAPES[self.shape]
        return shape.kv_heads, shape.heads // shape.kv_heads, shape.hidden // shape.heads

    @property
    def nbytes(self) -> int:
        kv_heads, _, dim = self.heads
        return self.context * 2 * kv_heads * dim * self.dtype.itemsize * (self.rows if self.kind == "decode" else 1)

    @property
    def operations(self) -> float:
        kv_heads, group, dim = self.heads
        return 4 * kv_heads * group * dim * self.rows * (self.context - self.rows / 2)

    def candidates(self) -> Sequence[Config]:
        kv_heads, group, dim = self.heads
        chip = choice.Chip.of(gpu_timing.device())
        if self.kind == "decode":
            return choice.decode_candidates(self.rows, kv_heads, group, dim, chip)
        return choice.prefill_candidates(self.rows, group, dim, chip)

    def key(self) -> str:
        kv_heads, group, dim = self.heads
        if self.kind == "decode":
            return choice.decode_key(self.rows, kv_heads, group, dim)
        return choice.prefill_key(self.rows, group, dim)


class Run:
    """A case's tensors. As many layers as keep the cache that is read out of the GPU's own."""

    def __init__(self, case: Case) -> None:
        self.case, device = case, gpu_timing.device()
        self._decodes = case.kind == "decode"
        kv_heads, group, dim = case.heads
        sequences, blocks = case.rows if self._decodes else 1, -(-case.context // BLOCK)
        size = (sequences * blocks + 1, 2, kv_heads, BLOCK, dim)
        self._layers = [
            torch.randn(size, device=device, dtype=case.dtype) for _ in range(gpu_timing.copies(case.nbytes))
        ]
        order = torch.randperm(sequences * blocks, device=device) + 1
        self._tables = order.view(sequences, blocks).int().contiguous()
        self._q_THD = torch.randn(case.rows, kv_heads * group, dim, device=device, dtype=case.dtype)
        self._contexts = torch.full((sequences,), case.context, dtype=torch.int32, device=device)
        self._starts = torch.tensor([0, case.rows], dtype=torch.int32, device=device)
        self._out = torch.empty_like(self._q_THD).flatten(1)
        self._workspace = Workspace.empty(max(64, sequences), kv_heads * group, kv_heads, dim, device)
        self._entries = torch.zeros(case.rows, dtype=torch.int32, device=device)
        self._nothing = DeviceDeltas(self._out, self._entries, self._entries)
        self._expected = self._reference()

    def calls(self, config: Any) -> list[Callable[[], object]]:
        return [lambda cache=cache: self._call(cache, config) for cache in self._layers]

    def error(self, config: Any) -> float:
        """Of the first sequence."""
        self._out.fill_(float("nan"))
        self._call(self._layers[0], config)
        return gpu_timing.relative_error(self._out[: self._expected.shape[0]], self._expected)

    def _call(self, cache: torch.Tensor, config: Any) -> None:
        if self._decodes:
            decode(
                self._q_THD, cache, self._tables, self._contexts, None, self._out, None, None, self._nothing,
                self._entries, Kinds(), self._workspace, config=config,
            )  # fmt: skip
        else:
            prefill(
                self._q_THD, cache, self._starts, self._contexts, self._tables, None, self._out, self.case.rows,
                workspace=self._workspace, config=config,
            )  # fmt: skip

    def _reference(self) -> torch.Tensor:
        rows, context = 1 if self._decodes else self.case.rows, self.case.context
        gathered = self._layers[0][self._tables[0].long()].permute(1, 2, 0, 3, 4).flatten(2, 3)[:, None, :, :context]
        mask = torch.ones(rows, context, dtype=torch.bool, device=gathered.device).tril(context - rows)
        q = self._q_THD[:rows].transpose(0, 1)[None].float()
        found = torch.nn.functional.scaled_dot_product_attention(
            q, gathered[0].float(), gathered[1].float(), attn_mask=mask, enable_gqa=True
        )
        return found[0].transpose(0, 1).flatten(1)


def compile_ahead(pool: ProcessPoolExecutor | None, cases: Sequence[Case]) -> None:
    """Every code of these cases. Decode's depends on no context."""
    if pool is None:
        return
    for failed in pool.map(_compile, [(case, config) for case in cases for config in case.candidates()], chunksize=1):
        if failed:
            print(failed, flush=True)


def _compile(task: tuple[Case, Config]) -> str:
    """In a worker. What does not compile is not timed."""
    case, config = task
    try:
        Run(case).calls(config)[0]()
        torch.cuda.synchronize()
    except Exception as error:
        return f"does not run: {config}: {str(error)[:200]}"
    return ""


def timed(report: Report, run: Run, found: Sequence[Config]) -> dict[Config, float]:
    """Microseconds of the settings that run and are right."""
    times: dict[Config, float] = {}
    case = {name: value for name, value in asdict(run.case).items() if name != "dtype"}
    for config in dict.fromkeys(found):
        try:
            if not report.check(f"{run.case} {config}", run.error(config), LIMIT):
                continue
            times[config] = gpu_timing.graph_us(run.calls(config), replays=5, target_us=1500)
        except Exception as error:
            print(f"does not run: {config}: {str(error)[:200]}", flush=True)
            continue
        report.write({**case, "us": times[config], "bytes": run.case.nbytes, **asdict(config)})
    return times


def best(times: dict[Config, float], count: int) -> list[Config]:
    return sorted(times, key=lambda config: times[config])[:count]


def fastest(report: Report, cases: Sequence[Case], found: Sequence[Config]) -> Config:
    """By the sum of each case's time over that case's best."""
    slowness: dict[Config, float] = dict.fromkeys(found, 0.0)
    measured = {case: timed(report, Run(case), found) for case in cases}
    for times in measured.values():
        slowness = {c: s + times[c] / min(times.values()) for c, s in slowness.items() if c in times}
    (winner,) = best(slowness, 1)
    for case, times in measured.items():
        label = {"kernel": f"attention {case.kind}", "model": case.shape, "rows": case.rows, "context": case.context}
        if case.kind != "decode":
            label |= {"tflops": round(case.operations / times[winner] / 1e6, 1)}
        report.row(label, times[winner], nbytes=case.nbytes)
    print(f"    {cases[0].key()}: {winner}", flush=True)
    return winner


def tune_decode(report: Report, cases: Sequence[Case]) -> Config:
    """Cases of the same rows; the middle one ranks the codes."""
    middle = cases[len(cases) // 2]
    first = best(timed(report, Run(middle), middle.candidates()[:1] if report.dry else middle.candidates()), BEST)
    refined = [r for c in first if isinstance(c, choice.DecodeConfig) for r in choice.decode_refinements(c)]
    return fastest(report, cases, refined[:1] if report.dry else refined)


def run(arguments: argparse.Namespace, pool: ProcessPoolExecutor | None) -> int:
    report = Report("tune_attention", arguments.dry_run, gpu_timing.read_bandwidth())
    found: dict[str, dict[str, Any]] = {}
    for shape in ["tiny"] if report.dry else arguments.shapes:
        decodes = [[Case(shape, "decode", n, c) for c in CONTEXTS] for n in arguments.rows]
        prefills = [[Case(shape, "prefill", *size) for size in sizes] for sizes in CHUNKS.values()]
        if report.dry:
            decodes, prefills = (
                [[Case(shape, "decode", 2, 40, torch.float32)]],
                [[Case(shape, "prefill", 20, 40, torch.float32)]],
            )
        codes = {padded_rows(cases[0].rows): cases[0] for cases in decodes}.values()
        compile_ahead(pool, [*codes, *(case for cases in prefills for case in cases)])
        for cases in decodes:
            found[cases[0].key()] = asdict(tune_decode(report, cases))
        for cases in prefills:
            tried = cases[0].candidates()
            found[cases[0].key()] = asdict(fastest(report, cases, tried[:1] if report.dry else tried))
        if not report.dry:
            _file(found)
    return 1 if report.failed else 0


def _file(found: dict[str, dict[str, Any]]) -> None:
    """Beside what is filed already."""
    path = configs.path("paged_attention", torch.cuda.get_device_name())
    path.parent.mkdir(exist_ok=True)
    filed = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(dict(sorted({**filed, **found}.items())), indent=1) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=sorted(SHAPES), default=["llama-2-7b", "llama-3.1-8b"])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64])
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 2) - 2))
    parser.add_argument("--dry-run", action="store_true", help="tiny, one configuration: tests the search")
    arguments = parser.parse_args()
    if arguments.dry_run:
        return run(arguments, None)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(arguments.workers, mp_context=context) as pool:
        return run(arguments, pool)


if __name__ == "__main__":
    sys.exit(main())
