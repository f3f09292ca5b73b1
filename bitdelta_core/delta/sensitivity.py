"""What an error in each matrix costs the fine-tune, measured on calibration text: second moments of its two sides.

Labels are drawn from the fine-tune's own predictions, so the gradients' second moment is the Fisher information of the
output, Kronecker-factored per matrix (K-FAC; Martens and Grosse, arXiv 1503.05671). The whole model is in memory, and
as many moments as fit MOMENT_BYTES; for more of them the text is run again.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from bitdelta_core.checkpoint import Checkpoint
from bitdelta_core.delta.allocation import Metric
from bitdelta_core.delta.calibration import Batches
from bitdelta_core.delta.format import EMBEDDING, HEAD

MOMENT_BYTES = 16 * 10**9
Metrics = tuple[Metric, Metric]
"""Of a matrix's inputs (columns) and outputs (rows)."""


def load_model(fine: Checkpoint, device: torch.device) -> Any:
    """The checkpoint in transformers: in bf16 on a GPU, in fp32 on a CPU."""
    from transformers import AutoModelForCausalLM

    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    model: Any = AutoModelForCausalLM.from_pretrained(fine.path, dtype=dtype)
    return model.to(device).eval().requires_grad_(False)


def measure(model: Any, names: Sequence[str], batches: Batches, count: int) -> Iterator[tuple[str, Metrics]]:
    """The metrics of each matrix (Hugging Face parameter names), from the first `count` batches, a few at a time.

    They lie where the model does.
    """
    sizes = {name: _moment_bytes(name, model.get_parameter(name)) for name in names}
    waiting = list(names)
    while waiting:
        room, chosen = MOMENT_BYTES, []
        while waiting and (not chosen or sizes[waiting[0]] <= room):
            room -= sizes[waiting[0]]
            chosen.append(waiting.pop(0))
        yield from _Pass(model, chosen).run(itertools.islice(batches, count), batches.seed)


class _Pass:
    """One run over the text, with hooks on the chosen matrices' modules."""

    def __init__(self, model: Any, names: Sequence[str]) -> None:
        self.model = model
        self.tokens = 0
        self.mask = torch.empty(0, dtype=torch.bool)
        device = next(model.parameters()).device
        self.inputs = {n: _zeros(n, model.get_parameter(n), side=1).to(device) for n in names}
        self.outputs = {n: _zeros(n, model.get_parameter(n), side=0).to(device) for n in names}
        self.tied = HEAD not in names and model.get_input_embeddings().weight is model.get_output_embeddings().weight

    def run(self, batches: Iterator[tuple[torch.Tensor, torch.Tensor]], seed: int) -> Iterator[tuple[str, Metrics]]:
        device = next(self.model.parameters()).device
        generator = torch.Generator(device).manual_seed(seed)
        hooks = [self.model.get_input_embeddings().register_forward_hook(self._embedded)]
        hooks += [self._module(name).register_forward_hook(self._hook(name)) for name in self._linears()]
        for ids, mask in batches:
            self.mask = mask.to(device)
            logits = self.model(input_ids=ids.to(device), attention_mask=self.mask.long()).logits[self.mask]
            logp = logits.float().log_softmax(-1)
            drawn = torch.multinomial(logp.detach().exp(), 1, generator=generator)
            logp.gather(1, drawn).sum().backward()
            self.tokens += int(mask.sum())
        for hook in hooks:
            hook.remove()
        for name in list(self.inputs):
            scale = 1 / self.tokens
            yield name, (Metric(self.inputs.pop(name).mul_(scale)), Metric(self.outputs.pop(name).mul_(scale)))

    def _linears(self) -> list[str]:
        return [name for name in self.inputs if name != EMBEDDING or self.tied]

    def _module(self, name: str) -> nn.Module:
        if name in (HEAD, EMBEDDING):
            return self.model.get_output_embeddings()
        return self.model.get_submodule(name.removesuffix(".weight"))

    def _embedded(self, module: nn.Module, args: tuple[torch.Tensor], output: torch.Tensor) -> torch.Tensor:
        """The graph begins here; an embedding of its own is measured here, a tied one where it is the head."""
        output = output.detach().requires_grad_(True)
        if EMBEDDING in self.inputs and not self.tied:
            ids = args[0][self.mask]
            self.outputs[EMBEDDING].index_add_(0, ids, torch.ones(len(ids), device=ids.device))
            output.register_hook(lambda grad: self._add(self.inputs[EMBEDDING], grad))
        return output

    def _hook(self, name: str) -> Any:
        def forward(module: nn.Module, args: tuple[torch.Tensor], output: torch.Tensor) -> None:
            self._add(self.inputs[name], args[0].detach())
            output.register_hook(lambda grad: self._add(self.outputs[name], grad))

        return forward

    def _add(self, moment: torch.Tensor, values: torch.Tensor) -> None:
        rows = values[self.mask].float()
        moment += rows.square().sum(0) if moment.ndim == 1 else rows.T @ rows


def _zeros(name: str, weight: torch.Tensor, *, side: int) -> torch.Tensor:
    """Of a vocabulary's side only the diagonal."""
    size = weight.shape[side]
    return torch.zeros(size) if side == 0 and name in (EMBEDDING, HEAD) else torch.zeros(size, size)


def _moment_bytes(name: str, weight: torch.Tensor) -> int:
    rows, columns = weight.shape
    return 4 * (columns**2 + (rows if name in (EMBEDDING, HEAD) else rows**2))
