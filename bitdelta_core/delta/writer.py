"""Writing a delta directory, one parameter at a time, so that nothing but the parameter at hand is in memory.

Everything goes to `OUT.partial/` first: sparse shards of full length, and a journal of the parameters that are safely
in them. A later run with the same fingerprint goes on where this one stopped; renaming the directory to OUT makes it
visible.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save

from bitdelta_core.delta.config import CONFIG_FILE, DeltaConfig, FileEntry
from bitdelta_core.delta.shards import Extent, lay_out, shard_names, split
from bitdelta_core.delta.spec import TensorEntry
from bitdelta_core.errors import CheckpointError, InvalidRequest

INDEX = "delta.safetensors.index.json"
SHARD_BYTES = 4 * 10**9
Parts = Mapping[str, torch.Tensor]


class DeltaWriter:
    """The delta under construction for `out`. `done` names the parameters that need no writing any more."""

    def __init__(
        self, out: Path, entries: Sequence[TensorEntry], *, fingerprint: str = "", shard_bytes: int = SHARD_BYTES
    ) -> None:
        check_absent(out)
        self.out = out
        self.work = out.with_name(out.name + ".partial")
        self.entries = {entry.name: entry for entry in entries}
        groups = [{e.part_name(p): spec for p, spec in e.parts().items()} for e in entries]
        layouts = [lay_out(specs) for specs in split(groups, shard_bytes)]
        names = shard_names("delta", len(layouts))
        self._layouts = dict(zip(names, layouts, strict=True))
        self._home: dict[str, tuple[Path, Extent]] = {
            part: (self.work / file, extent)
            for file, layout in self._layouts.items()
            for part, extent in layout.extents.items()
        }
        self._fingerprint = self._hash_fingerprint(fingerprint)
        with writing(out):
            self.done = self._resume() or self._start()

    def put(self, entry: TensorEntry, parts: Parts) -> None:
        """Store one parameter, durably.

        Raises:
            CheckpointError: a value is too large for what stores it.
        """
        assert entry == self.entries[entry.name], f"{entry.name} is not as planned"
        specs = entry.parts()
        assert parts.keys() == specs.keys(), f"{entry.name}: {sorted(parts)} for {sorted(specs)}"
        for part, tensor in parts.items():
            assert (tensor.dtype, tuple(tensor.shape)) == specs[part], f"{entry.name}.{part}: {tensor.dtype}"
            if tensor.is_floating_point() and tensor.numel() and not tensor.isfinite().all():
                raise CheckpointError(f"tensor {entry.name}: its {part} is not finite; are there very large values?")
            self._write(entry.part_name(part), tensor)
        self._note(entry.name)

    def part(self, entry: TensorEntry, part: str) -> torch.Tensor:
        """A part that was put before, memory-mapped."""
        file, extent = self._home[entry.part_name(part)]
        count = extent.stop - extent.start
        storage = torch.UntypedStorage.from_file(str(file), shared=False, nbytes=file.stat().st_size)
        flat = torch.empty(0, dtype=torch.uint8).set_(storage)[extent.start : extent.start + count]  # pyright: ignore
        return flat.view(extent.dtype).view(extent.shape)

    def overwrite(self, parts: Mapping[str, torch.Tensor]) -> None:
        """Replace stored parts (by full part name) with tensors of the same dtype and shape."""
        for name, tensor in parts.items():
            extent = self._home[name][1]
            assert (tensor.dtype, tuple(tensor.shape)) == (extent.dtype, extent.shape), f"{name}: not of its dtype"
            self._write(name, tensor)

    def save_trained(self, parts: Parts, losses: Mapping[str, float]) -> None:
        """Keep trained scales (and the losses that describe them) until `finish`, so that a resumed run has them."""
        metadata = {name: repr(value) for name, value in losses.items()}
        with writing(self.out):
            (self.work / "trained.tmp").write_bytes(save(dict(parts), metadata=metadata))
            (self.work / "trained.tmp").rename(self.work / "trained")

    def load_trained(self) -> tuple[dict[str, torch.Tensor], dict[str, float]] | None:
        """What an earlier run saved, or None."""
        if not (self.work / "trained").is_file():
            return None
        with safe_open(self.work / "trained", framework="pt") as file:
            losses = {name: float(value) for name, value in (file.metadata() or {}).items()}
            return {name: file.get_tensor(name).clone() for name in file.keys()}, losses  # noqa: SIM118

    def finish(self, config: DeltaConfig, sidecars: Mapping[str, bytes]) -> Path:
        """Add the other files and make the delta visible at `out`. `config.files` is filled in here."""
        with writing(self.out):
            return self._finish(config, sidecars)

    def _finish(self, config: DeltaConfig, sidecars: Mapping[str, bytes]) -> Path:
        missing = self.entries.keys() - self.done
        assert not missing, f"never put: {sorted(missing)[:3]}"
        if len(self._layouts) > 1:
            sidecars = {**sidecars, INDEX: self._index()}
        for name, data in sidecars.items():
            _write_durably(self.work / name, data)
        names = [*self._layouts, *sidecars]
        files = {name: FileEntry((self.work / name).stat().st_size, sha256_of(self.work / name)) for name in names}
        _write_durably(self.work / CONFIG_FILE, replace(config, files=files).to_json())
        for leftover in set(os.listdir(self.work)) - {*names, CONFIG_FILE}:
            (self.work / leftover).unlink()
        self.work.rename(self.out)
        return self.out

    def _hash_fingerprint(self, fingerprint: str) -> str:
        digest = hashlib.sha256(fingerprint.encode())
        for name, layout in self._layouts.items():
            digest.update(name.encode() + layout.header)
        return digest.hexdigest()

    def _resume(self) -> set[str] | None:
        """What an interrupted run of the very same work has finished, or None."""
        try:
            lines = (self.work / "journal").read_text().splitlines(keepends=True)
        except FileNotFoundError:
            return None
        whole = [line[:-1] for line in lines if line.endswith("\n")]
        if not whole or whole[0] != self._fingerprint:
            return None
        if lines and not lines[-1].endswith("\n"):
            (self.work / "journal").write_text("".join(f"{line}\n" for line in whole))
        return set(whole[1:])

    def _start(self) -> set[str]:
        shutil.rmtree(self.work, ignore_errors=True)
        self.work.mkdir(parents=True)
        for name, layout in self._layouts.items():
            with (self.work / name).open("wb") as stream:
                stream.truncate(layout.nbytes)
                stream.write(layout.header)
        _write_durably(self.work / "journal", f"{self._fingerprint}\n".encode())
        return set()

    def _write(self, name: str, tensor: torch.Tensor) -> None:
        file, extent = self._home[name]
        with writing(self.out), file.open("r+b") as stream:
            stream.seek(extent.start)
            stream.write(raw_bytes(tensor))
            stream.flush()
            os.fdatasync(stream.fileno())

    def _note(self, line: str) -> None:
        with writing(self.out), (self.work / "journal").open("a") as stream:
            stream.write(f"{line}\n")
            stream.flush()
            os.fdatasync(stream.fileno())
        self.done.add(line)

    def _index(self) -> bytes:
        total = sum(e.stop - e.start for layout in self._layouts.values() for e in layout.extents.values())
        weight_map = {part: file for file, layout in self._layouts.items() for part in layout.extents}
        body = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        return json.dumps(body, indent=1).encode()


def write(
    out: Path, config: DeltaConfig, parts: Iterable[tuple[TensorEntry, Parts]], *, sidecars: Mapping[str, bytes]
) -> Path:
    """Write a whole delta in one go. `config.tensors` plans it; `parts` yields every entry once, in any order."""
    writer = DeltaWriter(out, list(config.tensors.values()))
    for entry, tensors in parts:
        writer.put(entry, tensors)
    return writer.finish(config, sidecars)


def check_absent(out: Path) -> None:
    """Raise InvalidRequest if there is something at `out`: nothing is ever overwritten."""
    if os.path.lexists(out):
        raise InvalidRequest(f"{out} exists already: choose another directory or remove it", param="out")


@contextmanager
def writing(out: Path) -> Iterator[None]:
    """Turn what the file system refuses while `out` is written (no space, no permission) into InvalidRequest."""
    try:
        yield
    except OSError as error:
        elsewhere = error.filename is not None and not str(error.filename).startswith(str(out))
        why = f"{error.filename}: {error.strerror}" if elsewhere else error.strerror or error
        raise InvalidRequest(f"{out} cannot be written: {why}", param="out") from error


def raw_bytes(tensor: torch.Tensor) -> memoryview:
    """The tensor's bytes, little-endian and row-major, without a copy where it is contiguous already."""
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data


def sha256_of(file: Path) -> str:
    """Hex sha256 of a file's bytes."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _write_durably(file: Path, data: bytes) -> None:
    with file.open("wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())
