"""What an error in each matrix costs the fine-tune, measured on calibration text: second moments of its two sides.

Labels are drawn from the fine-tune's own predictions, so the gradients' second moment is the Fisher information of the
output, Kronecker-factored per matrix (K-FAC; Martens and Grosse, arXiv 1503.05671). The whole model is in memory, and
as many moments as fit MOMENT_BYTES, or a third of what a GPU has free; for more of them the text is run again. A model
that does not fit is measured by `streaming.py`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from bitdelta_core.checkpoint import Checkpoint
from bitdelta_core.delta import moments
from bitdelta_core.delta.calibration import Batches
from bitdelta_core.delta.device import free_bytes
from bitdelta_core.delta.format import EMBEDDING, HEAD
from bitdelta_core.delta.moments import Metrics, Moments

MOMENT_BYTES = 16 * 10**9


def compute_dtype(device: torch.device) -> torch.dtype:
    """bf16 on a GPU, fp32 on a CPU."""
    return torch.float32 if device.type == "cpu" else torch.bfloat16


def has_room(fine: Checkpoint, device: torch.device, models: int) -> bool:
    """For so many models: half of a CPU's memory, or most of what a GPU has free, takes one; all of a CPU's two."""
    room = free_bytes(device)
    if device.type == "cuda":
        return models * fine.nbytes_16bit <= 0.8 * room
    return models * fine.nbytes_16bit <= models * room


def load_model(fine: Checkpoint, device: torch.device) -> Any:
    """The checkpoint in transformers."""
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(fine.path, dtype=compute_dtype(device))
    return model.to(device).eval().requires_grad_(False)


def measure(model: Any, names: Sequence[str], batches: Batches, count: int) -> Iterator[tuple[str, Metrics]]:
    """The metrics of each matrix (Hugging Face parameter names), from the first `count` batches, a few at a time.

    They lie where the model does.
    """
    sizes = {name: moments.nbytes(name, model.get_parameter(name)) for name in names}
    waiting, device = list(names), next(model.parameters()).device
    most = MOMENT_BYTES if device.type == "cpu" else max(MOMENT_BYTES, free_bytes(device) / 3)
    while waiting:
        room, chosen = most, []
        while waiting and (not chosen or sizes[waiting[0]] <= room):
            room -= sizes[waiting[0]]
            chosen.append(waiting.pop(0))
        yield from _Pass(model, chosen).run(itertools.islice(batches, count), batches.seed)


def drawn_loss(logits: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Log-likelihood of labels drawn from these predictions [tokens, vocabulary], summed."""
    logp = logits.float().log_softmax(-1)
    drawn = torch.multinomial(logp.detach().exp(), 1, generator=generator)
    return logp.gather(1, drawn).sum()


class _Pass:
    """One run over the text, with hooks on the chosen matrices' modules."""

    def __init__(self, model: Any, names: Sequence[str]) -> None:
        self.model, self.names = model, names
        self.moments = Moments(model, names, next(model.parameters()).device)
        self.tied = HEAD not in names and model.get_input_embeddings().weight is model.get_output_embeddings().weight

    def run(self, batches: Iterator[tuple[torch.Tensor, torch.Tensor]], seed: int) -> Iterator[tuple[str, Metrics]]:
        device, tokens = next(self.model.parameters()).device, 0
        generator = torch.Generator(device).manual_seed(seed)
        hooks = [self.model.get_input_embeddings().register_forward_hook(self._embedded)]
        hooks += [self._module(name).register_forward_hook(self.moments.hook(name)) for name in self._linears()]
        for ids, mask in batches:
            self.moments.mask = mask = mask.to(device)
            logits = self.model(input_ids=ids.to(device), attention_mask=mask.long()).logits[mask]
            drawn_loss(logits, generator).backward()
            tokens += int(mask.sum())
        for hook in hooks:
            hook.remove()
        for name in self.names:
            yield name, self.moments.take(name, tokens)

    def _linears(self) -> list[str]:
        return [name for name in self.names if name != EMBEDDING or self.tied]

    def _module(self, name: str) -> nn.Module:
        if name in (HEAD, EMBEDDING):
            return self.model.get_output_embeddings()
        return self.model.get_submodule(name.removesuffix(".weight"))

    def _embedded(self, module: nn.Module, args: tuple[torch.Tensor], output: torch.Tensor) -> torch.Tensor:
        """The graph begins here; an embedding of its own is measured here, a tied one where it is the head."""
        output = output.detach().requires_grad_(True)
        if EMBEDDING in self.names and not self.tied:
            self.moments.embedded(args[0])
            output.register_hook(self.moments.embedding_gradient)
        return output
