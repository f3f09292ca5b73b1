"""Where compressing computes: a GPU, or the CPU."""

from __future__ import annotations

import os

import torch

from bitdelta_core.errors import InvalidRequest


def chosen_device(name: str | None) -> torch.device:
    """None: the first GPU where there is one.

    Raises:
        InvalidRequest: there is no such device.
    """
    if name not in (None, "cpu", "cuda"):
        raise InvalidRequest(f"device is cpu or cuda, got {name}", param="device")
    if name == "cuda" and not torch.cuda.is_available():
        raise InvalidRequest("device cuda: torch sees no GPU here", param="device")
    return torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))


def free_bytes(device: torch.device) -> float:
    """Bytes that may be taken: what is free on a GPU, a quarter of what a CPU's machine has."""
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 4
