"""Training loops of benchmarks/make_models.py: next tokens, answers alone, preferences, adapters.

On a GPU the model is in bf16 and its optimiser in fp32, beside fp32 weights. Nothing in a step waits for the GPU.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.nn import functional
from transformers import AttentionInterface
from transformers.models.llama.modeling_llama import LlamaRMSNorm


class Batch(NamedTuple):
    """Rows of tokens and which of them are to be learnt."""

    ids: torch.Tensor
    """int64 [B, L], padded on the right"""
    places: torch.Tensor
    """int64: of those to be learnt, in ids flattened"""


Loss = Callable[[Any, Any], torch.Tensor]
_WARMUP, _LAST = 0.05, 0.1
_CLIP = 1.0
_BETA, _LIKELIHOOD = 0.1, 0.3
"""DPO's beta, and the weight of the chosen answer's own likelihood beside it, which keeps it from falling."""
_LINES = 5
"""Of progress, for one training."""
_ATTENTION = "causal"


def train(
    model: Any,
    batches: Sequence[Any] | Iterator[Any],
    steps: int,
    lr: float,
    loss: Loss,
    decay: float,
    *,
    seconds: float = math.inf,
    title: str = "",
) -> float:
    """Train what requires gradients, for so many steps or seconds; returns the mean loss of the last tenth."""
    quicken(model)
    weights = _Weights(model, lr, decay)
    model.train()
    started, lines, last = time.monotonic(), 1, []
    for step, batch in zip(range(steps), batches, strict=False):
        share = max(step / steps, (time.monotonic() - started) / seconds)
        if share >= 1:
            break
        value = loss(model, batch)
        value.backward()
        weights.step(_rate(share, 1 / steps))
        if share >= 0.9 or step >= steps - max(1, steps // 10):
            last.append(value.detach())
        if title and share >= lines / _LINES:
            lines += 1
            print(f"  {title}: step {step}, {time.monotonic() - started:.0f} s, loss {value.item():.3f}", flush=True)
    model.eval()
    return torch.stack(last).mean().item() if last else math.nan


class _Weights:
    """The trained parameters, their fp32 originals and the optimiser of these."""

    def __init__(self, model: Any, lr: float, decay: float) -> None:
        self.own = [p for p in model.parameters() if p.requires_grad]
        self.originals = [p.detach().clone().float() for p in self.own]
        for original in self.originals:
            original.grad = torch.zeros_like(original)
        fused = self.own[0].is_cuda
        self.optimizer = torch.optim.AdamW(self.originals, lr=lr, betas=(0.9, 0.95), weight_decay=decay, fused=fused)
        self.lr = lr

    @torch.no_grad()
    def step(self, rate: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * rate
        for own in self.own:
            if own.grad is None:  # nothing of this batch went through it
                own.grad = torch.zeros_like(own)
        _copy(_gradients(self.originals), _gradients(self.own))
        torch.nn.utils.clip_grad_norm_(self.originals, _CLIP)
        self.optimizer.step()
        _copy(self.own, self.originals)
        for own in self.own:
            own.grad = None


def _gradients(parameters: list[Any]) -> list[torch.Tensor]:
    return [parameter.grad for parameter in parameters]


def _copy(to: list[torch.Tensor], values: list[torch.Tensor]) -> None:
    torch._foreach_copy_(to, values)  # pyright: ignore[reportPrivateImportUsage]


def quicken(model: Any) -> None:
    """One kernel for a norm and one for attention, without a mask: rows are padded on the right only."""
    LlamaRMSNorm.forward = _norm  # pyright: ignore[reportAttributeAccessIssue]
    AttentionInterface.register(_ATTENTION, _attention)
    model.config._attn_implementation = _ATTENTION


def _norm(self: Any, hidden_states: torch.Tensor) -> torch.Tensor:
    return functional.rms_norm(hidden_states, self.weight.shape, self.weight, self.variance_epsilon)


def _attention(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: Any, **kwargs: Any
) -> tuple[torch.Tensor, None]:
    del module, attention_mask, kwargs
    found = functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    return found.transpose(1, 2).contiguous(), None


def likelihood(model: Any, batch: Batch) -> torch.Tensor:
    """Nats per token to be learnt. The head sees only those positions."""
    return -_log_probabilities(model, batch).mean()


def preference(reference: Any) -> Loss:
    """DPO (Rafailov et al., arXiv 2305.18290) against `reference`, on pairs (chosen, rejected) of batches."""

    def loss(model: Any, pair: tuple[Batch, Batch]) -> torch.Tensor:
        chosen, rejected = (_sums(model, batch) for batch in pair)
        with torch.no_grad():
            chosen_before, rejected_before = (_sums(reference, batch) for batch in pair)
        margin = (chosen - chosen_before) - (rejected - rejected_before)
        own = chosen.sum() / len(pair[0].places)
        return -torch.nn.functional.logsigmoid(_BETA * margin).mean() - _LIKELIHOOD * own

    return loss


def frozen(model: Any) -> Any:
    """A copy that does not learn."""
    return copy.deepcopy(model).eval().requires_grad_(False)


def windows(ids: torch.Tensor, length: int, size: int, seed: int) -> Iterator[Batch]:
    """Random windows of one long text, all of it to be learnt, without end."""
    generator = torch.Generator(ids.device).manual_seed(seed)
    inside = torch.arange(length, device=ids.device)
    places = (torch.arange(size, device=ids.device)[:, None] * length + inside[1:]).flatten()
    while True:
        starts = torch.randint(len(ids) - length, (size, 1), generator=generator, device=ids.device)
        yield Batch(ids[starts + inside].long(), places)


def answers(samples: Sequence[tuple[list[int], list[int]]], tokens: int, device: str) -> Iterator[Batch]:
    """Prompts with their answers in the order given, `tokens` to a batch; all as long as the longest, in eights."""
    length = -(-max(len(prompt) + len(answer) for prompt, answer in samples) // 8) * 8
    size = max(1, tokens // length)
    ids = np.zeros((len(samples), length), np.int64)
    learnt = np.zeros(ids.shape, bool)
    for row, mask, (prompt, answer) in zip(ids, learnt, samples, strict=True):
        stop = len(prompt) + len(answer)
        row[:stop] = prompt + answer
        mask[len(prompt) : stop] = True
    for start in range(0, len(samples), size):
        places = torch.from_numpy(learnt[start : start + size].reshape(-1).nonzero()[0])
        yield Batch(torch.from_numpy(ids[start : start + size]).to(device), places.to(device))


def _log_probabilities(model: Any, batch: Batch) -> torch.Tensor:
    """Of every token to be learnt. The head sees only the positions before these."""
    hidden = model.model(input_ids=batch.ids, use_cache=False).last_hidden_state.flatten(0, 1)
    logits = model.lm_head(hidden[batch.places - 1]).float()
    return -functional.cross_entropy(logits, batch.ids.flatten()[batch.places], reduction="none")


def _sums(model: Any, batch: Batch) -> torch.Tensor:
    """fp32 [B]: log-probability of each row's answer."""
    rows = batch.places // batch.ids.shape[1]
    return torch.zeros(len(batch.ids), device=rows.device).index_add(0, rows, _log_probabilities(model, batch))


def _rate(share: float, step: float) -> float:
    """Of the learning rate, when this share is done: up at first, then down on a cosine."""
    if share < _WARMUP:
        return (share + step) / (_WARMUP + step)
    return _LAST + (1 - _LAST) * 0.5 * (1 + math.cos(math.pi * (share - _WARMUP) / (1 - _WARMUP)))
