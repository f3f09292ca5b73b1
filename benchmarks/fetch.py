"""How fast a blob becomes a verified file: ours, against boto3's download_file and a plain copy, in one run.

    python benchmarks/fetch.py [--mib 256] [--repeats 5] [--out benchmarks/results/fetch.jsonl]

Servers: a local directory, and Swift's S3 API on this machine (so client and server share the cores: compare within
a run, not across machines). Ours ends with a sha256, the others do not; `cpu_s` is the client's, per GiB. Rounds
alternate between the ways, the first round is not counted, the median is reported. Every file is compared with the
original.
"""

from __future__ import annotations

import argparse
import datetime
import filecmp
import json
import os
import platform
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import boto3
from boto3.s3.transfer import TransferConfig
from revision import commit

from storage import DiskCache, LocalStore, Repository
from storage.base import BlobStore
from storage.catalog import Catalog
from storage.fetch import fetch_blob
from storage.manifest import Manifest
from storage.s3 import S3Config, S3Store
from tests.contract.swift_server import running

BOTO = TransferConfig(preferred_transfer_client="classic", multipart_chunksize=16 << 20, max_concurrency=8)
Way = Callable[[Path], Path]
"""Makes a file, at the given path or at one of its own, and says where."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "fetch.jsonl")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        (root / "delta").mkdir()
        (root / "delta" / "blob").write_bytes(os.urandom(options.mib << 20))
        rows = [*local(root, options.repeats), *swift(root, options.repeats)]
    with options.out.open("a") as file:
        for row in rows:
            file.write(json.dumps(context() | {"mib": options.mib, "repeats": options.repeats} | row) + "\n")
            print(
                f"{row['store']:6} {row['way']:24} {row['mib_per_s']:8.0f} MiB/s {row['cpu_s_per_gib']:6.2f} CPU-s/GiB"
            )


def local(root: Path, repeats: int) -> list[dict[str, Any]]:
    store = LocalStore(root / "store")
    manifest = Catalog(store).publish(root / "delta", "bench/local", base_sha256="0" * 64)
    copy = store.root / manifest.files[0].key
    ways, evict = ours(store, manifest, root)
    ways["shutil.copyfile"] = lambda out: Path(shutil.copyfile(copy, out))
    return measure("local", root, repeats, evict, ways)


def swift(root: Path, repeats: int) -> list[dict[str, Any]]:
    (root / "swift").mkdir()
    with running(root / "swift") as server:
        session = boto3.Session(server.access_key, server.secret_key)
        config = S3Config(endpoint_url=server.endpoint_url)
        client = config.client(session)
        client.create_bucket(Bucket="bench")
        store = S3Store("bench", config=config, session=session)
        manifest = Catalog(store).publish(root / "delta", "bench/swift", base_sha256="0" * 64)
        ways, evict = ours(store, manifest, root)

        def download_file(out: Path) -> Path:
            client.download_file("bench", manifest.files[0].key, str(out), Config=BOTO)
            return out

        ways["boto3 download_file"] = download_file
        return measure("swift", root, repeats, evict, ways)


def ours(store: BlobStore, manifest: Manifest, root: Path) -> tuple[dict[str, Way], Callable[[], object]]:
    """The fetcher alone, and the whole path through the disk cache (reserve, fsync, rename, link); what empties it."""
    entry = manifest.files[0]
    repository = Repository(store, DiskCache(root / f"cache-{manifest.name}", 2 * entry.nbytes))

    def fetch(out: Path) -> Path:
        with out.open("wb+") as file:
            assert fetch_blob(store, entry.key, entry.nbytes, file.fileno()) == entry.sha256
        return out

    def cached(out: Path) -> Path:
        return repository.fetch(manifest) / entry.path

    ways: dict[str, Way] = {"fetch_blob (hashed)": fetch, "Repository (hash, fsync)": cached}
    return ways, lambda: repository.cache.evict(manifest)


def measure(
    store: str, root: Path, repeats: int, evict: Callable[[], object], ways: dict[str, Way]
) -> list[dict[str, Any]]:
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for _ in range(repeats + 1):
        for name, way in ways.items():
            cpu, began = time.process_time(), time.perf_counter()
            made = way(root / "out")
            times[name].append((time.perf_counter() - began, time.process_time() - cpu))
            assert filecmp.cmp(made, root / "delta" / "blob", shallow=False)
            (root / "out").unlink(missing_ok=True)
            evict()
    mib = (root / "delta" / "blob").stat().st_size / (1 << 20)
    return [
        {
            "store": store,
            "way": name,
            "mib_per_s": round(mib / statistics.median(wall for wall, _ in taken[1:]), 1),
            "cpu_s_per_gib": round(statistics.median(cpu for _, cpu in taken[1:]) * 1024 / mib, 3),
            "walls_s": [round(wall, 4) for wall, _ in taken[1:]],
        }
        for name, taken in times.items()
    ]


def context() -> dict[str, Any]:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "commit": commit(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "cmd": " ".join(["python", "benchmarks/fetch.py", *sys.argv[1:]]),
        "machine": {"cores": os.cpu_count(), "ram_gib": round(memory / (1 << 30)), "arch": platform.machine()},
        "load_before": round(os.getloadavg()[0], 1),
        "python": platform.python_version(),
        "boto3": boto3.__version__,
    }


if __name__ == "__main__":
    main()
