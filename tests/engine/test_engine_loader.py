"""An engine that reads its deltas in other processes answers as one that reads them in threads, errors included."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from bitdelta_core import Engine, EngineConfig, SamplingParams
from bitdelta_core.delta.compress import compress
from bitdelta_core.delta.planning import CompressOptions
from bitdelta_core.engine.config import LoaderName
from bitdelta_core.engine.host_buffers import SMALLEST
from bitdelta_core.errors import BitDeltaError, DeltaFormatError, InvalidRequest
from tests.engine.engine_zoo import overwrite
from tests.tiny import make_base, make_finetune

GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
PROMPTS = ((72, 101, 108), (1, 2, 3, 4, 5), (200, 100))
OPTIONS = {"signs": CompressOptions(embeddings="int4"), "dense": CompressOptions(codec="dense", embeddings="exact")}


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    work = tmp_path_factory.mktemp("engines")
    make_base(work / "base")
    for seed, (name, options) in enumerate(OPTIONS.items(), start=1):
        fine = make_finetune(work / "base", work / f"fine-{name}", seed=seed, scale=0.3)
        compress(work / "base", fine, work / name, options)
    shutil.copytree(work / "signs", work / "corrupt")
    overwrite(work / "corrupt" / "delta.safetensors", "layers.0.mlp.up_proj.weight.scale", float("nan"))
    return work


def config(loader: LoaderName, **given: Any) -> EngineConfig:
    limits: dict[str, Any] = {"device": "cpu", "num_kv_blocks": 60, "slab_bytes": 300_000, "load_threads": 1}
    return EngineConfig(loader=loader, **{**limits, **given})


def answers(engine: Engine, work: Path) -> list[list[int]]:
    """In one batch, over and over in a slab that holds one."""
    names = [None, *OPTIONS, *reversed(OPTIONS)]
    asked = [(name, prompt) for prompt in PROMPTS for name in names]
    deltas = [None if name is None else engine.add_delta(work / name) for name, _ in asked]
    return [c.token_ids for c in engine.generate([prompt for _, prompt in asked], GREEDY, delta=deltas)]


def refusal(engine: Engine, work: Path) -> tuple[type, str]:
    with pytest.raises(BitDeltaError) as caught:
        engine.generate([1, 2], GREEDY, delta=engine.add_delta(work / "corrupt"))
    return type(caught.value), str(caught.value)


def test_the_same_answers_and_errors(work: Path) -> None:
    with Engine(work / "base", config("thread")) as engine:
        expected, refused = answers(engine, work), refusal(engine, work)
    assert len({tuple(tokens) for tokens in expected[:3]}) == 3, "variants answer alike"
    assert refused[0] is DeltaFormatError
    with Engine(work / "base", config("process", host_cache_bytes=SMALLEST)) as engine:
        assert answers(engine, work) == expected
        assert refusal(engine, work) == refused
        for process in engine._base.loader._processes._processes:  # pyright: ignore[reportAttributeAccessIssue]
            os.kill(process.pid, signal.SIGKILL)
        evicted = engine.stats().delta_evictions_total
        assert answers(engine, work) == expected
        assert engine.stats().delta_evictions_total > evicted, "the case is not tested"
        assert engine.stats().delta_load_failures_total == 1


def test_who_loads_where(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not EngineConfig(device="cpu").loads_in_processes
    assert EngineConfig(device="cuda").loads_in_processes
    assert not EngineConfig(device="cuda", loader="thread").loads_in_processes
    monkeypatch.delattr(os, "memfd_create")
    assert not EngineConfig(device="cuda").loads_in_processes
    with pytest.raises(InvalidRequest, match="memfd_create"):
        EngineConfig(loader="process")
    with pytest.raises(InvalidRequest, match="auto, thread or process"):
        EngineConfig(loader="fork")  # pyright: ignore[reportArgumentType]
