"""Training loops of benchmarks/make_models.py: next tokens, answers alone, preferences, adapters."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

Batch = tuple[torch.Tensor, torch.Tensor]
"""Token ids [B, L], padded on the right, and which of them are to be learnt, bool [B, L]."""
Loss = Callable[[Any, Any], torch.Tensor]
_WARMUP, _LAST = 0.05, 0.1
_CLIP = 1.0
_BETA, _LIKELIHOOD = 0.1, 0.3
"""DPO's beta, and the weight of the chosen answer's own likelihood beside it, which keeps it from falling."""


def train(model: Any, batches: Sequence[Any] | Iterator[Any], steps: int, lr: float, loss: Loss, decay: float) -> float:
    """Train what requires gradients; returns the mean loss of the last tenth of the steps."""
    device = next(model.parameters()).device
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.95), weight_decay=decay, fused=device.type == "cuda")
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, steps))
    model.train()
    last: list[torch.Tensor] = []
    for step, batch in zip(range(steps), batches, strict=False):
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            value = loss(model, batch)
        optimizer.zero_grad()
        value.backward()
        torch.nn.utils.clip_grad_norm_(parameters, _CLIP)
        optimizer.step()
        schedule.step()
        if step >= steps - max(1, steps // 10):
            last.append(value.detach())
    model.eval()
    return torch.stack(last).mean().item()


def likelihood(model: Any, batch: Batch) -> torch.Tensor:
    """Nats per token to be learnt. The head sees only those positions."""
    return -_log_probabilities(model, batch)[0].mean()


def preference(reference: Any) -> Loss:
    """DPO (Rafailov et al., arXiv 2305.18290) against `reference`, on pairs (chosen, rejected) of batches."""

    def loss(model: Any, pair: tuple[Batch, Batch]) -> torch.Tensor:
        chosen, rejected = (_sums(model, batch) for batch in pair)
        with torch.no_grad():
            chosen_before, rejected_before = (_sums(reference, batch) for batch in pair)
        margin = (chosen - chosen_before) - (rejected - rejected_before)
        own = chosen.sum() / pair[0][1].sum()
        return -torch.nn.functional.logsigmoid(_BETA * margin).mean() - _LIKELIHOOD * own

    return loss


def frozen(model: Any) -> Any:
    """A copy that does not learn."""
    return copy.deepcopy(model).eval().requires_grad_(False)


def windows(ids: torch.Tensor, length: int, size: int, seed: int) -> Iterator[Batch]:
    """Random windows of one long text, all of it to be learnt, without end."""
    generator = torch.Generator(ids.device).manual_seed(seed)
    inside = torch.arange(length, device=ids.device)
    learnt = (inside > 0).expand(size, length)
    while True:
        starts = torch.randint(len(ids) - length, (size, 1), generator=generator, device=ids.device)
        yield ids[starts + inside].long(), learnt


def answers(samples: Sequence[tuple[list[int], list[int]]], tokens: int, device: str) -> Iterator[Batch]:
    """Prompts with their answers in the order given, `tokens` to a batch; all as long as the longest, in eights."""
    length = -(-max(len(prompt) + len(answer) for prompt, answer in samples) // 8) * 8
    size = max(1, tokens // length)
    for start in range(0, len(samples), size):
        rows = samples[start : start + size]
        ids = torch.tensor([[*prompt, *answer, *[0] * (length - len(prompt) - len(answer))] for prompt, answer in rows])
        place = torch.arange(length)
        first = torch.tensor([[len(prompt)] for prompt, _ in rows])
        last = torch.tensor([[len(prompt) + len(answer)] for prompt, answer in rows])
        yield ids.to(device), ((place >= first) & (place < last)).to(device)


def _log_probabilities(model: Any, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Of every token to be learnt, and the row that each is in."""
    ids, learnt = batch
    before = learnt.roll(-1, 1)
    hidden = model.model(input_ids=ids).last_hidden_state[before]
    logits = model.lm_head(hidden).float()
    found = -torch.nn.functional.cross_entropy(logits, ids[learnt], reduction="none")
    return found, before.nonzero()[:, 0]


def _sums(model: Any, batch: Batch) -> torch.Tensor:
    """fp32 [B]: log-probability of each row's answer."""
    values, rows = _log_probabilities(model, batch)
    return torch.zeros(len(batch[0]), device=values.device).index_add(0, rows, values)


def _rate(step: int, steps: int) -> float:
    """Of the learning rate: up over the first steps, then down on a cosine."""
    warm = max(1, int(_WARMUP * steps))
    if step < warm:
        return (step + 1) / warm
    return _LAST + (1 - _LAST) * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))
