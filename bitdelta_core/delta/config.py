"""delta_config.json: what a delta is of, which parameters it changes and how, and which files it consists of.

docs/delta-format.md is the specification; this module is its reader and writer.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from bitdelta_core.delta.spec import FIRST_VERSION, FORMAT_VERSION, Codec, DeltaCodec, ScaleLayout, TensorEntry
from bitdelta_core.delta.strict_json import BadJson, parse_object
from bitdelta_core.errors import DeltaFormatError, UnsupportedFormat

CONFIG_FILE = "delta_config.json"
MAX_CONFIG_BYTES = 32 * 2**20
ABSENT: dict[str, Any] = {"$absent": True}
"""As an override: the fine-tune's config.json lacks this key (which is not the same as null)."""
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_SHA256 = r"^[0-9a-f]{64}$"
_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")


@dataclass(frozen=True, slots=True)
class FileEntry:
    """One file of the delta, delta_config.json itself excepted."""

    nbytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True, slots=True)
class DeltaConfig:
    """Everything that delta_config.json says."""

    base_sha256: str
    """`Checkpoint.sha256()` of the base."""
    codec: DeltaCodec
    """Of the linears; embeddings, head, norms and biases may use others (see each entry)."""
    tensors: Mapping[str, TensorEntry]
    """By parameter name, in name order. What is absent equals the base."""
    files: Mapping[str, FileEntry]
    """By file name: weights, tokenizer, generation config."""
    format_version: int = 0
    """0: the lowest that has every codec in `tensors`, so that readers of that version keep reading what they can."""
    base_model_name_or_path: str = ""
    revision: str | None = None
    config_overrides: Mapping[str, Any] = field(default_factory=dict)
    """Top-level keys of config.json that differ from the base's; ABSENT marks a key that the fine-tune lacks."""
    provenance: Mapping[str, Any] = field(default_factory=dict)
    """How it was made; for readers, never for loading."""

    def __post_init__(self) -> None:
        if not self.format_version:
            codecs = {self.codec, *(entry.codec for entry in self.tensors.values())}
            object.__setattr__(self, "format_version", max(map(_first_version, codecs)))

    @property
    def weight_files(self) -> tuple[str, ...]:
        """The safetensors files, in order."""
        return tuple(sorted(name for name in self.files if name.endswith(".safetensors")))

    @property
    def sidecar_files(self) -> tuple[str, ...]:
        """Every other file but the shard index: the tokenizer's and generation_config.json."""
        return tuple(sorted(n for n in self.files if not n.endswith((".safetensors", ".safetensors.index.json"))))

    @property
    def tokenizer_files(self) -> tuple[str, ...]:
        """The variant's own tokenizer and chat template; empty: the base's serve."""
        return tuple(name for name in self.sidecar_files if name != "generation_config.json")

    def merged_config(self, base_config: Mapping[str, Any]) -> dict[str, Any]:
        """The variant's config.json: the base's with the overrides applied, key by top-level key."""
        merged = {k: v for k, v in base_config.items() if self.config_overrides.get(k) != ABSENT}
        return merged | {k: v for k, v in self.config_overrides.items() if v != ABSENT}

    def to_json(self) -> bytes:
        """Deterministic: equal configs give equal bytes."""
        body = {
            "format_version": self.format_version,
            "base_sha256": self.base_sha256,
            "base_model_name_or_path": self.base_model_name_or_path,
            "revision": self.revision,
            "codec": self.codec,
            "config_overrides": dict(self.config_overrides),
            "tensors": {name: _entry_to_json(entry) for name, entry in sorted(self.tensors.items())},
            "files": {name: asdict(entry) for name, entry in sorted(self.files.items())},
            "provenance": dict(self.provenance),
        }
        return (json.dumps(body, indent=1, ensure_ascii=False) + "\n").encode()


def _first_version(codec: str) -> int:
    return FIRST_VERSION.get(codec, 1)


def config_overrides(base: Mapping[str, Any], fine: Mapping[str, Any], *, ignore: frozenset[str]) -> dict[str, Any]:
    """The overrides that turn `base` into `fine`, keys in `ignore` left out."""
    changed = {k: v for k, v in fine.items() if k not in ignore and (k not in base or base[k] != v)}
    return dict(sorted((changed | {k: ABSENT for k in base if k not in fine and k not in ignore}).items()))


def parse_config(text: bytes, *, delta: str | None = None) -> DeltaConfig:
    """Read delta_config.json.

    Raises:
        UnsupportedFormat: a newer format version, or a codec that this version does not know.
        DeltaFormatError: anything else that is wrong, naming the field.
    """
    try:
        body = parse_object(text, max_bytes=MAX_CONFIG_BYTES)
    except BadJson as error:
        raise DeltaFormatError(f"{CONFIG_FILE}: {error}", delta=delta) from error
    _check_version(body, delta)
    try:
        parsed = _ConfigText.model_validate(body)
    except ValidationError as error:
        raise _refusal(error, body, delta) from error
    for name in parsed.files:
        if not _FILE_NAME.fullmatch(name) or name == CONFIG_FILE:
            raise DeltaFormatError(f"{CONFIG_FILE}: files: {name!r} is not a plain file name", delta=delta)
    config = _from_text(parsed, delta)
    for where, codec in [("codec", config.codec), *((f"tensors.{n}", e.codec) for n, e in config.tensors.items())]:
        if _first_version(codec) > config.format_version:
            raise DeltaFormatError(
                f"{CONFIG_FILE}: {where}: codec {codec} in format version {config.format_version}", delta=delta
            )
    return config


def _check_version(body: Mapping[str, Any], delta: str | None) -> None:
    version = body.get("format_version")
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise DeltaFormatError(f"{CONFIG_FILE}: format_version is {version!r}, expected 1 or more", delta=delta)
    if version > FORMAT_VERSION:
        raise UnsupportedFormat(
            f"{CONFIG_FILE}: format version {version}; this bitdelta reads up to {FORMAT_VERSION}: upgrade it",
            delta=delta,
        )


def _refusal(error: ValidationError, body: Mapping[str, Any], delta: str | None) -> DeltaFormatError:
    first = error.errors(include_url=False)[0]
    where = ".".join(str(part) for part in first["loc"])
    message = f"{CONFIG_FILE}: {where}: {first['msg']}, found {_clip(first.get('input'))}"
    unknown_codec = first["loc"][-1:] == ("codec",) and isinstance(first.get("input"), str)
    return (UnsupportedFormat if unknown_codec else DeltaFormatError)(message, delta=delta)


def _clip(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class _EntryText(_Strict):
    shape: list[int] = Field(min_length=1, max_length=2)
    codec: Codec
    dtype: Literal["float32", "float16", "bfloat16"]
    planes: int = Field(1, ge=1, le=16)
    scale_layout: ScaleLayout = "tensor"
    rank: int = Field(0, ge=0)
    scaling: float = Field(1.0, allow_inf_nan=False)
    rows: int = Field(0, ge=0)
    bits: Literal[1, 2, 4, 8] = 4
    group: int = Field(0, ge=0)
    alpha: int = Field(1, ge=1)
    mask_rows: Literal[1, 16, 64] = 1
    seed: int = Field(0, ge=0, lt=2**32)
    code_bytes: int = Field(0, ge=0)


class _FileText(_Strict):
    nbytes: int = Field(ge=0)
    sha256: str = Field(pattern=_SHA256)


class _ConfigText(_Strict):
    format_version: int
    base_sha256: str = Field(pattern=_SHA256)
    base_model_name_or_path: str = ""
    revision: str | None = None
    codec: DeltaCodec
    config_overrides: dict[str, Any] = {}
    tensors: dict[str, _EntryText]
    files: dict[str, _FileText]
    provenance: dict[str, Any] = {}


def _from_text(text: _ConfigText, delta: str | None) -> DeltaConfig:
    return DeltaConfig(
        format_version=text.format_version,
        base_sha256=text.base_sha256,
        base_model_name_or_path=text.base_model_name_or_path,
        revision=text.revision,
        codec=text.codec,
        config_overrides=text.config_overrides,
        tensors={name: _entry_from_text(name, entry, delta) for name, entry in sorted(text.tensors.items())},
        files={name: FileEntry(entry.nbytes, entry.sha256) for name, entry in sorted(text.files.items())},
        provenance=text.provenance,
    )


def _entry_from_text(name: str, text: _EntryText, delta: str | None) -> TensorEntry:
    fields = text.model_dump()
    entry = TensorEntry(name=name, **{**fields, "shape": tuple(text.shape), "dtype": DTYPES[text.dtype]})
    problem = entry.problem()
    if problem:
        raise DeltaFormatError(f"{CONFIG_FILE}: tensors.{name}: {problem}", delta=delta)
    return entry


def _entry_to_json(entry: TensorEntry) -> dict[str, Any]:
    body: dict[str, Any] = {
        "codec": entry.codec,
        "dtype": _DTYPE_NAMES[entry.dtype],
        "shape": list(entry.shape),
    }
    return body | {name: getattr(entry, name) for name in entry.used_fields()}
