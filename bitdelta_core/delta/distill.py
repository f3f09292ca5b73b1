"""Scale distillation: train only the scales, to match the fine-tune's logits (BitDelta, section 3.2).

Loss: mean squared error of all logits at all positions that are not padding. Base, signs, embeddings, head, norms and
biases stay as they are. Both models are in memory: this step, unlike the rest of compressing, needs room for them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bitdelta_core.checkpoint import Checkpoint
from bitdelta_core.delta.calibration import Batches, sequences
from bitdelta_core.delta.codecs import decode_parts
from bitdelta_core.delta.config import DeltaConfig
from bitdelta_core.delta.format import EMBEDDING, HEAD, base_name
from bitdelta_core.delta.pairing import is_tied, parameters
from bitdelta_core.delta.signlinear import SignLinear
from bitdelta_core.delta.writer import DeltaWriter
from bitdelta_core.errors import CheckpointError, InvalidRequest

_MEASURED_BATCHES = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class DistillOptions:
    """The paper's 200 steps of 4 texts of 128 tokens. Its lr of 1e-4 was absolute; ours is relative to each scale."""

    steps: int = 200
    batch: int = 4
    length: int = 128
    lr: float = 0.03
    """Of Adam, at the first step; falls to 0 on a cosine. docs/fidelity.md has what the default rests on."""
    calibration: Path | None = None
    """None: the text that ships with bitdelta."""
    seed: int = 0

    def check(self) -> None:
        """Raise InvalidRequest naming the first option out of range."""
        for name, least in (("steps", 1), ("batch", 1), ("length", 2)):
            if getattr(self, name) < least:
                raise InvalidRequest(f"distill {name} must be {least} or more, got {getattr(self, name)}", param=name)
        if not 0 < self.lr < math.inf:
            raise InvalidRequest(f"distill lr must be above 0, got {self.lr}", param="lr")

    def provenance(self) -> dict[str, Any]:
        body = asdict(self)
        return body | {"calibration": self.calibration.name if self.calibration else "default"}


class Distillation:
    """A student (base + delta) beside its teacher (the fine-tune)."""

    def __init__(self, teacher: nn.Module, student: nn.Module, layers: list[SignLinear], batches: Batches) -> None:
        self.teacher = teacher.eval().requires_grad_(False)
        self.student = student.eval()
        self.layers = layers
        self.batches = batches
        self.scales = [factor for layer in layers for factor in layer.factors.values()]
        trainable = [p for p in student.parameters() if p.requires_grad]
        assert len(trainable) == len(self.scales), "something besides the scales would be trained"

    def loss(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Mean squared error of the logits at unmasked positions. ids, mask: [B, L]."""
        with torch.no_grad():
            wanted = self.teacher(input_ids=ids, attention_mask=mask.long()).logits
        got = self.student(input_ids=ids, attention_mask=mask.long()).logits
        return (got[mask].float() - wanted[mask].float()).square().mean()

    def run(self, options: DistillOptions) -> Iterator[int]:
        """Train; yields the number of steps done after each. Ends early when the loss is not finite any more."""
        optimizer = torch.optim.Adam(self.scales, lr=options.lr, betas=(0.9, 0.999), eps=1e-8)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, options.steps)
        device = self.scales[0].device
        for step, (ids, mask) in zip(range(options.steps), self.batches, strict=False):
            optimizer.zero_grad()
            loss = self.loss(ids.to(device), mask.to(device))
            if not loss.isfinite():
                return
            loss.backward()
            optimizer.step()
            schedule.step()
            yield step + 1

    @torch.no_grad()
    def measure(self) -> float:
        """Mean loss over the first few batches."""
        device = self.scales[0].device
        pairs = zip(range(_MEASURED_BATCHES), self.batches, strict=False)
        return sum(self.loss(ids.to(device), mask.to(device)).item() for _, (ids, mask) in pairs) / _MEASURED_BATCHES

    @torch.no_grad()
    def reset(self) -> None:
        """Back to the scales before training."""
        for scale in self.scales:
            scale.fill_(1.0)

    def trained(self) -> dict[str, torch.Tensor]:
        """The scales as they would be stored."""
        return {name: part for layer in self.layers for name, part in layer.scales().items()}


def distil(run: Distillation, options: DistillOptions, progress: Callable[[int], None]) -> dict[str, float]:
    """Train, and keep what came out if the loss fell, else the scales as they were. Returns the losses.

    Raises:
        CheckpointError: the loss is not finite before any training, so base or fine-tune is broken.
    """
    before = run.measure()
    if not math.isfinite(before):
        raise CheckpointError("the fine-tune's or the base's logits are not finite: there is nothing to distil towards")
    for step in run.run(options):
        progress(step)
    after = run.measure()
    if not after < before:
        run.reset()
        after = before
    return {"loss_before": before, "loss_after": after}


def tokenise(base: Checkpoint, fine: Checkpoint, text: bytes, options: DistillOptions) -> Batches:
    """The calibration text in the variant's tokens.

    Raises:
        CheckpointError: there is no usable tokenizer, or its tokens are not all in the fine-tune's vocabulary.
        InvalidRequest: the text is not what its suffix says, or is empty.
    """
    tokenizer = _tokenizer(fine.path, base.path)
    jsonl = options.calibration is not None and options.calibration.suffix == ".jsonl"
    found = sequences(text, tokenizer, length=options.length, jsonl=jsonl)
    highest, vocabulary = max(map(max, found)), fine.shape(EMBEDDING)[0]
    if highest >= vocabulary:
        raise CheckpointError(f"{fine.path}: its tokenizer gives token {highest}, its embedding has {vocabulary} rows")
    return Batches(found, options.batch, seed=options.seed)


def prepare(
    base: Checkpoint,
    fine: Checkpoint,
    config: DeltaConfig,
    writer: DeltaWriter,
    batches: Batches,
    device: torch.device,
) -> Distillation:
    """Load both models: in bf16 on a GPU, in fp32 on a CPU."""
    from transformers import AutoModelForCausalLM

    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    teacher: Any = AutoModelForCausalLM.from_pretrained(fine.path, dtype=dtype)
    student = _student(base, config, writer, dtype)
    layers = list(_install(student, config, writer))
    return Distillation(teacher.to(device), student.to(device), layers, batches)


def _tokenizer(fine: Path, base: Path) -> Any:
    from transformers import AutoTokenizer

    names = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")
    for path in (fine, base):
        if any((path / name).is_file() for name in names):
            try:
                return AutoTokenizer.from_pretrained(path)
            except (OSError, ValueError, ImportError) as error:
                raise CheckpointError(f"{path}: its tokenizer cannot be loaded: {error}") from error
    raise CheckpointError(f"{fine} has no tokenizer, nor has {base}: distillation needs one, or use --no-distill")


def _student(base: Checkpoint, config: DeltaConfig, writer: DeltaWriter, dtype: torch.dtype) -> nn.Module:
    """The variant's model with the base's weights where sign deltas will go, and every other change decoded."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig

    merged = config.merged_config(base.config)
    tied = merged.get("tie_word_embeddings", is_tied(base))
    names = [name for name in parameters(base) if name != HEAD] + ([] if tied else [HEAD])
    state = {name: _weight(name, base, config, writer).to(dtype) for name in names}
    hf = AutoConfig.for_model(**merged)
    kind: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(hf)]
    model = kind.from_pretrained(None, config=hf, state_dict=state, dtype=dtype)
    return model.requires_grad_(False)


def _weight(name: str, base: Checkpoint, config: DeltaConfig, writer: DeltaWriter) -> torch.Tensor:
    entry = config.tensors.get(name)
    own = base.get(base_name(name, base))
    if entry is None or entry.codec == "bitdelta":
        return own
    return decode_parts(entry, {part: writer.part(entry, part) for part in entry.parts()}, own)


def _install(student: nn.Module, config: DeltaConfig, writer: DeltaWriter) -> Iterator[SignLinear]:
    for entry in config.tensors.values():
        if entry.codec != "bitdelta":
            continue
        path, _, leaf = entry.name.removesuffix(".weight").rpartition(".")
        parent = student.get_submodule(path)
        layer = SignLinear(
            parent.get_submodule(leaf),  # pyright: ignore[reportArgumentType]
            entry,
            {part: writer.part(entry, part) for part in entry.parts()},
        )
        setattr(parent, leaf, layer)
        yield layer
