"""What to store of a fine-tune: which parameters changed, and the codec of each. Reads both sides, writes nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, Protocol

import torch

from bitdelta_core.checkpoint import Checkpoint
from bitdelta_core.delta import dropout, lora, rows, shards
from bitdelta_core.delta.codecs import encode
from bitdelta_core.delta.config import DTYPES
from bitdelta_core.delta.dropout import DropoutOptions
from bitdelta_core.delta.format import EMBEDDING, HEAD
from bitdelta_core.delta.pairing import Pairing, is_tied, parameters
from bitdelta_core.delta.sidecars import sidecars
from bitdelta_core.delta.spec import DeltaCodec, ScaleLayout, TensorEntry
from bitdelta_core.delta.writer import sha256_of
from bitdelta_core.errors import CheckpointError, InvalidRequest

Embeddings = Literal["auto", "exact", "int8", "int4", "int2"]
Parts = dict[str, torch.Tensor]
_CHUNK = 1 << 12


@dataclass(frozen=True, kw_only=True, slots=True)
class CompressOptions:
    """How to code a fine-tune. What does not apply to an adapter (all of it) must keep its default there."""

    codec: Literal["bitdelta", "deltadq", "dense"] = "bitdelta"
    """Of the linears."""
    dropout: DropoutOptions | None = None
    """With codec deltadq, and only there."""
    scale_layout: ScaleLayout = "row_col"
    bits: int = 1
    """Sign planes, 1 to 16."""
    embeddings: Embeddings = "auto"
    """Embedding and head: whole changed rows, or the difference in so many bits. auto: whole rows where that is smaller
    than 4 bits (or with codec dense), else 4 bits."""
    dtype: Literal["float32", "float16", "bfloat16"] | None = None
    """Of what is stored whole, and of the restored checkpoint's changed tensors; None: the fine-tune's own."""

    def check(self) -> None:
        """Raise InvalidRequest for a value out of range."""
        if not 1 <= self.bits <= 16:
            raise InvalidRequest(f"bits must be 1 to 16, got {self.bits}", param="bits")
        if (self.codec == "deltadq") != (self.dropout is not None):
            raise InvalidRequest(f"codec {self.codec} and options of deltadq: either both or none", param="codec")
        if self.dropout is not None:
            self.dropout.check()

    def described(self) -> dict[str, Any]:
        """For a delta's provenance: plain values, and no path but the name of a file."""
        body = asdict(self)
        if self.dropout is None:
            return {key: value for key, value in body.items() if key != "dropout"}
        calibration = self.dropout.calibration
        own = {**body["dropout"], "calibration": calibration.name if calibration else "default"}
        return {key: body[key] for key in ("codec", "embeddings", "dtype")} | {"dropout": own}


class Source(Protocol):
    """A fine-tune, ready to be stored."""

    @property
    def codec(self) -> DeltaCodec: ...
    @property
    def entries(self) -> tuple[TensorEntry, ...]: ...
    @property
    def overrides(self) -> Mapping[str, Any]: ...
    @property
    def sidecars(self) -> Mapping[str, bytes]: ...
    @property
    def provenance(self) -> Mapping[str, Any]: ...
    def encode(self, entry: TensorEntry) -> Parts:
        """The parts of one planned entry, on the CPU."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class FineTune:
    """A full fine-tune beside its base."""

    pairing: Pairing
    codec: DeltaCodec
    entries: tuple[TensorEntry, ...]
    overrides: Mapping[str, Any]
    sidecars: Mapping[str, bytes]
    provenance: Mapping[str, Any] = field(default_factory=dict)
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    """Where to encode."""

    def encode(self, entry: TensorEntry) -> Parts:
        base, fine = (get(entry.name).to(self.device) for get in (self.pairing.base_tensor, self.pairing.fine_tensor))
        with self.device:  # what encoding makes besides lies there too
            parts = encode(entry, base, fine)[1]
        self.pairing.release()
        return {part: tensor.cpu() for part, tensor in parts.items()}


@dataclass(frozen=True, kw_only=True, slots=True)
class AdapterSource:
    """A PEFT adapter beside its base."""

    base: Checkpoint
    adapter: lora.Adapter
    entries: tuple[TensorEntry, ...]
    overrides: Mapping[str, Any]
    sidecars: Mapping[str, bytes]
    provenance: Mapping[str, Any] = field(default_factory=dict)
    codec: Literal["lora"] = "lora"

    def encode(self, entry: TensorEntry) -> Parts:
        if entry.codec == "lora":
            return self.adapter.parts(entry)
        return encode(entry, _head_or_own(self.base, entry.name), self.adapter.get(entry.name))[1]


def plan_finetune(base: Checkpoint, fine: Checkpoint, options: CompressOptions) -> FineTune:
    """Plan a full fine-tune.

    Raises:
        CheckpointError: `fine` is not a fine-tune of `base`; names the tensor or the key of config.json.
        InvalidRequest: an option is out of range.
    """
    options.check()
    pairing = Pairing(base, fine)
    pairing.check()
    planned = [_plan_tensor(name, pairing, options) for name in pairing.names]
    return FineTune(
        pairing=pairing,
        codec=options.codec,
        entries=tuple(entry for entry in planned if entry is not None),
        overrides=pairing.overrides(),
        sidecars=sidecars(base.path, fine.path),
        provenance={
            "finetune": fine.path.resolve().name,
            "finetune_sha256": fine.sha256(),
            "finetune_bytes_16bit": 2 * count_parameters(parameters(fine), fine.shape),
            "options": options.described(),
        },
    )


def plan_adapter(base: Checkpoint, adapter: lora.Adapter) -> AdapterSource:
    """Plan a LoRA adapter.

    Raises:
        CheckpointError: it does not fit the base; names the tensor.
    """
    names = adapter.linears + adapter.whole
    for name in names:
        if name not in base and not (name == HEAD and is_tied(base)):
            raise CheckpointError(f"{adapter.path}: the base has no parameter {name}")
    entries = [adapter.entry(name, tuple(_head_or_own(base, name).shape)) for name in adapter.linears]
    for name in adapter.whole:
        own, value = _head_or_own(base, name), adapter.get(name)
        grows = name in (EMBEDDING, HEAD)
        if value.ndim != own.ndim or value.shape[grows:] != own.shape[grows:] or value.dtype not in DTYPES.values():
            raise CheckpointError(
                f"{adapter.path}: {name} is {value.dtype} {list(value.shape)}, the base's is {list(own.shape)}"
            )
        entry = plan_exact(name, own, value)
        entries += [entry] if entry is not None else []
    return AdapterSource(
        base=base,
        adapter=adapter,
        entries=tuple(sorted(entries, key=lambda entry: entry.name)),
        overrides=_adapter_overrides(base, adapter),
        sidecars=sidecars(base.path, adapter.path),
        provenance={
            "finetune": adapter.path.resolve().name,
            "finetune_sha256": sha256_of(adapter.path / lora.ADAPTER_WEIGHTS),
            "finetune_bytes_16bit": _adapted_bytes(base, adapter),
            "adapter": {key: adapter.config.get(key) for key in ("r", "lora_alpha", "use_rslora", "peft_version")},
        },
    )


def differs(base: torch.Tensor, fine: torch.Tensor) -> bool:
    """Whether any value differs; reads only as far as the first that does."""
    if base.shape != fine.shape:
        return True
    starts = range(0, base.shape[0], _CHUNK)
    return any(bool((base[i : i + _CHUNK] != fine[i : i + _CHUNK]).any()) for i in starts)


def _plan_tensor(name: str, pairing: Pairing, options: CompressOptions) -> TensorEntry | None:
    base, fine = pairing.base_tensor(name), pairing.fine_tensor(name)
    pairing.release()
    if not differs(base, fine):
        return None
    shape, dtype = tuple(fine.shape), _stored_dtype(fine, options)
    if fine.ndim == 1 or (options.codec == "dense" and name not in (EMBEDDING, HEAD)):
        return TensorEntry(name=name, shape=shape, codec="dense", dtype=dtype)
    if name in (EMBEDDING, HEAD):
        return plan_embedding(name, base, fine, options)
    if options.dropout is not None:
        return dropout.entry(name, shape, dtype, options.dropout)
    return TensorEntry(
        name=name,
        shape=shape,
        codec="bitdelta",
        dtype=dtype,
        planes=options.bits,
        scale_layout=options.scale_layout,
    )


def plan_embedding(name: str, base: torch.Tensor, fine: torch.Tensor, options: CompressOptions) -> TensorEntry | None:
    """Changed rows or few bits, as the options say; None where nothing differs."""
    dtype = _stored_dtype(fine, options)
    exact = plan_exact(name, base, fine, dtype)
    if options.embeddings == "exact" or (options.embeddings == "auto" and options.codec == "dense"):
        return exact
    bits = 4 if options.embeddings == "auto" else int(options.embeddings.removeprefix("int"))
    common = min(base.shape[0], fine.shape[0])
    quant = TensorEntry(name=name, shape=tuple(fine.shape), codec="quant", dtype=dtype, rows=common, bits=bits)
    if options.embeddings == "auto" and exact is not None and entry_bytes(exact) <= entry_bytes(quant):
        return exact
    return quant


def _stored_dtype(fine: torch.Tensor, options: CompressOptions) -> torch.dtype:
    return DTYPES[options.dtype] if options.dtype else fine.dtype


def plan_exact(
    name: str, base: torch.Tensor, fine: torch.Tensor, dtype: torch.dtype | None = None
) -> TensorEntry | None:
    """Whole rows, or the whole tensor where that is smaller; None where nothing differs."""
    dtype = dtype or fine.dtype
    dense = TensorEntry(name=name, shape=tuple(fine.shape), codec="dense", dtype=dtype)
    if not differs(base, fine):
        return None
    if fine.ndim == 1:
        return dense
    count = len(rows.changed_rows(base, fine))
    changed = TensorEntry(name=name, shape=tuple(fine.shape), codec="rows", dtype=dtype, rows=count)
    return min(changed, dense, key=entry_bytes)


def entry_bytes(entry: TensorEntry) -> int:
    """Bytes of an entry's parts."""
    return sum(map(shards.nbytes, entry.parts().values()))


def _head_or_own(base: Checkpoint, name: str) -> torch.Tensor:
    return base.get(EMBEDDING if name == HEAD and is_tied(base) else name)


def _adapter_overrides(base: Checkpoint, adapter: lora.Adapter) -> dict[str, Any]:
    """An adapter that holds its own embedding or head unties the two, as PEFT does unless `ensure_weight_tying`."""
    overrides: dict[str, Any] = {}
    changed = {EMBEDDING, HEAD} & {*adapter.linears, *adapter.whole}
    sizes = {adapter.get(name).shape[0] for name in changed & set(adapter.whole)}
    if len(sizes) > 1:
        raise CheckpointError(f"{adapter.path}: embedding and head have different vocabularies {sorted(sizes)}")
    if sizes and sizes != {base.shape(EMBEDDING)[0]}:
        overrides["vocab_size"] = sizes.pop()
    if is_tied(base) and changed and not (adapter.config.get("ensure_weight_tying") and HEAD not in changed):
        overrides["tie_word_embeddings"] = False
        if "vocab_size" in overrides and changed != {EMBEDDING, HEAD}:
            raise CheckpointError(f"{adapter.path}: {changed.pop()} grows the vocabulary alone; the base ties them")
    return overrides


def _adapted_bytes(base: Checkpoint, adapter: lora.Adapter) -> int:
    """What the adapted model would take as a 16-bit checkpoint of its own."""
    names = set(parameters(base)) | ({HEAD} & {*adapter.linears, *adapter.whole})

    def shape(name: str) -> tuple[int, ...]:
        return tuple((adapter.get(name) if name in adapter.whole else _head_or_own(base, name)).shape)

    return 2 * count_parameters(sorted(names), shape)


def count_parameters(names: list[str], shape: Callable[[str], tuple[int, ...]]) -> int:
    """Elements of those parameters."""
    return sum(torch.Size(shape(name)).numel() for name in names)
