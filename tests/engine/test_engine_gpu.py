"""On a GPU: the same answers as on a CPU, with and without graphs and overlap, while deltas come and go.

Logits in float32 on the CPU and 16 bits on the GPU differ, so answers are compared by how good the GPU's tokens are
in the CPU's eyes, and word for word among the ways of the GPU that launch the same kernels. How good they must be
follows the variant: `limit`, which no other variant's answers keep.

These tests want the GPU to themselves: beside others on it, its memory is not what the table says.
"""

from __future__ import annotations

import gc
import random
import shutil
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from bitdelta_core import Engine, EngineConfig, GenerationRequest, SamplingParams
from bitdelta_core.engine.accelerator import PIECE, PINNED_AT_ONCE, Cuda
from bitdelta_core.engine.completion import Completion
from bitdelta_core.engine.graphs import DecodeGraphs
from bitdelta_core.engine.shared_memory import SharedMemory
from bitdelta_core.errors import DeltaError, InvalidRequest
from tests.engine.engine_zoo import KINDS, Zoo, overwrite

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
SHAPE = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 8, "head_dim": 16}
ALL = [None, *KINDS, "lora"]
GREEDY = SamplingParams(temperature=0, max_tokens=10, ignore_eos=True)
MIXES: dict[str, list[str | None]] = {
    "distinct": ALL,
    "identical": ["bitdelta-row"],
    "uniform": ["bitdelta-row", "lora", None, "dense"],
    "zipf": ["bitdelta-row"] * 4 + ["lora"] * 2 + ["more-vocabulary", None],
    "base": [None],
}
WAYS: dict[str, dict[str, Any]] = {
    "graphs": {"cuda_graph_sizes": None},
    "eager": {"enforce_eager": True},
    "one-step-at-a-time": {"async_scheduling": False},
    "few-sizes": {"cuda_graph_sizes": (1, 8)},
    "chunks": {"max_num_batched_tokens": 32, "max_num_seqs": 32},
    "no-prefix-cache": {"enable_prefix_caching": False},
}


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Zoo:
    return Zoo(tmp_path_factory.mktemp("zoo"), config=SHAPE)


def config(**given: Any) -> EngineConfig:
    """Few sizes of graphs: every engine captures its own."""
    limits = {"num_kv_blocks": 400, "slab_bytes": 64 << 20, "max_num_seqs": 32, "cuda_graph_sizes": (4, 32)}
    return EngineConfig(**{"device": "cuda", **limits, **given})


def answer(
    engine: Engine, zoo: Zoo, asked: Sequence[tuple[str | None, tuple[int, ...]]], params: Any
) -> list[Completion]:
    shas = {kind: engine.add_delta(zoo.deltas[kind]) for kind, _ in asked if kind is not None}
    deltas = [None if kind is None else shas[kind] for kind, _ in asked]
    return engine.generate([prompt for _, prompt in asked], params, delta=deltas)


def requests(mix: str, count: int = 24) -> list[tuple[str | None, tuple[int, ...]]]:
    rng, kinds = random.Random(mix), MIXES[mix]
    return [
        (kinds[i % len(kinds)], tuple(rng.randrange(256) for _ in range(rng.randrange(1, 60)))) for i in range(count)
    ]


def limit(zoo: Zoo, kind: str | None, dtype: torch.dtype = torch.bfloat16) -> float:
    """Of `regret`, and of the error of a logprob: of two logits, or of one and of what all add up to, each is off by no
    more than rounding the same variant in transformers makes it."""
    return 2 * zoo.rounding(kind, dtype)


def regret(zoo: Zoo, kind: str | None, prompt: tuple[int, ...], tokens: list[int]) -> float:
    """How far the tokens were from the best in float32, at worst, in units of the logits' spread."""
    if max(tokens) >= zoo.reference(kind).config.vocab_size:
        return float("inf")
    rows = zoo.logits(kind, [*prompt, *tokens])[len(prompt) - 1 : -1]
    chosen = rows.gather(1, torch.tensor(tokens)[:, None]).squeeze(1)
    return float(((rows.max(dim=1).values - chosen) / rows.std(dim=1)).max())


def check(
    zoo: Zoo,
    asked: Sequence[tuple[str | None, tuple[int, ...]]],
    got: Sequence[Completion],
    dtype: torch.dtype = torch.bfloat16,
) -> None:
    """Every answer is its variant's."""
    for (kind, prompt), completion in zip(asked, got, strict=True):
        worst = regret(zoo, kind, prompt, completion.token_ids)
        assert worst <= limit(zoo, kind, dtype), f"{kind}: a token {worst:.3f} spreads below the best"


@pytest.mark.parametrize("kind", ALL, ids=str)
def test_no_other_variant_keeps_the_limit(zoo: Zoo, kind: str | None) -> None:
    """What the checks of answers can tell apart: all variants, but for the one that changes nothing."""
    prompts = [tuple(range(start, start + 12)) for start in (20, 60, 100)]
    answers = [(prompt, zoo.answer(kind, prompt, 10)) for prompt in prompts]
    assert max(regret(zoo, kind, *answer) for answer in answers) < 1e-3
    for other in ALL:
        if {kind, other} - {None, "empty"} and other != kind:
            worst = max(regret(zoo, other, *answer) for answer in answers)
            assert worst > 1.5 * limit(zoo, other), f"{kind}'s answers pass for {other}'s: {worst:.2f}"


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_tokens_are_the_variants(zoo: Zoo, mix: str, dtype: str) -> None:
    asked = requests(mix)
    with Engine(zoo.base, config(dtype=dtype)) as engine:
        assert engine.memory.decoder.startswith("device kernels; binary tensor core: error")
        got = answer(engine, zoo, asked, GREEDY)
        again = answer(engine, zoo, asked, GREEDY)
        stats = engine.stats()
    check(zoo, asked, got, getattr(torch, dtype))
    check(zoo, asked, again, getattr(torch, dtype))
    assert (stats.kv_blocks_used, stats.pinned) == (0, ())


@pytest.mark.parametrize("way", WAYS)
def test_every_way_through_the_engine(zoo: Zoo, way: str) -> None:
    asked = requests("distinct", 36)
    with Engine(zoo.base, config(**WAYS[way])) as engine:
        got = answer(engine, zoo, asked, GREEDY)
    check(zoo, asked, got)


@pytest.mark.parametrize("params", [GREEDY, SamplingParams(seed=5, max_tokens=12, top_p=0.9, ignore_eos=True)])
def test_graphs_and_overlap_change_no_token(zoo: Zoo, params: SamplingParams) -> None:
    """One request at a time, so that every way multiplies the same rows."""
    asked = [(kind, tuple(range(40 + i, 52 + i))) for i, kind in enumerate(ALL)]
    found = []
    for given in ({}, {"enforce_eager": True}, {"async_scheduling": False}):
        with Engine(zoo.base, config(cuda_graph_sizes=(1,), **given)) as engine:
            found.append([answer(engine, zoo, [one], params)[0].token_ids for one in asked])
    assert found[0] == found[1] == found[2]


def test_a_seed_gives_the_same_again(zoo: Zoo) -> None:
    params = SamplingParams(seed=3, max_tokens=20, temperature=1.2, top_k=40, repetition_penalty=1.1, ignore_eos=True)
    asked: list[tuple[str | None, tuple[int, ...]]] = [("bitdelta-row", tuple(range(30)))]
    with Engine(zoo.base, config(enable_prefix_caching=False)) as engine:
        first, second = (answer(engine, zoo, asked, params)[0].token_ids for _ in range(2))
    assert first == second


def test_variants_come_and_go_under_load(zoo: Zoo) -> None:
    """Room for a few of the variants: every wave loads almost all of them, and evicts as many, while others compute."""
    with Engine(zoo.base, config()) as engine:
        answer(engine, zoo, requests("distinct"), GREEDY)
        room = engine.stats().slab_bytes_used
    expected = tuple(str(zoo.deltas[kind]) for kind in ("bitdelta-row", "lora"))
    resident, waves, rng = 4, 4, random.Random(1)
    given = {"slab_bytes": room // 3, "max_resident_variants": resident, "slab_patience_s": 0.0}
    given |= {"host_cache_bytes": 16 << 20, "cuda_graph_deltas": expected}
    with Engine(zoo.base, config(**given)) as engine:
        for wave in range(waves):
            asked = rng.sample(requests("distinct", 45), 45)
            check(zoo, asked, answer(engine, zoo, asked, GREEDY))
            assert engine.stats().delta_loads_total >= (wave + 1) * (len(ALL) - 1 - resident), "the case is not tested"
        stats = engine.stats()
    assert stats.delta_evictions_total >= stats.delta_loads_total - resident
    assert (stats.pinned, stats.kv_blocks_used) == ((), 0)


def test_preemption(zoo: Zoo) -> None:
    asked = requests("uniform", 24)
    with Engine(zoo.base, config(num_kv_blocks=24)) as engine:
        got = answer(engine, zoo, asked, SamplingParams(temperature=0, max_tokens=40, ignore_eos=True))
        assert engine.stats().preemptions_total > 0, "the case is not tested"
    check(zoo, asked, got)


def test_aborted_streams_leave_nothing(zoo: Zoo) -> None:
    with Engine(zoo.base, config()) as engine:
        shas = [engine.add_delta(zoo.deltas[kind]) for kind in KINDS]
        rng, params = random.Random(2), SamplingParams(max_tokens=100, ignore_eos=True)
        for turn in range(60):
            _submit(engine, f"r{turn}", rng.choice([None, *shas]), params)
            engine.abort(f"r{rng.randrange(turn + 1)}")
        for turn in range(60):
            engine.abort(f"r{turn}")
        assert answer(engine, zoo, requests("base", 2), GREEDY)
        stats = engine.stats()
    assert (stats.running, stats.waiting, stats.pinned, stats.kv_blocks_used) == (0, 0, (), 0)


def _submit(engine: Engine, name: str, delta: str | None, params: SamplingParams) -> None:
    request = GenerationRequest(request_id=name, prompt_token_ids=(1, 2, 3), delta=delta, params=params)
    engine.submit(request, lambda event: None)


def test_a_variant_with_nan_weights_fails_alone(zoo: Zoo, tmp_path: Path) -> None:
    poisoned = shutil.copytree(zoo.deltas["dense"], tmp_path / "poisoned")
    overwrite(poisoned / "delta.safetensors", "layers.0.self_attn.k_proj", 3e38)
    asked = requests("uniform", 8)
    with Engine(zoo.base, config(num_kv_blocks=40)) as engine:
        bad = engine.add_delta(poisoned)
        with pytest.raises(DeltaError) as caught:
            engine.generate(tuple(range(20)), GREEDY, delta=bad)
        assert caught.value.delta == bad
        got = answer(engine, zoo, asked, GREEDY)
    check(zoo, asked, got)


def test_logprobs_and_what_is_sampled_apart(zoo: Zoo) -> None:
    prompt = tuple(range(40, 60))
    params = SamplingParams(temperature=0, max_tokens=3, prompt_logprobs=2, logprobs=4, ignore_eos=True)
    with Engine(zoo.base, config()) as engine:
        [got] = answer(engine, zoo, [("lora", prompt)], params)
        [biased] = answer(engine, zoo, [(None, prompt)], SamplingParams(max_tokens=2, logit_bias={7: 100.0}, seed=1))
    assert got.prompt_logprobs is not None
    found = [p for p in got.prompt_logprobs if p is not None] + got.logprobs
    tokens = [*prompt, *got.token_ids]
    assert [p.chosen.token_id for p in found] == tokens[1:]
    assert {len(p.top) for p in found} == {2, 4}
    worst = {kind: _logprob_error(zoo, kind, tokens, [p.chosen.logprob for p in found]) for kind in ("lora", None)}
    assert worst["lora"] <= limit(zoo, "lora")
    assert worst[None] > 1.5 * limit(zoo, "lora"), "another variant's would pass"
    assert biased.token_ids == [7, 7]


def _logprob_error(zoo: Zoo, kind: str | None, tokens: list[int], logprobs: list[float]) -> float:
    """At worst, in units of the logits' spread; logprobs of all tokens but the first."""
    rows = zoo.logits(kind, tokens)[:-1]
    expected = torch.log_softmax(rows, dim=1).gather(1, torch.tensor(tokens[1:])[:, None]).squeeze(1)
    return float(((torch.tensor(logprobs) - expected).abs() / rows.std(dim=1)).max())


def test_float32_is_served_by_torch_and_is_exact(zoo: Zoo) -> None:
    asked = requests("distinct")
    with Engine(zoo.base, config(dtype="float32")) as engine:
        assert engine.memory.decoder.startswith("torch (torch.float32")
        got = answer(engine, zoo, asked, GREEDY)
    assert max(regret(zoo, k, p, c.token_ids) for (k, p), c in zip(asked, got, strict=True)) < 1e-3


def test_memory_is_what_the_table_says(zoo: Zoo) -> None:
    given = {"num_kv_blocks": None, "slab_bytes": None, "gpu_memory_utilization": 0.5}
    gc.collect()
    with Engine(zoo.base, config(**given)) as engine:
        memory = engine.memory
        free, total = torch.cuda.mem_get_info()
        answer(engine, zoo, requests("distinct"), GREEDY)
        later, _ = torch.cuda.mem_get_info()
    assert total - free == pytest.approx(0.5 * total, rel=0.05)
    assert free - later < 0.01 * total, "memory is taken while serving"
    assert memory.fixed.graph_bytes > 0, "graphs were not measured"


def test_a_closed_engine_gives_its_memory_back(zoo: Zoo) -> None:
    """All of it but what libraries keep, though somebody still holds the engine."""
    with Engine(zoo.base, config()):
        pass
    before, total = torch.cuda.mem_get_info()
    with Engine(zoo.base, config(num_kv_blocks=None, slab_bytes=None, gpu_memory_utilization=0.5)) as engine:
        answer(engine, zoo, requests("distinct"), GREEDY)
        taken = before - torch.cuda.mem_get_info()[0]
    left = before - torch.cuda.mem_get_info()[0]
    assert taken > 0.3 * total
    assert left < 64 << 20, f"{engine} is closed and {left} bytes are in use"


def test_what_does_not_fit(zoo: Zoo) -> None:
    with pytest.raises(InvalidRequest, match=r"gpu_memory_utilization=0\.9 of"):
        Engine(zoo.base, config(slab_bytes=10**12))


@pytest.fixture
def cuda() -> Iterator[Cuda]:
    one = Cuda(torch.device("cuda"))
    yield one
    one.synchronize()


def test_copies_to_the_slab_arrive_whole(cuda: Cuda) -> None:
    """Three at a time, of several pieces each, into one slab."""
    nbytes = 3 * PIECE + 1000
    slab = torch.zeros(3 * nbytes, dtype=torch.uint8, device=cuda.device)
    hosts = [cuda.host_buffer(nbytes) for _ in range(3)]
    for host in hosts:
        host.copy_(torch.randint(0, 256, (nbytes,), dtype=torch.uint8))
    torch.cuda.synchronize()
    threads = [threading.Thread(target=cuda.fill, args=pair) for pair in zip(slab.split(nbytes), hosts, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(part.cpu(), host) for part, host in zip(slab.split(nbytes), hosts, strict=True))


def test_shared_memory_is_pinned_and_let_go(cuda: Cuda) -> None:
    """More than is pinned at once, and no whole number of pieces of that."""
    memory = SharedMemory(PINNED_AT_ONCE + PIECE + 4096)
    memory.bytes_.copy_(torch.randint(0, 256, (memory.nbytes,), dtype=torch.uint8))
    slab = torch.zeros(memory.nbytes - 100, dtype=torch.uint8, device=cuda.device)
    torch.cuda.synchronize()
    pieces = memory.bytes_.split(PIECE)
    undo = cuda.pin(memory.bytes_)
    assert all(piece.is_pinned() for piece in pieces)
    cuda.fill(slab, memory.bytes_[:-100])
    assert torch.equal(slab.cpu(), memory.bytes_[:-100])
    undo()
    assert not any(piece.is_pinned() for piece in pieces)


def test_a_capture_is_launched_again_with_what_is_there(cuda: Cuda) -> None:
    x, y = (torch.zeros(4, device=cuda.device) for _ in range(2))
    torch.cuda.synchronize()

    def launch() -> torch.Tensor:
        return torch.add(x, 1, out=y)

    made: DecodeGraphs[torch.Tensor] = DecodeGraphs(cuda, lambda shape: launch(), max_rows=2, sizes=(2,))
    made.capture_all([])
    replay = cuda.capture(launch)
    with cuda.in_steps():
        x.fill_(5)
        out = cuda.to_host(replay())
        mark = cuda.mark()
    mark.wait()
    assert mark.reached()
    assert out.tolist() == [6] * 4
