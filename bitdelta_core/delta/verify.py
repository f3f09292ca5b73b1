"""Checking a delta all the way down: structure, base, hashes of every file, finite values, optionally fidelity."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from bitdelta_core.checkpoint import Checkpoint
from bitdelta_core.delta import spectral
from bitdelta_core.delta.format import DeltaReader
from bitdelta_core.delta.lora import is_adapter
from bitdelta_core.delta.pairing import Pairing
from bitdelta_core.delta.restore import Variant, open_for
from bitdelta_core.delta.writer import sha256_of
from bitdelta_core.errors import DeltaFormatError, InvalidRequest

_CHUNK = 1 << 22


@dataclass(frozen=True, slots=True)
class TensorError:
    """How far a decoded tensor is from the fine-tune's, relative to how far the fine-tune is from the base.

    0 is exact, 1 as far as the base itself (Frobenius norms); rows that the base does not have count in full.
    """

    name: str
    codec: str
    relative_error: float


def verify(base_path: Path, delta_path: Path) -> DeltaReader:
    """Open the delta against its base and check every byte.

    Raises:
        BaseMismatch: it belongs to another base.
        DeltaFormatError: malformed, a file is not what delta_config.json says, or a value is not finite.
    """
    delta = open_for(Checkpoint(base_path), delta_path)
    for name, entry in delta.config.files.items():
        if sha256_of(delta.path / name) != entry.sha256:
            raise DeltaFormatError(f"{name}: its sha256 is not the one in delta_config.json", delta=str(delta.path))
    for entry in delta.config.tensors.values():
        for part in entry.parts():
            _check_finite(delta, entry.part_name(part), delta.part(entry, part))
        if entry.codec == "spectral":
            spectral.factors(entry, delta.parts(entry))
    return delta


def compare(base_path: Path, delta_path: Path, finetune_path: Path) -> Iterator[TensorError]:
    """Relative error of every parameter that the delta changes or should have changed, in name order.

    Raises:
        InvalidRequest: `finetune_path` is an adapter (its factors are in the delta as they are), or has another
            vocabulary than the delta.
        CheckpointError: it is no fine-tune of the base.
    """
    if is_adapter(finetune_path):
        raise InvalidRequest(f"{finetune_path} is an adapter: give a full checkpoint to compare with", param="against")
    base = Checkpoint(base_path)
    pairing = Pairing(base, Checkpoint(finetune_path))
    pairing.check()
    variant = Variant(base, open_for(base, delta_path), dtype=torch.float32)
    for name in pairing.names:
        entry = variant.delta.config.tensors.get(name)
        fine = pairing.fine_tensor(name).float()
        if (shape := variant.spec(name)[1]) != tuple(fine.shape):
            raise InvalidRequest(
                f"tensor {name} of {finetune_path} is {list(fine.shape)}, the delta's is {list(shape)}", param="against"
            )
        change = (fine - _padded(pairing.base_tensor(name), fine.shape)).norm().item()
        if entry is None and change == 0:
            continue
        error = (fine - variant.get(name)).norm().item()
        yield TensorError(name, entry.codec if entry else "absent", error / change if change else error)


def _padded(base: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    padded = torch.zeros(shape)
    common = min(shape[0], base.shape[0])
    padded[:common] = base[:common].float()
    return padded


def _check_finite(delta: DeltaReader, name: str, tensor: torch.Tensor) -> None:
    if not tensor.dtype.is_floating_point:
        return
    flat = tensor.reshape(-1)
    if not all(bool(flat[i : i + _CHUNK].isfinite().all()) for i in range(0, flat.numel(), _CHUNK)):
        raise DeltaFormatError(f"tensor {name!r} has a value that is not finite", delta=str(delta.path))
