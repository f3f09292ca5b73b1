"""Codec `lora`: D = scaling * B A (LoRA, arXiv 2106.09685), taken from a PEFT adapter directory as it stands.

Covered: ranks and alphas by pattern, rank-stabilised scaling, trained biases, `modules_to_save`. What changes the
formula or the base (DoRA, PiSSA, ...) is refused by name; so are adapters on embeddings and trained single tokens.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from bitdelta_core.checkpoint import read_object
from bitdelta_core.delta.spec import TensorEntry
from bitdelta_core.errors import CheckpointError

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_PLAIN_INITS = (True, False, "gaussian", "eva", "orthogonal")
"""Initialisations that leave the base alone."""
_REFUSED = (
    "alora_invocation_tokens",
    "arrow_config",
    "fan_in_fan_out",
    "kasa_config",
    "layer_replication",
    "lora_bias",
    "monteclora_config",
    "target_parameters",
    "trainable_token_indices",
    "use_bdlora",
    "use_dora",
    "use_qalora",
    "velora_config",
)


def decode(entry: TensorEntry, parts: Mapping[str, torch.Tensor], base: torch.Tensor) -> torch.Tensor:
    """The adapted matrix, fp32 [N, K]."""
    return base.float() + entry.scaling * (parts["lora_B"].float() @ parts["lora_A"].float())


def is_adapter(path: Path) -> bool:
    """Whether this directory is a PEFT adapter."""
    return (path / ADAPTER_CONFIG).is_file()


class Adapter:
    """A PEFT LoRA adapter directory, validated; tensors are memory-mapped.

    Raises:
        CheckpointError: not LoRA, a variant of LoRA that is not supported, or an unknown tensor in it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = read_object(path / ADAPTER_CONFIG)
        self._check_config()
        self._file = self._open()
        self._keys = {self._parameter(key): key for key in self._file.keys()}  # noqa: SIM118

    @cached_property
    def linears(self) -> list[str]:
        """The adapted parameters, sorted."""
        found = {name.removesuffix(".lora_A.weight") for name in self._keys if name.endswith(".lora_A.weight")}
        other = {name.removesuffix(".lora_B.weight") for name in self._keys if name.endswith(".lora_B.weight")}
        for module in found ^ other:
            raise CheckpointError(f"{self.path}: {module} has only one of lora_A and lora_B")
        return sorted(f"{module}.weight" for module in found)

    @cached_property
    def whole(self) -> list[str]:
        """Parameters that the adapter holds whole (`modules_to_save`, biases), sorted."""
        return sorted(name for name in self._keys if ".lora_" not in name)

    def get(self, name: str) -> torch.Tensor:
        """A parameter that the adapter holds whole."""
        return self._file.get_tensor(self._keys[name])

    def factors(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """(A [r, K], B [N, r]) of an adapted parameter."""
        module = name.removesuffix(".weight")
        a = self._file.get_tensor(self._keys[f"{module}.lora_A.weight"])
        b = self._file.get_tensor(self._keys[f"{module}.lora_B.weight"])
        return a, b

    def entry(self, name: str, shape: tuple[int, ...]) -> TensorEntry:
        """The entry of an adapted parameter whose base has this shape."""
        a, b = self.factors(name)
        rank = a.shape[0]
        if len(shape) != 2 or a.shape != (rank, shape[1]) or b.shape != (shape[0], rank):
            raise CheckpointError(
                f"{self.path}: lora_B {list(b.shape)} times lora_A {list(a.shape)} does not fit {name} {list(shape)}"
            )
        dtype = a.dtype if a.dtype == b.dtype else torch.float32
        return TensorEntry(
            name=name, shape=shape, codec="lora", dtype=dtype, rank=rank, scaling=self._scaling(name, rank)
        )

    def parts(self, entry: TensorEntry) -> dict[str, torch.Tensor]:
        """The parts of `entry`."""
        a, b = self.factors(entry.name)
        return {"lora_A": a.to(entry.dtype), "lora_B": b.to(entry.dtype)}

    def _check_config(self) -> None:
        kind = self.config.get("peft_type")
        if kind != "LORA":
            raise CheckpointError(f"{self.path}: PEFT type {kind!r} is not supported, only LORA is")
        for name in _REFUSED:
            if self.config.get(name):
                raise CheckpointError(f"{self.path}: LoRA with {name} is not supported; merge it into its base first")
        init = self.config.get("init_lora_weights", True)
        if init not in _PLAIN_INITS:
            raise CheckpointError(f"{self.path}: init_lora_weights={init!r} changes the base; convert it to plain LoRA")

    def _open(self) -> Any:
        file = self.path / ADAPTER_WEIGHTS
        try:
            return safe_open(file, framework="pt")
        except FileNotFoundError:
            raise CheckpointError(f"{file} is missing (adapter_model.bin is pickle and not read)") from None
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{file} cannot be read: {error}") from error

    def _parameter(self, key: str) -> str:
        """The base parameter, or `<module>.lora_A.weight`, that a PEFT key stands for."""
        name = key.removeprefix(_PREFIX).replace(".base_layer.", ".").replace(".modules_to_save.default.", ".")
        name = name.replace(".modules_to_save.", ".")
        supported = name.endswith((".lora_A.weight", ".lora_B.weight")) or ".lora_" not in name
        if not key.startswith(_PREFIX) or not supported or ".embed_tokens.lora" in name:
            raise CheckpointError(f"{self.path}: tensor {key} is not supported")
        return name

    def _scaling(self, name: str, rank: int) -> float:
        module = name.removesuffix(".weight")
        planned = _by_pattern(self.config.get("rank_pattern") or {}, module, self.config.get("r", 8))
        if planned != rank:
            raise CheckpointError(f"{self.path}: {name} has rank {rank}, {ADAPTER_CONFIG} says {planned}")
        alpha = _by_pattern(self.config.get("alpha_pattern") or {}, module, self.config.get("lora_alpha", 8))
        return alpha / (math.sqrt(rank) if self.config.get("use_rslora") else rank)


def _by_pattern(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    """PEFT's rule: the first key that, as a regular expression, matches the end of the module's name."""
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default
