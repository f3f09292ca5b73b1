"""Served tokens equal those of the restored checkpoint in transformers: every kind of variant, mixed in one batch."""

from __future__ import annotations

import asyncio
import random
import shutil
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from itertools import accumulate
from pathlib import Path

import pytest
import torch

from bitdelta_core import Engine, EngineConfig, GenerationRequest, SamplingParams
from bitdelta_core.delta.compress import compress
from bitdelta_core.engine.sources import content_sha256
from bitdelta_core.errors import BaseMismatch, ContextLengthExceeded, DeltaError, DeltaFormatError, DeltaTooLarge
from deployments.replica import Deltas
from storage import Catalog, DiskCache, Repository, open_store
from storage.manifest import FileEntry, Manifest
from tests.engine.engine_zoo import KINDS, Zoo, overwrite
from tests.tiny import make_base, make_finetune

ALL = [*KINDS, "lora"]
GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
MIXES = {
    "distinct": [None, *ALL],
    "identical": ["bitdelta-row"],
    "uniform": ["bitdelta-row", "lora", None, "dense", "dropout", "auto-low-rank"],
    "zipf": ["bitdelta-row"] * 4 + ["dropout"] * 2 + ["auto-dense"] * 2 + ["lora"] * 2 + ["more-vocabulary", None],
    "base": [None],
}
LIMITS = {
    "roomy": {},
    "chunks": {"max_num_seqs": 3, "max_num_batched_tokens": 5},
    "preemption": {"num_kv_blocks": 14, "block_size": 4},
    "no-prefix-cache": {"num_kv_blocks": 14, "block_size": 4, "enable_prefix_caching": False},
    "one-variant-per-step": {"max_variants_per_step": 1},
}


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Zoo:
    return Zoo(tmp_path_factory.mktemp("zoo"))


@pytest.fixture(scope="module")
def engine(zoo: Zoo) -> Iterator[Engine]:
    with Engine(zoo.base, EngineConfig(device="cpu", num_kv_blocks=200, slab_bytes=32 << 20)) as one:
        yield one


@pytest.fixture(scope="module")
def expected(zoo: Zoo) -> dict[tuple[str | None, tuple[int, ...]], list[int]]:
    """Prompts and answers of every variant, worked out once."""
    rng = random.Random(0)
    shared = [rng.randrange(256) for _ in range(20)]
    found = {}
    for kind in [None, *ALL]:
        for length in (1, 9, 20):
            prompt = tuple(shared if length == 20 else [rng.randrange(256) for _ in range(length)])
            found[kind, prompt] = zoo.answer(kind, prompt, 12)
    assert len({tuple(a) for (_, p), a in found.items() if p == tuple(shared)}) >= 9, "variants answer alike"
    return found


def asked(mix: str, expected: dict, count: int = 12) -> list[tuple[str | None, tuple[int, ...]]]:
    kinds = MIXES[mix]
    prompts = {kind: [p for k, p in expected if k == kind] for kind in kinds}
    return [
        (k, prompts[k][i // len(kinds) % 3]) for i in range(max(count, 3 * len(kinds))) for k in [kinds[i % len(kinds)]]
    ]


@pytest.mark.parametrize("kind", [None, *ALL])
def test_each_variant_alone(zoo: Zoo, engine: Engine, expected: dict, kind: str | None) -> None:
    delta = None if kind is None else engine.add_delta(zoo.deltas[kind])
    for (k, prompt), answer in expected.items():
        if k == kind:
            assert engine.generate(prompt, GREEDY, delta=delta)[0].token_ids == answer


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("limits", LIMITS)
def test_every_mix_in_one_batch(zoo: Zoo, expected: dict, mix: str, limits: str) -> None:
    config = {"num_kv_blocks": 200, **LIMITS[limits]}
    with Engine(zoo.base, EngineConfig(device="cpu", slab_bytes=32 << 20, **config)) as engine:
        shas = {kind: engine.add_delta(zoo.deltas[kind]) for kind in ALL}
        requests = asked(mix, expected)
        deltas = [None if kind is None else shas[kind] for kind, _ in requests]
        for _ in range(2):  # the second time from the prefix cache
            got = engine.generate([prompt for _, prompt in requests], GREEDY, delta=deltas)
            assert [c.token_ids for c in got] == [expected[r] for r in requests]
        stats = engine.stats()
    if limits == "preemption":
        assert stats.preemptions_total > 0, "the case is not tested"
    if limits == "roomy":
        assert stats.prefix_cache_hits_total > 0, "the case is not tested"
    if limits == "no-prefix-cache":
        assert stats.prefix_cache_hits_total == 0


def test_isolation_under_a_tiny_slab(zoo: Zoo, expected: dict) -> None:
    """Room for the largest variant and little more: all are loaded and evicted, over and over, while others compute."""
    with Engine(zoo.base, EngineConfig(device="cpu", num_kv_blocks=100, slab_bytes=32 << 20)) as engine:
        sizes = []
        for kind in ALL:
            engine.generate([1], SamplingParams(max_tokens=1), delta=engine.add_delta(zoo.deltas[kind]))
            sizes.append(engine.stats().slab_bytes_used - sum(sizes))
    config = EngineConfig(device="cpu", num_kv_blocks=100, slab_bytes=max(sizes) + 60_000, slab_patience_s=0.0)
    together = sum(total <= config.slab_bytes for total in accumulate(sorted(sizes)))
    assert together < len(ALL), "the case is not tested"
    with Engine(zoo.base, config) as engine:
        shas = {kind: engine.add_delta(zoo.deltas[kind]) for kind in ALL}
        requests = asked("distinct", expected) * 2
        random.Random(5).shuffle(requests)
        deltas = [None if kind is None else shas[kind] for kind, _ in requests]
        got = engine.generate([prompt for _, prompt in requests], GREEDY, delta=deltas)
        assert [c.token_ids for c in got] == [expected[r] for r in requests]
        stats = engine.stats()
        # in which order deltas arrive, and so how often one leaves, is up to the loader's threads
        assert stats.delta_evictions_total == stats.delta_loads_total - len(stats.resident)
        assert stats.delta_evictions_total >= len(ALL) - together
        assert (stats.pinned, stats.kv_blocks_used) == ((), 0)


async def test_streams_beside_failures(zoo: Zoo, expected: dict, tmp_path: Path) -> None:
    """A corrupt delta, one of another base and one that blocks: each tells its own requests, the others are served."""
    good = zoo.deltas["bitdelta-row"]
    corrupt = shutil.copytree(good, tmp_path / "corrupt")
    weights = corrupt / "delta.safetensors"
    weights.write_bytes(weights.read_bytes()[:-9])
    stranger = make_base(tmp_path / "stranger", seed=9)
    foreign = compress(stranger, make_finetune(stranger, tmp_path / "fine"), tmp_path / "foreign")
    gate = threading.Event()

    def source(sha256: str) -> nullcontext[Path]:
        assert sha256 == "slow"
        assert gate.wait(60)
        return nullcontext(good)

    with Engine(zoo.base, EngineConfig(device="cpu", num_kv_blocks=200, slab_bytes=16 << 20), source) as engine:
        shas = {
            "row": engine.add_delta(good),
            "corrupt": engine.add_delta(corrupt),
            "foreign": engine.add_delta(foreign),
        }
        [prompt, *_] = [p for k, p in expected if k == "bitdelta-row"]

        async def tokens(name: str, delta: str | None) -> list[int]:
            request = GenerationRequest(request_id=name, prompt_token_ids=prompt, params=GREEDY, delta=delta)
            return [t async for event in engine.stream(request) for t in event.token_ids]

        slow = asyncio.create_task(tokens("slow", "slow"))
        names = ["row", "corrupt", "foreign", "corrupt"]
        got = await asyncio.gather(*(tokens(f"{n}{i}", shas[n]) for i, n in enumerate(names)), return_exceptions=True)
        assert got[0] == expected["bitdelta-row", prompt]
        assert isinstance(got[1], DeltaFormatError)
        assert isinstance(got[3], DeltaFormatError)
        assert isinstance(got[2], BaseMismatch)
        assert not slow.done()
        assert await tokens("again", shas["row"]) == expected["bitdelta-row", prompt]
        gate.set()
        assert await slow == expected["bitdelta-row", prompt]
        assert engine.stats().delta_load_failures_total == 2


def test_a_source_may_take_the_files_away_once_they_are_mapped(zoo: Zoo, expected: dict, tmp_path: Path) -> None:
    """As a disk cache does: outside the source's `with` block nothing of the directory is opened again."""

    @contextmanager
    def source(kind: str) -> Iterator[Path]:
        place = tmp_path / f"{kind}-{uuid.uuid4().hex}"
        yield shutil.copytree(zoo.deltas[kind], place)
        shutil.rmtree(place)

    with Engine(zoo.base, EngineConfig(device="cpu", num_kv_blocks=200, slab_bytes=16 << 20), source) as engine:
        for (kind, prompt), answer in expected.items():
            if kind is not None:
                assert engine.generate(prompt, GREEDY, delta=kind)[0].token_ids == answer
    assert list(tmp_path.iterdir()) == []


def test_many_variants_pass_through_a_tiny_disk_cache(zoo: Zoo, expected: dict, tmp_path: Path) -> None:
    """It holds the largest delta and little more, and the slab not many: directories are evicted over and over."""
    catalog = Catalog(open_store(tmp_path / "repo"))
    kinds = sorted(zoo.deltas)
    manifests = {kind: catalog.publish(zoo.deltas[kind], f"a/{kind}", base_sha256="0" * 64) for kind in kinds}
    budget = max(manifest.nbytes for manifest in manifests.values()) * 5 // 4
    cache = DiskCache(tmp_path / "cache", budget)
    deltas = Deltas(Repository(catalog.store, cache))
    for manifest in manifests.values():
        deltas.remember(manifest)
    asked = [(kind, prompt, answer) for (kind, prompt), answer in expected.items() if kind is not None] * 2
    random.Random(0).shuffle(asked)
    with Engine(zoo.base, EngineConfig(device="cpu", num_kv_blocks=200, slab_bytes=2 * budget), deltas.lease) as engine:
        for turn in range(0, len(asked), 8):
            part = asked[turn : turn + 8]
            shas = [manifests[kind].delta_sha256 for kind, _, _ in part]
            found = engine.generate([prompt for _, prompt, _ in part], GREEDY, delta=shas)
            assert [c.token_ids for c in found] == [answer for _, _, answer in part]
            assert cache.stats().nbytes <= budget
        assert engine.stats().delta_evictions_total
    cache.check_integrity()


def test_a_variant_with_nan_weights_fails_alone_and_poisons_no_block(zoo: Zoo, expected: dict, tmp_path: Path) -> None:
    """Its K and V are NaN: whoever gets its blocks afterwards must not see them."""
    poisoned = shutil.copytree(zoo.deltas["dense"], tmp_path / "poisoned")
    overwrite(poisoned / "delta.safetensors", "layers.0.self_attn.k_proj", 3e38)  # finite, but its products are not
    with Engine(zoo.base, EngineConfig(device="cpu", num_kv_blocks=12, slab_bytes=16 << 20)) as engine:
        bad = engine.add_delta(poisoned)
        prompt = tuple(range(20))
        with pytest.raises(DeltaError, match="NaN or infinity") as caught:
            engine.generate(prompt, GREEDY, delta=bad)
        assert caught.value.delta == bad
        for (kind, prompt), answer in expected.items():
            if kind is None:
                assert engine.generate([prompt] * 4, GREEDY)[3].token_ids == answer


def test_each_variant_has_its_own_tokenizer_and_context(zoo: Zoo, engine: Engine) -> None:
    grown, rope = engine.add_delta(zoo.deltas["more-vocabulary"]), engine.add_delta(zoo.deltas["rope"])
    assert len(engine.tokenizer(grown)) == len(engine.tokenizer()) + 3
    assert engine.tokenizer(grown).chat_template
    assert engine.tokenizer(grown)("<|end|>")["input_ids"] == [259]
    biased = SamplingParams(temperature=0, max_tokens=2, logit_bias={258: 100.0}, skip_special_tokens=False)
    assert engine.generate("x", biased, delta=grown)[0].text == "<|user|>" * 2
    long = [65] * 300
    with pytest.raises(ContextLengthExceeded):
        engine.generate(long, GREEDY)
    assert len(engine.generate(long, GREEDY, delta=rope)[0].token_ids) == 12


def test_what_a_slab_cannot_hold(zoo: Zoo) -> None:
    with Engine(zoo.base, EngineConfig(device="cpu", num_kv_blocks=20, slab_bytes=4096)) as engine:
        sha256 = engine.add_delta(zoo.deltas["dense"])
        with pytest.raises(DeltaTooLarge, match="4096") as caught:
            engine.generate("x", GREEDY, delta=sha256)
        assert caught.value.delta == sha256


def test_prompt_logprobs_are_transformers(zoo: Zoo, engine: Engine) -> None:
    prompt = list(range(40, 60))
    params = SamplingParams(temperature=0, max_tokens=3, prompt_logprobs=2, logprobs=4, ignore_eos=True)
    [got] = engine.generate(prompt, params, delta=engine.add_delta(zoo.deltas["lora"]))
    with torch.no_grad():
        logits = zoo.reference("lora")(torch.tensor([prompt + got.token_ids])).logits[0].float()
    logprobs = torch.log_softmax(logits, dim=-1)
    assert got.prompt_logprobs is not None
    found = [p for p in got.prompt_logprobs if p is not None] + got.logprobs
    for position, (p, token) in enumerate(zip(found, (prompt + got.token_ids)[1:], strict=True)):
        assert p.chosen.token_id == token
        assert p.chosen.logprob == pytest.approx(logprobs[position, token].item(), abs=2e-4)
        assert p.chosen.rank == 1 + int((logprobs[position] > logprobs[position, token]).sum())


def test_a_seeded_sample_does_not_depend_on_company(zoo: Zoo, engine: Engine) -> None:
    delta = engine.add_delta(zoo.deltas["bitdelta-row"])
    params = SamplingParams(seed=3, max_tokens=20, top_p=0.9, ignore_eos=True)
    [alone] = engine.generate("hello", params, delta=delta)
    crowd = engine.generate(["hello", "world", "hello", "x"], params, delta=[delta, None, delta, delta])
    assert crowd[0].token_ids == crowd[2].token_ids == alone.token_ids


def test_a_directory_and_its_published_version_have_one_identity(zoo: Zoo) -> None:
    import hashlib

    path = zoo.deltas["more-vocabulary"]
    files = tuple(
        FileEntry(path=f.name, sha256=hashlib.sha256(f.read_bytes()).hexdigest(), nbytes=f.stat().st_size)
        for f in path.iterdir()
    )
    manifest = Manifest(owner="o", name="n", version=1, files=files, base_sha256="0" * 64)
    assert content_sha256(path) == manifest.delta_sha256
