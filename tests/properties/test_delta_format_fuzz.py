"""Whatever is done to a valid delta's bytes or fields: only DeltaError escapes, and no large allocation is made."""

from __future__ import annotations

import json
import shutil
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bitdelta_core.checkpoint import Checkpoint
from bitdelta_core.delta.codecs import decode
from bitdelta_core.delta.compress import compress
from bitdelta_core.delta.planning import CompressOptions
from bitdelta_core.delta.restore import open_for
from bitdelta_core.errors import DeltaError
from tests.tiny import make_base, make_finetune

EXAMPLES = settings(
    max_examples=200,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.sampled_from([0, 1, -1, 2**31, 2**62, 2**63, 10**30]),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(max_size=8),
    st.lists(st.integers(-4, 2**66), max_size=4),
    st.dictionaries(st.text(max_size=4), st.integers(), max_size=2),
)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    path = tmp_path_factory.mktemp("fuzz") / "base"
    return Checkpoint(make_base(path, num_hidden_layers=1, hidden_size=24, intermediate_size=20, head_dim=6))


@pytest.fixture(scope="module")
def sound(base: Checkpoint) -> Path:
    root = base.path.parent
    fine = make_finetune(base.path, root / "fine", new_tokens=("<|x|>",))
    return compress(base.path, fine, root / "delta", CompressOptions(scale_layout="row_col", bits=2))


@pytest.fixture(scope="module")
def scratch(sound: Path) -> Path:
    return Path(shutil.copytree(sound, sound.parent / "scratch"))


def attempt(base: Checkpoint, delta: Path) -> None:
    """Open, and where that succeeds decode everything: sound values or DeltaError, within a few megabytes."""
    tracemalloc.start()
    try:
        reader = open_for(base, delta)
        for entry in reader.config.tensors.values():
            assert tuple(decode(reader, entry, base).shape) == entry.shape
    except DeltaError:
        pass
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 8 * 2**20


def restore_files(sound: Path, scratch: Path) -> None:
    for name in ("delta.safetensors", "delta_config.json"):
        shutil.copyfile(sound / name, scratch / name)


@EXAMPLES
@given(data=st.data())
def test_mutated_bytes(base: Checkpoint, sound: Path, scratch: Path, data: st.DataObject) -> None:
    restore_files(sound, scratch)
    file = scratch / data.draw(st.sampled_from(["delta.safetensors", "delta_config.json"]))
    raw = bytearray(file.read_bytes())
    header_end = min(len(raw), 6000)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.one_of(st.integers(0, 7), st.integers(0, header_end - 1), st.integers(0, len(raw) - 1)))
        raw[at] = data.draw(st.integers(0, 255))
    cut = data.draw(st.one_of(st.just(len(raw)), st.integers(0, len(raw))))
    file.write_bytes(bytes(raw[:cut]) + data.draw(st.binary(max_size=16)))
    attempt(base, scratch)


def replace_somewhere(data: st.DataObject, body: Any) -> None:
    """Walk to a random place in a JSON value and put something odd there, or take it away."""
    while True:
        key = data.draw(st.sampled_from(sorted(body) if isinstance(body, dict) else list(range(len(body)))))
        inner = body[key]
        if isinstance(inner, dict | list) and inner and data.draw(st.integers(0, 5)) > 0:
            body = inner
            continue
        if data.draw(st.booleans()) or isinstance(body, list):
            body[key] = data.draw(ODD)
        else:
            del body[key]
        return


@EXAMPLES
@given(data=st.data())
def test_mutated_config_fields(base: Checkpoint, sound: Path, scratch: Path, data: st.DataObject) -> None:
    restore_files(sound, scratch)
    body = json.loads((sound / "delta_config.json").read_text())
    for _ in range(data.draw(st.integers(1, 3))):
        replace_somewhere(data, body)
    (scratch / "delta_config.json").write_text(json.dumps(body))
    attempt(base, scratch)


@EXAMPLES
@given(data=st.data())
def test_mutated_header_fields(base: Checkpoint, sound: Path, scratch: Path, data: st.DataObject) -> None:
    """The config is made to agree with the new size, so that the header itself has to be caught."""
    restore_files(sound, scratch)
    raw = (sound / "delta.safetensors").read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    for _ in range(data.draw(st.integers(1, 3))):
        replace_somewhere(data, header)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    body = json.loads((sound / "delta_config.json").read_text())
    body["files"]["delta.safetensors"]["nbytes"] = 8 + len(text) + len(raw) - 8 - length
    (scratch / "delta.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])
    (scratch / "delta_config.json").write_text(json.dumps(body))
    attempt(base, scratch)


def test_the_unharmed_delta_passes_the_same_attempt(base: Checkpoint, sound: Path) -> None:
    assert len(open_for(base, sound).config.tensors) > 5
    attempt(base, sound)
