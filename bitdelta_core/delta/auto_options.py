"""What can be asked of codec `auto`."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from bitdelta_core.delta.budget import Budget
from bitdelta_core.delta.distill import DistillOptions
from bitdelta_core.errors import InvalidRequest

DISTILL = DistillOptions(steps=400, batch=16, lr=0.02)
"""Training of the factors: lr is in steps of their rounding."""
_BATCH = 4
"""Of calibration text."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AutoOptions:
    """Exactly one of the three budgets."""

    bits: float | None = None
    """Per weight of the changed matrices, embeddings and head included."""
    max_bytes: int | None = None
    """Of the whole delta, every file."""
    min_fidelity: float | None = None
    """1 - KL(fine-tune || variant) / KL(fine-tune || no matrix changed), on calibration text, before training."""
    calibrate: bool = True
    """Weigh errors by what they cost on calibration text as well, not by the difference's own moments alone."""
    texts: int = 192
    length: int = 128
    """Of calibration: sequences, and tokens of each."""
    calibration: Path | None = None
    """None: the text that ships with bitdelta."""
    examples: Path | None = None
    """What the variant is asked, with its answers: .txt or .jsonl, thousands of them. The factors are trained on it."""
    distill: DistillOptions = DISTILL
    """How; of no use without examples. Its own calibration, length and seed are not used."""
    seed: int = 0

    def check(self) -> None:
        """Raise InvalidRequest naming the first option out of range."""
        self.budget.check()
        for name, least in (("texts", 1), ("length", 2)):
            if getattr(self, name) < least:
                raise InvalidRequest(f"{name} must be {least} or more, got {getattr(self, name)}", param=name)
        if not 0 <= self.seed < 2**32:
            raise InvalidRequest(f"seed must be 0 to 2^32 - 1, got {self.seed}", param="seed")
        self.distill.check()
        for name in ("examples", "min_fidelity"):
            if not self.calibrate and getattr(self, name) is not None:
                raise InvalidRequest(f"without calibration text there is no {name}", param=name)

    @property
    def budget(self) -> Budget:
        return Budget(bits=self.bits, max_bytes=self.max_bytes, min_fidelity=self.min_fidelity)

    @property
    def reading(self) -> DistillOptions:
        """How the calibration text is cut up."""
        return DistillOptions(batch=_BATCH, length=self.length, calibration=self.calibration, seed=self.seed)

    @property
    def practising(self) -> DistillOptions:
        """How the examples are cut up."""
        return replace(self.distill, length=self.length, calibration=self.examples, seed=self.seed)

    def described(self) -> dict[str, Any]:
        """For provenance: plain values, and of a path its name."""
        body = {key: value for key, value in asdict(self).items() if value is not None}
        training = {key: getattr(self.distill, key) for key in ("steps", "batch", "lr")}
        named = {"calibration": self.calibration.name if self.calibration else "default"}
        named |= {"examples": self.examples.name} if self.examples else {}
        return {
            **{k: v for k, v in body.items() if k != "distill"},
            **named,
            "training": training if self.examples else None,
        }
