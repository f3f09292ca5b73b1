"""The engine as a library: one base, two fine-tunes of it, answered together.

    python examples/library.py BASE FINETUNE...

Compresses each fine-tune next to nothing (a temporary directory), adds it to an engine, and asks base and variants the
same question: first blocking, then as concurrent streams.
"""

from __future__ import annotations

import asyncio
import sys
import tempfile
from pathlib import Path

from bitdelta_core import Engine, EngineConfig, GenerationRequest, SamplingParams
from bitdelta_core.delta.compress import compress

QUESTION = "12 + 30 ="


async def stream(engine: Engine, name: str, delta: str | None) -> None:
    """Print one variant's answer as it comes."""
    tokenizer = await asyncio.to_thread(engine.tokenizer, delta)
    request = GenerationRequest(
        request_id=name,
        prompt_token_ids=tuple(tokenizer(QUESTION)["input_ids"]),
        params=SamplingParams(temperature=0.8, seed=1, max_tokens=24),
        delta=delta,
    )
    async for event in engine.stream(request):
        print(f"{name:>12} | {event.text!r} {event.finish_reason or ''}")


async def stream_all(engine: Engine, deltas: dict[str, str | None]) -> None:
    await asyncio.gather(*(stream(engine, name, delta) for name, delta in deltas.items()))


def main(base: Path, finetunes: list[Path]) -> None:
    with tempfile.TemporaryDirectory() as work, Engine(base, EngineConfig()) as engine:
        print(engine.memory.table())
        deltas: dict[str, str | None] = {"base": None}
        for finetune in finetunes:
            deltas[finetune.name] = engine.add_delta(compress(base, finetune, Path(work) / finetune.name))
        params = SamplingParams(temperature=0, max_tokens=24)
        answers = engine.generate([QUESTION] * len(deltas), params, delta=list(deltas.values()))
        for name, answer in zip(deltas, answers, strict=True):
            print(f"{name:>12}: {QUESTION}{answer.text!r} ({answer.finish_reason})")
        asyncio.run(stream_all(engine, deltas))
        print(engine.stats())


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]), [Path(path) for path in sys.argv[2:]])
