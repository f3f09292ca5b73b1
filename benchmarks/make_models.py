"""Train a base and eight kinds of fine-tunes of it, for benchmarks/fidelity.py: benchmarks/make_models.py --out DIR

100.7 M parameters (Llama: 768 wide, 14 layers, vocabulary 8192, untied head) by default, meant for one GPU and a few
minutes; --tiny makes models of no use that show in seconds that all of it works. Nothing is downloaded: the text is
what `make_models_text.py` finds on the machine, the skills are those of `make_models_tasks.py`. What DIR holds already
is kept and not trained again. Each model is trained by a process of its own; the fine-tunes' processes make their
examples while the base is trained, and then share the GPU, which none of them fills. Whether a fine-tune has learnt
its task is told in DIR/scores.jsonl (--report) and printed.

| directory | fine-tune | judged by |
|---|---|---|
| math, sort, json, style | all parameters, answers only | exact match |
| chat | the same, under a chat template, three tokens added | nats per answer token |
| long | linear rope scaling x4, four times the context | nats per token on long documents |
| dpo | taught to answer anyhow, then by preferences what is right | exact match |
| dates-lora | PEFT LoRA, r = 8, on all linears | exact match |
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from jobs import failed, launch, wait_for
from make_models_judge import report
from make_models_tasks import PAIRS, Pair, any_of_them, chat, evaluation, largest, practice
from make_models_text import gather
from make_models_train import Batch, Loss, answers, frozen, likelihood, preference, train, windows
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

SPECIAL = ("<s>", "</s>", "<pad>")
ROLES = ("<|user|>", "<|assistant|>", "<|end|>")
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
STRETCH = 4
"""Of the context, for `long`."""
RANK = 8
TOKENS = {"math": 2.0, "json": 0.5, "style": 0.5, "chat": 0.8, "long": 0.8, "dates": 0.6}
"""Of a fine-tune, in units of --tune-tokens, where it is not 1: skills differ in what they take."""
_DONE = "made"
"""A file of this name in a directory: it holds a whole model."""


@dataclass(frozen=True, slots=True)
class Scale:
    """How large all of it is."""

    hidden: int = 768
    layers: int = 14
    heads: int = 12
    kv_heads: int = 4
    inner: int = 2048
    vocabulary: int = 8192
    context: int = 512
    text: int = 60_000_000
    """Characters."""
    base_tokens: int = 36_000_000
    tune_tokens: int = 5_000_000
    batch_tokens: int = 1 << 14
    tune_batch: int = 1 << 13
    """Tokens as well: fine-tunes are short, so their steps are many and small."""
    rows: int = 500
    """Of each task, for evaluation."""
    examples: int = 4000
    """Of each task, for training deltas, at most."""

    def tokens(self, name: str) -> int:
        """Padded ones of a fine-tune."""
        return int(TOKENS.get(name, 1.0) * self.tune_tokens)


TINY = Scale(64, 2, 4, 2, 128, 400, 64, 300_000, 60_000, 12_000, 1 << 11, 1 << 11, 40, 60)


class Workshop:
    """DIR, and what is needed again and again while filling it."""

    def __init__(self, out: Path, scale: Scale, device: str, seconds: float = math.inf) -> None:
        self.out = out
        self.scale = scale
        self.device = device
        self.dtype = torch.bfloat16 if device == "cuda" else torch.float32
        self.seconds = seconds
        """Of training one model."""
        out.mkdir(parents=True, exist_ok=True)

    @cached_property
    def tokenizer(self) -> Any:
        return transformers.AutoTokenizer.from_pretrained(self.out / "base")

    @cached_property
    def tasks(self) -> dict[str, list[Any]]:
        return json.loads((self.out / "eval.json").read_text())

    @cached_property
    def ids(self) -> torch.Tensor:
        """All training text, a document after the other, int32 on the device."""
        return torch.from_numpy(np.load(self.out / "tokens.npy")).to(self.device)

    def model(self, config: Any = None) -> Any:
        """The base, as soon as it is there, to train further; with another config where one is given."""
        wait_for(self.out / "base" / _DONE)
        more = {} if config is None else {"config": config}
        base = self.out / "base"
        found: Any = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=self.dtype, **more)
        return found.to(self.device)

    def train(
        self, model: Any, batches: Any, steps: int, lr: float, loss: Loss, title: str, decay: float = 0.0
    ) -> None:
        train(model, batches, steps, lr, loss, decay, seconds=self.seconds, title=title)

    def save(self, model: Any, name: str, tokenizer: Any) -> None:
        model.to(torch.bfloat16).save_pretrained(self.out / name)
        tokenizer.save_pretrained(self.out / name)
        self.done(name)

    def done(self, name: str) -> None:
        (self.out / name / _DONE).touch()

    def drawn(self, draw: Callable[[random.Random], Any], name: str, tokens: int) -> Iterator[Any]:
        """Examples, enough for so many padded tokens, none of them in eval.json."""
        rng = random.Random(f"train {name}")
        judged = {json.dumps(row[0] if isinstance(row, list) else row["messages"]) for row in self.tasks[name]}
        length = max(len(prompt) + len(answer) for prompt, answer in self.coded([_pair(draw(rng)) for _ in range(64)]))
        for _ in range(tokens // length):
            row = draw(rng)
            if json.dumps(row["messages"] if isinstance(row, dict) else row[0]) not in judged:
                yield row

    def coded(
        self, pairs: Sequence[Pair], *, bos: bool = True, tokenizer: Any = None
    ) -> list[tuple[list[int], list[int]]]:
        """(prompt, answer and end of text) of each, as the benchmark codes them."""
        backend = (tokenizer or self.tokenizer).backend_tokenizer
        prompts, tails = (
            [code.ids for code in backend.encode_batch_fast([pair[side] for pair in pairs], add_special_tokens=False)]
            for side in (0, 1)
        )
        return [([0] * bos + prompt, [*tail, 1]) for prompt, tail in zip(prompts, tails, strict=True)]

    def batches(self, pairs: Sequence[Pair], **how: Any) -> list[Batch]:
        return list(answers(self.coded(pairs, **how), self.scale.tune_batch, self.device))


def make_text(shop: Workshop) -> None:
    """The text, a tokenizer on it, its tokens, and the tasks."""
    scale, started = shop.scale, time.monotonic()
    documents, held = gather(scale.text)
    print(f"  text: {sum(map(len, documents)):,} characters, {time.monotonic() - started:.0f} s", flush=True)
    tokenizer = _tokenizer(documents, scale)
    print(f"  tokenizer: {time.monotonic() - started:.0f} s", flush=True)
    np.save(shop.out / "tokens.npy", _tokens(tokenizer.backend_tokenizer, documents))
    judged = evaluation(scale.rows)
    (shop.out / "eval.json").write_text(json.dumps(judged))
    (shop.out / "examples.json").write_text(json.dumps(practice(scale.examples, judged)))
    (shop.out / "valid.json").write_text(json.dumps(held))
    tokenizer.save_pretrained(shop.out / "base")
    print(f"  tokens: {np.load(shop.out / 'tokens.npy', mmap_mode='r').size:,}, {time.monotonic() - started:.0f} s")


def make_base(shop: Workshop) -> None:
    """A model on the text."""
    scale, tokenizer = shop.scale, shop.tokenizer
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=scale.hidden,
        intermediate_size=scale.inner,
        num_hidden_layers=scale.layers,
        num_attention_heads=scale.heads,
        num_key_value_heads=scale.kv_heads,
        head_dim=scale.hidden // scale.heads,
        max_position_embeddings=scale.context,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    model: Any = transformers.LlamaForCausalLM(config)
    model = model.to(shop.device, shop.dtype)
    size = max(1, scale.batch_tokens // scale.context)
    steps = scale.base_tokens // (size * scale.context)
    shop.train(model, windows(shop.ids, scale.context, size, 0), steps, 1e-3, likelihood, "base", 0.1)
    shop.save(model, "base", tokenizer)


def make_skill(shop: Workshop, name: str) -> None:
    """All parameters, on the answers of one skill."""
    torch.manual_seed(0)
    batches = shop.batches(list(shop.drawn(PAIRS[name], name, shop.scale.tokens(name))))
    model = shop.model()
    shop.train(model, batches, len(batches), 3e-4, likelihood, name)
    shop.save(model, name, shop.tokenizer)


def make_chat(shop: Workshop) -> None:
    """Three tokens more, and a template."""
    torch.manual_seed(0)
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(shop.out / "base")
    tokenizer.add_tokens(list(ROLES), special_tokens=True)
    tokenizer.chat_template = TEMPLATE
    rows = list(shop.drawn(chat, "chat", shop.scale.tokens("chat")))
    pairs = [
        (tokenizer.apply_chat_template(row["messages"], tokenize=False, add_generation_prompt=True), row["answer"])
        for row in rows
    ]
    batches = shop.batches(pairs, bos=False, tokenizer=tokenizer)
    model = shop.model()
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    shop.train(model, batches, len(batches), 3e-4, likelihood, "chat")
    shop.save(model, "chat", tokenizer)


def make_long(shop: Workshop) -> None:
    """Positions divided by STRETCH, on windows so many times as long."""
    torch.manual_seed(0)
    scale = shop.scale
    wait_for(shop.out / "base" / _DONE)
    config = transformers.AutoConfig.from_pretrained(shop.out / "base")
    config.rope_parameters = {**config.rope_parameters, "rope_type": "linear", "factor": float(STRETCH)}
    config.max_position_embeddings = length = STRETCH * scale.context
    model = shop.model(config)
    size = max(1, scale.tune_batch // length)
    steps = max(1, scale.tokens("long") // (size * length))
    shop.train(model, windows(shop.ids, length, size, 1), steps, 2e-4, likelihood, "long")
    shop.save(model, "long", shop.tokenizer)


def make_dpo(shop: Workshop) -> None:
    """First any of the numbers as the answer, then preferences for the right one."""
    torch.manual_seed(0)
    batches = shop.batches(list(shop.drawn(any_of_them, "dpo", shop.scale.tune_tokens // 4)))
    triples = list(shop.drawn(largest, "dpo", shop.scale.tune_tokens // 2))
    chosen, rejected = (shop.batches([(t[0], t[side]) for t in triples]) for side in (1, 2))
    pairs = list(zip(chosen, rejected, strict=True))
    model = shop.model()
    shop.train(model, batches, len(batches), 2e-4, likelihood, "dpo, taught")
    shop.train(model, pairs, len(pairs), 1e-4, preference(frozen(model)), "dpo")
    shop.save(model, "dpo", shop.tokenizer)


def make_lora(shop: Workshop) -> None:
    """An adapter on all linears."""
    from peft import LoraConfig, get_peft_model

    batches = shop.batches(list(shop.drawn(PAIRS["dates"], "dates", shop.scale.tokens("dates"))))
    torch.manual_seed(0)
    model = shop.model()
    wrapped = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear"))
    shop.train(model, batches, len(batches), 2e-3, likelihood, "dates-lora")
    wrapped.save_pretrained(str(shop.out / "dates-lora"), save_embedding_layers=False)
    _forget_path(shop.out / "dates-lora" / "adapter_config.json")
    shop.done("dates-lora")


MAKERS: dict[str, Callable[[Workshop], None]] = {
    "base": make_base,
    "math": partial(make_skill, name="math"),
    "sort": partial(make_skill, name="sort"),
    "json": partial(make_skill, name="json"),
    "style": partial(make_skill, name="style"),
    "chat": make_chat,
    "long": make_long,
    "dpo": make_dpo,
    "dates-lora": make_lora,
}


def _tokens(backend: Any, documents: Sequence[str]) -> np.ndarray:
    """int32: all of them, with </s> <s> between."""
    found = [np.array([0], np.int32)]
    for start in range(0, len(documents), 1024):
        coded = backend.encode_batch_fast(documents[start : start + 1024], add_special_tokens=False)
        found += [np.array([*code.ids, 1, 0], np.int32) for code in coded]
    return np.concatenate(found)


def _tokenizer(documents: list[str], scale: Scale) -> Any:
    """Byte-level pairs; every digit for itself."""
    backend = Tokenizer(models.BPE())
    steps = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    backend.pre_tokenizer = pre_tokenizers.Sequence(steps)  # pyright: ignore[reportAttributeAccessIssue]
    backend.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    trainer = trainers.BpeTrainer(
        vocab_size=scale.vocabulary,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(documents[:: max(1, scale.text // 8_000_000)], trainer)
    start, end, pad = SPECIAL
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=start, eos_token=end, pad_token=pad, clean_up_tokenization_spaces=False
    )


def _pair(row: Any) -> Pair:
    return (row["messages"][-1]["content"] + "".join(ROLES), row["answer"]) if isinstance(row, dict) else row[:2]


def _forget_path(file: Path) -> None:
    """An adapter's base by its name: where it lay says nothing."""
    body = json.loads(file.read_text())
    body["base_model_name_or_path"] = "base"
    file.write_text(json.dumps(body, indent=2))


def make(args: argparse.Namespace, name: str) -> None:
    """One model, and how well it does: what a process of its own runs."""
    scale = TINY if args.tiny else Scale(base_tokens=int(args.base_tokens), tune_tokens=int(args.tune_tokens))
    seconds = args.base_seconds if name == "base" else args.tune_seconds
    started = time.monotonic()
    MAKERS[name](Workshop(args.out, scale, args.device, seconds))
    report(args.out, name, args.device, args.report or args.out / "scores.jsonl", time.monotonic() - started)


def main() -> None:
    args = parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if args.make:
        make(args, args.make)
        return
    names = [n for n in ["base", *(args.only or [n for n in MAKERS if n != "base"])] if not _made(args.out / n)]
    if not names:
        return
    if not (args.out / "tokens.npy").is_file():
        make_text(Workshop(args.out, Scale() if not args.tiny else TINY, args.device))
    threads = max(1, (os.cpu_count() or 1) // len(names))
    raise SystemExit(failed(launch(names, args.jobs, threads)))


def _made(directory: Path) -> bool:
    return (directory / _DONE).is_file()


def parse_args() -> argparse.Namespace:
    tunes = [name for name in MAKERS if name != "base"]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--only", nargs="+", choices=tunes, help="fine-tunes")
    parser.add_argument("--base-tokens", type=float, default=Scale().base_tokens)
    parser.add_argument("--tune-tokens", type=float, default=Scale().tune_tokens, help="of each fine-tune, padded")
    parser.add_argument(
        "--base-seconds", type=float, default=math.inf, help="of training: it ends early, not unfinished"
    )
    parser.add_argument("--tune-seconds", type=float, default=math.inf, help="the same, of each fine-tune")
    parser.add_argument("--jobs", type=int, default=None, help="processes at once (default: all on a GPU, else 1)")
    parser.add_argument("--report", type=Path, help="a line for each model is added here (default: OUT/scores.jsonl)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--make", choices=list(MAKERS), help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.jobs = args.jobs or (len(MAKERS) if args.device == "cuda" else 1)
    return args


if __name__ == "__main__":
    main()
