"""Programmatic dependent launch: a kernel starts while the one before it in the stream still runs.

What a step's kernels hide that way is each other's launch, and the first requests for weights, which depend on nothing
that the kernel before writes. The rules, on chips of capability 9.0 and later:

- Every kernel of a step calls `gdc_wait` before it touches anything but weights, device tables and the step's own
  rows. It returns once the kernel before has finished and its writes are seen; as that one waited too, so has every
  earlier one.
- The first kernel of a step is launched plainly, after all that came before it: copies to the slab, and the tables that
  say where variants lie, are complete for the whole step, and so are the step's rows.
- All let the next kernel start at once. Linears have no more programs than run at a time, so what starts early can take
  nothing but the room that they leave: where that is enough for a small kernel, it is there when the linear ends, and
  programs of the linear after it copy their first weights as programs of this one end (`delta_linear/gluon_ring.py`).
- Whoever does neither (cuBLAS, copies) may stand anywhere: it starts after, and is finished before.
"""

from __future__ import annotations

from typing import Any

import torch
from triton.runtime import driver


def early(tensor: torch.Tensor) -> bool:
    """Whether kernels on this tensor may start before their predecessor has ended."""
    if tensor.is_cpu:
        return False
    target: Any = driver.active.get_current_target()
    return target.backend == "cuda" and int(target.arch) >= 90


def options(pdl: bool) -> dict[str, bool]:
    """For a kernel's launch, beside its constant PDL."""
    return {"launch_pdl": True} if pdl else {}
