"""Base plus delta back to a plain Hugging Face checkpoint, one parameter in memory at a time."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from bitdelta_core.checkpoint import INDEX, Checkpoint
from bitdelta_core.delta.codecs import decode
from bitdelta_core.delta.config import DTYPES
from bitdelta_core.delta.format import EMBEDDING, HEAD, DeltaReader, base_name, open_delta
from bitdelta_core.delta.pairing import is_tied, parameters
from bitdelta_core.delta.shards import Spec, lay_out, shard_names, split
from bitdelta_core.delta.sidecars import GENERATION_CONFIG, TOKENIZER_FILES
from bitdelta_core.delta.writer import check_absent, raw_bytes, writing

SHARD_BYTES = 5 * 10**9
Progress = Callable[[int, int, str], None]
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class Variant:
    """A base with a delta over it: the checkpoint that restoring writes, tensor by tensor."""

    def __init__(self, base: Checkpoint, delta: DeltaReader, *, dtype: torch.dtype | None = None) -> None:
        self.base = base
        self.delta = delta
        self._dtype = dtype
        self.config = delta.config.merged_config(base.config)

    @property
    def names(self) -> list[str]:
        """Every parameter of the restored checkpoint, sorted; a tied head is not one."""
        tied = self.config.get("tie_word_embeddings", is_tied(self.base))
        return sorted({name for name in parameters(self.base) if name != HEAD} | (set() if tied else {HEAD}))

    def spec(self, name: str) -> Spec:
        """(dtype, shape) of a parameter."""
        entry = self.delta.config.tensors.get(name)
        base = self.base.get(base_name(name, self.base))
        own = base.dtype if entry is None or entry.codec == "lora" else entry.dtype
        return self._dtype or own, tuple(base.shape) if entry is None else entry.shape

    def get(self, name: str) -> torch.Tensor:
        """A parameter, decoded in fp32 and rounded once to its dtype."""
        entry = self.delta.config.tensors.get(name)
        if entry is None:
            return self.base.get(base_name(name, self.base)).to(self.spec(name)[0])
        return decode(self.delta, entry, self.base).to(self.spec(name)[0])


def restore(
    base_path: Path,
    delta_path: Path,
    out: Path,
    *,
    dtype: torch.dtype | None = None,
    shard_bytes: int = SHARD_BYTES,
    progress: Progress | None = None,
) -> Path:
    """Write the checkpoint that a delta stands for; `dtype` None keeps each tensor's own.

    Raises:
        InvalidRequest: `out` exists or cannot be written.
        CheckpointError, DeltaError: one of the two cannot be read, or they do not belong together.
    """
    check_absent(out)
    base = Checkpoint(base_path)
    variant = Variant(base, open_for(base, delta_path), dtype=dtype)
    work = out.with_name(out.name + ".partial")
    with writing(out):
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        _write_weights(work, variant, shard_bytes, progress or (lambda done, total, name: None))
        _write_config(work, variant)
        _copy_sidecars(work, base.path, variant.delta)
        work.rename(out)
    return out


def open_for(base: Checkpoint, delta_path: Path) -> DeltaReader:
    """Open a delta, checked against this base's hash and shapes."""
    shapes = {name: base.shape(name) for name in base.names}
    return open_delta(delta_path, expected_base_sha256=base.sha256(), base_shapes=shapes)


def _write_weights(work: Path, variant: Variant, shard_bytes: int, progress: Progress) -> None:
    names = variant.names
    files = split([{name: variant.spec(name)} for name in names], shard_bytes)
    weight_map: dict[str, str] = {}
    for file, specs in zip(shard_names("model", len(files)), files, strict=True):
        layout = lay_out(specs)
        with (work / file).open("wb") as stream:
            stream.write(layout.header)
            for name, extent in layout.extents.items():
                progress(len(weight_map), len(names), name)
                stream.seek(extent.start)
                stream.write(raw_bytes(variant.get(name)))
                variant.base.release()
                weight_map[name] = file
    progress(len(names), len(names), "")
    if len(files) > 1:
        total = sum((work / file).stat().st_size for file in set(weight_map.values()))
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (work / INDEX).write_text(json.dumps(index, indent=2))


def _write_config(work: Path, variant: Variant) -> None:
    config: dict[str, Any] = dict(variant.config)
    key = "torch_dtype" if "torch_dtype" in config else "dtype"
    config[key] = _DTYPE_NAMES.get(variant.spec(EMBEDDING)[0])
    (work / "config.json").write_text(json.dumps(config, indent=2))


def _copy_sidecars(work: Path, base: Path, delta: DeltaReader) -> None:
    """The delta's tokenizer and generation config where it has them, else the base's."""
    tokenizer = delta.config.tokenizer_files
    _copy(dict.fromkeys(tokenizer or TOKENIZER_FILES, delta.path if tokenizer else base), work)
    own = GENERATION_CONFIG in delta.config.sidecar_files
    _copy({GENERATION_CONFIG: delta.path if own else base}, work)


def _copy(sources: Mapping[str, Path], work: Path) -> None:
    for name, directory in sources.items():
        if (directory / name).is_file():
            shutil.copyfile(directory / name, work / name)
