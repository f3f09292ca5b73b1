"""Loader processes write the bytes that threads write, for every codec, layout and dtype; errors read the same."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from bitdelta_core.engine import delta_loader, loader_processes
from bitdelta_core.engine.delta_loader import DeltaLoader
from bitdelta_core.errors import BaseMismatch, BitDeltaError, CheckpointError, DeltaFormatError, UnsupportedFormat
from tests.engine.engine_zoo import overwrite
from tests.tiny import make_base, make_finetune
from tests.unit.loader_harness import Place, ThreadedProcess, filled, host_buffers, process_loader
from tests.unit.models_harness import FakeDelta, base_state
from tests.unit.test_models_variants import KINDS, TABLES

SIZES = {"hidden_size": 44, "intermediate_size": 96, "attention_bias": True, "mlp_bias": True}
ALL = [*KINDS, *(f"table-{name}" for name in TABLES), "auto"]
LAYOUTS: dict[str, dict[str, Any]] = {
    "device": {"decoder": "device", "dtype": torch.bfloat16, "device": "cuda"},
    "bytes": {"decoder": "torch", "dtype": torch.float32, "device": "cpu"},
    "packed": {"decoder": "torch", "dtype": torch.float16, "device": "cuda"},
}


class Pair:
    """Both ways, over one base."""

    def __init__(self, place: Place) -> None:
        self.place = place
        self.threads = place.threads()
        self.processes, self.beside = process_loader(place)
        self.hosts = host_buffers(self.processes)

    def check(self, delta: Path) -> torch.Tensor:
        ours = filled(self.beside, delta, self.hosts)
        expected = filled(self.threads, delta)
        assert torch.equal(ours, expected)
        return ours


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Place]:
    """By whether the base ties its head."""
    found = {}
    for tied in (False, True):
        work = tmp_path_factory.mktemp("place")
        base = make_base(work / "base", tie_word_embeddings=tied, **SIZES)
        found[tied] = Place(base, work, **LAYOUTS["device"])
    return found


@pytest.fixture(scope="module", params=[*LAYOUTS, "tied"])
def pair(request: pytest.FixtureRequest, places: dict[bool, Place]) -> Iterator[Pair]:
    """One of them with a process that is one."""
    place = places[request.param == "tied"]
    with pytest.MonkeyPatch.context() as patch:
        if request.param != "device":
            patch.setattr(loader_processes, "_launch", ThreadedProcess)
        one = Pair(place if request.param == "tied" else place.laid_out(**LAYOUTS[request.param]))
        yield one
        one.processes.close()


def test_the_same_bytes_for_every_codec(pair: Pair) -> None:
    found = {kind: pair.check(pair.place.deltas[kind]) for kind in ALL}
    assert len({extent.numpy().tobytes() for extent in found.values()}) == len(ALL)
    assert pair.processes.restarts == 0
    pair.processes.check_integrity()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_several_processes_fill_one_extent(
    layout: str, places: dict[bool, Place], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Each its share of what has to be decoded; when one of them finds an error, the others have ended before it is
    told."""
    monkeypatch.setattr(loader_processes, "_launch", ThreadedProcess)
    monkeypatch.setattr(delta_loader, "VALUES_EACH", 500)
    place = places[False].laid_out(**LAYOUTS[layout])
    processes, beside = process_loader(place, 3)
    hosts, shares = host_buffers(processes), []
    call = processes.call

    def counted(name: str, **arguments: Any) -> Any:
        shares.append(arguments.get("share"))
        return call(name, **arguments)

    monkeypatch.setattr(processes, "call", counted)
    threads = place.threads()
    for kind in ("auto", "sign", "auto"):
        shares.clear()
        assert torch.equal(filled(beside, place.deltas[kind], hosts), filled(threads, place.deltas[kind]))
        found = sorted(share.index for share in shares if share is not None)
        assert found == ([0, 1, 2] if kind == "auto" else [0])
    delta = Path(shutil.copytree(place.deltas["auto"], tmp_path / "delta"))
    overwrite(delta / "delta.safetensors", "layers.0.mlp.up_proj.weight.scale", float("nan"))
    assert said(beside, delta, hosts) == said(threads, delta)
    assert processes.restarts == 0
    processes.check_integrity()
    processes.close()


def test_layouts_are_the_same_but_for_what_fills(pair: Pair) -> None:
    for delta in pair.place.deltas.values():
        ours, theirs = (loader.open(delta).layout for loader in (pair.beside, pair.threads))
        assert (ours.nbytes, ours.config) == (theirs.nbytes, theirs.config)
        for name in ("kinds", "vectors", "forms"):
            assert getattr(ours, name, None) == getattr(theirs, name, None)
        if hasattr(ours, "row"):
            assert torch.equal(*(layout.row(512) for layout in (ours, theirs)))  # pyright: ignore[reportAttributeAccessIssue]


def said(loader: DeltaLoader, delta: Path, hosts: Any = None) -> tuple[type, str, Any, Any]:
    with pytest.raises(BitDeltaError) as caught:
        filled(loader, delta, hosts)
    error = caught.value
    return type(error), str(error), getattr(error, "delta", None), error.status


def _poison(delta: Path) -> None:
    overwrite(delta / "delta.safetensors", "layers.0.mlp.up_proj.weight.scale", float("nan"))


def _truncate(delta: Path) -> None:
    file = delta / "delta.safetensors"
    file.write_bytes(file.read_bytes()[:-10])


def _newer(delta: Path) -> None:
    file = delta / "delta_config.json"
    file.write_text(file.read_text().replace('"format_version": 2', '"format_version": 99'))


def _foreign(delta: Path) -> None:
    file = delta / "delta_config.json"
    text = file.read_text()
    at = text.index('"base_sha256": "') + len('"base_sha256": "')
    file.write_text(text[:at] + "0" * 64 + text[at + 64 :])


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (_poison, DeltaFormatError),
        (_truncate, DeltaFormatError),
        (_newer, UnsupportedFormat),
        (_foreign, BaseMismatch),
        (lambda delta: (delta / "delta_config.json").unlink(), DeltaFormatError),
        (lambda delta: (delta / "delta.safetensors").unlink(), DeltaFormatError),
    ],
    ids=["not-finite", "truncated", "newer", "foreign", "no-config", "no-weights"],
)  # fmt: skip
def test_errors_read_the_same(
    pair: Pair, tmp_path: Path, spoil: Callable[[Path], Any], expected: type[BitDeltaError]
) -> None:
    delta = Path(shutil.copytree(pair.place.deltas["sign"], tmp_path / "delta"))
    spoil(delta)
    ours = said(pair.beside, delta, pair.hosts)
    assert ours == said(pair.threads, delta)
    assert ours[0] is expected
    pair.check(pair.place.deltas["sign"])
    assert pair.processes.restarts == 0


def test_the_directory_may_go_once_it_is_open(pair: Pair, tmp_path: Path) -> None:
    expected = filled(pair.threads, pair.place.deltas["sign"])
    delta = Path(shutil.copytree(pair.place.deltas["sign"], tmp_path / "delta"))
    loadable = pair.beside.open(delta)
    shutil.rmtree(delta)
    host = pair.hosts.take(loadable.layout.nbytes)
    host.bytes_.fill_(0xA5)  # as `filled` does: nobody writes between the parts
    loadable.fill(host)
    assert torch.equal(host.bytes_, expected)
    with pytest.raises(AssertionError, match="filled twice"):
        loadable.fill(host)
    pair.hosts.give_back(host)


def test_a_base_that_has_changed_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only what needs the base fails, and says why."""
    monkeypatch.setattr(loader_processes, "_launch", ThreadedProcess)
    place = Place(make_base(tmp_path / "base", num_hidden_layers=1), tmp_path, device="cpu")
    alone, dense = FakeDelta(), FakeDelta()
    for delta, kind in ((alone, "sign"), (dense, "dense")):
        name, generator = "model.layers.0.mlp.up_proj.weight", torch.Generator().manual_seed(1)
        delta.add(base_state(place.base), name, generator, **KINDS[kind])
    paths = {"alone": place.write("alone", alone), "dense": place.write("dense", dense)}
    processes, loader = process_loader(place)
    hosts = host_buffers(processes)
    expected = filled(place.threads(), paths["alone"])
    shutil.copy(make_finetune(place.base, tmp_path / "other") / "model.safetensors", place.base)
    with pytest.raises(CheckpointError, match="changed since"):
        filled(loader, paths["dense"], hosts)
    assert torch.equal(filled(loader, paths["alone"], hosts), expected)
    processes.close()


def test_loads_at_the_same_time_do_not_mix(places: dict[bool, Place]) -> None:
    """Two processes, four threads, buffers that are lent again and again, made and freed: each its own bytes."""
    place = places[False]
    threads, (processes, loader) = place.threads(), process_loader(place, count=2)
    hosts = host_buffers(processes, keep=1)
    expected = {kind: filled(threads, delta) for kind, delta in place.deltas.items()}

    def load(turn: int) -> None:
        kind = [*expected][turn % len(expected)]
        assert torch.equal(filled(loader, place.deltas[kind], hosts), expected[kind]), kind

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(load, range(60)))
    assert hosts.made > 1
    processes.check_integrity()
    assert (processes.restarts, processes._free.qsize()) == (0, 2)
    processes.close()
