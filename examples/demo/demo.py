"""The main job in one command: compress four fine-tunes of a small base, publish them, serve them all, ask them all.

`python examples/demo/demo.py [--keep] [--state DIR] [--questions N]`. Everything goes through what a user has: the
`bitdelta` command and the OpenAI SDK over HTTP.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from tasks import TASKS, Example, held_out

HERE = Path(__file__).resolve().parent
MODELS = HERE / "models"
BITDELTA = str(Path(sys.executable).parent / "bitdelta")
OWNER = "acme"
MAX_TOKENS = 48
STARTUP_S = 180


def say(text: str) -> None:
    print(f"\n== {text}", flush=True)


def shown(word: str | Path) -> str:
    """Paths as seen from here."""
    return os.path.relpath(word) if isinstance(word, Path) else word


def bitdelta(*args: str | Path) -> str:
    """Run a `bitdelta` command, showing it; its output is returned."""
    print("$ bitdelta", *map(shown, args), flush=True)
    # Two of these run at a time: a thread each is faster than two that fight for the cores.
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([BITDELTA, *map(str, args)], capture_output=True, text=True, env=env)
    if done.returncode:
        sys.exit(f"{done.stdout}{done.stderr}")
    return done.stdout


@dataclass(frozen=True, slots=True)
class Answer:
    """One streamed answer: how it was, how long until its first token, and all its tokens and seconds."""

    right: bool
    first_s: float
    tokens: int
    total_s: float


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table."""

    variant: str
    codec: str
    nbytes: int
    ratio: float
    bits_per_weight: float
    base: float
    fine_tune: float
    served: float
    first_ms: float
    tokens_per_s: float


def write_calibration(task: str, path: Path) -> None:
    """Texts of the task's own kind for distillation; the held-out questions are not among them."""
    rng = random.Random(f"calibration {task}")
    forbidden = {e.prompt for e in held_out(task, 400)}
    fresh = (TASKS[task](rng) for _ in range(400))
    lines = [json.dumps(_as_text(e)) for e in fresh if e.prompt not in forbidden]
    path.write_text("\n".join(lines))


def _as_text(example: Example) -> dict:
    if not example.chat:
        return {"text": example.prompt + example.answer}
    turns = {"user": example.prompt, "assistant": example.answer}
    return {"messages": [{"role": role, "content": text} for role, text in turns.items()]}


def compress_and_push(state: Path, task: str) -> None:
    """What is there already is kept, so that a second run is quick."""
    out = state / "deltas" / task
    if out.is_dir():
        return
    calibration = state / f"{task}.calibration.jsonl"
    options: list[str | Path] = []
    if not task.endswith("lora"):
        write_calibration(task, calibration)
        options = ["--calibration", calibration]
    bitdelta("compress", MODELS / "base", MODELS / task, out, *options)
    bitdelta("push", out, f"{OWNER}/{task}", "--repo", state / "repo")


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def start_server(state: Path, port: int) -> subprocess.Popen:
    command: list[str | Path] = [
        "serve",
        "--base",
        MODELS / "base",
        "--served-model-name",
        "base",
        "--repo",
        state / "repo",
    ]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    print("$ bitdelta", *map(shown, command), flush=True)
    log = (state / "server.log").open("w")
    return subprocess.Popen([BITDELTA, *map(str, command)], stdout=log, stderr=log)


def wait_until_healthy(server: subprocess.Popen, port: int, log: Path) -> None:
    deadline = time.monotonic() + STARTUP_S
    while time.monotonic() < deadline:
        if server.poll() is not None:
            sys.exit(f"the server stopped with code {server.returncode}; its log:\n{log.read_text()[-4000:]}")
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2) as reply:
                if reply.status == 200:
                    return
        except OSError:
            time.sleep(0.5)
    sys.exit(f"the server was not healthy after {STARTUP_S} s; see {log}")


def stop(server: subprocess.Popen) -> None:
    """As Ctrl-C does."""
    if server.poll() is None:
        server.send_signal(signal.SIGINT)
        server.wait(timeout=60)


async def ask(client, model: str, example: Example) -> Answer:
    """One question over HTTP, streamed. The base has no chat template, so it gets chats as plain text."""
    started = time.monotonic()
    first = tokens = 0
    text = ""
    options = {"model": model, "temperature": 0, "stream": True, "stream_options": {"include_usage": True}}
    if example.chat and model != "base":
        messages = [{"role": "user", "content": example.prompt}]
        stream = await client.chat.completions.create(messages=messages, max_completion_tokens=MAX_TOKENS, **options)
    else:
        stream = await client.completions.create(prompt=example.prompt, max_tokens=MAX_TOKENS, **options)
    async for chunk in stream:
        if chunk.usage is not None:
            tokens = chunk.usage.completion_tokens
        for choice in chunk.choices:
            piece = choice.text if hasattr(choice, "text") else choice.delta.content
            text += piece or ""
            first = first or (time.monotonic() if piece else 0)
    ended = time.monotonic()
    return Answer(text == example.answer, (first or ended) - started, tokens, ended - started)


async def ask_everybody(port: int, questions: int) -> dict[tuple[str, str], list[Answer]]:
    """(model, task) -> answers: every variant its own task, and the base all of them, everything at once."""
    from openai import AsyncOpenAI

    client = AsyncOpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=5, timeout=300)
    served = {model.id for model in (await client.models.list()).data}
    pairs = [(f"{OWNER}/{task}", task) for task in TASKS]
    missing = [model for model, _ in pairs if model not in served]
    if missing:
        sys.exit(f"/v1/models does not list {missing}")
    variants = await _ask_pairs(client, pairs, questions)
    base = await _ask_pairs(client, [("base", task) for task in TASKS], questions)
    return variants | base


async def _ask_pairs(client, pairs: Sequence[tuple[str, str]], questions: int) -> dict[tuple[str, str], list[Answer]]:
    gate = asyncio.Semaphore(32)

    async def guarded(model: str, example: Example) -> Answer:
        async with gate:
            return await ask(client, model, example)

    wanted = [(model, task, example) for model, task in pairs for example in held_out(task, questions)]
    random.Random(0).shuffle(wanted)  # so that every batch mixes the variants
    answers = await asyncio.gather(*(guarded(model, example) for model, _, example in wanted))
    by_pair: dict[tuple[str, str], list[Answer]] = {pair: [] for pair in pairs}
    for (model, task, _), answer in zip(wanted, answers, strict=True):
        by_pair[model, task].append(answer)
    return by_pair


def score_fine_tunes(state: Path, questions: int) -> dict[str, float]:
    """Exact match of each fine-tune itself, in transformers. The LoRA is merged into its base for that."""
    from train import score
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast
    from transformers.utils import logging

    logging.disable_progress_bar()
    scores = {}
    for task in TASKS:
        checkpoint, tokenizer = MODELS / task, MODELS / task
        if task.endswith("lora"):
            checkpoint, tokenizer = state / "merged" / task, MODELS / "base"
            if not checkpoint.is_dir():
                bitdelta("restore", MODELS / "base", state / "deltas" / task, checkpoint, "--dtype", "float32")
        model = LlamaForCausalLM.from_pretrained(checkpoint)
        scores[task] = score(model, PreTrainedTokenizerFast.from_pretrained(tokenizer), task, "cpu", questions)
    return scores


def make_row(state: Path, task: str, answers: dict, fine_tune: float) -> Row:
    report = json.loads(bitdelta("inspect", state / "deltas" / task, "--json"))
    own = answers[f"{OWNER}/{task}", task]
    base = answers["base", task]
    return Row(
        variant=f"{OWNER}/{task}",
        codec=report["codec"],
        nbytes=report["nbytes"],
        ratio=report["ratio"],
        bits_per_weight=report["bits_per_weight"],
        base=sum(a.right for a in base) / len(base),
        fine_tune=fine_tune,
        served=sum(a.right for a in own) / len(own),
        first_ms=1000 * median(a.first_s for a in own),
        tokens_per_s=median((a.tokens - 1) / (a.total_s - a.first_s) for a in own if a.tokens > 1),
    )


def print_table(rows: Sequence[Row], answers: dict, wall_s: float, questions: int) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{questions} questions to each variant and to the base, at most 32 at once")
    heads = ("variant", "codec", "bytes", "ratio", "bits/weight", "base", "fine-tune", "served", "TTFT ms", "tok/s")
    for head in heads:
        table.add_column(head, justify="left" if head in ("variant", "codec") else "right")
    for r in rows:
        scores = (f"{s:.2f}" for s in (r.base, r.fine_tune, r.served))
        sizes = (f"{r.nbytes:,}", f"{r.ratio:.1f}x", f"{r.bits_per_weight:.2f}")
        table.add_row(r.variant, r.codec, *sizes, *scores, f"{r.first_ms:.0f}", f"{r.tokens_per_s:.0f}")
    Console(width=118).print(table)
    tokens = sum(a.tokens for group in answers.values() for a in group)
    print("Scores are exact match. TTFT and tok/s after it are medians over streams, 32 of them at a time.")
    print(f"All together: {tokens / wall_s:.0f} tokens/s.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--keep", action="store_true", help="serve until Ctrl-C and ask nothing")
    parser.add_argument("--state", type=Path, default=HERE.parents[1] / ".demo", help="where deltas and logs go")
    parser.add_argument("--questions", type=int, default=50, help="per variant")
    parser.add_argument("--port", type=int, default=0, help="0: any free one (8000 with --keep)")
    args = parser.parse_args()
    started = time.monotonic()
    args.state.mkdir(parents=True, exist_ok=True)
    say("Compress each fine-tune into a delta of the base, and publish it to a local repository")
    with ThreadPoolExecutor(max_workers=2) as pool:
        list(pool.map(lambda task: compress_and_push(args.state, task), TASKS))
    if args.keep:
        keep(args.state, args.port or 8000)
        return
    say("Serve the base and all its variants")
    port = args.port or free_port()
    server = start_server(args.state, port)
    try:
        wait_until_healthy(server, port, args.state / "server.log")
        say("Ask all of them at once, through the OpenAI SDK")
        asked = time.monotonic()
        answers = asyncio.run(ask_everybody(port, args.questions))
        wall_s = time.monotonic() - asked
    finally:
        stop(server)
    say("Score the fine-tunes themselves, for comparison")
    fine_tunes = score_fine_tunes(args.state, args.questions)
    rows = [make_row(args.state, task, answers, fine_tunes[task]) for task in TASKS]
    print_table(rows, answers, wall_s, args.questions)
    print(
        f"\nDone in {time.monotonic() - started:.0f} s. Where to go next:\n"
        "  make serve                                   keep these variants running on port 8000\n"
        "  bitdelta compress BASE FINETUNE OUT          your own fine-tune (README, 'Your own models')\n"
        "  bitdelta push OUT you/name && bitdelta serve --base BASE\n"
    )


def keep(state: Path, port: int) -> None:
    """Become the server, so that Ctrl-C reaches it directly."""
    command = ["serve", "--base", MODELS / "base", "--served-model-name", "base", "--repo", state / "repo"]
    os.execv(BITDELTA, [BITDELTA, *map(str, command), "--port", str(port)])


if __name__ == "__main__":
    if shutil.which(BITDELTA) is None:
        sys.exit(f"{BITDELTA} not found: install the project first (`make install`)")
    main()
