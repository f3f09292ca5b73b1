"""The safetensors container, read and written strictly: layouts known before a byte of data moves.

Reading checks the whole header against the file's size before anything is mapped. Writing lays the file out first, so
that tensors can be written one at a time, in any order, without holding the others.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bitdelta_core.delta.strict_json import BadJson, parse_object
from bitdelta_core.errors import DeltaFormatError

MAX_HEADER_BYTES = 32 * 2**20
DTYPES = {
    "U8": torch.uint8,
    "I32": torch.int32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_FIELDS = {"dtype", "shape", "data_offsets"}
Spec = tuple[torch.dtype, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class Extent:
    """Where one tensor lies in its file, in bytes from the file's beginning."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class ShardLayout:
    """One file to be: its header and where each tensor goes."""

    header: bytes
    """With the length prefix and padding, ready to write at 0."""
    extents: Mapping[str, Extent]
    nbytes: int


def nbytes(spec: Spec) -> int:
    """Bytes of a tensor of this dtype and shape."""
    dtype, shape = spec
    return dtype.itemsize * math.prod(shape)


def lay_out(specs: Mapping[str, Spec]) -> ShardLayout:
    """Lay out one file. Tensors of wider dtypes come first, so that each is aligned to its own item size."""
    order = sorted(specs, key=lambda name: -specs[name][0].itemsize)
    offsets: dict[str, tuple[int, int]] = {}
    at = 0
    for name in order:
        offsets[name] = (at, at + nbytes(specs[name]))
        at = offsets[name][1]
    body: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    for name in order:
        dtype, shape = specs[name]
        body[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": list(offsets[name])}
    text = json.dumps(body, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    extents = {n: Extent(*specs[n], start + offsets[n][0], start + offsets[n][1]) for n in order}
    return ShardLayout(len(text).to_bytes(8, "little") + text, extents, start + at)


def split(groups: Sequence[Mapping[str, Spec]], limit: int) -> list[dict[str, Spec]]:
    """Spread groups of tensors over files of about `limit` bytes; a group is never split. At least one file."""
    files: list[dict[str, Spec]] = [{}]
    used = 0
    for group in groups:
        size = sum(map(nbytes, group.values()))
        if files[-1] and used + size > limit:
            files.append({})
            used = 0
        files[-1].update(group)
        used += size
    return files


def shard_names(stem: str, count: int) -> list[str]:
    """`stem.safetensors`, or `stem-00001-of-0000N.safetensors` and so on."""
    if count == 1:
        return [f"{stem}.safetensors"]
    return [f"{stem}-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]


def read_header(file: Path, *, delta: str | None = None) -> dict[str, Extent]:
    """Every tensor's extent, checked: the tensors tile the data exactly, aligned, and end where the file ends.

    Raises:
        DeltaFormatError: naming the file, and the tensor where there is one to name.
    """

    def refuse(message: str) -> DeltaFormatError:
        return DeltaFormatError(f"{file.name}: {message}", delta=delta)

    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            prefix = stream.read(8)
            length = int.from_bytes(prefix, "little")
            if len(prefix) < 8 or length > min(size - 8, MAX_HEADER_BYTES):
                raise refuse(f"header of {length} bytes in a file of {size} (at most {MAX_HEADER_BYTES} are read)")
            text = stream.read(length)
    except OSError as error:
        raise refuse(f"cannot be read: {error.strerror}") from error
    try:
        body = parse_object(text, max_bytes=MAX_HEADER_BYTES)
    except BadJson as error:
        raise refuse(f"header: {error}") from error
    metadata = body.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise refuse("header: __metadata__ is not a table of strings")
    extents = {}
    for name, fields in body.items():
        extent = _extent(fields, 8 + length)
        if isinstance(extent, str):
            raise refuse(f"tensor {name!r}: {extent}")
        extents[name] = extent
    problem = _tiling_problem(extents, 8 + length, size)
    if problem:
        raise refuse(problem)
    return extents


def _extent(fields: Any, start: int) -> Extent | str:
    """The extent that a header's fields describe, or what is wrong with them."""
    if not isinstance(fields, dict) or fields.keys() != _FIELDS:
        return "expected exactly dtype, shape and data_offsets"
    dtype, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        return f"dtype {str(dtype)[:20]!r} is not one of {', '.join(DTYPES)}"
    if not _naturals(shape) or len(shape) > 4:
        return "shape is not a list of at most 4 natural numbers"
    if not _naturals(offsets) or len(offsets) != 2:
        return "data_offsets is not a pair of natural numbers"
    extent = Extent(DTYPES[dtype], tuple(shape), start + offsets[0], start + offsets[1])
    if extent.stop - extent.start != nbytes((extent.dtype, extent.shape)):
        return f"{extent.stop - extent.start} bytes for {dtype} {shape}"
    if extent.start % extent.dtype.itemsize:
        return f"not aligned to its {extent.dtype.itemsize}-byte items"
    return extent


def _naturals(value: Any) -> bool:
    return isinstance(value, list) and all(type(v) is int and 0 <= v < 2**63 for v in value)


def _tiling_problem(extents: Mapping[str, Extent], start: int, size: int) -> str | None:
    at = start
    for name, extent in sorted(extents.items(), key=lambda item: (item[1].start, item[1].stop)):
        if extent.start != at:
            return f"tensor {name!r} starts at byte {extent.start}, expected {at}: tensors overlap or leave a gap"
        if extent.stop > size:
            return f"tensor {name!r} ends at byte {extent.stop} of a file of {size}: the file is truncated"
        at = extent.stop
    return None if at == size else f"{size - at} bytes after the last tensor"
