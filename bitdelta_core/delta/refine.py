"""Judging and training coded factors against the fine-tune: KL divergence of its predictions on some text.

Training moves the factors under the rounding that is stored: forward with rounded values, gradients passed straight to
the values underneath (Bengio et al., arXiv 1308.3432), exact for everything else. What it moves away from zero costs
bits, so all values are pulled back, small ones most, and the harder the nearer their code is to its budget.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from bitdelta_core.delta import allocation, entropy
from bitdelta_core.delta.allocation import Scaled
from bitdelta_core.delta.calibration import Batches
from bitdelta_core.delta.distill import DistillOptions
from bitdelta_core.delta.spectral import Coded, component_scales

START = 0.75
"""Of the budget, for values rounded each for itself: training fills the rest."""
_JUDGED = 8
"""Batches."""
_WEIGHED = 10
"""Steps between two looks at what the code takes."""
_FULL = 0.99
"""Of the budget."""
_PULL, _LEAST_PULL, _MOST_PULL = 0.1, 1e-3, 1.0
"""Of the learning rate, by which values near zero are pulled in a step: at first, and from where to where it moves."""
_HARDER, _SOFTER = 1.5, 0.7
Coding = Mapping[str, Coded | None]


class _Round(torch.autograd.Function):
    """To the nearest integer; the gradient passes as it is."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.round().clamp(-entropy.LIMIT, entropy.LIMIT)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        return grads[0]


class SpectralLinear(nn.Module):
    """y = x W^T + b + ((x A^T) scale) B^T, where A and B are what rounding makes of `a` and `b`."""

    def __init__(self, linear: nn.Linear, start: Scaled) -> None:
        super().__init__()
        self.linear = linear.requires_grad_(False)
        self.start = start
        device = linear.weight.device
        self.scale_r = component_scales(torch.tensor([start.scale], device=device), start.exponent_r.to(device))
        self.a = nn.Parameter(start.a_rK.to(device, copy=True))
        self.b = nn.Parameter(start.b_rN.to(device, copy=True))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., K] -> [..., N]"""
        a, b = (_Round.apply(side) for side in (self.a, self.b))
        inner = functional.linear(x, a.to(x.dtype)) * self.scale_r.to(x.dtype)
        return self.linear(x) + functional.linear(inner, b.to(x.dtype).T)

    def trained(self) -> Coded | None:
        """The factors as they would be stored, components that died left out."""
        found = Scaled(self.a.detach(), self.b.detach(), self.start.scale, self.start.exponent_r.to(self.a.device))
        return found.rounded()


@dataclass(frozen=True, slots=True)
class Training:
    """What is trained, and what it may take."""

    starts: Mapping[str, Scaled | None]
    rest: Coding
    """Matrices that stay as they are."""
    budget_bits: float
    """Of all that is trained."""
    progress: Callable[[int], None] = lambda step: None


class Bench:
    """The fine-tune beside a student whose coded matrices can be set."""

    def __init__(self, teacher: Any, student: Any, base: Mapping[str, torch.Tensor], batches: Batches) -> None:
        """`base`: what each coded matrix is without its difference, of the shape that it has in the fine-tune."""
        self.teacher, self.student = teacher, student
        self.base = base
        self.batches = batches
        self.device = next(student.parameters()).device

    def kl(self, coding: Coding) -> float:
        """Mean nats per token that the student with these factors is away from the fine-tune."""
        wanted = self._wanted
        self._set(coding)
        with torch.no_grad():
            found = [_divergence(own, self._predicted(self.student, *batch)) for batch, own in wanted]
        return sum(loss.item() for loss in found) / len(found)

    @cached_property
    def _wanted(self) -> list[tuple[tuple[torch.Tensor, torch.Tensor], torch.Tensor]]:
        """The first batches, and what the fine-tune says of them."""
        with torch.no_grad():
            batches = list(itertools.islice(self.batches, _JUDGED))
            return [(batch, self._predicted(self.teacher, *batch)) for batch in batches]

    def train(self, training: Training, options: DistillOptions, batches: Batches) -> dict[str, Coded | None]:
        """All factors after training. Stops early when the loss is not finite."""
        self._set(training.rest)
        layers = {name: self._install(name, start) for name, start in training.starts.items() if start is not None}
        factors = [side for layer in layers.values() for side in (layer.a, layer.b)]
        optimizer = torch.optim.Adam(factors, lr=options.lr, betas=(0.9, 0.99))
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, options.steps)
        pull = _PULL
        for step, batch in zip(range(options.steps), batches, strict=False):
            optimizer.zero_grad()
            loss = self._loss(*batch)
            if not loss.isfinite():
                break
            loss.backward()
            optimizer.step()
            for side in factors:
                _pull(side, pull * float(schedule.get_last_lr()[0]))
            schedule.step()
            if step % _WEIGHED == _WEIGHED - 1:
                full = sum(map(allocation.code_bits, _trained(layers).values())) > _FULL * training.budget_bits
                pull = min(max(pull * (_HARDER if full else _SOFTER), _LEAST_PULL), _MOST_PULL)
            training.progress(step + 1)
        for name, layer in layers.items():
            self._put(name, layer.linear)
        return {**training.rest, **{name: _on_cpu(coded) for name, coded in _trained(layers).items()}}

    def _loss(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            wanted = self._predicted(self.teacher, ids, mask)
        return _divergence(wanted, self._predicted(self.student, ids, mask))

    def _predicted(self, model: Any, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Log-probabilities where there is text [tokens, vocabulary]."""
        ids, mask = ids.to(self.device), mask.to(self.device)
        return model(input_ids=ids, attention_mask=mask.long()).logits[mask].float().log_softmax(-1)

    def _set(self, coding: Coding) -> None:
        for name, base in self.base.items():
            parameter, coded = self.student.get_parameter(name), coding.get(name)
            weight = base.to(parameter.device, torch.float32, copy=True)
            if coded is not None:
                weight[: coded.b_rN.shape[1]] += coded.to(weight.device).matrix()
            parameter.data = weight.to(parameter.dtype)

    def _install(self, name: str, start: Scaled) -> SpectralLinear:
        layer = SpectralLinear(self.student.get_submodule(name.removesuffix(".weight")), start)
        self._put(name, layer)
        return layer

    def _put(self, name: str, module: nn.Module) -> None:
        path, _, leaf = name.removesuffix(".weight").rpartition(".")
        setattr(self.student.get_submodule(path), leaf, module)


def _trained(layers: Mapping[str, SpectralLinear]) -> dict[str, Coded | None]:
    return {name: layer.trained() for name, layer in layers.items()}


@torch.no_grad()
def _pull(values: torch.Tensor, most: float) -> None:
    """Towards zero by at most so much: the derivative of log(1 + |x|), about what a value costs."""
    values.sub_(values.sign() * values.abs().clamp(max=most) / (1 + values.abs()))


def _divergence(wanted: torch.Tensor, got: torch.Tensor) -> torch.Tensor:
    return (wanted.exp() * (wanted - got)).sum(-1).mean()


def _on_cpu(coded: Coded | None) -> Coded | None:
    return None if coded is None else coded.to("cpu")


def fidelity(kl: float, kl_base: float) -> float:
    """1: predicts as the fine-tune does; 0: no nearer than without any difference in the coded matrices."""
    return 1 - kl / kl_base if kl_base > 0 and math.isfinite(kl) else float(kl == 0)
