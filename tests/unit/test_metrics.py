"""The table of series is what everything else uses."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest

from bitdelta_core.engine.api import EngineStats, TokenEvent
from deployments import metrics
from deployments.metrics_text import merge

GRAFANA = Path(metrics.__file__).parent / "grafana.json"
SUFFIXES = ("_bucket", "_sum", "_count")


def exported() -> set[str]:
    """Every name that Prometheus can see."""
    names = set()
    for name, spec in metrics.SERIES.items():
        names |= {name + suffix for suffix in SUFFIXES} if spec.kind == "histogram" else {name}
    return {f"ray_bitdelta_{name}" for name in names}


def test_the_dashboard_reads_only_series_that_exist() -> None:
    text = GRAFANA.read_text()
    read = set(re.findall(r"\bray_\w+", text))
    assert read
    assert read <= exported()
    assert len({panel["id"] for panel in json.loads(text)["panels"]}) == len(json.loads(text)["panels"])


def test_the_dashboard_shows_every_series() -> None:
    unread = {name for name in metrics.SERIES if f"ray_bitdelta_{name}" not in GRAFANA.read_text()}
    assert unread == set()


def test_kinds_and_names_agree() -> None:
    for name, spec in metrics.SERIES.items():
        assert name.endswith("_total") == (spec.kind == "counter"), name
        assert bool(spec.buckets) == (spec.kind == "histogram"), name
        assert list(spec.buckets) == sorted(set(spec.buckets)), name
        assert not {"tenant", "model", "variant", "owner"} & set(spec.labels), name


def test_counters_follow_fields_that_the_engine_has() -> None:
    fields = {field.name for field in dataclasses.fields(EngineStats)}
    assert set(metrics.COUNTED.values()) <= fields
    assert set(metrics.COUNTED) <= {name for name, spec in metrics.SERIES.items() if spec.kind == "counter"}


def test_tokens_that_come_together_count_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four of a choice, 0.2 s after its last: 0.05 s each, one observation an event; another choice has its own."""
    clock, seen = iter((0.0, 1.0, 1.2)), []
    monkeypatch.setattr(metrics.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(metrics, "observe", lambda name, value: seen.append((name, round(value, 6))))
    monkeypatch.setattr(metrics, "count", lambda name, **labels: seen.append((name, labels)))

    def event(index: int, *tokens: int, **more: Any) -> TokenEvent:
        return TokenEvent(request_id="a", index=index, token_ids=tokens, prompt_tokens=7, **more)

    timer = metrics.RequestTimer()
    timer.saw([event(0, 1), event(1, 2)])
    assert seen == [("time_to_first_token_seconds", 1.0), ("request_prompt_tokens", 7)]
    seen.clear()
    timer.saw([event(0, 3), event(0, 4, 5, 6), event(1, 8), event(0, finish_reason="stop", completion_tokens=5)])
    gaps = [value for name, value in seen if name == "inter_token_latency_seconds"]
    assert gaps == [0.05, 0.05, 0.2]
    assert ("request_success_total", {"finished_reason": "stop"}) in seen


def test_texts_of_several_nodes_become_one() -> None:
    def node(replica: str, value: int) -> str:
        return (
            "# HELP ray_other x\n# TYPE ray_other gauge\n"
            'ray_other{application="app"} 1\n'
            "# HELP ray_bitdelta_deltas_resident Deltas.\n# TYPE ray_bitdelta_deltas_resident gauge\n"
            f'ray_bitdelta_deltas_resident{{application="app",replica="{replica}"}} {value}\n'
            f'ray_bitdelta_deltas_resident{{application="another",replica="{replica}"}} 9\n'
        )

    assert merge([node("r1", 3), "", node("r2", 4)], "app").splitlines() == [
        "# HELP ray_bitdelta_deltas_resident Deltas.",
        "# TYPE ray_bitdelta_deltas_resident gauge",
        'ray_bitdelta_deltas_resident{application="app",replica="r1"} 3',
        'ray_bitdelta_deltas_resident{application="app",replica="r2"} 4',
    ]
