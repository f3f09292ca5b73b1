"""Gather the slots, then torch's scaled_dot_product_attention."""

from __future__ import annotations

import torch
from torch.nn.functional import scaled_dot_product_attention

from kernels.paged_attention.plan import AttentionPlan, Chunk, DecodeGroup


def paged_attention(q_THD: torch.Tensor, kv_X2GD: torch.Tensor, plan: AttentionPlan) -> torch.Tensor:
    """As the reference."""
    if len(plan.decode) == 1 and plan.decode[0].rows_S is None:
        return _decode(q_THD, kv_X2GD, plan.decode[0])
    out_TC = q_THD.new_empty((q_THD.shape[0], q_THD.shape[1] * q_THD.shape[2]))
    for group in plan.decode:
        assert group.rows_S is not None, "a group without row numbers must be alone"
        out_TC.index_copy_(0, group.rows_S, _decode(q_THD.index_select(0, group.rows_S), kv_X2GD, group))
    for chunk in plan.chunks:
        out_TC[chunk.start : chunk.stop] = _prefill(q_THD[chunk.start : chunk.stop], kv_X2GD, chunk)
    return out_TC


def _decode(q_SHD: torch.Tensor, kv_X2GD: torch.Tensor, group: DecodeGroup) -> torch.Tensor:
    """The heads that share a K head stand as its query rows."""
    (s, length), (_, _, g, d) = group.slots_SL.shape, kv_X2GD.shape
    kv = kv_X2GD.index_select(0, group.slots_SL.flatten()).view(s, length, 2, g, d)
    keys, values = kv[:, :, 0].transpose(1, 2), kv[:, :, 1].transpose(1, 2)
    out = scaled_dot_product_attention(q_SHD.reshape(s, g, -1, d), keys, values, attn_mask=group.visible_S11L)
    return out.reshape(s, -1)


def _prefill(q_RHD: torch.Tensor, kv_X2GD: torch.Tensor, chunk: Chunk) -> torch.Tensor:
    kv = kv_X2GD.index_select(0, chunk.slots_L)
    out = scaled_dot_product_attention(
        q_RHD.transpose(0, 1)[None],
        kv[:, 0].transpose(0, 1)[None],
        kv[:, 1].transpose(0, 1)[None],
        attn_mask=chunk.visible_RL,
        is_causal=chunk.visible_RL is None,
        enable_gqa=True,
    )
    return out[0].transpose(0, 1).reshape(q_RHD.shape[0], -1)
