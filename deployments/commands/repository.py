"""Commands: push, pull, ls, alias, rm, gc. Results go to stdout, progress to stderr if that is a terminal."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from storage import Catalog, Manifest, VariantInfo

Repo = Annotated[
    str | None,
    typer.Option(
        "--repo",
        help="Path, file:///path or s3://bucket/prefix. Default: $BITDELTA_REPO, else ~/.local/share/bitdelta/repo.",
    ),
]


def register(app: typer.Typer) -> None:
    """Add this module's commands to the `bitdelta` app."""
    for command in (push, pull, alias, rm, gc):
        app.command()(command)
    app.command("ls")(list_variants)


def push(
    directory: Annotated[Path, typer.Argument(help="What `bitdelta compress` wrote.")],
    name: Annotated[str, typer.Argument(help="owner/name")],
    repo: Repo = None,
    alias: Annotated[str | None, typer.Option(help="Also point this alias at the new version.")] = None,
) -> None:
    """Publish a delta as the next version of owner/name, and print that version."""
    from bitdelta_core.delta.format import open_delta
    from deployments.metadata import metadata_of
    from storage import InvalidSource

    if not (directory / "delta_config.json").is_file():
        raise InvalidSource(
            f"{directory} has no delta_config.json; push takes a directory that `bitdelta compress` wrote"
        )
    catalog = _catalog(repo)
    if alias is not None:
        _check_alias(name, alias)
    config = open_delta(directory).config
    with _progress(f"push {name}") as report:
        manifest = catalog.publish(
            directory,
            name,
            base_sha256=config.base_sha256,
            base_model=config.base_model_name_or_path,
            metadata=metadata_of(config),
            expected_sha256={path: entry.sha256 for path, entry in config.files.items()},
            on_progress=report,
        )
    if alias is not None:
        catalog.set_alias(manifest.model_id, alias)
    print(manifest.model_id)


def pull(
    name: Annotated[str, typer.Argument(help="owner/name, owner/name@7 or owner/name:stable")],
    out: Annotated[Path, typer.Argument(help="A directory to create.")],
    repo: Repo = None,
) -> None:
    """Download a version into a new directory."""
    from storage import download

    catalog = _catalog(repo)
    manifest = catalog.resolve(name)
    with _progress(f"pull {manifest.model_id}") as report:
        download(catalog.store, manifest, out, report)
    print(manifest.model_id)


def list_variants(
    repo: Repo = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON array, for programs.")] = False,
) -> None:
    """List variants: what the bare name means, all versions, aliases, size, base."""
    from concurrent.futures import ThreadPoolExecutor

    catalog = _catalog(repo)
    variants = catalog.list()
    with ThreadPoolExecutor(8) as pool:
        manifests = list(pool.map(lambda v: catalog.resolve(f"{v.path}@{v.default_version}"), variants))
    rows = [_row(variant, manifest) for variant, manifest in zip(variants, manifests, strict=True)]
    if as_json:
        print(json.dumps(rows, indent=2))
    elif rows:
        print(_table(rows))
    else:
        print(f"no variants in {catalog.store.uri}", file=sys.stderr)


def alias(
    name: Annotated[str, typer.Argument(help="owner/name@7")],
    alias: Annotated[str, typer.Argument(help="stable; `latest` is what the bare name means")],
    repo: Repo = None,
) -> None:
    """Point an alias at a version. Servers follow within seconds."""
    _catalog(repo).set_alias(name, alias)
    print(f"{name.partition('@')[0]}:{alias} -> {name}")


def rm(
    name: Annotated[str, typer.Argument(help="owner/name@7, owner/name:alias, or owner/name for all of it")],
    repo: Repo = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
    """Remove a version, an alias, or a variant. Version numbers are not given out again; `gc` frees the space."""
    catalog = _catalog(repo)
    if not yes:
        typer.confirm(f"Remove {name} from {catalog.store.uri}?", abort=True, err=True)
    for removed in catalog.remove(name):
        print(f"removed {removed}")


def gc(
    repo: Repo = None,
    grace_hours: Annotated[
        float, typer.Option(min=0, help="Keep what is younger: it may belong to a push under way.")
    ] = 24.0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be deleted.")] = False,
) -> None:
    """Delete files that no version refers to."""
    report = _catalog(repo).gc(grace_s=grace_hours * 3600, dry_run=dry_run)
    verb = "would delete" if dry_run else "deleted"
    print(f"{verb} {report.deleted} files, {_size(report.nbytes)}; kept {report.kept_young} young ones")


def _catalog(repo: str | None) -> Catalog:
    from storage import Catalog, open_store, repository_uri

    return Catalog(open_store(repository_uri(repo)))


def _check_alias(name: str, alias: str) -> None:
    """Before the upload rather than after it."""
    from storage import InvalidName, VariantName

    if VariantName.parse(f"{name}:{alias}").alias != alias:
        raise InvalidName(f"{alias!r} is not an alias")


def _row(variant: VariantInfo, manifest: Manifest) -> dict[str, Any]:
    return {
        "name": variant.path,
        "default_version": variant.default_version,
        "versions": list(variant.versions),
        "aliases": dict(variant.aliases),
        "nbytes": manifest.nbytes,
        "base_model": manifest.base_model,
        "base_sha256": manifest.base_sha256,
        "delta_sha256": manifest.delta_sha256,
        "created_at": manifest.created_at,
    }


def _table(rows: list[dict[str, Any]]) -> str:
    lines = [("NAME", "VERSION", "VERSIONS", "ALIASES", "SIZE", "CREATED", "BASE")]
    for row in rows:
        versions = ",".join(str(version) for version in row["versions"])
        aliases = ",".join(f"{name}={version}" for name, version in sorted(row["aliases"].items())) or "-"
        base = row["base_model"] or row["base_sha256"][:12]
        lines.append(
            (row["name"], str(row["default_version"]), versions, aliases, _size(row["nbytes"]), row["created_at"], base)
        )
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines)


def _size(nbytes: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if nbytes < 1000:
            return f"{nbytes:.4g} {unit}"
        nbytes /= 1000
    return f"{nbytes:.4g} TB"


@contextmanager
def _progress(what: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on a terminal; nothing elsewhere."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (TextColumn(what), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty(), transient=True) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
