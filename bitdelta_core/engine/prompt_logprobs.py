"""Log-probabilities of prompt tokens, read off a wide pass's logits on the device and sent to the host."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from bitdelta_core.engine.accelerator import Accelerator
from bitdelta_core.engine.pieces import Piece
from bitdelta_core.engine.sampler import LogprobRow

SLICE = 32
"""Rows at a time: bounds the memory that they take beside the logits."""


@dataclass(frozen=True, slots=True)
class PromptPart:
    """Of the prompt tokens that follow some rows. On their way to the host."""

    tokens: Sequence[int]
    slices: Sequence[tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]]
    """Of SLICE rows: log-probabilities, ranks, best ids and their log-probabilities."""

    def rows(self) -> list[LogprobRow]:
        """Once they are there."""
        columns = [[line for part in column for line in part.tolist()] for column in zip(*self.slices, strict=True)]
        return [
            LogprobRow(token, logprob, rank, tuple(zip(ids, values, strict=True)))
            for token, logprob, rank, ids, values in zip(self.tokens, *columns, strict=True)
        ]


def prompt_part(accelerator: Accelerator, piece: Piece, logits_LV: torch.Tensor) -> PromptPart:
    """Launch all that it takes. `logits_LV` are those of the piece's rows."""
    seq = piece.task.work.seq
    following = seq.tokens[piece.start + 1 : piece.stop + 1]
    tokens_L = accelerator.to_device(torch.tensor(following, dtype=torch.int64))
    top = seq.request.params.prompt_logprobs or 0
    slices = []
    for start in range(0, len(following), SLICE):
        tokens_S1 = tokens_L[start : start + SLICE, None]
        logprobs_SV = torch.log_softmax(logits_LV[start : start + tokens_S1.shape[0]], dim=1)
        chosen_S1 = logprobs_SV.gather(1, tokens_S1)
        ranks_S = (logprobs_SV > chosen_S1).sum(dim=1) + 1
        best, ids = torch.topk(logprobs_SV, min(top, logprobs_SV.shape[1]), dim=1)
        found = (chosen_S1.squeeze(1), ranks_S, ids, best)
        slices.append(tuple(accelerator.to_host(tensor) for tensor in found))
    return PromptPart(following, slices)
