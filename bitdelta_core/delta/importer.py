"""Importing the published BitDelta files: one pickle of sign masks, coefficients and whole tensors.

The layout is that of the authors' code: `<module>.mask` int32 [K / 32, N], bit j of word i the sign of input 32 i + j
(set: +1); `<module>.coeff` one float; every other key a whole tensor. Loaded with `weights_only=True`, so that a
hostile file can name no code to run. Not covered: their tokenizer and config, which those files do not hold.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

from bitdelta_core.checkpoint import Checkpoint
from bitdelta_core.delta.codecs import encode
from bitdelta_core.delta.config import DTYPES, DeltaConfig
from bitdelta_core.delta.format import EMBEDDING, HEAD, base_name
from bitdelta_core.delta.planning import plan_exact
from bitdelta_core.delta.spec import TensorEntry
from bitdelta_core.delta.writer import DeltaWriter, sha256_of
from bitdelta_core.errors import DeltaFormatError, InvalidRequest
from bitdelta_core.version import VERSION

Parts = dict[str, torch.Tensor]


def import_published(base_path: Path, file: Path, out: Path) -> Path:
    """Write the delta in `file` (BitDelta's `diff.pt`) as a delta directory at `out`; whole tensors stay exact.

    Raises:
        DeltaFormatError: not such a file, or it wants to run code; names the key.
        InvalidRequest: `out` exists.
        CheckpointError: the base cannot be read.
    """
    base = Checkpoint(base_path)
    tensors = _load(file)
    sources = {entry.name: (entry, source) for entry, source in _entries(base, tensors, str(file))}
    entries = [sources[name][0] for name in sorted(sources)]
    config = DeltaConfig(
        base_sha256=base.sha256(),
        base_model_name_or_path=base.path.resolve().name,
        codec="bitdelta",
        tensors={entry.name: entry for entry in entries},
        files={},
        config_overrides=_overrides(base, tensors),
        provenance={
            "writer": f"bitdelta {VERSION}",
            "imported_from": file.name,
            "imported_sha256": sha256_of(file),
            "finetune_bytes_16bit": _full_bytes(base, tensors),
        },
    )
    writer = DeltaWriter(out, entries, fingerprint=config.to_json().decode())
    for entry in entries:
        if entry.name not in writer.done:
            writer.put(entry, _parts(base, tensors, entry))
    return writer.finish(config, {})


def _load(file: Path) -> dict[str, torch.Tensor]:
    if not file.is_file():
        raise InvalidRequest(f"{file} is no file here", param="file")
    try:
        body = torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, OSError) as error:
        reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        raise DeltaFormatError(f"{file.name}: not a pickle of tensors alone: {reason}", delta=str(file)) from error
    if not isinstance(body, Mapping):
        raise DeltaFormatError(f"{file.name}: holds a {type(body).__name__}, not a table", delta=str(file))
    for key, value in body.items():
        if not isinstance(key, str) or not isinstance(value, torch.Tensor) or value.layout != torch.strided:
            raise DeltaFormatError(f"{file.name}: {str(key)[:80]!r} is not a plain tensor", delta=str(file))
    return dict(body)


def _entries(
    base: Checkpoint, tensors: Mapping[str, torch.Tensor], file: str
) -> Iterator[tuple[TensorEntry, torch.Tensor]]:
    """Every entry, its shapes checked against the base before any conversion."""
    for key, tensor in tensors.items():
        if key.endswith(".coeff"):
            if f"{key.removesuffix('.coeff')}.mask" not in tensors:
                raise DeltaFormatError(f"{key!r} has no mask", delta=file)
            continue
        name = f"{key.removesuffix('.mask')}.weight" if key.endswith(".mask") else key
        if base_name(name, base) not in base:
            raise DeltaFormatError(f"{key!r}: the base has no parameter {name}", delta=file)
        entry = _entry(base.get(base_name(name, base)), tensors, key, name, file)
        if entry is not None:
            yield entry, tensor


def _entry(
    base: torch.Tensor, tensors: Mapping[str, torch.Tensor], key: str, name: str, file: str
) -> TensorEntry | None:
    tensor = tensors[key]
    if key.endswith(".mask"):
        coeff = tensors.get(f"{key.removesuffix('.mask')}.coeff")
        n, k = base.shape if base.ndim == 2 else (0, 0)
        if tensor.dtype != torch.int32 or 32 * tensor.shape[0] != k or tuple(tensor.shape[1:]) != (n,):
            raise DeltaFormatError(f"{key!r} is {tensor.dtype} {list(tensor.shape)} for {n} x {k} weights", delta=file)
        if coeff is None or coeff.numel() != 1 or not coeff.dtype.is_floating_point:
            raise DeltaFormatError(f"{key!r} has no coefficient of one float", delta=file)
        return TensorEntry(name=name, shape=(n, k), codec="bitdelta", dtype=base.dtype)
    vocabulary = name in (EMBEDDING, HEAD)
    fits = tensor.ndim == base.ndim and tensor.shape[vocabulary:] == base.shape[vocabulary:]
    if not fits or tensor.dtype not in DTYPES.values() or tensor.shape[0] > 4 * base.shape[0]:
        raise DeltaFormatError(f"{key!r} is {tensor.dtype} {list(tensor.shape)} over {list(base.shape)}", delta=file)
    return plan_exact(name, base, tensor)


def _parts(base: Checkpoint, tensors: Mapping[str, torch.Tensor], entry: TensorEntry) -> Parts:
    if entry.codec != "bitdelta":
        return encode(entry, base.get(base_name(entry.name, base)), tensors[entry.name])[1]
    module = entry.name.removesuffix(".weight")
    words = tensors[f"{module}.mask"].T.contiguous()
    return {
        "sign": words.view(torch.uint8).reshape(1, *words.shape[:1], -1),
        "scale": tensors[f"{module}.coeff"].float().reshape(1),
    }


def _overrides(base: Checkpoint, tensors: Mapping[str, torch.Tensor]) -> dict[str, int]:
    grown = {tensors[name].shape[0] for name in (EMBEDDING, HEAD) if name in tensors} - {base.shape(EMBEDDING)[0]}
    if len(grown) > 1:
        raise DeltaFormatError(f"embedding and head have different vocabularies {sorted(grown)}")
    return {"vocab_size": grown.pop()} if grown else {}


def _full_bytes(base: Checkpoint, tensors: Mapping[str, torch.Tensor]) -> int:
    return 2 * sum((tensors[name] if name in tensors else base.get(name)).numel() for name in base.names)
