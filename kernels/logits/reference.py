"""The specification, in float32."""

from __future__ import annotations

import torch

from kernels.device import Partials


def logits(partials: Partials, entry_L: torch.Tensor, vocab_E: torch.Tensor) -> torch.Tensor:
    """float32 [L, V]: the sum of the partials, -inf from vocab[entry] on."""
    total_LV = partials.base_STN.float().sum(0)
    if partials.delta_TN is not None:
        total_LV = torch.where((entry_L > 0)[:, None], total_LV + partials.delta_TN, total_LV)
    ids_V = torch.arange(total_LV.shape[1], device=total_LV.device)
    return total_LV.masked_fill(ids_V >= vocab_E[entry_L.long()][:, None], float("-inf"))
