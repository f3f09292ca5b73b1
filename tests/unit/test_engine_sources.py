"""Fetching: single flight, remembered failures; tokenizers read once; what importing the package costs."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest

import bitdelta_core
from bitdelta_core.engine.sources import DeltaFiles
from bitdelta_core.engine.vocabulary import Vocabularies, read_vocabulary
from bitdelta_core.errors import CheckpointError, DeltaFormatError, DeltaUnavailable, InvalidRequest
from tests.tiny import CHAT_TEMPLATE, make_tokenizer


def enter(files: DeltaFiles, delta: str) -> Path:
    with files.held(delta) as path:
        return path


def test_the_second_waits_for_the_first(tmp_path: Path) -> None:
    """Both are in flight at once, so there is exactly one call."""
    entered, gate, calls = threading.Event(), threading.Event(), []

    @contextmanager
    def source(delta: str) -> Iterator[Path]:
        calls.append(delta)
        entered.set()
        assert gate.wait(20)
        if delta:
            raise OSError("no route")
        yield tmp_path

    files = DeltaFiles(source, retry_s=60)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(enter, files, "aa")
        assert entered.wait(20)
        second = pool.submit(enter, files, "aa")
        gate.set()
        errors = [first.exception(), second.exception()]
    assert all(isinstance(error, DeltaUnavailable) and "no route" in str(error) for error in errors)
    with pytest.raises(DeltaUnavailable, match="no route"):
        enter(files, "aa")
    assert calls == ["aa"], "a broken store is asked again within the retry interval"


def test_a_delta_that_nobody_has() -> None:
    with pytest.raises(DeltaUnavailable, match="add_delta") as caught:
        enter(DeltaFiles(None, retry_s=1), "ff")
    assert caught.value.delta == "ff"


def test_content_decides_the_identity_not_the_place(tmp_path: Path) -> None:
    files = DeltaFiles(None, retry_s=1)
    shas = []
    for name, body in (("a", "one"), ("b", "one"), ("c", "two")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "delta_config.json").write_text(body)
        shas.append(files.add(tmp_path / name))
    assert shas[0] == shas[1] != shas[2]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    path = tmp_path / "base"
    make_tokenizer(path)
    (path / "config.json").write_text('{"model_type": "llama", "eos_token_id": 9}')
    return path


def variant(path: Path, **files: object) -> Path:
    path.mkdir()
    for name, body in files.items():
        (path / f"{name}.json").write_text(json.dumps(body))
    return path


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, {9, 257}),
        ({"generation_config": {"eos_token_id": [4, 5]}}, {4, 5, 257}),
        ({"delta_config": {"config_overrides": {"eos_token_id": 7}}}, {7, 257}),
        ({"generation_config": {}, "delta_config": {}}, {9, 257}),
    ],
)
def test_what_ends_a_sequence(base: Path, tmp_path: Path, files: dict, expected: set[int]) -> None:
    """The variant's generation config, its config, the base's; and always the tokenizer's own."""
    assert read_vocabulary(base, variant(tmp_path / "v", **files)).stop_ids == expected


@pytest.mark.parametrize(
    ("own", "expected"),
    [
        (None, {"temperature": 0.6, "max_tokens": 9}),
        ({"top_k": 20, "do_sample": False, "top_p": None, "num_beams": 4}, {"top_k": 20}),
        ({"eos_token_id": 1}, {}),
    ],
)
def test_sampling_defaults_are_the_variants_or_else_the_bases(
    base: Path, tmp_path: Path, own: dict | None, expected: dict
) -> None:
    (base / "generation_config.json").write_text('{"temperature": 0.6, "max_new_tokens": 9}')
    files: dict[str, object] = {} if own is None else {"generation_config": own}
    assert read_vocabulary(base, variant(tmp_path / "v", **files)).sampling_defaults == expected


def test_a_sampling_default_out_of_range_is_named(base: Path, tmp_path: Path) -> None:
    found = read_vocabulary(base, variant(tmp_path / "v", generation_config={"temperature": -1}))
    with pytest.raises(InvalidRequest, match="temperature"):
        _ = found.sampling_defaults


def test_a_variant_without_a_tokenizer_has_the_bases(base: Path, tmp_path: Path) -> None:
    own = variant(tmp_path / "own")
    make_tokenizer(own, extra=("<|end|>",), chat_template=CHAT_TEMPLATE)
    places: dict[str, Path] = {"own": own, "none": variant(tmp_path / "none")}
    located: list[str] = []

    def held(delta: str) -> nullcontext[Path]:
        located.append(delta)
        return nullcontext(places[delta])

    vocabularies = Vocabularies(base, held)
    assert len(vocabularies.get("own").tokenizer) == len(vocabularies.get(None).tokenizer) + 1
    assert len(vocabularies.get("none").tokenizer) == len(vocabularies.get(None).tokenizer)
    assert vocabularies.get("own") is vocabularies.get("own")
    assert located == ["own", "none"], "read more than once"


def break_tokenizer(path: Path) -> None:
    (path / "tokenizer.json").write_text("{")


def break_stop_ids(path: Path) -> None:
    make_tokenizer(path)
    (path / "generation_config.json").write_text('{"eos_token_id": "</s>"}')


@pytest.mark.parametrize("damage", [break_tokenizer, break_stop_ids])
def test_a_tokenizer_that_cannot_be_read(base: Path, tmp_path: Path, damage: Callable[[Path], None]) -> None:
    broken = variant(tmp_path / "broken")
    damage(broken)
    with pytest.raises(DeltaFormatError, match="tokenizer") as caught:
        Vocabularies(base, lambda delta: nullcontext(broken)).get("aa")
    assert caught.value.delta == "aa"
    (base / "tokenizer.json").unlink()
    (base / "tokenizer_config.json").unlink()
    with pytest.raises(CheckpointError, match="tokenizer"):
        Vocabularies(base, lambda delta: nullcontext(broken)).get(None)


def test_public_names_exist_and_are_sorted() -> None:
    assert bitdelta_core.__all__ == sorted(bitdelta_core.__all__)
    assert all(getattr(bitdelta_core, name).__name__ == name for name in bitdelta_core.__all__)
    with pytest.raises(AttributeError, match="Egnine"):
        _ = bitdelta_core.Egnine


def test_requests_can_be_made_without_importing_torch() -> None:
    code = "import sys, bitdelta_core; bitdelta_core.SamplingParams(n=2).validate(); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
