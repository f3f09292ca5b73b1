"""What `bitdelta push` notes in a manifest, so that a server can describe a variant without fetching it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from storage.manifest import Manifest

if TYPE_CHECKING:
    from bitdelta_core.delta.config import DeltaConfig

_CONTEXT = "context_overrides"
_CONTEXT_FIELDS = ("max_position_embeddings", "rope_parameters", "rope_scaling")


def metadata_of(config: DeltaConfig) -> dict[str, Any]:
    context = {name: config.config_overrides[name] for name in _CONTEXT_FIELDS if name in config.config_overrides}
    return {"codec": config.codec, "delta_format_version": config.format_version, _CONTEXT: context}


def context_overrides(manifest: Manifest) -> Mapping[str, Any]:
    """What the variant changes in config.json that bears on its context. Empty when nothing is noted: the base's."""
    noted = manifest.metadata.get(_CONTEXT)
    return noted if isinstance(noted, dict) else {}
