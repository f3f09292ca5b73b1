"""Which kernels steps launch on an H200, where there is none: on meta tensors, and nothing is compiled.

A kernel is compiled for every combination of constants and types that it is launched with. Here a launch only says what
these are. That kernels are chosen as on an H200 takes modules of `kernels` that take "meta" for "cuda" where they ask
what they run on, and torch's answers about the chip. As a program it must not see TRITON_INTERPRET:

    python -m tests.engine.launch_harness llama-2-7b signs lora
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from pathlib import Path
from types import CodeType, SimpleNamespace
from typing import Any

import torch
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from tests.kernels.compile_harness import Chip

Launches = set[tuple[str, str, str]]
ARCH, META = 90, torch.device("meta")
ROWS, SEQUENCES = 2048, 64


class _Loader(SourceFileLoader):
    def get_code(self, fullname: str) -> CodeType:
        source = Path(self.path).read_text()
        for asked, here in (
            ('type == "cuda"', 'type == "meta"'),
            ('type != "cuda"', 'type != "meta"'),
            ("is_cuda", "is_meta"),
        ):
            source = source.replace(asked, here)
        return compile(source, self.path, "exec")


class _Finder(MetaPathFinder):
    def find_spec(self, fullname: str, path: Sequence[str] | None, target: Any = None) -> ModuleSpec | None:
        spec = PathFinder.find_spec(fullname, path) if fullname.split(".")[0] == "kernels" else None
        if spec is not None and isinstance(spec.loader, SourceFileLoader):
            spec.loader = _Loader(spec.loader.name, spec.loader.path)
        return spec


def pretend() -> None:
    """Before anything of `kernels` is imported."""
    sys.meta_path.insert(0, _Finder())
    driver.set_active(Chip(ARCH))  # pyright: ignore[reportArgumentType]
    chip = SimpleNamespace(
        multi_processor_count=132,
        shared_memory_per_block_optin=227 * 1024,
        shared_memory_per_multiprocessor=228 * 1024,
        major=9,
    )
    for name, answer in (("properties", chip), ("capability", (9, 0)), ("name", "NVIDIA H200")):
        setattr(torch.cuda, f"get_device_{name}", lambda device=None, answer=answer: answer)
    from kernels.delta_linear import choice, compact

    passed = SimpleNamespace(ok=True, reason="taken for granted")
    for module, check in (
        (choice, "self_check"),
        (choice, "ring_check"),
        (choice, "compact_check"),
        (compact, "compact_check"),
    ):
        setattr(module, check, lambda device: passed)


@contextmanager
def noting() -> Iterator[Launches]:
    """What is launched inside."""
    run, found = JITFunction.run, Launches()

    def note(self: Any, *args: Any, grid: Any = None, warmup: bool = False, **options: Any) -> None:
        *_, bind = self.device_caches[ARCH]
        _, constants, used = bind(*args, debug=False, **options)
        found.add((self.__name__, str(constants), str(used)))

    JITFunction.run = note
    try:
        yield found
    finally:
        JITFunction.run = run


SHAPES = {
    "12m": (384, 1024, 6, 2, 4096),
    "qwen-0.5b": (896, 4864, 14, 2, 151936),
    "llama-2-7b": (4096, 11008, 32, 32, 32000),
    "llama-3.1-8b": (4096, 14336, 32, 8, 128256),
}
"""hidden, inner, heads, KV heads, vocabulary"""


def runner_for(shape: str) -> tuple[Any, Any]:
    """(runner, decoder) of two layers."""
    from bitdelta_core.engine.accelerator import Plain
    from bitdelta_core.engine.device_runner import DeviceRunner, Limits
    from bitdelta_core.models.config import ModelConfig
    from bitdelta_core.models.device.decoder import DeviceDecoder
    from bitdelta_core.models.device.layout import widest_vocabulary
    from bitdelta_core.models.device.tables import DeltaTables
    from bitdelta_core.models.parameters import Parameters
    from bitdelta_core.models.weights import Weights

    hidden, inner, heads, kv_heads, vocabulary = SHAPES[shape]
    model = ModelConfig.from_hf(
        {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": hidden,
            "intermediate_size": inner,
            "num_hidden_layers": 2,
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "head_dim": hidden // heads,
            "vocab_size": vocabulary,
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "hidden_act": "silu",
            "tie_word_embeddings": False,
        }
    )
    parameters = Parameters.of(model)
    rows = {place.target: place.start + place.rows for place in parameters.linears.values()}
    columns = {place.target: place.columns for place in parameters.linears.values()}
    with torch.device(META):
        targets = {name: torch.empty(rows[name], columns[name], dtype=torch.bfloat16) for name in rows}
        vectors = torch.empty(parameters.vector_elements, dtype=torch.bfloat16)
        slab = torch.empty(2**24, dtype=torch.uint8)
    tables = DeltaTables(model, vectors, slab, 0, 8)
    decoder = DeviceDecoder(model, Weights(targets, vectors, parameters), tables)
    decoder.reserve(SEQUENCES, ROWS)
    limits = Limits(sequences=SEQUENCES, rows=ROWS, blocks=256, block_size=16, vocab=widest_vocabulary(model))
    kv = decoder.new_kv_cache(512, 16)
    return DeviceRunner(decoder, kv, Plain(META), limits, sizes=None, depth=1), decoder


def kinds_of(name: str) -> Any:
    from bitdelta_core.models.device.kinds import StepKinds
    from kernels.device import Kinds

    signs, lora, factors = Kinds(signs=True), Kinds(rank=64), Kinds(byte_rank=250)
    return {
        "signs": StepKinds(signs, Kinds(rows=True), signs),
        "lora": StepKinds(lora),
        "auto": StepKinds(factors, factors, factors),
        "compact": StepKinds(Kinds(compact=2), Kinds(), Kinds(signs=True, planes=4)),
    }[name]


def some_lengths(draw: random.Random) -> list[int]:
    """Of sequences, of very different numbers and lengths."""
    while True:
        most = draw.choice((3, 5, 8, 11))
        lengths = [max(2, int(2 ** draw.uniform(0, most))) for _ in range(int(2 ** draw.uniform(0, 6)))]
        if sum(lengths) <= ROWS:
            return lengths


def counted(shape: str, names: Sequence[str], steps: int) -> dict[str, Any]:
    """How many kernels random steps need, how many of these a start has not met, and steps that need those: (rows of
    each sequence, rows with logits), such as `rehearsal.STEPS` may need as well."""
    from bitdelta_core.models.device.kinds import few_ranks, step_union

    runner, decoder = runner_for(shape)
    expected, draw = [kinds_of(name) for name in names], random.Random(0)
    needed, missing = Launches(), []
    with decoder.few_layers(), noting() as found:
        runner.launch_each(expected)
        started = set(found)
        for _ in range(steps):
            found.clear()
            lengths, present = some_lengths(draw), draw.sample(expected, draw.randint(1, len(expected)))
            wanted = draw.choice((1, len(lengths), min(256, sum(lengths))))
            runner._launch_wide(lengths, wanted, few_ranks(step_union(present), runner._prepared))
            if found - started - needed:
                missing.append((lengths, wanted))
            needed |= found
        found.clear()
        for prompt in ([ROWS], [200], [48], [8]):
            runner._launch_wide(prompt, 1, few_ranks(step_union(expected)))
        alone = set(found)
    counts = {"needed": len(needed), "missed": len(needed - started), "not_of_one_prompt": len(needed - alone)}
    return {**counts, "missed_by": missing}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=sorted(SHAPES))
    parser.add_argument("kinds", nargs="+")
    parser.add_argument("--steps", type=int, default=400)
    arguments = parser.parse_args()
    pretend()
    print(json.dumps(counted(arguments.shape, arguments.kinds, arguments.steps)))
