"""Compressing a fine-tune: plan, then stream parameter by parameter from memory-mapped files, then make it visible.

Memory does not grow with depth: one parameter is in memory at a time. An interrupted run goes on where it stopped.
Not covered: a base by Hub name; download it first.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from bitdelta_core.checkpoint import Checkpoint
from bitdelta_core.delta import dropout, lora
from bitdelta_core.delta.calibration import Batches, read_calibration
from bitdelta_core.delta.config import DeltaConfig
from bitdelta_core.delta.device import chosen_device
from bitdelta_core.delta.distill import DistillOptions, distil, prepare, tokenise
from bitdelta_core.delta.pairing import Pairing
from bitdelta_core.delta.planning import CompressOptions, FineTune, Source, plan_adapter, plan_finetune
from bitdelta_core.delta.writer import SHARD_BYTES, DeltaWriter
from bitdelta_core.errors import InvalidRequest
from bitdelta_core.version import VERSION

Progress = Callable[[int, int, str], None]
"""Called with (parameters done, parameters in all, name of the next one)."""


def no_progress(done: int, total: int, name: str) -> None:
    """Report nothing."""


def compress(
    base_path: Path,
    finetune_path: Path,
    out: Path,
    options: CompressOptions | None = None,
    *,
    distillation: DistillOptions | None = None,
    base_name: str | None = None,
    revision: str | None = None,
    shard_bytes: int = SHARD_BYTES,
    progress: Progress = no_progress,
    device: str | None = None,
) -> Path:
    """Write the delta of a fine-tune (a Hugging Face checkpoint, or a PEFT LoRA adapter) against its base to `out`.

    `distillation` None leaves the scales at their closed-form values.
    `base_name` and `revision` are recorded for readers; by default the base directory's own name.
    `device`: "cpu" or "cuda"; None: a GPU where there is one.

    Raises:
        CheckpointError: a directory cannot be read, or the two do not belong together.
        InvalidRequest: `out` exists or cannot be written, the calibration text cannot be used, or an option is out of
            range or does not apply to an adapter, or there is no such device.
    """
    used = chosen_device(device)
    base = Checkpoint(base_path)
    source = plan(base, finetune_path, _with_group(base, finetune_path, options))
    text = _calibration(source, distillation)
    batches = tokenise(base, Checkpoint(finetune_path), text, distillation) if distillation is not None else None
    config = delta_config(base, source, base_name=base_name, revision=revision)
    if distillation is not None:
        described = {**distillation.provenance(), "calibration_sha256": hashlib.sha256(text).hexdigest()}
        config = replace(config, provenance={**config.provenance, "distillation": described})
    writer = DeltaWriter(
        out, source.entries, fingerprint=hashlib.sha256(config.to_json()).hexdigest(), shard_bytes=shard_bytes
    )
    stream(replace(source, device=used) if isinstance(source, FineTune) else source, writer, progress)
    if distillation is not None and batches is not None:
        losses = _distill(base, Checkpoint(finetune_path), config, writer, batches, distillation, progress, used)
        described = {**config.provenance["distillation"], **dict(sorted(losses.items()))}
        config = replace(config, provenance={**config.provenance, "distillation": described})
    return writer.finish(config, source.sidecars)


def plan(base: Checkpoint, finetune_path: Path, options: CompressOptions | None) -> Source:
    """Plan a fine-tune of either kind. `options` None: the defaults."""
    if not lora.is_adapter(finetune_path):
        return plan_finetune(base, Checkpoint(finetune_path), options or CompressOptions())
    if options is not None:
        raise InvalidRequest(
            f"{finetune_path} is a PEFT adapter: it is taken as it is (codec lora), without further options",
            param="codec",
        )
    return plan_adapter(base, lora.Adapter(finetune_path))


def delta_config(
    base: Checkpoint, source: Source, *, base_name: str | None = None, revision: str | None = None
) -> DeltaConfig:
    """delta_config.json of a planned delta, its `files` still to come."""
    return DeltaConfig(
        base_sha256=base.sha256(),
        base_model_name_or_path=base_name or base.path.resolve().name,
        revision=revision,
        codec=source.codec,
        config_overrides=source.overrides,
        tensors={entry.name: entry for entry in source.entries},
        files={},
        provenance={"writer": f"bitdelta {VERSION}", **source.provenance},
    )


def stream(source: Source, writer: DeltaWriter, progress: Progress = no_progress) -> None:
    """Encode and store every planned parameter that the writer does not have yet."""
    for i, entry in enumerate(source.entries):
        progress(i, len(source.entries), entry.name)
        if entry.name not in writer.done:
            writer.put(entry, source.encode(entry))
    progress(len(source.entries), len(source.entries), "")


def _with_group(base: Checkpoint, finetune_path: Path, options: CompressOptions | None) -> CompressOptions | None:
    """`options` with the group size of its dropout chosen, where that is left open."""
    if options is None or options.dropout is None or options.dropout.group is not None:
        return options
    options.check()
    if lora.is_adapter(finetune_path):
        return options
    pairing = Pairing(base, Checkpoint(finetune_path))
    pairing.check()
    given = DistillOptions(
        batch=dropout.TEXTS, length=dropout.LENGTH, calibration=options.dropout.calibration, seed=options.dropout.seed
    )
    batches = tokenise(base, pairing.fine, read_calibration(given.calibration), given)
    return replace(options, dropout=dropout.choose_group(pairing, options.dropout, batches))


def _calibration(source: Source, options: DistillOptions | None) -> bytes:
    if options is None:
        return b""
    options.check()
    if source.codec != "bitdelta":
        raise InvalidRequest(f"codec {source.codec} has no scales to distil", param="distill")
    return read_calibration(options.calibration)


def _distill(
    base: Checkpoint,
    fine: Checkpoint,
    config: DeltaConfig,
    writer: DeltaWriter,
    batches: Batches,
    options: DistillOptions,
    progress: Progress,
    device: torch.device,
) -> dict[str, float]:
    """Train the scales and put them in place of the first ones; returns the losses. A resumed run trains only once."""
    if not any(entry.codec == "bitdelta" for entry in config.tensors.values()):
        return {}
    saved = writer.load_trained()
    if saved is None:
        run = prepare(base, fine, config, writer, batches, device)
        losses = distil(run, options, lambda step: progress(step, options.steps, "distillation"))
        saved = run.trained(), losses
        writer.save_trained(*saved)
    parts, losses = saved
    writer.overwrite(parts)
    return losses
