"""The delta file: every kind of damage has its named error, found before anything is mapped."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bitdelta_core.checkpoint import Checkpoint
from bitdelta_core.delta.compress import compress
from bitdelta_core.delta.config import parse_config
from bitdelta_core.delta.format import open_delta, write
from bitdelta_core.delta.planning import CompressOptions
from bitdelta_core.delta.restore import open_for
from bitdelta_core.delta.verify import verify
from bitdelta_core.errors import BaseMismatch, DeltaFormatError, UnsupportedFormat
from tests.tiny import make_base, make_finetune

UP = "model.layers.0.mlp.up_proj.weight"
EMBEDDING = "model.embed_tokens.weight"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("base") / "base")


@pytest.fixture(scope="module")
def sound(base: Path) -> Path:
    fine = make_finetune(base, base.parent / "fine", only="layers", new_tokens=("<|x|>",))
    return compress(base, fine, base.parent / "delta", CompressOptions(scale_layout="row_col", bits=2))


@pytest.fixture(scope="module")
def sharded(base: Path) -> Path:
    return compress(base, base.parent / "fine", base.parent / "sharded", shard_bytes=8000)


@pytest.fixture
def delta(sound: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sound, tmp_path / "delta"))


def edit_config(delta: Path, change: Callable[[dict[str, Any]], object]) -> None:
    file = delta / "delta_config.json"
    body = json.loads(file.read_text())
    change(body)
    file.write_text(json.dumps(body))


def edit_header(delta: Path, change: Callable[[dict[str, Any]], object], *, fix_size: bool = True) -> None:
    """Rewrite the header of delta.safetensors, the data left as it is."""
    file = delta / "delta.safetensors"
    raw = file.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])
    if fix_size:
        edit_config(delta, lambda body: body["files"]["delta.safetensors"].update(nbytes=file.stat().st_size))


def test_a_sound_delta_opens_and_gives_what_its_entries_promise(base: Path, sound: Path, sharded: Path) -> None:
    for path in (sound, sharded):
        delta = open_for(Checkpoint(base), path)
        assert delta.nbytes == sum(f.stat().st_size for f in path.iterdir())
        for entry in delta.config.tensors.values():
            for part, (dtype, shape) in entry.parts().items():
                tensor = delta.part(entry, part)
                assert (tensor.dtype, tuple(tensor.shape)) == (dtype, shape)
                file, extent = delta.extent(entry, part)
                raw = (path / file).read_bytes()[extent.start : extent.stop]
                assert raw == tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        entry = delta.config.tensors[UP]
        assert torch.equal(delta.part_slice(entry, "sign")[:, 3:9], delta.part(entry, "sign")[:, 3:9])


def test_config_round_trips(sound: Path) -> None:
    text = (sound / "delta_config.json").read_bytes()
    assert parse_config(text).to_json() == text


def test_write_makes_what_open_reads(base: Path, sound: Path, tmp_path: Path) -> None:
    delta = open_for(Checkpoint(base), sound)
    sidecars = {name: (sound / name).read_bytes() for name in delta.config.sidecar_files}
    entries = delta.config.tensors.values()
    copy = write(
        tmp_path / "copy", replace(delta.config, files={}), ((e, delta.parts(e)) for e in entries), sidecars=sidecars
    )
    assert {f.name: f.read_bytes() for f in copy.iterdir()} == {f.name: f.read_bytes() for f in sound.iterdir()}


@pytest.mark.parametrize("keep", [0, 7, 8, 500, -1, -3000])
def test_truncation_is_named(delta: Path, keep: int) -> None:
    file = delta / "delta.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(DeltaFormatError, match=r"delta\.safetensors: (header|tensor '.*truncated)"):
        open_delta(delta)


@pytest.mark.parametrize("length", [2**63, 2**40, 2**26])
def test_header_bombs_are_not_read(delta: Path, length: int) -> None:
    file = delta / "delta.safetensors"
    file.write_bytes(length.to_bytes(8, "little") + file.read_bytes()[8:])
    with pytest.raises(DeltaFormatError, match="header of"):
        open_delta(delta)


@pytest.mark.parametrize(
    "header",
    [
        b"[" * 5000 + b"]" * 5000, b'{"a":' * 200 + b"1" + b"}" * 200, b'"' + b'\\"' * 2_000_000, b'{"a":1,"a":1}',
        b'{"a":NaN}', b"[]", b"\xff\xfe",
    ],
    ids=["list-bomb", "object-bomb", "string-bomb", "twice", "nan", "no-object", "no-utf8"],
)  # fmt: skip
def test_headers_that_are_no_honest_json(delta: Path, header: bytes) -> None:
    file = delta / "delta.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(DeltaFormatError, match="header"):
        open_delta(delta)
    (delta / "delta_config.json").write_bytes(header)
    with pytest.raises(DeltaFormatError, match="delta_config"):
        open_delta(delta)


SIGN = f"{UP}.sign"


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda h: h.pop(SIGN), "starts at byte"),
        (lambda h: h.update({"other": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}}), "belongs to no entry"),
        (lambda h: h[SIGN].update(dtype="I32"), f"{SIGN}.*bytes for I32"),
        (lambda h: h[SIGN].update(dtype="F99"), f"{SIGN}.*F99"),
        (lambda h: h[SIGN].update(shape=[2, 6, 88]), f"{SIGN}.*promises"),
        (lambda h: h[SIGN].update(shape=[2, -88, -6]), f"{SIGN}.*natural"),
        (lambda h: h[SIGN].update(shape=[2, 88, 2**62, 2**62]), f"{SIGN}.*bytes for"),
        (lambda h: h[SIGN].update(data_offsets=[0, 2 * 88 * 6]), "overlap"),
        (lambda h: h[SIGN].update(data_offsets=[5]), f"{SIGN}.*pair"),
        (lambda h: h[SIGN].update(extra=1), f"{SIGN}.*exactly"),
        (lambda h: h.update({SIGN: 5}), f"{SIGN}.*exactly"),
        (lambda h: h.update(__metadata__=[1]), "__metadata__"),
    ],
)
def test_headers_that_lie(delta: Path, change: Callable[[dict[str, Any]], object], named: str) -> None:
    edit_header(delta, change)
    with pytest.raises(DeltaFormatError, match=named):
        open_delta(delta)


def test_renamed_tensor_is_missing(delta: Path) -> None:
    edit_header(delta, lambda h: h.update({"x": h.pop(SIGN)}))
    with pytest.raises(DeltaFormatError, match=f"{SIGN}' is missing"):
        open_delta(delta)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda c: c.pop("base_sha256"), "base_sha256"),
        (lambda c: c.update(base_sha256="xyz"), "base_sha256"),
        (lambda c: c.update(surprise=1), "surprise"),
        (lambda c: c.update(tensors=[]), "tensors"),
        (lambda c: c["tensors"][UP].update(planes="2"), f"{UP}.planes"),
        (lambda c: c["tensors"][UP].update(planes=10**9), f"{UP}.planes"),
        (lambda c: c["tensors"][UP].update(shape=[]), f"{UP}.shape"),
        (lambda c: c["tensors"][UP].update(shape=[88, -48]), UP),
        (lambda c: c["tensors"][UP].update(shape=[10**30, 48]), UP),
        (lambda c: c["tensors"][UP].update(dtype="int8"), f"{UP}.dtype"),
        (lambda c: c["tensors"][UP].update(scale_layout="col"), f"{UP}.scale_layout"),
        (lambda c: c["tensors"][UP].update(planes=1), f"{UP}.*promises"),
        (lambda c: c["tensors"][EMBEDDING].update(rows=10**12), EMBEDDING),
        (lambda c: c["tensors"].pop(UP), "belongs to no entry"),
        (lambda c: c["files"].update({"../x": {"nbytes": 1, "sha256": "0" * 64}}), "plain file name"),
        (lambda c: c["files"].update({"no.json": {"nbytes": 1, "sha256": "0" * 64}}), "no.json is missing"),
        (lambda c: c["files"].pop("delta.safetensors"), "weight files"),
        (lambda c: c["files"]["tokenizer.json"].update(nbytes=3), "tokenizer.json has"),
        (lambda c: c.update(format_version="1"), "format_version"),
        (lambda c: c.update(format_version=0), "format_version"),
    ],
)
def test_configs_that_lie(delta: Path, change: Callable[[dict[str, Any]], object], named: str) -> None:
    edit_config(delta, change)
    with pytest.raises(DeltaFormatError, match=named):
        open_delta(delta)


def test_newer_versions_and_codecs_are_unsupported_not_corrupt(delta: Path) -> None:
    edit_config(delta, lambda c: c.update(format_version=3, unheard_of={}))
    with pytest.raises(UnsupportedFormat, match="version 3"):
        open_delta(delta)
    edit_config(
        delta, lambda c: (c.update(format_version=1), c.pop("unheard_of"), c["tensors"][UP].update(codec="new"))
    )
    with pytest.raises(UnsupportedFormat, match=UP):
        open_delta(delta)


def test_another_base_and_shapes_that_do_not_fit(base: Path, delta: Path) -> None:
    with pytest.raises(BaseMismatch, match="made from the base"):
        open_delta(delta, expected_base_sha256="0" * 64)
    shapes = {name: Checkpoint(base).shape(name) for name in Checkpoint(base).names}
    for wrong in ({k: v for k, v in shapes.items() if k != UP}, {**shapes, UP: (88, 64)}):
        with pytest.raises(BaseMismatch, match=UP):
            open_delta(delta, base_shapes=wrong)


def test_vocabulary_must_fit_the_overrides_and_be_complete(base: Path, delta: Path) -> None:
    edit_config(delta, lambda c: c["config_overrides"].update(vocab_size=300))
    with pytest.raises(DeltaFormatError, match="vocab_size is 300"):
        open_for(Checkpoint(base), delta)
    edit_config(delta, lambda c: c["config_overrides"].update(vocab_size=259))
    poke(delta, f"{EMBEDDING}.index", torch.tensor([3], dtype=torch.int32))
    with pytest.raises(DeltaFormatError, match="rows beyond the base"):
        open_for(Checkpoint(base), delta)


@pytest.mark.parametrize("row", [-1, 259, 2**31 - 1])
def test_row_numbers_stay_inside(delta: Path, row: int) -> None:
    poke(delta, f"{EMBEDDING}.index", torch.tensor([row], dtype=torch.int32))
    with pytest.raises(DeltaFormatError, match="ascending row numbers"):
        open_delta(delta)


def poke(delta: Path, part: str, value: torch.Tensor) -> None:
    """Overwrite one part's bytes."""
    entry_name, _, leaf = part.rpartition(".")
    opened = open_delta(delta)
    file, extent = opened.extent(opened.config.tensors[entry_name], leaf)
    with (delta / file).open("r+b") as stream:
        stream.seek(extent.start)
        stream.write(value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())


def test_verify_finds_flipped_bits_and_values_that_are_not_finite(base: Path, delta: Path) -> None:
    verify(base, delta)
    poke(delta, f"{UP}.scale", torch.tensor([float("nan"), 1.0]))
    with pytest.raises(DeltaFormatError, match=r"delta\.safetensors: its sha256"):
        verify(base, delta)
    from bitdelta_core.delta.writer import sha256_of

    digest = sha256_of(delta / "delta.safetensors")
    edit_config(delta, lambda c: c["files"]["delta.safetensors"].update(sha256=digest))
    with pytest.raises(DeltaFormatError, match=rf"{UP}\.scale.*finite"):
        verify(base, delta)


def test_index_must_say_what_the_files_hold(sharded: Path, tmp_path: Path) -> None:
    delta = Path(shutil.copytree(sharded, tmp_path / "delta"))
    file = delta / "delta.safetensors.index.json"
    text = file.read_text()
    file.write_text(text.replace("00001-of", "00002-of", 1))
    with pytest.raises(DeltaFormatError, match="weight_map"):
        open_delta(delta)
    file.write_text(text)
    edit_config(
        delta, lambda c: c["files"].pop(f"delta-00002-of-{len(list(delta.glob('*.safetensors'))):05d}.safetensors")
    )
    with pytest.raises(DeltaFormatError, match="weight files"):
        open_delta(delta)


def test_an_enormous_config_is_not_read(delta: Path) -> None:
    with (delta / "delta_config.json").open("r+b") as stream:
        stream.truncate(2**40)  # a sparse file: it takes no disk, and reading it would take a terabyte
    with pytest.raises(DeltaFormatError, match="larger than"):
        open_delta(delta)


def test_missing_directory_and_files(tmp_path: Path, delta: Path) -> None:
    with pytest.raises(DeltaFormatError, match=r"delta_config\.json"):
        open_delta(tmp_path / "nowhere")
    (delta / "delta.safetensors").unlink()
    with pytest.raises(DeltaFormatError, match=r"delta\.safetensors is missing"):
        open_delta(delta)
