"""Which of the published variants a replica prepares steps for at its start: one of each of the most common codecs."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from bitdelta_core.delta.config import CONFIG_FILE, MAX_CONFIG_BYTES, DeltaConfig, parse_config
from bitdelta_core.engine.expected import MOST
from bitdelta_core.errors import BitDeltaError
from storage import Manifest, NotFound, Repository, StorageError

LOOKED_AT = 256
"""Variants of a larger repository: every so many of its list"""
THREADS = 32
logger = logging.getLogger(__name__)


def common_configs(repository: Repository, base_sha256: str) -> list[DeltaConfig]:
    """Of each codec the largest variant, whose steps cover those of smaller ones. None, and a word in the log, where
    the repository does not answer: a start does not depend on it."""
    try:
        found = [_config(repository, manifest) for manifest in _largest(_manifests(repository, base_sha256))]
    except (StorageError, BitDeltaError) as error:
        logger.warning("no steps are prepared for what is published: %s", error)
        return []
    return [config for config in found if config is not None]


def _manifests(repository: Repository, base_sha256: str) -> list[Manifest]:
    """Of variants of this base, as their bare names mean them."""
    listed = repository.list_variants()
    chosen = listed[:: -(-len(listed) // LOOKED_AT) or 1]
    with ThreadPoolExecutor(THREADS) as pool:
        found = list(pool.map(lambda v: _resolved(repository, f"{v.path}@{v.default_version}"), chosen))
    return [manifest for manifest in found if manifest is not None and manifest.base_sha256 == base_sha256]


def _resolved(repository: Repository, name: str) -> Manifest | None:
    try:
        return repository.resolve(name)
    except NotFound:  # removed since the listing
        return None


def _largest(manifests: Sequence[Manifest]) -> list[Manifest]:
    """Of each of the MOST commonest codecs, the commonest first."""
    by_codec: dict[str, list[Manifest]] = defaultdict(list)
    for manifest in manifests:
        by_codec[str(manifest.metadata.get("codec"))].append(manifest)
    ranked = sorted(by_codec.values(), key=len, reverse=True)[:MOST]
    return [max(group, key=lambda manifest: manifest.nbytes) for group in ranked]


def _config(repository: Repository, manifest: Manifest) -> DeltaConfig | None:
    for entry in manifest.files:
        if entry.path == CONFIG_FILE and entry.nbytes <= MAX_CONFIG_BYTES:
            return parse_config(repository.read(entry), delta=manifest.model_id)
    return None
