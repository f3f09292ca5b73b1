"""What `/v1/models` says of the base and of each variant."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

from deployments.calls import ModelInfo
from deployments.openai_responses import ModelCard, ModelList
from storage.manifest import Manifest

OWNER_OF_BASE = "bitdelta"


def model_list(info: ModelInfo, manifests: Sequence[Manifest], context_lens: Sequence[int]) -> ModelList:
    """The base first, then the variants by their bare names."""
    pairs = zip(manifests, context_lens, strict=True)
    variants = (variant(info, f"{m.owner}/{m.name}", m, context_len) for m, context_len in pairs)
    return ModelList(object="list", data=[base(info), *variants])


def base(info: ModelInfo) -> ModelCard:
    return ModelCard(
        id=info.base_name,
        object="model",
        created=0,
        owned_by=OWNER_OF_BASE,
        root=info.base_name,
        parent=None,
        max_model_len=info.max_model_len,
    )


def variant(info: ModelInfo, name: str, manifest: Manifest, context_len: int) -> ModelCard:
    created = int(datetime.fromisoformat(manifest.created_at).timestamp()) if manifest.created_at else 0
    return ModelCard(
        id=name,
        object="model",
        created=created,
        owned_by=manifest.owner,
        root=manifest.model_id,
        parent=info.base_name,
        max_model_len=context_len,
    )
