"""The published pickle format: what it decodes to, and what a hostile one meets."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from bitdelta_core.checkpoint import Checkpoint
from bitdelta_core.delta.importer import import_published
from bitdelta_core.delta.restore import restore
from bitdelta_core.delta.verify import verify
from bitdelta_core.errors import DeltaFormatError
from tests.tiny import make_base, make_finetune

MODULES = ("self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("base") / "base"
    return make_base(path, hidden_size=64, intermediate_size=96, num_hidden_layers=1)


def published(base: Path, fine: Path) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """(a file as the authors' code writes it, what it stands for), bit by bit from their layout."""
    a, b = Checkpoint(base), Checkpoint(fine)
    file: dict[str, torch.Tensor] = {}
    want: dict[str, torch.Tensor] = {}
    for module in MODULES:
        name = f"model.layers.0.{module}"
        difference = (b.get(f"{name}.weight") - a.get(f"{name}.weight")).T  # [in, out]
        words = torch.zeros(difference.shape[0] // 32, difference.shape[1], dtype=torch.int64)
        for j in range(32):
            words |= (difference[j::32] >= 0).long() << j
        words = torch.where(words >= 2**31, words - 2**32, words)
        file[f"{name}.mask"] = words.to(torch.int32)
        file[f"{name}.coeff"] = difference.abs().mean()
        sign = torch.where(difference >= 0, 1.0, -1.0)
        want[f"{name}.weight"] = a.get(f"{name}.weight") + difference.abs().mean() * sign.T
    for name in ("model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"):
        file[name] = want[name] = b.get(name).clone()
    return file, want


def test_published_files_mean_what_the_authors_code_means(base: Path, tmp_path: Path) -> None:
    fine = make_finetune(base, tmp_path / "fine", new_tokens=("<|x|>",))
    body, want = published(base, fine)
    torch.save(body, tmp_path / "diff.pt")
    delta = import_published(base, tmp_path / "diff.pt", tmp_path / "delta")
    verify(base, delta)
    back = Checkpoint(restore(base, delta, tmp_path / "back"))
    for name in back.names:
        expected = want[name] if name in want else Checkpoint(base).get(name)
        torch.testing.assert_close(back.get(name), expected, rtol=1e-6, atol=1e-7)
    assert back.config["vocab_size"] == 259


class Hostile:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("writer", [torch.save, lambda body, file: file.write_bytes(pickle.dumps(body))])
def test_hostile_pickles_run_nothing(base: Path, tmp_path: Path, writer: Any) -> None:
    writer({"model.norm.weight": Hostile(tmp_path / "pwned")}, tmp_path / "diff.pt")
    with pytest.raises(DeltaFormatError, match=r"diff\.pt"):
        import_published(base, tmp_path / "diff.pt", tmp_path / "delta")
    assert not (tmp_path / "pwned").exists()
    assert not (tmp_path / "delta").exists()


Q = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({f"{Q}.mask": torch.zeros(3, 64, dtype=torch.int32)}, f"{Q}.mask"),
        ({f"{Q}.mask": torch.zeros(2, 64, dtype=torch.int64)}, f"{Q}.mask"),
        ({f"{Q}.coeff": torch.zeros(2)}, f"{Q}.mask.*coefficient"),
        ({f"{Q}.mask": None}, f"{Q}.coeff.*no mask"),
        ({"model.unknown.weight": torch.zeros(3)}, "model.unknown.weight"),
        ({"model.norm.weight": torch.zeros(3)}, "model.norm.weight"),
        ({"model.embed_tokens.weight": torch.zeros(1).expand(10**9, 64)}, "model.embed_tokens.weight"),
        ({"model.norm.weight": "text"}, "plain tensor"),
        ({"lm_head.weight": torch.ones(261, 64)}, "different vocabularies"),
    ],
)
def test_what_does_not_fit_is_named(base: Path, tmp_path: Path, change: dict[str, Any], named: str) -> None:
    fine = make_finetune(base, tmp_path / "fine", new_tokens=("<|x|>",))
    body = {**published(base, fine)[0], **change}
    torch.save({key: value for key, value in body.items() if value is not None}, tmp_path / "diff.pt")
    with pytest.raises(DeltaFormatError, match=named):
        import_published(base, tmp_path / "diff.pt", tmp_path / "delta")
    assert not (tmp_path / "delta").exists()


def test_files_that_are_no_pickle(base: Path, tmp_path: Path) -> None:
    for content in (b"", b"hello", b"PK\x03\x04 not a zip"):
        (tmp_path / "diff.pt").write_bytes(content)
        with pytest.raises(DeltaFormatError, match=r"diff\.pt"):
            import_published(base, tmp_path / "diff.pt", tmp_path / "delta")
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(DeltaFormatError, match="not a table"):
        import_published(base, tmp_path / "list.pt", tmp_path / "delta")
