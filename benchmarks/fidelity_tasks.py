"""What a variant is judged on, and its figures: the tasks of benchmarks/fidelity.py.

A task's rows are [prompt, answer] (exact match: each token of the answer, and the end of text after it, is the most
likely one given those before: what greedy decoding would say), {"messages": [...], "answer": ...} (nats per answer
token under the chat template; the bare base reads the last message as a plain prompt), or documents (nats per token
in windows of the variant's context).
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

TEXT = "text"
_CHOICE = 3
"""Windows are drawn from the longest documents, so many times as are drawn at once."""
_LOGITS = 1 << 27
"""Of one batch, at most."""


@dataclass(frozen=True, slots=True)
class Sample:
    """Token ids; those from `scored` on are judged."""

    ids: list[int]
    scored: int


@dataclass(frozen=True, slots=True)
class Task:
    name: str
    samples: list[Sample]
    exact: bool
    """Whether answers are asked for, rather than likelihood."""

    @property
    def metric(self) -> str:
        return "exact_match" if self.exact else "nats"


@dataclass(frozen=True, slots=True)
class Score:
    """A variant's figures; kl (fine-tune || variant, nats per token) and top1 are against the fine-tune."""

    exact_match: float | None
    nats: float
    kl: float | None = None
    top1: float | None = None


def draws(name: str, rows: Sequence[Any], counts: tuple[int, int, int], seeds: int) -> list[list[int]]:
    """Which rows each seed is judged on, without replacement. counts: prompts, chat answers and windows per seed."""
    if name == TEXT:
        longest = sorted(range(len(rows)), key=lambda i: (-len(rows[i]), i))
        choice, count = longest[: _CHOICE * counts[2]], counts[2]
    else:
        choice, count = list(range(len(rows))), counts[1 if isinstance(rows[0], dict) else 0]
    return [sorted(random.Random(seed).sample(choice, min(count, len(choice)))) for seed in range(seeds)]


def make_task(name: str, rows: Sequence[Any], checkpoint: Path, *, plain: bool = False) -> Task:
    """The task as this checkpoint's tokenizer sees it; `plain`: without its chat template."""
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(checkpoint)
    bos = [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else []
    if name == TEXT:
        length = json.loads((checkpoint / "config.json").read_text())["max_position_embeddings"]
        return Task(name, [Sample((bos + _encode(tokenizer, text))[:length], len(bos)) for text in rows], False)
    if isinstance(rows[0], dict):
        return Task(name, [_chat(tokenizer, row, bos if plain else None) for row in rows], False)
    end = [tokenizer.eos_token_id]
    heads = [bos + _encode(tokenizer, prompt) for prompt, _ in rows]
    tails = [_encode(tokenizer, answer) + end for _, answer in rows]
    return Task(name, [Sample(head + tail, len(head)) for head, tail in zip(heads, tails, strict=True)], True)


class Judge:
    """One task, and what the fine-tune says on it."""

    def __init__(self, task: Task, device: str, teacher: Any | None) -> None:
        self.task = task
        self.device = device
        self.wanted: dict[int, torch.Tensor] = {}
        """Sample -> the fine-tune's log-probabilities [tokens, vocabulary]."""
        if teacher is not None:
            self.wanted = dict(self._answers(teacher, range(len(task.samples))))

    def figures(self, model: Any, chosen: Sequence[int]) -> torch.Tensor:
        """fp64 [samples, 5]: nats, KL, agreements, tokens and exact match of each; NaN where not chosen."""
        found = torch.full((len(self.task.samples), 5), torch.nan, dtype=torch.float64)
        for i, logp in self._answers(model, chosen):
            found[i] = self._figures(i, logp)
        return found

    @torch.no_grad()
    def _answers(self, model: Any, chosen: Sequence[int]) -> Iterator[tuple[int, torch.Tensor]]:
        for batch in self._batches(chosen, model.config.vocab_size):
            samples = [self.task.samples[i] for i in batch]
            longest = max(len(s.ids) for s in samples)
            ids = torch.tensor([s.ids + [0] * (longest - len(s.ids)) for s in samples])
            real = torch.tensor([[i < len(s.ids) for i in range(longest)] for s in samples])
            logits = model(input_ids=ids.to(self.device), attention_mask=real.long().to(self.device)).logits
            for i, sample, row in zip(batch, samples, logits, strict=True):
                yield i, row[sample.scored - 1 : len(sample.ids) - 1].float().log_softmax(-1)

    def _batches(self, chosen: Sequence[int], vocabulary: int) -> Iterator[list[int]]:
        """Of like lengths."""
        waiting = sorted(chosen, key=lambda i: len(self.task.samples[i].ids))
        while waiting:
            size = max(1, _LOGITS // (vocabulary * len(self.task.samples[waiting[-1]].ids)))
            yield waiting[-size:]
            del waiting[-size:]

    def _figures(self, i: int, logp: torch.Tensor) -> torch.Tensor:
        sample = self.task.samples[i]
        ids = torch.tensor(sample.ids[sample.scored :], device=logp.device)
        best = logp.argmax(-1)
        kl, same = torch.nan, torch.nan
        if (wanted := self.wanted.get(i)) is not None:
            kl = (wanted.exp() * (wanted - logp[:, : wanted.shape[1]])).sum().item()
            same = (wanted.argmax(-1) == best).sum().item()
        nats = -logp.gather(1, ids[:, None]).sum().item()
        return torch.tensor([nats, kl, same, len(ids), bool((best == ids).all())], dtype=torch.float64)


def summed(figures: torch.Tensor, chosen: Sequence[int], *, exact: bool) -> Score:
    """The figures of the chosen samples together."""
    rows = figures[list(chosen)]
    tokens = rows[:, 3].sum()
    nats, kl, same = (rows[:, :3].sum(0) / tokens).tolist()
    judged = kl == kl  # NaN where there was no fine-tune to compare with
    return Score(rows[:, 4].mean().item() if exact else None, nats, kl if judged else None, same if judged else None)


def _encode(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def _chat(tokenizer: Any, row: dict[str, Any], plain: list[int] | None) -> Sample:
    """plain: what stands before a prompt without template."""
    if plain is None:
        text = tokenizer.apply_chat_template(row["messages"], tokenize=False, add_generation_prompt=True)
        prompt = _encode(tokenizer, text)
    else:
        prompt = plain + _encode(tokenizer, row["messages"][-1]["content"] + "\n")
    return Sample(prompt + _encode(tokenizer, row["answer"]), len(prompt))
