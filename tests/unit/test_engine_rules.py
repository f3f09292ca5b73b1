"""Which parameters and configurations are refused, and by what name."""

from __future__ import annotations

import os
from typing import Any

import pytest

from bitdelta_core.engine.api import SamplingParams
from bitdelta_core.engine.config import EngineConfig
from bitdelta_core.engine.memory import Fixed, plan_memory
from bitdelta_core.errors import InvalidRequest


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("n", 0), ("n", 129), ("n", True), ("max_tokens", 0), ("max_tokens", 1.5), ("min_tokens", -1),
        ("temperature", -0.1), ("temperature", 2.1), ("temperature", float("nan")), ("top_p", 0.0), ("top_p", 1.1),
        ("top_k", -2), ("top_k", 10**30), ("min_p", -0.1), ("min_p", 1.5),
        ("presence_penalty", 2.5), ("frequency_penalty", -2.5),
        ("repetition_penalty", 0.0), ("repetition_penalty", 1e-40),
        ("seed", 2**64), ("logprobs", -1), ("logprobs", 101), ("prompt_logprobs", -1),
        ("logit_bias", {5: 101.0}), ("logit_bias", {-1: 1.0}), ("stop", ("",)), ("stop", ("x",) * 65),
        ("stop", ("x" * 1025,)), ("stop_token_ids", (-1,)), ("stop_token_ids", (10**30,)),
    ],
)  # fmt: skip
def test_out_of_range(name: str, value: Any) -> None:
    with pytest.raises(InvalidRequest, match=name) as caught:
        SamplingParams(**{name: value}).validate()
    assert caught.value.param == name


def test_limits_themselves_are_allowed() -> None:
    SamplingParams(
        n=128, max_tokens=1, min_tokens=1, temperature=2, top_p=1, top_k=-1, min_p=1, presence_penalty=-2,
        frequency_penalty=2, repetition_penalty=2, seed=-(2**63), logprobs=100, prompt_logprobs=0,
        logit_bias={0: -100}, stop=("x" * 1024,), stop_token_ids=(0,),
    ).validate()  # fmt: skip


def test_min_tokens_beyond_max_tokens() -> None:
    with pytest.raises(InvalidRequest, match="min_tokens must be <= max_tokens=3") as caught:
        SamplingParams(max_tokens=3, min_tokens=4).validate()
    assert caught.value.param == "min_tokens"


@pytest.mark.parametrize(
    "given",
    [
        {"block_size": 0}, {"max_num_seqs": 0}, {"max_num_seqs": 8, "max_num_batched_tokens": 7},
        {"num_kv_blocks": 10, "kv_cache_bytes": 1000}, {"num_kv_blocks": 1}, {"dtype": "int8"},
        {"gpu_memory_utilization": 0.0}, {"gpu_memory_utilization": 1.1}, {"cuda_graph_sizes": (0, 1)},
        {"decoder": "cublas"}, {"max_resident_variants": 0},
    ],
)  # fmt: skip
def test_configurations_that_cannot_work(given: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest):
        EngineConfig(**given)


BLOCKS = Fixed(block_bytes=1000, base_bytes=10**9, work_bytes=5 * 10**8, graph_bytes=2 * 10**8)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 10 GB, of which 1.5 GB are in use."""
    monkeypatch.setattr("bitdelta_core.engine.memory.torch.cuda.mem_get_info", lambda device: (85 * 10**8, 10**10))


@pytest.mark.parametrize(
    ("given", "kv", "slab"),
    [
        ({}, 3.4e9, 3.4e9),
        ({"slab_bytes": 10**9}, 5.8e9, 1e9),
        ({"kv_cache_bytes": 2 * 10**9}, 2e9, 4.8e9),
        ({"num_kv_blocks": 1000}, 1e6, 6.799e9),
        ({"slab_bytes": 10**9, "kv_cache_bytes": 10**9}, 1e9, 1e9),
        ({"gpu_memory_utilization": 0.5}, 1.4e9, 1.4e9),
    ],
)
@pytest.mark.usefixtures("gpu")
def test_a_gpu_is_filled_up_to_its_share(given: dict[str, Any], kv: float, slab: float) -> None:
    plan = plan_memory(EngineConfig(device="cuda", **given), BLOCKS, decoder="device kernels")
    assert (plan.kv_bytes, plan.slab_bytes) == (pytest.approx(kv, abs=2000), pytest.approx(slab, abs=2000))
    if len(given) < 2:
        assert plan.left_bytes == pytest.approx(1e10 * (1 - given.get("gpu_memory_utilization", 0.9)), abs=2000)
    assert "device kernels" in plan.table()
    assert "others       0.50 GB" in plan.table()


@pytest.mark.usefixtures("gpu")
def test_what_does_not_fit_a_gpu_is_told_in_numbers() -> None:
    with pytest.raises(InvalidRequest, match=r"0\.9 of 10\.00 GB leaves 7\.50 GB .*KV cache 7\.00 GB"):
        plan_memory(EngineConfig(device="cuda", kv_cache_bytes=7 * 10**9), BLOCKS)
    with pytest.raises(InvalidRequest, match="at least 2"):
        plan_memory(EngineConfig(device="cuda", slab_bytes=68 * 10**8), BLOCKS)


def test_memory_is_divided_as_told() -> None:
    plan = plan_memory(EngineConfig(device="cpu", kv_cache_bytes=10_500, slab_bytes=77), BLOCKS)
    assert (plan.num_kv_blocks, plan.slab_bytes, plan.kv_tokens) == (10, 77, 9 * 16)
    assert "144 tokens" in plan.table()
    assert 2**20 < plan.free_bytes < os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with pytest.raises(InvalidRequest, match="at least 2"):
        plan_memory(EngineConfig(device="cpu", kv_cache_bytes=1999), BLOCKS)
