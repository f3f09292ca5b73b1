"""How to drop: the options of codec `deltadq`, its entries, and the choice of the group size (DeltaDQ, section 3.2).

The group size is the power of two whose masks disturb the attention outputs of the first layers least, on calibration
text, all else as in the fine-tune. Only those layers are loaded.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from bitdelta_core.delta import deltadq
from bitdelta_core.delta.calibration import Batches
from bitdelta_core.delta.format import HEAD
from bitdelta_core.delta.pairing import Pairing
from bitdelta_core.delta.spec import TensorEntry
from bitdelta_core.errors import InvalidRequest

LAYERS = 2
"""Whose attention outputs decide."""
TEXTS, LENGTH = 4, 128
"""Of calibration text, tokens each."""
COMPACT_GROUP, COMPACT_KEPT = 256, 32
"""Largest group, and most that are kept of one, that are chosen for masks of several rows: what a GPU reads in their
compact form."""
RATIOS: Mapping[int, tuple[int, Literal[1, 2, 4]]] = {
    16: (4, 4),
    32: (4, 2),
    64: (8, 2),
    128: (16, 2),
    256: (16, 1),
    512: (32, 1),
}
"""Value bits alone, 16 alpha / bits -> (alpha, bits): the split that kept most where we looked (docs/fidelity.md)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DropoutOptions:
    """What codec `deltadq` is told."""

    alpha: int = 16
    """One of alpha inputs is kept: a power of two."""
    value_bits: Literal[1, 2, 4] = 2
    mask_rows: Literal[1, 16, 64] = 1
    """So many neighbouring outputs share their masks."""
    group: int | None = None
    """Inputs in one group, a power of two of alpha or more; None: chosen on calibration text."""
    scale: Literal["tensor", "row"] = "row"
    seed: int = 0
    calibration: Path | None = None
    """For choosing the group; None: the text that ships with bitdelta."""

    @classmethod
    def for_ratio(cls, ratio: int, **others: Any) -> DropoutOptions:
        """One of RATIOS, counted as the paper does: bits of the kept values alone."""
        if ratio not in RATIOS:
            raise InvalidRequest(f"ratio must be one of {', '.join(map(str, RATIOS))}, got {ratio}", param="ratio")
        alpha, bits = RATIOS[ratio]
        return cls(alpha=alpha, value_bits=bits, **others)

    def check(self) -> None:
        """Raise InvalidRequest naming the first option out of range."""
        if self.mask_rows not in (1, 16, 64):
            raise InvalidRequest(f"mask_rows must be 1, 16 or 64, got {self.mask_rows}", param="mask_rows")
        for name, least in (("alpha", 1), ("group", self.alpha)):
            value = getattr(self, name)
            if value is not None and (value < least or value & (value - 1)):
                raise InvalidRequest(f"{name} must be a power of two, {least} or more, got {value}", param=name)
        if not 0 <= self.seed < 2**32:
            raise InvalidRequest(f"seed must be 0 to 2^32 - 1, got {self.seed}", param="seed")


def entry(name: str, shape: tuple[int, ...], dtype: torch.dtype, options: DropoutOptions) -> TensorEntry:
    """The entry of one matrix. Its group divides its inputs where a power of two from alpha up does."""
    assert options.group is not None, "the group is chosen before entries are planned"
    divisor = shape[1] & -shape[1]
    return TensorEntry(
        name=name,
        shape=shape,
        codec="deltadq",
        dtype=dtype,
        bits=options.value_bits,
        scale_layout=options.scale,
        alpha=options.alpha,
        group=max(options.alpha, min(options.group, divisor)),
        mask_rows=options.mask_rows,
        seed=int.from_bytes(hashlib.sha256(f"{options.seed} {name}".encode()).digest()[:4], "little"),
    )


def choose_group(pairing: Pairing, options: DropoutOptions, batches: Batches) -> DropoutOptions:
    """`options` with the group whose masks disturb the first layers' attention least; the larger one of equals."""
    model = _first_layers(pairing)
    ids, mask = next(iter(batches))
    wanted = _attention_outputs(model, ids, mask)
    names = [n for n, p in model.named_parameters() if ".self_attn." in n and n.endswith(".weight") and p.ndim == 2]
    errors: dict[int, float] = {}
    widest = max(pairing.base.shape(name)[1] for name in names)
    if options.mask_rows > 1:
        widest = min(widest, COMPACT_GROUP, COMPACT_KEPT * options.alpha)
    for group in _candidates(options.alpha, widest):
        tried = replace(options, group=group)
        with _replaced(model, {name: _decoded(pairing, name, tried) for name in names}):
            got = _attention_outputs(model, ids, mask)
        errors[group] = sum(
            ((a - b).square().sum() / b.square().sum()).item() for a, b in zip(got, wanted, strict=True)
        )
    return replace(options, group=min(errors, key=lambda group: (errors[group], -group)))


def _candidates(alpha: int, widest: int) -> Iterator[int]:
    group = alpha
    while group <= max(alpha, widest):
        yield group
        group *= 2


def _decoded(pairing: Pairing, name: str, options: DropoutOptions) -> torch.Tensor:
    base, fine = pairing.base_tensor(name), pairing.fine_tensor(name)
    planned = entry(name, tuple(fine.shape), fine.dtype, options)
    return deltadq.decode(planned, deltadq.encode(base, fine, planned)[1], base)


def _first_layers(pairing: Pairing) -> nn.Module:
    """The fine-tune's first layers as a model of their own, float32, without a head."""
    from transformers import MODEL_MAPPING, AutoConfig

    config = dict(pairing.fine.config)
    count = min(LAYERS, config["num_hidden_layers"])
    config["num_hidden_layers"] = count
    if isinstance(config.get("layer_types"), list):
        config["layer_types"] = config["layer_types"][:count]
    state = {
        name.removeprefix("model."): pairing.fine_tensor(name).float()
        for name in pairing.names
        if name != HEAD and (not name.startswith("model.layers.") or int(name.split(".")[2]) < count)
    }
    hf = AutoConfig.for_model(**config)
    kind: Any = MODEL_MAPPING[type(hf)]
    inner = kind.from_pretrained(None, config=hf, state_dict=state, dtype=torch.float32)
    outer = nn.Module()
    outer.model = inner
    return outer.eval().requires_grad_(False)


@torch.no_grad()
def _attention_outputs(model: nn.Module, ids: torch.Tensor, mask: torch.Tensor) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []
    inner: Any = model.model
    hooks = [
        layer.self_attn.register_forward_hook(lambda module, args, output: found.append(output[0][mask]))
        for layer in inner.layers
    ]
    inner(input_ids=ids, attention_mask=mask.long())
    for hook in hooks:
        hook.remove()
    return found


@contextmanager
def _replaced(model: nn.Module, weights: Mapping[str, torch.Tensor]) -> Iterator[None]:
    parameters = dict(model.named_parameters())
    kept = {name: parameters[name].data for name in weights}
    for name, weight in weights.items():
        parameters[name].data = weight
    try:
        yield
    finally:
        for name, weight in kept.items():
            parameters[name].data = weight
