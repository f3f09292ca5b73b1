"""Results of the slow steps before a delta can be laid out, kept beside it so that an interrupted run goes on."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save

from bitdelta_core.delta.writer import writing

Tensors = Mapping[str, torch.Tensor]


class Stage:
    """Named sets of tensors in `OUT.stage/`. Those of another run (another fingerprint) are thrown away."""

    def __init__(self, out: Path, fingerprint: str) -> None:
        self.out = out
        self.path = out.with_name(out.name + ".stage")
        with writing(out):
            stamp = self.path / "fingerprint"
            if not stamp.is_file() or stamp.read_text() != fingerprint:
                shutil.rmtree(self.path, ignore_errors=True)
                self.path.mkdir(parents=True)
                stamp.write_text(fingerprint)

    def __contains__(self, name: str) -> bool:
        return self._file(name).is_file()

    def load(self, name: str) -> dict[str, torch.Tensor]:
        """One set, read into memory."""
        with safe_open(self._file(name), framework="pt") as file:
            return {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118

    def save(self, name: str, tensors: Tensors) -> None:
        temporary = self.path / "tmp"
        with writing(self.out):
            temporary.write_bytes(save({key: tensor.contiguous() for key, tensor in tensors.items()}))
            temporary.rename(self._file(name))

    def once(self, name: str, make: Callable[[], Tensors]) -> dict[str, torch.Tensor]:
        """The set of that name, made unless an earlier run did."""
        if name not in self:
            self.save(name, make())
        return self.load(name)

    def remove(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)

    def _file(self, name: str) -> Path:
        return self.path / f"{name}.safetensors"
