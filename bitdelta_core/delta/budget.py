"""What a budget of codec `auto` covers: which matrices share it, what is stored beside them, and how it is counted."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from bitdelta_core.delta.config import DeltaConfig
from bitdelta_core.delta.format import EMBEDDING, HEAD
from bitdelta_core.delta.pairing import Pairing, is_tied, parameters
from bitdelta_core.delta.planning import (
    CompressOptions,
    count_parameters,
    differs,
    entry_bytes,
    plan_embedding,
    plan_exact,
)
from bitdelta_core.delta.sidecars import sidecars
from bitdelta_core.delta.spec import TensorEntry
from bitdelta_core.delta.spectral import Coded
from bitdelta_core.errors import InvalidRequest
from bitdelta_core.version import VERSION

_ENTRY_BYTES, _DELTA_BYTES = 1100, 4000
"""Metadata of one entry (its JSON, the headers of its parts) and of a delta, at most."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Budget:
    """Exactly one of the three."""

    LEAST: ClassVar[float] = 0.03
    MOST: ClassVar[float] = 4.0
    bits: float | None = None
    max_bytes: int | None = None
    min_fidelity: float | None = None

    def check(self) -> None:
        given = [name for name in ("bits", "max_bytes", "min_fidelity") if getattr(self, name) is not None]
        if len(given) != 1:
            raise InvalidRequest(
                f"give one of bits, max_bytes and min_fidelity, got {', '.join(given) or 'none'}", param="bits"
            )
        if self.bits is not None and not self.LEAST <= self.bits <= self.MOST:
            raise InvalidRequest(f"bits must be {self.LEAST} to {self.MOST:g}, got {self.bits}", param="bits")
        if self.min_fidelity is not None and not 0 < self.min_fidelity < 1:
            raise InvalidRequest(f"min_fidelity must be between 0 and 1, got {self.min_fidelity}", param="min_fidelity")


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What will be stored, but for the codes themselves."""

    pool: Mapping[str, tuple[int, int]]
    """Matrices that share the budget -> (rows that the base has too, columns)."""
    exact: tuple[TensorEntry, ...]
    """Vectors, and embeddings of which few rows changed."""
    sidecars: Mapping[str, bytes]
    budget_bits: float
    """Of all codes of the pool."""

    @property
    def weights(self) -> int:
        return sum(rows * columns for rows, columns in self.pool.values())

    @classmethod
    def of(cls, pairing: Pairing, budget: Budget) -> Plan:
        """Raises InvalidRequest where the budget does not even cover what must be stored whole."""
        pool: dict[str, tuple[int, int]] = {}
        exact: list[TensorEntry] = []
        whole = 0
        for name in pairing.names:
            base, fine = pairing.base_tensor(name), pairing.fine_tensor(name)
            if differs(base, fine):
                entry = _exact(name, base, fine, budget, tied=is_tied(pairing.fine))
                if entry is None:
                    common = min(base.shape[0], fine.shape[0])
                    pool[name] = common, fine.shape[1]
                    whole += (fine.shape[0] - common) * fine.shape[1] * fine.dtype.itemsize
                else:
                    exact.append(entry)
            pairing.release()
        files = sidecars(pairing.base.path, pairing.fine.path)
        beside = whole + sum(map(entry_bytes, exact)) + sum(map(len, files.values()))
        beside += _ENTRY_BYTES * (len(pool) + len(exact)) + _DELTA_BYTES
        plan = cls(pool=pool, exact=tuple(exact), sidecars=files, budget_bits=0.0)
        bits = _budget_bits(budget, plan.weights, beside)
        return cls(pool=pool, exact=tuple(exact), sidecars=files, budget_bits=bits)

    def rank_limit(self, rows: int, columns: int) -> int:
        """Components to keep of one matrix until the budget is spread: eight times what it would pay for at one bit."""
        bits = self.budget_bits / max(self.weights, 1)
        return min(rows, columns, math.ceil(8 * bits * rows * columns / (rows + columns)) + 8)

    def entry(
        self, pairing: Pairing, name: str, coded: Coded | None, parts: Mapping[str, torch.Tensor]
    ) -> tuple[TensorEntry | None, dict[str, torch.Tensor]]:
        """How one matrix of the pool is stored; None: not at all. parts: of `spectral.parts_of`."""
        fine, rows = pairing.fine_tensor(name), self.pool[name][0]
        shape, dtype = tuple(fine.shape), fine.dtype
        if coded is not None:
            parts = {**parts, "extra": fine[rows:]}
            size = parts["code"].numel()
            fields: dict[str, Any] = {"codec": "spectral", "rank": coded.rank, "rows": rows, "code_bytes": size}
            return TensorEntry(name=name, shape=shape, dtype=dtype, **fields), parts
        base_rows = pairing.base_tensor(name).shape[0]
        if shape[0] == base_rows:
            return None, {}
        added = torch.arange(base_rows, shape[0], dtype=torch.int32)
        entry = TensorEntry(name=name, shape=shape, codec="rows", dtype=dtype, rows=len(added))
        return entry, {"index": added, "value": fine[rows:]}

    def config(
        self, pairing: Pairing, *, base_name: str | None, revision: str | None, provenance: Mapping[str, Any]
    ) -> DeltaConfig:
        """delta_config.json with the entries of the pool still to come."""
        base, fine = pairing.base, pairing.fine
        return DeltaConfig(
            base_sha256=base.sha256(),
            base_model_name_or_path=base_name or base.path.resolve().name,
            revision=revision,
            codec="auto",
            config_overrides=pairing.overrides(),
            tensors={entry.name: entry for entry in self.exact},
            files={},
            provenance={
                "writer": f"bitdelta {VERSION}",
                "finetune": fine.path.resolve().name,
                "finetune_sha256": fine.sha256(),
                "finetune_bytes_16bit": 2 * count_parameters(parameters(fine), fine.shape),
                **provenance,
            },
        )


def _exact(name: str, base: torch.Tensor, fine: torch.Tensor, budget: Budget, *, tied: bool) -> TensorEntry | None:
    """The entry of a parameter outside the pool, or None."""
    if fine.ndim == 1:
        return plan_exact(name, base, fine)
    if name not in (EMBEDDING, HEAD):
        return None
    if name == HEAD and tied:  # the base unties it: it equals the fine-tune's embedding, and has no budget of its own
        return plan_embedding(name, base, fine, CompressOptions())
    rows = plan_exact(name, base, fine)
    assert rows is not None, f"{name} does not differ"
    bits = budget.bits or 1.0
    return rows if rows.codec == "rows" and 8 * entry_bytes(rows) <= bits * fine.numel() else None


def _budget_bits(budget: Budget, weights: int, beside: int) -> float:
    if budget.bits is not None:
        return budget.bits * weights
    if budget.max_bytes is None:
        return Budget.MOST * weights
    if budget.max_bytes <= beside:
        raise InvalidRequest(
            f"max_bytes {budget.max_bytes}: what is stored whole takes up to {beside} bytes already", param="max_bytes"
        )
    return min(8.0 * (budget.max_bytes - beside), Budget.MOST * weights)
