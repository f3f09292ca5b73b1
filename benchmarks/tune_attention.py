"""Finds the fastest settings of decode and prefill attention on this GPU and files them where the kernels look.

    python benchmarks/tune_attention.py [--shapes llama-2-7b llama-3.1-8b] [--rows 1 4 64] [--workers 12] [--no-prefill]

Decode, behind a kernel that reads as much as a linear: every code at one context, then the best few with other units of
work at all contexts. Prefill: every code at a prompt and at the last chunk of one. Processes of their own compile ahead
into Triton's cache. Writes `kernels/paged_attention/configs/<device>.json`, and every timing to
benchmarks/results/tune_attention.jsonl.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace

import gpu_timing
import torch
import tuning
from attention_cases import AttentionCase, AttentionRun, Config
from gpu_timing import Report
from tuning import best

from kernels.paged_attention import choice
from kernels.paged_attention.device import padded_rows

CONTEXTS = (512, 1024, 4096)
CHUNKS = {"long": ((2048, 2048), (512, 4096)), "short": ((64, 4096), (16, 1024))}
"""(rows, context)"""
BEST = 3


def compile_one(case: AttentionCase, config: Config) -> None:
    AttentionRun(case).calls(config)[0]()


def timed(report: Report, case: AttentionCase, found: Iterable[Config]) -> dict[Config, float]:
    run = AttentionRun(case)
    return tuning.timed(
        report, case.settings(), run, found, limit=case.limit, nbytes=case.nbytes, less=run.before_us()
    )  # fmt: skip


def fastest(report: Report, cases: Sequence[AttentionCase], found: Sequence[Config]) -> Config:
    """By the sum of each case's time over that case's best."""
    slowness: dict[Config, float] = dict.fromkeys(found, 0.0)
    measured = {case: timed(report, case, found) for case in cases}
    for times in measured.values():
        slowness = {c: s + times[c] / min(times.values()) for c, s in slowness.items() if c in times}
    (winner,) = best(slowness, 1)
    for case, times in measured.items():
        label = case.label()
        if case.kind != "decode":
            label |= {"tflops": round(case.operations / times[winner] / 1e6, 1)}
        report.row(label, times[winner], nbytes=case.nbytes)
    print(f"    {cases[0].key()}: {winner}", flush=True)
    return winner


def codes(cases: Iterable[AttentionCase]) -> Iterator[tuple[AttentionCase, Config]]:
    """What a compiler tells apart, once each."""
    known: set[object] = set()
    for case in cases:
        for config in case.candidates():
            code: object = (case, config)
            if isinstance(config, choice.DecodeConfig):
                rows = 0 if config.direct else padded_rows(case.rows)
                code = (case.shape, rows, replace(config, chunk=0, splits=0, programs=0))
            if code not in known:
                known.add(code)
                yield case, config


def tune_decode(report: Report, cases: Sequence[AttentionCase]) -> Config:
    """Cases of the same rows; the middle one ranks the codes."""
    middle = cases[len(cases) // 2]
    first = best(timed(report, middle, middle.candidates()[:1] if report.dry else middle.candidates()), BEST)
    decodes = [config for config in first if isinstance(config, choice.DecodeConfig)]
    refined = [r for config in decodes for r in choice.decode_refinements(config, middle.rows)]
    return fastest(report, cases, refined[:1] if report.dry else refined)


def run(arguments: argparse.Namespace, pool: ProcessPoolExecutor | None) -> int:
    report = Report("tune_attention", arguments.dry_run, gpu_timing.read_bandwidth())
    found: tuning.Filed = {}
    for shape in ["tiny"] if report.dry else arguments.shapes:
        decodes = [[AttentionCase(shape, "decode", n, c) for c in CONTEXTS] for n in arguments.rows]
        chunks = () if arguments.no_prefill else CHUNKS.values()
        prefills = [[AttentionCase(shape, "prefill", *size) for size in sizes] for sizes in chunks]
        if report.dry:
            decodes = [[AttentionCase(shape, "decode", 2, 40, torch.float32)]]
            prefills = [[AttentionCase(shape, "prefill", 20, 40, torch.float32)]]
        # The shortest context of each: a compiler has tensors of its own, and what it compiles does not depend on them.
        cases = [case for cases in decodes for case in cases[:1]] + [case for cases in prefills for case in cases]
        tuning.compile_ahead(pool, compile_one, list(codes(cases)))
        for cases in decodes:
            found[cases[0].key()] = asdict(tune_decode(report, cases))
        for cases in prefills:
            tried = cases[0].candidates()
            found[cases[0].key()] = asdict(fastest(report, cases, tried[:1] if report.dry else tried))
        if not report.dry:
            tuning.file("paged_attention", found)
    return 1 if report.failed else 0


def main() -> int:
    parser = tuning.parser(__doc__, rows=[1, 4, 16, 64])
    parser.add_argument("--no-prefill", action="store_true", help="decode alone")
    arguments = parser.parse_args()
    with tuning.compilers(arguments.workers, arguments.dry_run) as pool:
        return run(arguments, pool)


if __name__ == "__main__":
    sys.exit(main())
