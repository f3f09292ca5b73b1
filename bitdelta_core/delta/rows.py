"""Codec `rows`: the rows that changed or that the base does not have, whole. Exact."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from bitdelta_core.delta.spec import TensorEntry

_CHUNK = 1 << 14


def encode(base: torch.Tensor, fine: torch.Tensor, entry: TensorEntry) -> tuple[TensorEntry, dict[str, torch.Tensor]]:
    """Keep the changed rows of `fine` [N', K] against `base` [N, K]; N' may be larger or smaller than N."""
    index = changed_rows(base, fine)
    assert len(index) == entry.rows, f"{entry.name}: {len(index)} rows changed, planned for {entry.rows}"
    return entry, {"index": index.to(torch.int32), "value": fine[index].to(entry.dtype)}


def decode(entry: TensorEntry, parts: Mapping[str, torch.Tensor], base: torch.Tensor) -> torch.Tensor:
    """The fine-tune's matrix, fp32 [N', K]."""
    fine = torch.zeros(entry.shape)
    common = min(entry.shape[0], base.shape[0])
    fine[:common] = base[:common].float()
    fine[parts["index"].long()] = parts["value"].float()
    return fine


def changed_rows(base: torch.Tensor, fine: torch.Tensor) -> torch.Tensor:
    """int64, ascending: rows of `fine` that differ from the base's in value, or that the base does not have."""
    common = min(base.shape[0], fine.shape[0])
    found = [
        start + (base[start:stop] != fine[start:stop]).any(1).nonzero().flatten()
        for start in range(0, common, _CHUNK)
        for stop in [min(start + _CHUNK, common)]
    ]
    return torch.cat([*found, torch.arange(common, fine.shape[0])])
