"""Opening a delta directory: everything checked before anything is mapped, then parts on demand.

docs/delta-format.md is the specification. Not covered here: the hashes of the files (`verify`), whether values are
finite (`verify`), and where the directory came from (`storage`).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from bitdelta_core.delta.config import CONFIG_FILE, MAX_CONFIG_BYTES, DeltaConfig, parse_config
from bitdelta_core.delta.shards import Extent, read_header, shard_names
from bitdelta_core.delta.spec import TensorEntry
from bitdelta_core.delta.strict_json import BadJson, parse_object
from bitdelta_core.delta.writer import INDEX, write
from bitdelta_core.errors import BaseMismatch, DeltaFormatError

__all__ = ["EMBEDDING", "HEAD", "DeltaReader", "open_delta", "write"]

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
Shapes = Mapping[str, tuple[int, ...]]


class DeltaReader:
    """An opened, validated delta. Parts are memory-mapped: opening costs no memory, and they must not be written to."""

    def __init__(
        self,
        path: Path,
        config: DeltaConfig,
        extents: Mapping[str, tuple[str, Extent]],
        *,
        places: Mapping[str, Path] | None = None,
    ) -> None:
        """`places`: where weight files are now, those that are not in `path` any more."""
        self.path = path
        self.config = config
        self._extents = extents
        self._places = places or {}

    def at(self, places: Mapping[str, Path]) -> DeltaReader:
        """The same with weight files elsewhere. Nothing of it is mapped yet."""
        return DeltaReader(self.path, self.config, self._extents, places=places)

    def __getstate__(self) -> dict[str, Any]:
        """What is mapped stays here."""
        return {name: value for name, value in vars(self).items() if name != "_handles"}

    def part(self, entry: TensorEntry, part: str) -> torch.Tensor:
        """One part of an entry, of the dtype and shape that `entry.parts()` says."""
        return self._call(entry, part, "get_tensor")

    def part_slice(self, entry: TensorEntry, part: str) -> Any:
        """safetensors' lazy slice of one part: `[a:b, c:d]` reads only that."""
        return self._call(entry, part, "get_slice")

    def parts(self, entry: TensorEntry) -> dict[str, torch.Tensor]:
        """All parts of an entry."""
        return {part: self.part(entry, part) for part in entry.parts()}

    def extent(self, entry: TensorEntry, part: str) -> tuple[str, Extent]:
        """File name and byte range of one part, for ranged reads."""
        return self._extents[entry.part_name(part)]

    @cached_property
    def nbytes(self) -> int:
        """Every byte of the directory, delta_config.json included."""
        config_bytes = (self.path / CONFIG_FILE).stat().st_size
        return config_bytes + sum(entry.nbytes for entry in self.config.files.values())

    def map_files(self) -> None:
        """Map all weight files now: from here on the directory may be removed."""
        for file in self.config.weight_files:
            self._handle(file)

    @cached_property
    def _handles(self) -> dict[str, Any]:
        return {}

    def _call(self, entry: TensorEntry, part: str, method: str) -> Any:
        name = entry.part_name(part)
        file = self._extents[name][0]
        try:
            return getattr(self._handle(file), method)(name)
        except (SafetensorError, OSError) as error:
            raise DeltaFormatError(f"{file}: tensor {name!r}: {error}", delta=str(self.path)) from error

    def _handle(self, file: str) -> Any:
        if file not in self._handles:
            try:
                self._handles[file] = safe_open(self._places.get(file, self.path / file), framework="pt")
            except (SafetensorError, OSError) as error:
                raise DeltaFormatError(f"{file}: {error}", delta=str(self.path)) from error
        return self._handles[file]


def open_delta(
    path: str | os.PathLike[str], *, expected_base_sha256: str | None = None, base_shapes: Shapes | None = None
) -> DeltaReader:
    """Open and validate a delta directory.

    `base_shapes` (parameter name -> shape of the base) makes it also check that every entry fits that base.

    Raises:
        UnsupportedFormat: newer format version, or unknown codec.
        BaseMismatch: `expected_base_sha256` is not the base that the delta was made from, or an entry's shape does
            not fit `base_shapes`.
        DeltaFormatError: anything malformed, naming the file and the tensor or field.
    """
    path = Path(path)
    delta = str(path)
    config = parse_config(_read_config(path), delta=delta)
    if expected_base_sha256 is not None and config.base_sha256 != expected_base_sha256:
        raise BaseMismatch(
            f"made from the base {config.base_sha256[:12]}… ({config.base_model_name_or_path or 'unnamed'}), "
            f"the base at hand is {expected_base_sha256[:12]}…",
            delta=delta,
        )
    _check_files(path, config)
    extents = _read_extents(path, config)
    _check_parts(config, extents, delta)
    reader = DeltaReader(path, config, extents)
    if base_shapes is not None:
        check_fits(config, base_shapes, delta)
    for entry in config.tensors.values():
        if entry.codec == "rows":
            _check_row_index(reader, entry, base_shapes)
    return reader


def base_name(name: str, base: Any) -> str:
    """Which base parameter an entry's differences and missing rows refer to.

    Its own name, but for the head of a base that ties it (no `lm_head.weight` there): the base's embedding.
    """
    return EMBEDDING if name == HEAD and HEAD not in base else name


def _read_config(path: Path) -> bytes:
    file = path / CONFIG_FILE
    try:
        if file.stat().st_size > MAX_CONFIG_BYTES:
            raise DeltaFormatError(f"{CONFIG_FILE} is larger than {MAX_CONFIG_BYTES} bytes", delta=str(path))
        return file.read_bytes()
    except OSError as error:
        raise DeltaFormatError(f"{CONFIG_FILE} cannot be read: {error.strerror}", delta=str(path)) from error


def _check_files(path: Path, config: DeltaConfig) -> None:
    """Every listed file is there in its listed size. Shards of weights are left to their headers to blame."""
    for name, entry in config.files.items():
        file = path / name
        if not file.is_file():
            raise DeltaFormatError(f"{name} is missing", delta=str(path))
        size = file.stat().st_size
        if size == entry.nbytes:
            continue
        if name in config.weight_files:
            read_header(file, delta=str(path))
        raise DeltaFormatError(f"{name} has {size} bytes, {CONFIG_FILE} says {entry.nbytes}", delta=str(path))


def _read_extents(path: Path, config: DeltaConfig) -> dict[str, tuple[str, Extent]]:
    files = list(config.weight_files)
    if not files or files != shard_names("delta", len(files)):
        raise DeltaFormatError(
            f"weight files are {files[:3]}, expected delta.safetensors or delta-00001-of-N and so on", delta=str(path)
        )
    found: dict[str, tuple[str, Extent]] = {}
    for file in files:
        for name, extent in read_header(path / file, delta=str(path)).items():
            if name in found:
                raise DeltaFormatError(f"tensor {name!r} is in {found[name][0]} and in {file}", delta=str(path))
            found[name] = (file, extent)
    if len(files) > 1:
        _check_index(path, config, found)
    return found


def _check_index(path: Path, config: DeltaConfig, found: Mapping[str, tuple[str, Extent]]) -> None:
    if INDEX not in config.files:
        raise DeltaFormatError(f"several weight files but no {INDEX} in `files`", delta=str(path))
    try:
        weight_map = parse_object((path / INDEX).read_bytes(), max_bytes=MAX_CONFIG_BYTES).get("weight_map")
    except (BadJson, OSError) as error:
        raise DeltaFormatError(f"{INDEX}: {error}", delta=str(path)) from error
    if weight_map != {name: file for name, (file, _) in found.items()}:
        raise DeltaFormatError(f"{INDEX}: weight_map does not say what the files hold", delta=str(path))


def _check_parts(config: DeltaConfig, extents: Mapping[str, tuple[str, Extent]], delta: str) -> None:
    """The files hold exactly the parts that the entries promise."""
    extra = set(extents)
    for entry in config.tensors.values():
        for part, (dtype, shape) in entry.parts().items():
            name = entry.part_name(part)
            if name not in extents:
                raise DeltaFormatError(f"tensor {name!r} is missing", delta=delta)
            file, extent = extents[name]
            if (extent.dtype, extent.shape) != (dtype, shape):
                raise DeltaFormatError(
                    f"{file}: tensor {name!r} is {extent.dtype} {list(extent.shape)}, "
                    f"{CONFIG_FILE} promises {dtype} {list(shape)}",
                    delta=delta,
                )
            extra.discard(name)
    if extra:
        name = min(extra)
        raise DeltaFormatError(f"{extents[name][0]}: tensor {name!r} belongs to no entry", delta=delta)


def check_fits(config: DeltaConfig, base_shapes: Shapes, delta: str) -> None:
    """Raise BaseMismatch or DeltaFormatError where an entry does not fit the base. delta: for messages."""
    for entry in config.tensors.values():
        source = base_name(entry.name, base_shapes)
        if source not in base_shapes:
            raise BaseMismatch(f"tensor {entry.name!r}: the base has no such parameter", delta=delta)
        base = base_shapes[source]
        grows = entry.name in (EMBEDDING, HEAD)
        if len(entry.shape) != len(base) or entry.shape[grows:] != base[grows:]:
            raise BaseMismatch(f"tensor {entry.name!r}: {list(entry.shape)} over a base of {list(base)}", delta=delta)
        _check_vocabulary(config, entry, base, delta)


def _check_vocabulary(config: DeltaConfig, entry: TensorEntry, base: tuple[int, ...], delta: str) -> None:
    if entry.codec in ("quant", "spectral") and entry.rows != min(entry.shape[0], base[0]):
        raise DeltaFormatError(
            f"tensor {entry.name!r}: {entry.rows} rows coded over {base[0]} of the base", delta=delta
        )
    if entry.shape[:1] == base[:1]:
        return
    if config.config_overrides.get("vocab_size") != entry.shape[0]:
        raise DeltaFormatError(
            f"tensor {entry.name!r} has {entry.shape[0]} rows, the base {base[0]}, "
            f"but config_overrides.vocab_size is {config.config_overrides.get('vocab_size')!r}",
            delta=delta,
        )
    if entry.codec in ("bitdelta", "deltadq", "lora"):
        raise DeltaFormatError(f"tensor {entry.name!r}: codec {entry.codec} cannot change the vocabulary", delta=delta)


def _check_row_index(reader: DeltaReader, entry: TensorEntry, base_shapes: Shapes | None) -> None:
    """Row numbers ascend, stay inside the shape, and cover what the base does not have."""
    index = reader.part(entry, "index").to(torch.int64)
    inside = not len(index) or (int(index[0]) >= 0 and int(index[-1]) < entry.shape[0])
    if not inside or bool((index[1:] <= index[:-1]).any()):
        raise DeltaFormatError(
            f"tensor {entry.part_name('index')!r}: not ascending row numbers below {entry.shape[0]}",
            delta=str(reader.path),
        )
    if base_shapes is None:
        return
    base_rows = base_shapes[base_name(entry.name, base_shapes)][0]
    new_rows = max(0, entry.shape[0] - base_rows)
    if int((index >= base_rows).sum()) != new_rows:
        raise DeltaFormatError(
            f"tensor {entry.part_name('index')!r}: not all of the {new_rows} rows beyond the base are stored",
            delta=str(reader.path),
        )
