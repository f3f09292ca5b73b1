"""Second moments of what goes into chosen matrices, and of the loss's gradients at what comes out, over all tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from bitdelta_core.delta.format import EMBEDDING, HEAD


@dataclass(frozen=True, slots=True)
class Metric:
    """What an error costs along one side: a second moment [M, M], its diagonal [M] (to which its mean is added), or
    None where that is not known."""

    moment: torch.Tensor | None = None


Metrics = tuple[Metric, Metric]
"""Of a matrix's inputs (columns) and outputs (rows)."""


class Moments:
    """Of matrices named as in a Hugging Face checkpoint. Hooks on their modules add to them."""

    def __init__(self, model: Any, names: Sequence[str], device: torch.device) -> None:
        self.mask = torch.empty(0, dtype=torch.bool)
        """Which tokens of the batch under way are text [B, L]"""
        self.inputs = {n: _zeros(n, model.get_parameter(n), side=1).to(device) for n in names}
        self.outputs = {n: _zeros(n, model.get_parameter(n), side=0).to(device) for n in names}

    def hook(self, name: str) -> Any:
        """A forward hook for the module of that matrix."""

        def forward(module: nn.Module, args: tuple[torch.Tensor], output: torch.Tensor) -> None:
            self._add(self.inputs[name], args[0].detach())
            output.register_hook(lambda grad: self._add(self.outputs[name], grad))

        return forward

    def embedded(self, ids: torch.Tensor) -> None:
        """Tokens whose rows of the embedding were read. ids: [B, L]"""
        read = ids[self.mask]
        self.outputs[EMBEDDING].index_add_(0, read, torch.ones(len(read), device=read.device))

    def embedding_gradient(self, grad: torch.Tensor) -> None:
        """[B, L, hidden]"""
        self._add(self.inputs[EMBEDDING], grad)

    def take(self, name: str, tokens: int) -> Metrics:
        """The means over so many tokens; they are not kept."""
        inputs, outputs = self.inputs.pop(name), self.outputs.pop(name)
        return Metric(inputs.mul_(1 / tokens)), Metric(outputs.mul_(1 / tokens))

    def _add(self, moment: torch.Tensor, values: torch.Tensor) -> None:
        rows = values[self.mask].float()
        moment += rows.square().sum(0) if moment.ndim == 1 else rows.T @ rows


def unknown(name: str, rows: int) -> Metrics:
    """Without text. Rows of a vocabulary weigh one each: a diagonal of halves, to which its mean is added."""
    return Metric(), Metric(torch.full((rows,), 0.5)) if name in (EMBEDDING, HEAD) else Metric()


def nbytes(name: str, weight: torch.Tensor) -> int:
    """Of both sides."""
    rows, columns = weight.shape
    return 4 * (columns**2 + (rows if name in (EMBEDDING, HEAD) else rows**2))


def _zeros(name: str, weight: torch.Tensor, *, side: int) -> torch.Tensor:
    """Of a vocabulary's side only the diagonal."""
    size = weight.shape[side]
    return torch.zeros(size) if side == 0 and name in (EMBEDDING, HEAD) else torch.zeros(size, size)
