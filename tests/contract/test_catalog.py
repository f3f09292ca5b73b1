"""The catalog over every store: publishing, racing, interrupting, removing, collecting."""

from __future__ import annotations

import hashlib
import io
import os
import random
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from storage import Catalog, Conflict, CorruptBlob, InvalidName, InvalidSource, NotFound, StoreUnavailable
from storage.base import BlobStore, Body
from storage.download import download

BASE = "ab" * 32


@pytest.fixture
def catalog(store: BlobStore) -> Catalog:
    if store.settle_s:
        store.settle_s = 0.01  # nobody races in most of these tests
    return Catalog(store)


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., Path]:
    """A directory with a large and a small file and one in a folder; equal for equal seeds."""

    def make(seed: int, *, nbytes: int = 5000) -> Path:
        rng = random.Random(seed)
        directory = tmp_path / f"delta-{seed}"
        (directory / "tokenizer").mkdir(parents=True, exist_ok=True)
        (directory / "delta.safetensors").write_bytes(rng.randbytes(nbytes))
        (directory / "delta_config.json").write_text(f'{{"seed": {seed}}}')
        (directory / "tokenizer" / "vocab.txt").write_text("the same in all")
        return directory

    return make


def contents(directory: Path) -> dict[str, bytes]:
    return {str(f.relative_to(directory)): f.read_bytes() for f in directory.rglob("*") if f.is_file()}


class Breaking:
    """A store whose connection is cut after `calls` writes."""

    def __init__(self, store: BlobStore, calls: int) -> None:
        self._store, self._calls = store, calls

    def __getattr__(self, name: str):
        if name in ("put", "put_new", "touch"):
            self._calls -= 1
            if self._calls < 0:
                raise StoreUnavailable("cut")
        return getattr(self._store, name)


class TestCatalog:
    def test_round_trip(self, catalog: Catalog, make: Callable[..., Path], tmp_path: Path) -> None:
        seen: list[tuple[int, int]] = []
        manifest = catalog.publish(
            make(1),
            "acme/support",
            base_sha256=BASE,
            base_model="base",
            metadata={"codec": "bitdelta"},
            on_progress=lambda done, total: seen.append((done, total)),
        )
        assert manifest.model_id == "acme/support@1"
        assert seen[-1] == (manifest.nbytes, manifest.nbytes)
        assert catalog.resolve("acme/support") == manifest
        download(catalog.store, manifest, tmp_path / "out")
        assert contents(tmp_path / "out") == contents(make(1))

    def test_versions_and_aliases(self, catalog: Catalog, make: Callable[..., Path]) -> None:
        one, two = (catalog.publish(make(seed), "acme/x", base_sha256=BASE) for seed in (1, 2))
        assert (one.version, two.version) == (1, 2)
        assert one.delta_sha256 != two.delta_sha256
        assert catalog.resolve("acme/x") == two
        catalog.set_alias("acme/x@1", "stable")
        assert catalog.resolve("acme/x:stable") == one
        catalog.set_alias("acme/x@2", "stable")
        assert catalog.resolve("acme/x:stable") == two
        catalog.set_alias("acme/x@1", "latest")
        assert catalog.resolve("acme/x") == one
        (info,) = catalog.list()
        assert (info.path, info.versions, dict(info.aliases)) == ("acme/x", (1, 2), {"stable": 2, "latest": 1})
        assert info.default_version == 1
        catalog.remove("acme/x:latest")
        assert catalog.resolve("acme/x") == two

    def test_names_do_not_bleed_into_each_other(self, catalog: Catalog, make: Callable[..., Path]) -> None:
        """One variant is never answered with another's files, however alike the names."""
        names = ["acme/x", "acme/x-2", "acm/e-x", "acme-x/x"]
        made = {name: catalog.publish(make(i), name, base_sha256=BASE) for i, name in enumerate(names)}
        for name in names:
            assert catalog.resolve(name) == made[name]
        assert [info.path for info in catalog.list()] == sorted(names)

    def test_a_manifest_in_the_wrong_place_is_refused(self, catalog: Catalog, make: Callable[..., Path]) -> None:
        catalog.publish(make(1), "acme/x", base_sha256=BASE)
        raw = catalog.store.read("variants/acme/x/versions/000001.json")
        catalog.store.put_new("variants/acme/y/versions/000001.json", raw)
        with pytest.raises(CorruptBlob, match="holds the manifest of acme/x@1"):
            catalog.resolve("acme/y")

    def test_what_is_there_is_not_sent_again(self, catalog: Catalog, make: Callable[..., Path]) -> None:
        catalog.publish(make(1), "acme/x", base_sha256=BASE)
        puts: list[str] = []

        class Counting:
            def __getattr__(self, name: str):
                return getattr(catalog.store, name)

            def put(self, key: str, body: Body, nbytes: int) -> None:
                puts.append(key)
                catalog.store.put(key, body, nbytes)

        again = Catalog(Counting()).publish(make(1), "acme/y", base_sha256=BASE)  # type: ignore[arg-type]
        assert puts == []
        assert again.delta_sha256 == catalog.resolve("acme/x").delta_sha256

    @pytest.mark.parametrize("calls", [0, 1, 3])
    def test_an_interrupted_push_shows_nothing(self, catalog: Catalog, make: Callable[..., Path], calls: int) -> None:
        """Three blobs, then the manifest: cut before each."""
        with pytest.raises(StoreUnavailable):
            Catalog(Breaking(catalog.store, calls)).publish(make(1), "acme/x", base_sha256=BASE)  # type: ignore[arg-type]
        assert catalog.list() == []
        with pytest.raises(NotFound):
            catalog.resolve("acme/x")
        assert catalog.publish(make(1), "acme/x", base_sha256=BASE).version == 1

    def test_racing_pushes_get_distinct_consecutive_versions(self, catalog: Catalog, make: Callable[..., Path]) -> None:
        if catalog.store.settle_s:
            catalog.store.settle_s = 1.0
        directories = [make(seed, nbytes=100) for seed in range(4)]
        with ThreadPoolExecutor(4) as pool:
            made = list(pool.map(lambda d: catalog.publish(d, "acme/x", base_sha256=BASE), directories))
        assert sorted(manifest.version for manifest in made) == [1, 2, 3, 4]
        for manifest in made:
            assert catalog.resolve(manifest.model_id) == manifest

    def test_a_retried_request_that_had_succeeded_is_not_a_lost_race(
        self, catalog: Catalog, make: Callable[..., Path]
    ) -> None:
        class AnswersLost:
            def __getattr__(self, name: str):
                return getattr(catalog.store, name)

            def put_new(self, key: str, body: bytes) -> bool:
                catalog.store.put_new(key, body)
                return catalog.store.put_new(key, body)

        assert Catalog(AnswersLost()).publish(make(1), "acme/x", base_sha256=BASE).version == 1  # type: ignore[arg-type]
        assert catalog.list()[0].versions == (1,)

    def test_two_winners_of_one_number_do_not_both_keep_it(self, catalog: Catalog, make: Callable[..., Path]) -> None:
        """A store that checks and then writes: the other's manifest replaces ours after we were told that we won."""
        directories = [make(1), make(2)]

        class Overwriting:
            def __getattr__(self, name: str):
                return getattr(catalog.store, name)

            def put_new(self, key: str, body: bytes) -> bool:
                if key.endswith("000001.json"):
                    other = catalog.publish(directories[1], "acme/x", base_sha256=BASE)
                    assert other.version == 1
                    return True
                return catalog.store.put_new(key, body)

        ours = Catalog(Overwriting()).publish(directories[0], "acme/x", base_sha256=BASE)  # type: ignore[arg-type]
        assert ours.version == 2
        assert catalog.resolve("acme/x@2") == ours

    def test_removed_numbers_stay_taken(self, catalog: Catalog, make: Callable[..., Path]) -> None:
        for seed in (1, 2):
            catalog.publish(make(seed), "acme/x", base_sha256=BASE)
        assert catalog.remove("acme/x@2") == ["acme/x@2"]
        with pytest.raises(NotFound, match="removed"):
            catalog.resolve("acme/x@2")
        assert catalog.resolve("acme/x").version == 1
        assert catalog.publish(make(3), "acme/x", base_sha256=BASE).version == 3
        assert catalog.remove("acme/x") == ["acme/x@1", "acme/x@3"]
        assert catalog.list() == []
        with pytest.raises(NotFound):
            catalog.resolve("acme/x")
        assert catalog.publish(make(4), "acme/x", base_sha256=BASE).version == 4

    def test_an_aliased_version_is_not_removed(self, catalog: Catalog, make: Callable[..., Path]) -> None:
        catalog.publish(make(1), "acme/x", base_sha256=BASE)
        catalog.set_alias("acme/x@1", "stable")
        with pytest.raises(Conflict, match="stable"):
            catalog.remove("acme/x@1")
        assert catalog.resolve("acme/x:stable").version == 1

    def test_gc_keeps_what_is_referred_to_and_what_is_young(self, catalog: Catalog, make: Callable[..., Path]) -> None:
        later = Catalog(catalog.store, clock=lambda: time.time() + 3600)
        kept = catalog.publish(make(1), "acme/x", base_sha256=BASE)
        gone = catalog.publish(make(2), "acme/x", base_sha256=BASE)
        assert later.gc(grace_s=60).deleted == 0
        catalog.remove("acme/x@2")
        assert (report := later.gc(grace_s=7200)).deleted == 0
        assert report.kept_young == 2  # the third file is shared
        assert later.gc(grace_s=60, dry_run=True).deleted == 2
        report = later.gc(grace_s=60)
        shared = {e.sha256 for e in kept.files}
        assert (report.deleted, report.nbytes) == (2, sum(e.nbytes for e in gone.files if e.sha256 not in shared))
        assert list(catalog.store.list("blobs/")) == sorted(entry.key for entry in kept.files)

    def test_gc_during_a_push_of_old_unreferenced_blobs(self, catalog: Catalog, make: Callable[..., Path]) -> None:
        """A collection between "the store has it" and the manifest takes nothing, even from an earlier, old attempt."""
        directory = make(1)
        with pytest.raises(StoreUnavailable):
            Catalog(Breaking(catalog.store, 3)).publish(directory, "acme/x", base_sha256=BASE)  # type: ignore[arg-type]

        class CollectsFirst:
            def __getattr__(self, name: str):
                return getattr(catalog.store, name)

            def put_new(self, key: str, body: bytes) -> bool:
                assert Catalog(catalog.store).gc(grace_s=30).deleted == 0
                Catalog(catalog.store, clock=lambda: time.time() + 3600).gc(grace_s=0)  # one with a wrong clock
                return catalog.store.put_new(key, body)

        manifest = Catalog(CollectsFirst()).publish(directory, "acme/x", base_sha256=BASE)  # type: ignore[arg-type]
        assert all(catalog.store.size(entry.key) == entry.nbytes for entry in manifest.files)

    def test_gc_refuses_to_guess(self, catalog: Catalog, make: Callable[..., Path]) -> None:
        catalog.publish(make(1), "acme/x", base_sha256=BASE)
        catalog.store.put("variants/acme/y/versions/000001.json", io.BytesIO(b"{}"), 2)
        with pytest.raises(CorruptBlob):
            Catalog(catalog.store, clock=lambda: time.time() + 9e9).gc()
        assert len(list(catalog.store.list("blobs/"))) == 3

    def test_missing_names(self, catalog: Catalog, make: Callable[..., Path]) -> None:
        catalog.publish(make(1), "acme/x", base_sha256=BASE)
        for name in ("acme/y", "acme/x@2", "acme/x:stable", "other/x"):
            with pytest.raises(NotFound, match=name):
                catalog.resolve(name)
            with pytest.raises(NotFound):
                catalog.remove(name)
        with pytest.raises(NotFound):
            catalog.set_alias("acme/x@2", "stable")


class TestRefusals:
    """What does not depend on the store."""

    @pytest.fixture
    def catalog(self) -> Catalog:
        from storage import MemoryStore

        return Catalog(MemoryStore())

    @pytest.mark.parametrize("name", ["acme", "acme/x@1", "acme/x:stable", "../x", "acme/x/y", "", "acme/ x"])
    def test_names(self, catalog: Catalog, make: Callable[..., Path], name: str) -> None:
        with pytest.raises(InvalidName):
            catalog.publish(make(1), name, base_sha256=BASE)

    @pytest.mark.parametrize("alias", ["", "a b", "a/b", "a@1", "a:b", "../a"])
    def test_aliases(self, catalog: Catalog, make: Callable[..., Path], alias: str) -> None:
        catalog.publish(make(1), "acme/x", base_sha256=BASE)
        with pytest.raises(InvalidName):
            catalog.set_alias("acme/x@1", alias)
        with pytest.raises(InvalidName):
            catalog.set_alias("acme/x", "stable")

    @pytest.mark.parametrize("kind", ["file link", "folder link", "pipe", "empty", "missing", "bad name"])
    def test_directories(self, catalog: Catalog, tmp_path: Path, kind: str) -> None:
        directory = tmp_path / "d"
        (tmp_path / "secret").write_text("secret")
        if kind != "missing":
            directory.mkdir()
        match kind:
            case "file link":
                (directory / "a").symlink_to(tmp_path / "secret")
            case "folder link":
                (directory / "a").symlink_to(tmp_path)
            case "pipe":
                os.mkfifo(directory / "a")
            case "bad name":
                (directory / "a\\b").write_text("x")
        with pytest.raises(InvalidSource):
            catalog.publish(directory, "acme/x", base_sha256=BASE)
        assert list(catalog.store.list("")) == []

    def test_base_hash(self, catalog: Catalog, make: Callable[..., Path]) -> None:
        with pytest.raises(CorruptBlob, match="base_sha256"):
            catalog.publish(make(1), "acme/x", base_sha256="abc")

    def test_expected_hashes(self, catalog: Catalog, make: Callable[..., Path]) -> None:
        with pytest.raises(CorruptBlob, match=r"delta\.safetensors has changed"):
            catalog.publish(make(1), "acme/x", base_sha256=BASE, expected_sha256={"delta.safetensors": "0" * 64})

    def test_a_file_that_changes_under_the_upload(self, catalog: Catalog, make: Callable[..., Path]) -> None:
        directory = make(1)

        # Called after the weights are up; the configuration comes after them.
        def change_config(done: int, total: int) -> None:
            config = directory / "delta_config.json"
            config.write_text("x" * config.stat().st_size)

        with pytest.raises(CorruptBlob, match="did the file change"):
            catalog.publish(directory, "acme/x", base_sha256=BASE, on_progress=change_config)
        assert catalog.list() == []
        for key in catalog.store.list("blobs/"):
            assert hashlib.sha256(catalog.store.read(key)).hexdigest() == key.rpartition("/")[2]

    def test_a_file_that_vanishes_under_the_upload(self, catalog: Catalog, make: Callable[..., Path]) -> None:
        directory = make(1)

        def remove(done: int, total: int) -> None:
            (directory / "delta_config.json").unlink(missing_ok=True)

        with pytest.raises(InvalidSource, match=r"delta_config\.json"):
            catalog.publish(directory, "acme/x", base_sha256=BASE, on_progress=remove)
        assert catalog.list() == []
