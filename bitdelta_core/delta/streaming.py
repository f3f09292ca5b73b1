"""`sensitivity.py` for a model that does not fit into memory: its layers are read from the checkpoint one at a time.

They are read twice. On the way up each layer's inputs are kept on the CPU in 16 bits; on the way down it runs on them
once more, with the gradient of what came out, and its matrices are measured. So memory holds embedding and head, one
layer with its moments and what it computes of a few texts, and of the CPU's 2 bytes x tokens x hidden size x layers.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.func import functional_call
from torch.nn.functional import pad

from bitdelta_core.checkpoint import Checkpoint
from bitdelta_core.delta.calibration import Batches
from bitdelta_core.delta.format import EMBEDDING, HEAD
from bitdelta_core.delta.moments import Metrics, Moments
from bitdelta_core.delta.pairing import is_tied
from bitdelta_core.delta.sensitivity import compute_dtype, drawn_loss
from bitdelta_core.errors import InvalidRequest

_TOGETHER = 16
"""Batches that go through a layer at once."""
_KEPT = torch.bfloat16
"""Inputs of layers."""


@dataclass
class _Texts:
    """Some texts on their way through the model."""

    ids: torch.Tensor
    mask: torch.Tensor
    now: torch.Tensor
    """Going up: inputs of the next layer. Going down: the gradient of the last one's outputs."""
    calls: list[Mapping[str, Any]]
    """What each layer is given beside them"""
    kept: list[torch.Tensor] = field(default_factory=list)
    """Inputs of each layer"""


class Streamed:
    """The fine-tune, without its layers."""

    def __init__(self, fine: Checkpoint, device: torch.device) -> None:
        self.fine, self.device, self.dtype = fine, device, compute_dtype(device)
        self.model = _skeleton(fine, device, self.dtype)
        self.decoder = getattr(self.model, self.model.base_model_prefix)
        self.prefix = f"{self.model.base_model_prefix}.layers"

    def measure(self, names: Sequence[str], batches: Batches, count: int) -> Iterator[tuple[str, Metrics]]:
        """As `sensitivity.measure`, from the last layer to the first."""
        read = list(itertools.islice(batches, count))
        texts = [self._begun(*_joined(read[i : i + _TOGETHER])) for i in range(0, count, _TOGETHER)]
        tokens = sum(int(some.mask.sum()) for some in texts)
        with torch.no_grad():
            for index in range(len(self.decoder.layers)):
                self._up(index, texts)
        waiting = set(names)
        for chosen, moments in self._measured(names, batches, texts):
            for name in chosen:
                yield name, moments.take(name, tokens)
            waiting.difference_update(chosen)
            if not waiting:
                return

    def _measured(
        self, names: Sequence[str], batches: Batches, texts: list[_Texts]
    ) -> Iterator[tuple[list[str], Moments]]:
        """Matrices and their moments, on the way down."""
        ends = [name for name in names if name in (EMBEDDING, HEAD)]
        moments = Moments(self.model, ends, self.device)
        tied = is_tied(self.fine)
        self._turn(moments, EMBEDDING if tied else HEAD, texts, batches)
        yield [name for name in ends if tied or name == HEAD], moments
        for index in reversed(range(len(self.decoder.layers))):
            chosen = [name for name in names if name.startswith(f"{self.prefix}.{index}.")]
            own = Moments(self.model, chosen, self.device)
            self._down(index, own, texts)
            yield chosen, own
        if EMBEDDING in ends and not tied:
            for some in texts:
                moments.mask = some.mask
                moments.embedded(some.ids)
                moments.embedding_gradient(some.now)
            yield [EMBEDDING], moments

    @torch.no_grad()
    def _begun(self, ids: torch.Tensor, mask: torch.Tensor) -> _Texts:
        """Embedded, and what the model would give its layers, which do nothing meanwhile."""
        ids, mask = ids.to(self.device), mask.to(self.device)
        calls: list[Mapping[str, Any]] = []
        first: list[torch.Tensor] = []

        def passed(hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
            first.append(hidden_states)
            calls.append(kwargs)
            return hidden_states

        with ExitStack() as stack:
            for layer in self.decoder.layers:
                layer.forward = passed
                stack.callback(layer.__dict__.pop, "forward")
            self.decoder(input_ids=ids, attention_mask=mask.long(), use_cache=False)
        return _Texts(ids, mask, first[0], calls)

    def _weights(self, index: int) -> dict[str, torch.Tensor]:
        names = [name for name, _ in self.decoder.layers[index].named_parameters()]
        read = {n: self.fine.get(f"{self.prefix}.{index}.{n}").to(self.device, self.dtype, copy=True) for n in names}
        self.fine.release()
        return read

    def _run(self, index: int, weights: dict[str, torch.Tensor], x: torch.Tensor, some: _Texts) -> torch.Tensor:
        return functional_call(self.decoder.layers[index], weights, (x,), dict(some.calls[index]))

    def _up(self, index: int, texts: list[_Texts]) -> None:
        weights = self._weights(index)
        for some in texts:
            some.kept.append(some.now.to("cpu", _KEPT))
            some.now = self._run(index, weights, some.now, some)

    def _turn(self, moments: Moments, head: str, texts: list[_Texts], batches: Batches) -> None:
        """From outputs of the last layer to their gradient, a batch at a time."""
        generator = torch.Generator(self.device).manual_seed(batches.seed)
        module = self.model.get_output_embeddings()
        hooks = [module.register_forward_hook(moments.hook(head))] if head in moments.inputs else []
        for some in texts:
            x = some.now.detach().requires_grad_(True)
            for own, mask in zip(x.split(batches.size), some.mask.split(batches.size), strict=True):
                moments.mask = mask
                drawn_loss(module(self.decoder.norm(own))[mask], generator).backward()
            assert x.grad is not None
            some.now = x.grad
        for hook in hooks:
            hook.remove()

    def _down(self, index: int, moments: Moments, texts: list[_Texts]) -> None:
        weights = self._weights(index)
        hooks = [
            self.model.get_submodule(name.removesuffix(".weight")).register_forward_hook(moments.hook(name))
            for name in moments.inputs
        ]
        for some in texts:
            moments.mask = some.mask
            x = some.kept.pop().to(self.device, self.dtype).requires_grad_(True)
            self._run(index, weights, x, some).backward(some.now)
            assert x.grad is not None
            some.now = x.grad
        for hook in hooks:
            hook.remove()


def _joined(batches: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
    """One batch of all, padded to the longest."""
    longest = max(ids.shape[1] for ids, _ in batches)
    padded = [[pad(part, (0, longest - part.shape[1])) for part in batch] for batch in batches]
    return torch.cat([ids for ids, _ in padded]), torch.cat([mask for _, mask in padded])


def _skeleton(fine: Checkpoint, device: torch.device, dtype: torch.dtype) -> Any:
    """The model with all but its layers' parameters."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(fine.path)
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype).eval().requires_grad_(False)
    own = [name for name, _ in model.named_parameters() if ".layers." not in name]
    model.load_state_dict({n: fine.get(n).to(device, dtype, copy=True) for n in own}, strict=False, assign=True)
    model.tie_weights()
    for name, module in list(model.named_modules()):
        if any(buffer.is_meta for buffer in module.buffers(recurse=False)):
            model.set_submodule(name, _made(type(module), config).to(device))
    return model.requires_grad_(False)


def _made(kind: type[nn.Module], config: Any) -> nn.Module:
    """Its buffers follow from the configuration, as those of rotary embeddings do."""
    try:
        return kind(config)
    except (TypeError, AttributeError) as error:
        raise InvalidRequest(
            f"{config.model_type}: does not fit into memory, and {kind.__name__} cannot be made alone", param="device"
        ) from error
