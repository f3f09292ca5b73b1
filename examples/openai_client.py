"""Ask a running server (`bitdelta serve ...`) with the official SDK: every variant, at the same time, streamed.

python examples/openai_client.py http://127.0.0.1:8000/v1 "The capital of France is"
"""

from __future__ import annotations

import asyncio
import os
import sys

from openai import AsyncOpenAI


async def ask(client: AsyncOpenAI, model: str, prompt: str) -> str:
    """The model's text, collected from its stream."""
    stream = await client.completions.create(model=model, prompt=prompt, max_tokens=32, temperature=0, stream=True)
    return "".join([chunk.choices[0].text async for chunk in stream])


async def main(url: str, prompt: str) -> None:
    client = AsyncOpenAI(base_url=url, api_key=os.environ.get("BITDELTA_API_KEY", "none"))
    models = [card.id async for card in client.models.list()]
    answers = await asyncio.gather(*(ask(client, model, prompt) for model in models))
    for model, answer in zip(models, answers, strict=True):
        print(f"{model:<32} {answer!r}")


if __name__ == "__main__":
    asyncio.run(main(*(sys.argv[1:] or ["http://127.0.0.1:8000/v1", "The capital of France is"])))
