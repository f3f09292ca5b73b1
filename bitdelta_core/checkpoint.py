"""Reading a Hugging Face checkpoint directory: config.json and one or many safetensors files, memory-mapped.

Not covered: pytorch_model.bin (pickle; convert it with transformers), GGUF, quantised checkpoints.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from bitdelta_core.errors import CheckpointError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class Location:
    """Bytes start:stop of a file."""

    file: Path
    start: int
    stop: int
    dtype: torch.dtype


@dataclass(frozen=True, slots=True)
class _Header:
    """Of one safetensors file."""

    nbytes: int
    fields: Mapping[str, Any]


class Checkpoint:
    """A read-only view of a checkpoint directory. Tensors are memory-mapped, so opening one costs no memory."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        if not self.path.is_dir():
            raise CheckpointError(
                f"{self.path} is no directory here: a checkpoint is a local directory "
                f"(for a model of the Hugging Face Hub: `hf download {self.path} --local-dir DIR` first)"
            )
        self._files = {name: file for file in self._weight_files() for name in self._open(file).keys()}  # noqa: SIM118
        if not self._files:
            raise CheckpointError(f"{self.path}: no tensors in its safetensors files")

    @cached_property
    def config(self) -> dict[str, Any]:
        """config.json as it stands."""
        file = self.path / "config.json"
        if not file.is_file():
            raise CheckpointError(f"{file} is missing")
        return read_object(file)

    @property
    def names(self) -> list[str]:
        """Names of all tensors, sorted."""
        return sorted(self._files)

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def get(self, name: str) -> torch.Tensor:
        """The tensor, memory-mapped: do not write to it.

        Raises:
            CheckpointError: no such tensor.
        """
        return self._open(self._file_of(name)).get_tensor(name)

    def get_slice(self, name: str) -> Any:
        """safetensors' lazy slice: `[a:b]` reads only those rows."""
        return self._open(self._file_of(name)).get_slice(name)

    def release(self) -> None:
        """Let go of the mapped files: what was read stops counting as this process's memory once no tensor holds it."""
        self._handles.clear()

    def location(self, name: str) -> Location:
        """Where the tensor's bytes lie, for whoever reads them without mapping the file.

        Raises:
            CheckpointError: no such tensor, or it is not of a floating type.
        """
        file = self._file_of(name)
        stored, header = self.get_slice(name).get_dtype(), self._header(file)
        if stored not in FLOATS:
            raise CheckpointError(f"{self.path}: {name} is {stored}, expected a floating type")
        start, stop = header.fields[name]["data_offsets"]
        return Location(file, header.nbytes + start, header.nbytes + stop, FLOATS[stored])

    def _header(self, file: Path) -> _Header:
        """Parsed once. safetensors has checked it when the file was opened."""
        if file not in self._headers:
            with file.open("rb") as stream:
                length = int.from_bytes(stream.read(8), "little")
                self._headers[file] = _Header(8 + length, json.loads(stream.read(length)))
        return self._headers[file]

    @cached_property
    def _headers(self) -> dict[Path, _Header]:
        return {}

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.get_slice(name).get_shape())

    @cached_property
    def nbytes_16bit(self) -> int:
        """Bytes of the parameters at 16 bits each: what ratios are taken against."""
        return sum(2 * self.get(name).numel() for name in self.names)

    def sha256(self) -> str:
        """Identity of the weights, independent of sharding: a hash over every tensor's name, dtype, shape and bytes.

        Hex sha256 of the lines `name dtype shape sha256(bytes)`, in name order. Computed once per set of files (sizes
        and modification times) and remembered in the user's cache directory.
        """
        cache = _hash_cache_file(self.fingerprint())
        if cache.is_file():
            return cache.read_text().strip()
        with ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as pool:
            lines = list(pool.map(self._hash_line, self.names))
        digest = hashlib.sha256("\n".join(lines).encode()).hexdigest()
        _write_quietly(cache, digest)
        return digest

    def _hash_line(self, name: str) -> str:
        tensor = self.get(name).contiguous()
        raw = tensor.reshape(-1).view(torch.uint8).numpy().data if tensor.numel() else b""
        line = f"{name} {tensor.dtype} {list(tensor.shape)} {hashlib.sha256(raw).hexdigest()}"
        self.release()
        return line

    def fingerprint(self) -> str:
        """Of the files as they are now: another where one was replaced or written to."""
        parts = [(str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns) for f in self._weight_files()]
        return hashlib.sha256(repr(parts).encode()).hexdigest()

    def _weight_files(self) -> list[Path]:
        index = self.path / INDEX
        if index.is_file():
            files = sorted({self.path / name for name in self._read_index(index).values()})
        else:
            files = [self.path / SINGLE]
        for file in files:
            if not file.is_file():
                pickled = any(self.path.glob("*.bin")) and not index.is_file()
                hint = ": its weights are pickle, which is not read; save it as safetensors first" if pickled else ""
                raise CheckpointError(f"{file} is missing{hint}")
        return files

    @staticmethod
    def _read_index(index: Path) -> dict[str, str]:
        weight_map = read_object(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
            raise CheckpointError(f"{index} is not a safetensors index: weight_map does not map tensors to file names")
        for name in weight_map.values():
            if Path(name).name != name:
                raise CheckpointError(f"{index} points outside its directory: {name!r}")
        return weight_map

    def _file_of(self, name: str) -> Path:
        try:
            return self._files[name]
        except KeyError:
            raise CheckpointError(f"{self.path} has no tensor {name!r}") from None

    def _open(self, file: Path) -> Any:
        handle = self._handles.get(file)
        if handle is None:
            try:
                handle = self._handles[file] = safe_open(file, framework="pt")
            except (SafetensorError, struct.error, OSError) as error:
                raise CheckpointError(f"{file} cannot be read: {error}") from error
        return handle

    @cached_property
    def _handles(self) -> dict[Path, Any]:
        return {}

    def items(self) -> Iterator[tuple[str, torch.Tensor]]:
        """All tensors, in name order."""
        for name in self.names:
            yield name, self.get(name)


def read_object(file: Path) -> dict[str, Any]:
    """The JSON object in `file`.

    Raises:
        CheckpointError: it cannot be read, or is no JSON object.
    """
    try:
        body = json.loads(file.read_text())
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise CheckpointError(f"{file} is not valid JSON: {error}") from error
    if not isinstance(body, dict):
        raise CheckpointError(f"{file}: expected a JSON object, found {type(body).__name__}")
    return body


def _hash_cache_file(fingerprint: str) -> Path:
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return root / "bitdelta" / "base-sha256" / fingerprint


def _write_quietly(file: Path, text: str) -> None:
    """Remember a hash; a read-only home only costs the time to compute it again."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary = file.with_suffix(f".{os.getpid()}")
        temporary.write_text(text)
        temporary.replace(file)
    except OSError:
        return
