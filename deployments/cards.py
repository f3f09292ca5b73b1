"""What `/v1/models` says of the base and of each variant."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime

from deployments.calls import ModelInfo, Target
from deployments.openai_responses import ModelCard, ModelList
from storage.manifest import Manifest

OWNER_OF_BASE = "bitdelta"


def model_list(info: ModelInfo, manifests: Iterable[Manifest]) -> ModelList:
    """The base first, then the variants by their bare names."""
    variants = (_variant(info, f"{m.owner}/{m.name}", m) for m in manifests)
    return ModelList(object="list", data=[_base(info), *variants])


def card(info: ModelInfo, target: Target) -> ModelCard:
    return _base(info) if target.manifest is None else _variant(info, target.model, target.manifest)


def _base(info: ModelInfo) -> ModelCard:
    return ModelCard(
        id=info.base_name,
        object="model",
        created=0,
        owned_by=OWNER_OF_BASE,
        root=info.base_name,
        parent=None,
        max_model_len=info.max_model_len,
    )


def _variant(info: ModelInfo, name: str, manifest: Manifest) -> ModelCard:
    created = int(datetime.fromisoformat(manifest.created_at).timestamp()) if manifest.created_at else 0
    return ModelCard(
        id=name,
        object="model",
        created=created,
        owned_by=manifest.owner,
        root=manifest.model_id,
        parent=info.base_name,
        max_model_len=info.max_model_len,
    )
