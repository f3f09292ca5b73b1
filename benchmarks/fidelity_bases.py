"""Quantised bases under deltas that were made against the original base, as in BitDelta's section 4.3.

The linears of the base are rounded in groups of 128 with a 16-bit scale and a zero point; all else stays as it is.
"""

from __future__ import annotations

import argparse

import torch
from baselines_grid import gptq, round_to_nearest
from fidelity_ways import moments_of

from bitdelta_core.checkpoint import Checkpoint
from bitdelta_core.delta.format import EMBEDDING, HEAD

METHODS = {"8": "int8", "4": "int4", "gptq4": "int4, GPTQ"}
"""--base-bits -> how results name it. Without GPTQ: round-to-nearest."""


def shifts(base: Checkpoint, method: str, args: argparse.Namespace) -> dict[str, torch.Tensor]:
    """Linear -> what quantising the base adds to its weights, fp32 on the device."""
    names = [name for name in base.names if len(base.shape(name)) == 2 and name not in (EMBEDDING, HEAD)]
    moments = moments_of(base, names, args) if method == "gptq4" else {}
    found = {}
    for name in names:
        weight = base.get(name).to(args.device).float()
        bits = torch.full((weight.shape[0],), 8 if method == "8" else 4, device=weight.device)
        codes = gptq(weight, moments[name], bits) if name in moments else round_to_nearest(weight, bits)
        found[name] = codes.values() - weight
    return found
