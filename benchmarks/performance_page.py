"""Tables and figures of docs/performance.md from the results of the GPU benchmarks.

    python benchmarks/performance_page.py [--results DIR] [--page docs/performance.md]

Text between `<!-- name -->` and `<!-- /name -->` is replaced by the table of that name; figures go to docs/figures/. Of
several measurements of one case on one device the last counts. A table without any results is left out, and said so.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from charts import Chart, Series

HERE = Path(__file__).parent
Record = dict[str, Any]
LATENCY = ("TTFT p50 / p99, ms", "gap p50 / p99, ms")


class Results:
    """JSON lines by benchmark."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def latest(self, name: str, keys: Sequence[str], *, case: str | None = None) -> list[Record]:
        """The last record of each combination of keys, in order of first appearance. `case`: what the line is about,
        where it is not what the benchmark is for."""
        file = self._directory / f"{name}.jsonl"
        found: dict[tuple[Any, ...], Record] = {}
        for line in file.read_text().splitlines() if file.exists() else []:
            record = json.loads(line)
            if "wrong" not in record and record.get("case") == case:
                found[tuple(record.get(key) for key in ("device", *keys))] = record
        return list(found.values())


def markdown(heads: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    return "\n".join(lines + ["| " + " | ".join(map(str, row)) + " |" for row in rows])


def stamp(records: Sequence[Record]) -> str:
    """When, where and on what code these were measured."""
    seen = {(r["device"], r["date"][:10], r["commit"], f"torch {r['torch']}, triton {r['triton']}") for r in records}
    return "\n".join(
        f"Measured on {d}, {day}, commit {commit}, {versions}." for d, day, commit, versions in sorted(seen)
    )


def decode_table(results: Results) -> str:
    records = results.latest("decode", ("model", "kind", "rows", "variants", "context"))
    heads = ("model", "deltas", "rows", "variants", "context", "ms", "floor", "of the floor", "peers, ms (times ours)")
    rows = [
        (
            r["model"], r["kind"], r["rows"], r["variants"], r["context"], f"{r['us'] / 1e3:.2f}",
            f"{r['floor_us'] / 1e3:.2f}", f"{r['fraction']:.2f}", _peers(r, 1e3),
        )
        for r in records
    ]  # fmt: skip
    return _with_stamp(heads, rows, records)


def linear_table(results: Results) -> str:
    keys = ("kernel", "model", "op", "rows", "variants", "mix", "planes", "columns", "rank", "byte_rank")
    records = [r for r in results.latest("ops", keys) if r["kernel"] == "linear" and not _beside_factors(r)]
    heads = ("model", "linear", "rows", "variants", "deltas", "us", "floor", "of the floor", "peers, us (times ours)")
    rows = [
        (
            r["model"], r["op"], r["rows"], r["variants"], _parts(r), f"{r['us']:.1f}", f"{r['floor_us']:.1f}",
            f"{r['fraction']:.2f}", _peers(r, 1.0),
        )
        for r in records
    ]  # fmt: skip
    return _with_stamp(heads, rows, records)


WAYS = ("specialised, 256", "specialised, 128", "specialised, 64", "fused", "split", "merge")


def prompts_table(results: Results) -> str:
    """A line for each case, of what was measured in one run; the last that has all WAYS counts."""
    cases: dict[tuple[Any, ...], dict[str, Record]] = {}
    for r in results.latest("ops", ("kernel", "commit", "model", "op", "rows", "variants", "impl")):
        if r["kernel"] == "prefill":
            cases.setdefault((r["commit"], r["model"], r["op"], r["rows"], r["variants"]), {})[r["impl"]] = r
    whole = {case[1:]: by_way for case, by_way in cases.items() if by_way.keys() >= {"chosen", *WAYS}}
    rows = [
        (
            *case, f"{of['chosen']['peers_us']['cublas base']:.1f}",
            *(f"{of[way]['us']:.1f}" for way in ("chosen", *WAYS)), f"{of['chosen']['of_base']:.2f}",
        )
        for case, of in whole.items()
    ]  # fmt: skip
    heads = ("model", "linear", "rows", "variants", "base product, us", "chosen, us", *WAYS, "times the base product")
    return _with_stamp(heads, rows, [of["chosen"] for of in whole.values()])


def others_table(results: Results) -> str:
    keys = ("kernel", "model", "op", "rows", "variants", "context", "impl", "way", "planes", "form")
    apart = ("linear", "prefill")
    records = [r for r in results.latest("ops", keys) if r["kernel"] not in apart and "floor_us" in r]
    heads = ("kernel", "model", "case", "us", "floor", "of the floor", "TFLOP/s", "peers, us (times ours)")
    named = ("op", "rows", "variants", "context", "impl", "way", "planes", "form")
    rows = [
        (
            r["kernel"], r["model"], ", ".join(f"{k} {r[k]}" for k in named if k in r), f"{r['us']:.1f}",
            f"{r['floor_us']:.1f}", f"{r['fraction']:.2f}", r.get("tflops", ""), _peers(r, 1.0),
        )
        for r in records
    ]  # fmt: skip
    return _with_stamp(heads, rows, records)


def engine_table(results: Results) -> str:
    records = results.latest("engine", ("shape", "kind", "variants", "rate", "arrival", "cold_loads"))
    heads = ("model", "variants", "requests/s", "arrivals", "loads meanwhile", "tokens/s", "decoding", *LATENCY)
    rows = [
        (
            r["shape"], r["variants"], r["rate"], r["arrival"], r["delta_loads"] if r["cold_loads"] else "none",
            r["tokens_per_s"], r["decoding"], *_latency_of(r), r["longest_gap_ms"], r.get("itl_p99_ratio", ""),
            _notes(r),
        )
        for r in records
    ]  # fmt: skip
    return _with_stamp((*heads, "longest gap", "gap p99 over that without loads", "notes"), rows, records)


def serve_table(results: Results) -> str:
    records = results.latest("serve_gpu", ("shape", "kind", "variants", "rate", "system"))
    heads = ("model", "variants", "requests/s", "system", "tokens/s", "decoding", *LATENCY, "longest gap", "notes")
    rows = [
        (
            r["shape"], r["variants"], r["rate"], r["system"], r["tokens_per_s"], r["decoding"], *_latency_of(r),
            r["longest_gap_ms"], _notes(r),
        )
        for r in records
    ]  # fmt: skip
    return _with_stamp(heads, rows, records)


def _latency_of(record: Record) -> tuple[str, str]:
    """For the columns LATENCY."""
    ttft, gaps = (f"{record[f'{name}_p50']} / {record[f'{name}_p99']}" for name in ("ttft_ms", "itl_ms"))
    return ttft, gaps


def _notes(record: Record) -> str:
    """What makes a run worth less than its figures say."""
    said = {
        "failed": "{} failed",
        "compiled": "{} kernels compiled",
        "captured": "{} steps captured",
        "preemptions": "{} preempted",
        "without_a_token": "{} not begun",
    }
    return ", ".join(text.format(record[name]) for name, text in said.items() if record.get(name))


def load_table(results: Results) -> str:
    records = results.latest("load", ("base", "kind"))
    heads = ("base", "deltas", "MB", "disk to slab, s", "opening, s", "filling, GB/s", "pinned to slab, GB/s")
    rows = [
        (
            r["base"], r["kind"], f"{r['nbytes'] / 1e6:.0f}", r["disk_to_slab_s"], r["open_s"], r["fill_gb_per_s"],
            r["stage_gb_per_s"], r["stage_of_copy"],
        )
        for r in records
    ]  # fmt: skip
    return _with_stamp((*heads, "of a plain copy"), rows, records)


def startup_table(results: Results) -> str:
    found = results.latest("startup", ("shape", "kind", "compiled"), case="startup")
    records = list({(r["shape"], r["kind"], r["compiled"] > 0): r for r in found}.values())
    stages = ("imports", "device", "weights", "hash", "tokenizer", "memory_plan", "memory", "kernels", "graphs")
    heads = ("model", "to the first token, s", *(f"{stage.replace('_', ' ')}, s" for stage in stages))
    rows = [
        (
            r["shape"], r["engine_to_first_token_s"], *(f"{r.get(f'{stage}_s', 0.0):.2f}" for stage in stages),
            f"{r['first_token_s']:.2f}", f"{r['first_token_of_a_variant_s']:.2f}", r["compiled"],
        )
        for r in records
    ]  # fmt: skip
    return _with_stamp((*heads, "request, s", "variant's request, s", "kernels compiled"), rows, records)


def memory_table(results: Results) -> str:
    records = results.latest("startup", ("shape", "kind", "variants"), case="memory")
    heads = ("model", "deltas", "variants", "base, GB", "deltas, GB", "KV cache, GB", "together, GB", "in use, GB")
    rows = [
        (
            r["shape"], r["kind"], r["variants"], _gb(r["base_bytes"]), _gb(r["variants"] * r["delta_bytes"]),
            _gb(r["kv_bytes"]), _gb(r["needed_bytes"]), _gb(r["used_bytes"]), _gb(r["work_bytes"]),
            _gb(r["graph_bytes"]), _gb(r["rest_bytes"]), f"{100 * r['rest_of_needed']:.1f} %",
        )
        for r in records
    ]  # fmt: skip
    return _with_stamp((*heads, "working, GB", "graphs, GB", "all else, GB", "all else"), rows, records)


def _gb(nbytes: float) -> str:
    return f"{nbytes / 1e9:.2f}"


TABLES: dict[str, Callable[[Results], str]] = {
    "decode": decode_table,
    "linears": linear_table,
    "prompts": prompts_table,
    "kernels": others_table,
    "engine": engine_table,
    "serve": serve_table,
    "load": load_table,
    "startup": startup_table,
    "memory": memory_table,
}


def figures(results: Results, out: Path) -> list[Path]:
    """Latency and memory against the number of variants, as in the paper's figure 5 (arXiv 2402.10193)."""
    made = []
    records = results.latest("decode", ("model", "kind", "rows", "variants", "context"))
    for model in sorted({r["model"] for r in records if r["kind"] == "row" and r["context"] == 1024}):
        mine = [r for r in records if (r["model"], r["kind"], r["context"]) == (model, "row", 1024)]
        made.append(_latency(model, mine).write(out / f"latency-{model}.svg"))
        made.append(_memory(model, mine).write(out / f"memory-{model}.svg"))
    return made


def _latency(model: str, records: list[Record]) -> Chart:
    naive = [(r["variants"], us / 1e3) for r in records for name, us in r["peers_us"].items() if "naive" in name]
    series = [
        Series("bitdelta", [(r["variants"], r["us"] / 1e3) for r in records]),
        *([Series("one model per variant", naive)] if naive else []),
        Series("floor: bytes / bandwidth", [(r["variants"], r["floor_us"] / 1e3) for r in records], dash=2),
    ]
    return Chart(f"Decode step, {model}, context 1024", "variants (one row each)", "ms", series, log_x=True, log_y=True)


def _memory(model: str, records: list[Record]) -> Chart:
    ours = [(r["variants"], (r["base_bytes"] + r["variants"] * r["delta_bytes"]) / 1e9) for r in records]
    naive = [(r["variants"], r["variants"] * r["base_bytes"] / 1e9) for r in records]
    series = [Series("base and deltas", ours), Series("one model per variant", naive, dash=1)]
    return Chart(f"Weights in memory, {model}", "variants", "GB", series, log_x=True, log_y=True)


def _beside_factors(record: Record) -> bool:
    """Signs that section `factors` measures once more."""
    return record.get("byte_rank") == 0 and not record["rank"]


def _parts(record: Record) -> str:
    if record.get("byte_rank"):
        return f"bytes, rank {record['byte_rank']}"
    if record.get("rank"):
        return f"LoRA, rank {record['rank']}"
    planes, columns = record.get("planes", 1), " x columns" if record.get("columns") else ""
    return f"{planes} bit{columns}" if record["variants"] else "none"


def _peers(record: Record, unit: float) -> str:
    peers = record.get("peers_us", {})
    return ", ".join(f"{name} {us / unit:.1f} ({us / record['us']:.2f})" for name, us in peers.items())


def _with_stamp(heads: Sequence[str], rows: Sequence[Sequence[Any]], records: Sequence[Record]) -> str:
    return f"{markdown(heads, rows)}\n\n{stamp(records)}" if rows else ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=HERE / "results")
    parser.add_argument("--page", type=Path, default=HERE.parent / "docs" / "performance.md")
    arguments = parser.parse_args()
    results, page = Results(arguments.results), arguments.page.read_text()
    for name, table in TABLES.items():
        text = table(results)
        if not text:
            print(f"no results for {name}: left as it is", file=sys.stderr)
            continue
        pattern = re.compile(f"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        page, found = pattern.subn(lambda m, t=text: f"{m[1]}{t}\n{m[2]}", page)
        assert found == 1, f"{arguments.page} has no place for {name}"
    arguments.page.write_text(page)
    for path in figures(results, arguments.page.parent / "figures"):
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
