"""The specification: softmax attention in float32, one row and one head group at a time."""

from __future__ import annotations

import torch

from kernels.paged_attention.plan import AttentionPlan


def paged_attention(q_THD: torch.Tensor, kv_X2GD: torch.Tensor, plan: AttentionPlan) -> torch.Tensor:
    """[T, H * D]"""
    out_THD = torch.empty_like(q_THD)
    for group in plan.decode:
        rows = range(group.slots_SL.shape[0]) if group.rows_S is None else group.rows_S.tolist()
        for s, row in enumerate(rows):
            slots = group.slots_SL[s] if group.visible_S11L is None else group.slots_SL[s][group.visible_S11L[s, 0, 0]]
            out_THD[row] = _attend(q_THD[row], kv_X2GD[slots])
    for chunk in plan.chunks:
        for i, row in enumerate(range(chunk.start, chunk.stop)):
            seen = chunk.slots_L[: i + 1] if chunk.visible_RL is None else chunk.slots_L[chunk.visible_RL[i]]
            out_THD[row] = _attend(q_THD[row], kv_X2GD[seen])
    return out_THD.flatten(1)


def _attend(q_HD: torch.Tensor, kv_L2GD: torch.Tensor) -> torch.Tensor:
    heads, dim = q_HD.shape
    keys, values = kv_L2GD.float().repeat_interleave(heads // kv_L2GD.shape[2], dim=2).unbind(1)
    scores_HL = torch.einsum("hd,lhd->hl", q_HD.float(), keys) * dim**-0.5
    return torch.einsum("hl,lhd->hd", scores_HL.softmax(-1), values).to(q_HD.dtype)
