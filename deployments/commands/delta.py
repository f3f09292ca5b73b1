"""Commands that make and examine deltas: compress, inspect, restore, import, verify."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from bitdelta_core.delta.auto_options import AutoOptions
    from bitdelta_core.delta.distill import DistillOptions
    from bitdelta_core.delta.inspect import Summary
    from bitdelta_core.delta.planning import CompressOptions


class CodecName(StrEnum):
    """--codec"""

    auto = "auto"
    bitdelta = "bitdelta"
    deltadq = "deltadq"
    lora = "lora"
    dense = "dense"


class Scale(StrEnum):
    """--scale"""

    tensor = "tensor"
    row = "row"
    row_col = "row_col"


class EmbeddingCodec(StrEnum):
    """--embeddings"""

    auto = "auto"
    exact = "exact"
    int8 = "int8"
    int4 = "int4"
    int2 = "int2"


class Dtype(StrEnum):
    """--dtype"""

    float32 = "float32"
    float16 = "float16"
    bfloat16 = "bfloat16"


class Device(StrEnum):
    """--device"""

    cpu = "cpu"
    cuda = "cuda"


def register(app: typer.Typer) -> None:
    """Add this module's commands to the `bitdelta` app."""
    app.command("compress")(compress)
    app.command("inspect")(inspect)
    app.command("restore")(restore)
    app.command("import")(import_)
    app.command("verify")(verify)


def compress(
    base: Annotated[Path, typer.Argument(help="Directory of the base model.", show_default=False)],
    finetune: Annotated[
        Path, typer.Argument(help="Directory of the fine-tune, or of a PEFT LoRA adapter.", show_default=False)
    ],
    out: Annotated[Path, typer.Argument(help="Directory to write the delta to.", show_default=False)],
    codec: Annotated[
        CodecName | None, typer.Option(help="Of the linears. (default: bitdelta; lora for an adapter)")
    ] = None,
    scale: Annotated[Scale | None, typer.Option(help="Scales of the signs. (default: row_col)")] = None,
    bits: Annotated[
        float | None,
        typer.Option(help="bitdelta: sign planes, 1 to 16. auto: bits per weight, 0.03 to 4. (default: 1)"),
    ] = None,
    max_bytes: Annotated[int | None, typer.Option(help="auto: at most so many bytes, every file counted.")] = None,
    min_fidelity: Annotated[
        float | None, typer.Option(help="auto: the least size that keeps so much, 0 to 1, on the text.")
    ] = None,
    embeddings: Annotated[
        EmbeddingCodec | None, typer.Option(help="Embedding and head; auto: changed rows, or int4. (default: auto)")
    ] = None,
    dtype: Annotated[
        Dtype | None, typer.Option(help="Of values that are stored whole (default: the fine-tune's own).")
    ] = None,
    ratio: Annotated[
        int | None, typer.Option(help="deltadq: 16 to 512 (a power of two), value bits alone. (default: 128)")
    ] = None,
    mask_rows: Annotated[
        int | None, typer.Option(help="deltadq: outputs that share a mask: 1, 16 or 64. (default: 1)")
    ] = None,
    group: Annotated[int | None, typer.Option(help="deltadq: inputs per group (default: chosen by the text).")] = None,
    seed: Annotated[int | None, typer.Option(help="deltadq: of the masks (default: 0).")] = None,
    distill: Annotated[
        bool | None,
        typer.Option(
            "--distill/--no-distill", help="Train against the fine-tune. (default: on; auto: with --examples)"
        ),
    ] = None,
    distill_steps: Annotated[int | None, typer.Option(help="Steps of training (default: 200; auto: 400).")] = None,
    distill_batch: Annotated[int | None, typer.Option(help="Texts per step (default: 4; auto: 16).")] = None,
    distill_length: Annotated[int | None, typer.Option(help="Tokens per text. (default: 128)")] = None,
    distill_lr: Annotated[
        float | None, typer.Option(help="Of Adam, relative to each scale (default: 0.03); auto: in steps (0.02).")
    ] = None,
    calibration: Annotated[
        Path | None, typer.Option(help="Text to distil on: .txt or .jsonl. auto: to measure on.")
    ] = None,
    examples: Annotated[
        Path | None,
        typer.Option(help="auto: what the variant is asked and answers, to train on: .txt or .jsonl, thousands."),
    ] = None,
    base_name: Annotated[str | None, typer.Option(help="Name of the base to record.")] = None,
    revision: Annotated[str | None, typer.Option(help="Revision of the base to record.")] = None,
    device: Annotated[Device | None, typer.Option(help="Where to compute. (default: a GPU where there is one)")] = None,
) -> None:
    """Compress a fine-tune into a delta of its base. An interrupted run goes on when started again."""
    from bitdelta_core.delta import auto
    from bitdelta_core.delta import compress as room
    from bitdelta_core.delta.format import open_delta
    from bitdelta_core.delta.inspect import summarise

    coding = {"codec": codec, "scale_layout": scale, "bits": bits, "embeddings": embeddings, "dtype": dtype}
    dropping = {"ratio": ratio, "mask_rows": mask_rows, "group": group, "seed": seed}
    limits = {"max_bytes": max_bytes, "min_fidelity": min_fidelity}
    training = {"steps": distill_steps, "batch": distill_batch, "length": distill_length, "lr": distill_lr}
    given = _given({**training, "calibration": calibration, "examples": examples})
    _quieten_transformers()
    named: dict[str, Any] = {"base_name": base_name, "revision": revision, "device": device.value if device else None}
    with _progress("compress") as progress:
        if codec == "auto":
            asked = _auto_options(_given(coding), _given(dropping), _given(limits), distill, given)
            auto.compress(base, finetune, out, asked, **named, progress=progress)
        else:
            options, distillation = _compress_options(
                finetune, _given(coding), _given({**dropping, **limits}), distill, given
            )
            room.compress(base, finetune, out, options, distillation=distillation, **named, progress=progress)
    summary = summarise(open_delta(out))
    _print_summary(summary)
    if failed := _failed_training(summary.provenance):
        typer.echo(failed, err=True)


def inspect(
    delta: Annotated[Path, typer.Argument(help="Directory of the delta.", show_default=False)],
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False,
) -> None:
    """Show what a delta holds: bytes by kind, bits per weight, ratio, provenance."""
    from bitdelta_core.delta.format import open_delta
    from bitdelta_core.delta.inspect import summarise

    summary = summarise(open_delta(delta))
    if as_json:
        typer.echo(json.dumps(summary.to_json(), indent=2))
    else:
        _print_summary(summary)


def restore(
    base: Annotated[Path, typer.Argument(help="Directory of the base model.", show_default=False)],
    delta: Annotated[Path, typer.Argument(help="Directory of the delta.", show_default=False)],
    out: Annotated[Path, typer.Argument(help="Directory to write the checkpoint to.", show_default=False)],
    dtype: Annotated[Dtype | None, typer.Option(help="(default: the fine-tune's own)")] = None,
) -> None:
    """Write the plain Hugging Face checkpoint that a delta stands for."""
    from bitdelta_core.delta import restore as room
    from bitdelta_core.delta.config import DTYPES

    with _progress("restore") as progress:
        room.restore(base, delta, out, dtype=DTYPES[dtype] if dtype else None, progress=progress)
    typer.echo(f"{out}")


def import_(
    base: Annotated[Path, typer.Argument(help="Directory of the base model.", show_default=False)],
    file: Annotated[Path, typer.Argument(help="A published BitDelta file (pickle).", show_default=False)],
    out: Annotated[Path, typer.Argument(help="Directory to write the delta to.", show_default=False)],
) -> None:
    """Import a delta in the format of the BitDelta authors' code."""
    from bitdelta_core.delta.format import open_delta
    from bitdelta_core.delta.importer import import_published
    from bitdelta_core.delta.inspect import summarise

    _print_summary(summarise(open_delta(import_published(base, file, out))))


def verify(
    base: Annotated[Path, typer.Argument(help="Directory of the base model.", show_default=False)],
    delta: Annotated[Path, typer.Argument(help="Directory of the delta.", show_default=False)],
    against: Annotated[Path | None, typer.Option(help="The fine-tune: also show each tensor's error.")] = None,
) -> None:
    """Check a delta's structure, base, hashes and values."""
    from bitdelta_core.delta import verify as room

    checked = room.verify(base, delta)
    if against is not None:
        for error in room.compare(base, delta, against):
            typer.echo(f"{error.relative_error:10.6f}  {error.codec:8s}  {error.name}")
    files, tensors = len(checked.config.files), len(checked.config.tensors)
    typer.echo(f"{delta}: {files} files, {tensors} tensors, sound, and made from this base")


def _given(values: dict[str, Any]) -> dict[str, Any]:
    plain = {key: value.value if isinstance(value, StrEnum) else value for key, value in values.items()}
    return {key: value for key, value in plain.items() if value is not None}


def _compress_options(
    finetune: Path,
    coding: dict[str, Any],
    dropping: dict[str, Any],
    distill: bool | None,
    training: dict[str, Any],
) -> tuple[CompressOptions | None, DistillOptions | None]:
    """What the flags ask for; a flag that would be ignored is an error."""
    from bitdelta_core.delta.distill import DistillOptions
    from bitdelta_core.delta.lora import is_adapter
    from bitdelta_core.delta.planning import CompressOptions
    from bitdelta_core.errors import InvalidRequest

    if "bits" in coding:
        if coding["bits"] % 1:
            raise InvalidRequest(f"bits {coding['bits']} of sign planes: give a whole number", param="bits")
        coding = {**coding, "bits": int(coding["bits"])}
    if is_adapter(finetune):
        others = {**{k: v for k, v in coding.items() if (k, v) != ("codec", "lora")}, **dropping, **training}
        if others or distill:
            named = sorted(others) or ["distill"]
            raise InvalidRequest(f"{finetune} is a PEFT adapter, taken as it is: drop {', '.join(named)}")
        return None, None
    if coding.get("codec") == "lora":
        raise InvalidRequest(f"{finetune} is no PEFT adapter: codec lora takes one as it is", param="codec")
    if coding.get("codec") == "deltadq":
        return _dropout_options(coding, dropping, distill, training), None
    if dropping:
        codec = coding.get("codec", "bitdelta")
        raise InvalidRequest(f"codec {codec} has nothing to do with {', '.join(sorted(dropping))}", param="codec")
    if coding.get("codec") == "dense":
        unused = sorted({"scale_layout", "bits"} & coding.keys() | training.keys()) or (["distill"] if distill else [])
        if unused:
            raise InvalidRequest(f"codec dense has nothing to do with {', '.join(unused)}", param=unused[0])
        return CompressOptions(**coding), None
    if "examples" in training:
        raise InvalidRequest("codec bitdelta trains its scales on --calibration, not on examples", param="examples")
    if distill is False:
        if training:
            raise InvalidRequest(f"--no-distill leaves no use for {', '.join(sorted(training))}", param="distill")
        return CompressOptions(**coding), None
    return CompressOptions(**coding), DistillOptions(**training)


def _auto_options(
    coding: dict[str, Any],
    dropping: dict[str, Any],
    limits: dict[str, Any],
    distill: bool | None,
    training: dict[str, Any],
) -> AutoOptions:
    from bitdelta_core.delta.auto_options import DISTILL, AutoOptions
    from bitdelta_core.errors import InvalidRequest

    unused = sorted({"scale_layout", "embeddings", "dtype"} & coding.keys() | dropping.keys() - {"seed"})
    if unused:
        raise InvalidRequest(f"codec auto has nothing to do with {', '.join(unused)}", param=unused[0])
    own = {key: training[key] for key in ("calibration", "length", "examples") if key in training}
    if not limits or "bits" in coding:
        own["bits"] = coding.get("bits", 1.0)
    steps = {key: training[key] for key in ("steps", "batch", "lr") if key in training}
    training_only = sorted(steps.keys() | {"examples"} & own.keys())
    if distill is False and training_only:
        raise InvalidRequest(f"--no-distill leaves no use for {', '.join(training_only)}", param="distill")
    if (distill or steps) and "examples" not in own:
        raise InvalidRequest("codec auto is trained on what the variant is asked: give --examples", param="distill")
    own |= {key: value for key, value in dropping.items() if key == "seed"}
    return AutoOptions(**own, **limits, distill=replace(DISTILL, **steps))


def _failed_training(provenance: Mapping[str, Any]) -> str | None:
    losses, measured = provenance.get("distillation", {}), provenance.get("measured", {})
    if losses and losses.get("loss_after") == losses.get("loss_before"):
        return "distillation did not lower the loss: the scales are untrained; try a lower --distill-lr"
    if "kl_untrained" in measured and not measured.get("kl_trained", math.inf) < measured["kl_untrained"]:
        return "training did not help on the examples held out: the factors are untrained; give more, or fewer steps"
    if measured.get("trained_of_budget", 0) > 1:
        return "training went over the budget: the factors are untrained; try a lower --distill-lr"
    if needed := measured.get("untrained_for_want_of_bytes"):
        return f"training would take {_size(int(needed))} of memory, for which there is no room: it was left out"
    return None


def _dropout_options(
    coding: dict[str, Any], dropping: dict[str, Any], distill: bool | None, training: dict[str, Any]
) -> CompressOptions:
    from bitdelta_core.delta.dropout import DropoutOptions
    from bitdelta_core.delta.planning import CompressOptions
    from bitdelta_core.errors import InvalidRequest

    unused = sorted({"scale_layout", "bits"} & coding.keys() | training.keys() - {"calibration"})
    unused += ["distill"] if distill else []
    if unused:
        raise InvalidRequest(f"codec deltadq has nothing to do with {', '.join(unused)}", param=unused[0])
    if limited := {"max_bytes", "min_fidelity"} & dropping.keys():
        raise InvalidRequest(f"codec deltadq has nothing to do with {', '.join(sorted(limited))}", param="codec")
    chosen = {**dropping, **{k: v for k, v in training.items() if k == "calibration"}}
    ratio = chosen.pop("ratio", 128)
    return CompressOptions(**coding, dropout=DropoutOptions.for_ratio(ratio, **chosen))


@contextmanager
def _progress(title: str) -> Iterator[Callable[[int, int, str], None]]:
    """A progress bar on stderr; silent when that is no terminal."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, disable=not console.is_terminal, transient=True) as bar:
        task = bar.add_task(title, total=None)
        yield lambda done, total, name: bar.update(task, completed=done, total=total, description=f"{title} {name}")


def _quieten_transformers() -> None:
    """Its own bars for loading the two models would only break ours, or fill a log."""
    from transformers.utils import logging

    logging.disable_progress_bar()


def _print_summary(summary: Summary) -> None:
    from bitdelta_core.delta.inspect import KINDS

    lines = [
        ("delta", summary.path),
        ("base", f"{summary.base_model_name_or_path} {summary.base_sha256[:12]}"),
        ("codec", summary.codec + _counts(summary)),
        ("size", f"{_size(summary.nbytes)}" + (f", {summary.ratio:.2f} times smaller" if summary.ratio else "")),
        *((f"  {kind}", _size(summary.bytes_by_kind[kind])) for kind in KINDS if summary.bytes_by_kind[kind]),
    ]
    if summary.linear_bits_per_weight is not None:
        lines.append(("bits per weight", f"{summary.linear_bits_per_weight:.3f} in the linears it changes"))
    if summary.linear_value_ratio is not None:
        lines.append(("", f"{summary.linear_value_ratio:.2f} times smaller linears, were only value bits counted"))
    if summary.bits_per_weight is not None:
        lines.append(("", f"{summary.bits_per_weight:.3f} over all, every byte counted"))
    lines += [("overrides", json.dumps(summary.config_overrides))] if summary.config_overrides else []
    lines += [(key, json.dumps(value)) for key, value in summary.provenance.items()]
    for label, value in lines:
        typer.echo(f"{label:22s} {value}")


def _counts(summary: Summary) -> str:
    return " (" + ", ".join(f"{count} {name}" for name, count in summary.tensors_by_codec.items()) + ")"


def _size(nbytes: int) -> str:
    """Decimal units, and the exact count."""
    for unit, factor in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if nbytes >= factor:
            return f"{nbytes / factor:.3f} {unit} ({nbytes:,} bytes)"
    return f"{nbytes} bytes"
