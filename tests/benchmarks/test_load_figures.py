"""What is said of a load: which tokens count, and that every table of the page can be made from what is written."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import pytest

from tests.benchmarks.conftest import BENCHMARKS

ROOT = BENCHMARKS.parent
CONDITIONS = {"date": "2026-01-01T00:00:00", "commit": "c", "device": "D", "torch": "t", "triton": "t"}


def test_only_the_window_counts() -> None:
    from arrivals import Offered, Timing, summary

    late = Timing(Offered(1.0, 0, (5, 6), 9), tokens=[1.5, 4.0, 4.5, 5.0, 9.5])
    begun = Timing(Offered(3.5, 0, (5,) * 12, 2), tokens=[4.0, 4.25])
    never = Timing(Offered(5.0, 0, (5,), 9))
    broken = Timing(Offered(5.0, 0, (5,), 9), error="E: x")
    found = summary([late, begun, never, broken], 9.0)
    assert found["window_s"] == 6.0
    assert found["tokens_per_s"] == pytest.approx(5 / 6, abs=0.06)  # 4.0 4.5 5.0, and 4.0 4.25
    assert found["prompt_tokens_per_s"] == 2.0, "only what began in the window"
    assert found["ttft_ms_p50"] == 500.0
    assert found["longest_gap_ms"] == 2500.0, "a gap belongs to its end"
    assert (found["failed"], found["first_error"], found["unfinished"], found["without_a_token"]) == (1, "E: x", 2, 1)


def test_without_tokens_there_are_no_percentiles() -> None:
    from arrivals import Offered, Timing, summary

    found = summary([Timing(Offered(0.0, -1, (5,), 3))], 3.0)
    assert found["itl_ms_p99"] is None
    assert found["tokens_per_s"] == 0.0


async def test_what_runs_too_long_is_given_up() -> None:
    from arrivals import Offered, play

    ended = []

    async def ask(offered: Offered) -> AsyncGenerator[int]:
        try:
            yield 1
            if offered.variant:
                await asyncio.Event().wait()
            yield 1
        finally:
            ended.append(offered.variant)

    quick, endless = await play([Offered(0.0, 0, (5,), 2), Offered(0.0, 1, (5,), 2)], ask, until=0.05)
    assert (len(quick.tokens), quick.unfinished) == (2, False)
    assert (len(endless.tokens), endless.unfinished, endless.error) == (1, True, "")
    assert sorted(ended) == [0, 1], "its stream was closed"


def test_loads_differ_in_their_tokens_alone() -> None:
    from arrivals import make_load

    def made(**given: Any) -> list[Any]:
        return make_load(seconds=5.0, rate=9.0, variants=4, vocabulary=999, **given)

    one, other = made(content=1), made(content=2)
    assert made(content=1) == one
    assert [(o.at, o.variant, len(o.prompt), o.answer) for o in one] == [
        (o.at, o.variant, len(o.prompt), o.answer) for o in other
    ]
    assert all(a.prompt != b.prompt for a, b in zip(one, other, strict=True))
    assert max(o.at for o in one) <= 5.0


def load_record(**given: Any) -> dict[str, Any]:
    from arrivals import Offered, Timing, summary

    figures = summary([Timing(Offered(1.0, 0, (5,), 3), tokens=[2.0, 2.5])], 3.0)
    return {**CONDITIONS, "shape": "S", "kind": "row", "variants": 2, "rate": 8.0, **figures, **given}


def results_in(folder: Path) -> None:
    """One made-up record for every table of whole engines."""
    start = {f"{name}_s": 1.25 for name in ("imports", "device", "weights", "hash", "tokenizer", "graphs")}
    start |= {"engine_to_first_token_s": 17.5, "first_token_s": 0.25, "first_token_of_a_variant_s": 0.5, "compiled": 3}
    memory = dict.fromkeys(("base", "kv", "needed", "used", "work", "graph", "rest", "delta"), 1e9)
    lines = {
        "engine": [
            load_record(arrival="poisson", cold_loads=False, delta_loads=0),
            load_record(arrival="poisson", cold_loads=True, delta_loads=7, itl_p99_ratio=1.07, compiled=2),
        ],
        "serve_gpu": [load_record(system="engine")],
        "load": [
            {**CONDITIONS, "base": "S", "kind": "row", "nbytes": 9e8, "disk_to_slab_s": 0.5, "open_s": 0.1}
            | {"fill_gb_per_s": 2.0, "stage_gb_per_s": 50.0, "stage_of_copy": 0.95}
        ],
        "startup": [
            {**CONDITIONS, "shape": "S", "kind": "row", "case": "startup", **start},
            {**CONDITIONS, "shape": "S", "kind": "row", "case": "memory", "variants": 2, "rest_of_needed": 0.031}
            | {f"{name}_bytes": value for name, value in memory.items()},
        ],
    }
    for name, records in lines.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def test_the_page_has_a_place_for_every_table(tmp_path: Path) -> None:
    results_in(tmp_path)
    page = tmp_path / "page.md"
    page.write_text((ROOT / "docs" / "performance.md").read_text())
    command = [sys.executable, str(BENCHMARKS / "performance_page.py"), "--results", str(tmp_path), "--page", str(page)]
    subprocess.run(command, check=True, capture_output=True)
    text = page.read_text()

    def row(name: str, last: int = -1) -> list[str]:
        inside = text.split(f"<!-- {name} -->\n")[1].split(f"\n<!-- /{name} -->")[0]
        table = [line for line in inside.splitlines() if line.startswith("| ")]
        assert len({line.count("|") for line in table}) == 1, "a row is not as wide as its heads"
        return [cell.strip() for cell in table[last].strip("|").split("|")]

    assert row("engine", -2)[4] == "none"
    assert row("engine")[-2:] == ["1.07", "2 kernels compiled"]
    assert row("serve")[3] == "engine"
    assert row("load")[-1] == "0.95"
    assert row("startup")[1] == "17.5"
    assert row("startup")[-1] == "3"
    assert row("memory")[-1] == "3.1 %"
