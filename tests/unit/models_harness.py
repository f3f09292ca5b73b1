"""Random deltas with their merged weights worked out independently, and a stepper with a poisoned, paged cache."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from bitdelta_core.delta.spec import TensorEntry
from bitdelta_core.models.batch import Batch
from bitdelta_core.models.decoder import Decoder
from bitdelta_core.models.variant import VariantLayout, VariantWeights
from kernels.segments import Segment
from tests.unit.by_the_book import kept_columns

BLOCK = 4
MIXES = ("distinct", "identical", "uniform", "zipf", "base")


def slots_of_mix(mix: str, count: int, variants: int, generator: torch.Generator) -> list[int]:
    """The slot of each of `count` sequences, sorted; -1 is the base."""
    match mix:
        case "distinct":
            drawn = [i % (variants + 1) - 1 for i in range(count)]
        case "identical":
            drawn = [0] * count
        case "base":
            drawn = [-1] * count
        case "uniform":
            drawn = (torch.randint(0, variants + 1, (count,), generator=generator) - 1).tolist()
        case _:
            weights = 1.0 / torch.arange(1, variants + 2) ** 1.5
            drawn = (torch.multinomial(weights, count, replacement=True, generator=generator) - 1).tolist()
    return sorted(drawn)


@dataclass
class FakeDelta:
    """A delta in memory: config, reader, and what it makes of the base."""

    tensors: dict[str, TensorEntry] = field(default_factory=dict)
    parts: dict[str, dict[str, torch.Tensor]] = field(default_factory=dict)
    config_overrides: dict[str, Any] = field(default_factory=dict)

    def part(self, entry: TensorEntry, part: str) -> torch.Tensor:
        return self.parts[entry.name][part]

    def add(self, base: Mapping[str, torch.Tensor], name: str, generator: torch.Generator, **fields: Any) -> None:
        """A random change of one parameter."""
        like = base.get(name, base["model.embed_tokens.weight"])
        fields = {"dtype": torch.float32, "shape": tuple(like.shape), **fields}
        entry = TensorEntry(name=name, **fields)
        assert entry.problem() is None
        self.tensors[name] = entry
        self.parts[name] = {p: _random_part(entry, p, like, generator) for p in entry.parts()}

    def merged(self, base: Mapping[str, torch.Tensor], *, untied: bool = False) -> dict[str, torch.Tensor]:
        """The fine-tune's state dict in float32."""
        state = {name: tensor.float() for name, tensor in base.items()}
        if untied and "lm_head.weight" not in state:
            state["lm_head.weight"] = state["model.embed_tokens.weight"]
        original = dict(state)
        for name, entry in self.tensors.items():
            state[name] = merge(entry, self.parts[name], original[name])
        return state


def _random_part(entry: TensorEntry, part: str, like: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    dtype, shape = entry.parts()[part]
    size = 0.3 * float(like.float().std())
    if part == "index":
        return torch.randperm(entry.shape[0], generator=generator)[: entry.rows].sort().values.to(dtype)
    if dtype == torch.uint8:
        return torch.randint(0, 256, shape, generator=generator, dtype=dtype)
    noise = torch.randn(shape, generator=generator)
    match part:
        case "scale":
            value = size * (0.5 + noise.abs()) / (2 ** (entry.bits - 1) if entry.codec == "quant" else 1)
        case "row" | "col":
            value = 0.5 + noise.abs()
        case "lora_A" | "lora_B":
            value = noise * (size / entry.rank**0.5) ** 0.5
        case _ if len(shape) == 1:
            value = like.float() + noise * 0.3
        case _:
            value = noise * float(like.float().std())
    return value.to(dtype)


def merge(entry: TensorEntry, parts: Mapping[str, torch.Tensor], base: torch.Tensor) -> torch.Tensor:
    """The fine-tune's tensor, straight from the definition of the codec."""
    match entry.codec:
        case "dense":
            return parts["value"].float()
        case "lora":
            return base + entry.scaling * parts["lora_B"].float() @ parts["lora_A"].float()
        case "rows":
            whole = torch.zeros(entry.shape)
            whole[: base.shape[0]] = base[: entry.shape[0]]
            whole[parts["index"].long()] = parts["value"].float()
            return whole
        case "quant":
            bits = np.unpackbits(parts["q"].numpy(), axis=1, bitorder="little")
            grouped = bits.reshape(entry.rows, -1, entry.bits)[:, : entry.shape[1]]
            q = torch.from_numpy((grouped * 2 ** np.arange(entry.bits)).sum(-1)).float()
            known = base[: entry.rows] + (q - 2 ** (entry.bits - 1)) * parts["scale"][:, None]
            return torch.cat([known, parts["extra"].float()])
        case "bitdelta":
            bits = np.unpackbits(parts["sign"].numpy(), axis=2, bitorder="little")[..., : entry.shape[1]]
            planes = (torch.from_numpy(bits).float() * 2 - 1) * parts["scale"][:, None, None]
            planes = planes * parts["row"].float()[:, :, None] if "row" in parts else planes
            planes = planes * parts["col"].float()[:, None, :] if "col" in parts else planes
            return base + planes.sum(0)
        case "deltadq":
            return base + _dropped(entry, parts)
        case "spectral":
            raise AssertionError("its code cannot be random: tests/integration has it")


def _dropped(entry: TensorEntry, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
    wide = torch.zeros(entry.shape[0], entry.padded_columns)
    for n in range(entry.shape[0]):
        bits = np.unpackbits(parts["code"][n].numpy(), bitorder="little")[: entry.kept * entry.bits]
        levels = (bits.reshape(-1, entry.bits) * 2 ** np.arange(entry.bits)).sum(-1) - (2**entry.bits - 1) / 2
        columns = kept_columns(n, entry.shape[1], entry.group, entry.alpha, entry.mask_rows, entry.seed)
        scale = parts["scale"] * (parts["row"][n].float() if "row" in parts else 1)
        wide[n, columns] = torch.from_numpy(levels).float() * scale
    return wide[:, : entry.shape[1]]


def oracle(base: Path, state: Mapping[str, torch.Tensor], overrides: Mapping[str, Any]) -> Any:
    """transformers' model of these weights, float32."""
    config = json.loads((base / "config.json").read_text()) | dict(overrides)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config), attn_implementation="eager")
    tied = config["tie_word_embeddings"]
    missing = model.load_state_dict(dict(state), strict=not tied)
    assert set(missing.missing_keys) <= {"lm_head.weight"}
    assert not missing.unexpected_keys
    model.tie_weights()
    return model.float().eval()


def base_state(path: Path) -> dict[str, torch.Tensor]:
    return load_file(path / "model.safetensors")


def make_variant(decoder: Decoder, delta: FakeDelta, *, expand: bool | None = None) -> VariantWeights:
    """Planned, filled into a poisoned host buffer, copied into a poisoned slab at an odd multiple of 256, viewed."""
    layout = VariantLayout.plan(delta, decoder.config, decoder.dtype, "cpu", expand=expand)
    host = torch.full((layout.nbytes,), 255, dtype=torch.uint8)
    layout.fill(delta, host, decoder)
    slab = torch.full((layout.nbytes + 768,), 255, dtype=torch.uint8)
    extent = slab[256 : 256 + layout.nbytes]
    extent.copy_(host)
    return layout.view(extent)


@dataclass(eq=False)
class Running:
    """A sequence being computed."""

    slot: int
    tokens: list[int]
    blocks: list[int] = field(default_factory=list)
    done: int = 0


class Stepper:
    """Feeds a decoder batches the way an engine does. Everything that a batch must not read is NaN."""

    def __init__(self, decoder: Decoder, variants: Mapping[int, VariantWeights], *, num_blocks: int = 128) -> None:
        self.decoder = decoder
        self.variants = variants
        self.kv = decoder.new_kv_cache(num_blocks, BLOCK)
        self.kv.slots_LX2GD.fill_(torch.nan)
        self._free = torch.randperm(num_blocks - 1, generator=torch.Generator().manual_seed(5)).add(1).tolist()

    def step(self, work: Sequence[tuple[Running, int]]) -> list[torch.Tensor]:
        """Compute the next rows of each sequence (sorted by slot): their logits [rows, V]."""
        tokens, positions, slots, starts = [], [], [], [0]
        for seq, rows in work:
            at = range(seq.done, seq.done + rows)
            while len(seq.blocks) * BLOCK < at.stop:
                seq.blocks.append(self._free.pop())
            tokens += [seq.tokens[i] for i in at]
            positions += list(at)
            slots += [seq.blocks[i // BLOCK] * BLOCK + i % BLOCK for i in at]
            starts.append(starts[-1] + rows)
            seq.done = at.stop
        table = torch.zeros((len(work), max(len(s.blocks) for s, _ in work) + 1), dtype=torch.int32)
        for i, (seq, _) in enumerate(work):
            table[i, : len(seq.blocks)] = torch.tensor(seq.blocks)
        segments = _segments([(seq.slot, rows) for seq, rows in work])
        batch = Batch(
            token_ids_T=torch.tensor(tokens),
            positions_T=torch.tensor(positions),
            kv_slots_T=torch.tensor(slots),
            query_starts=tuple(starts),
            context_lens=tuple(seq.done for seq, _ in work),
            block_tables_SM=table,
            logit_rows_L=torch.arange(starts[-1]),
            segments=segments,
            logit_segments=segments,
            variants={s.slot: self.variants[s.slot] for s in segments if s.slot >= 0},
        )
        logits = self.decoder.forward(batch, self.kv)
        assert logits.dtype == torch.float32
        return list(logits.split([rows for _, rows in work]))

    def run(self, sequences: Sequence[Running], chunks: Sequence[int]) -> list[torch.Tensor]:
        """All rows of all sequences: each step takes the next chunk size, then one row at a time."""
        out: dict[int, list[torch.Tensor]] = {i: [] for i in range(len(sequences))}
        step = 0
        while pending := [(i, s) for i, s in enumerate(sequences) if s.done < len(s.tokens)]:
            work = [(s, min(chunks[(step + i) % len(chunks)], len(s.tokens) - s.done)) for i, s in pending]
            for (i, _), logits in zip(pending, self.step(work), strict=True):
                out[i].append(logits)
            step += 1
        width = max(part.shape[1] for parts in out.values() for part in parts)
        pad = [[torch.nn.functional.pad(p, (0, width - p.shape[1]), value=-torch.inf) for p in out[i]] for i in out]
        return [torch.cat(parts) for parts in pad]


def _segments(work: Sequence[tuple[int, int]]) -> tuple[Segment, ...]:
    segments, at = [], 0
    for slot, group in groupby(work, key=lambda item: item[0]):
        stop = at + sum(rows for _, rows in group)
        segments.append(Segment(slot, at, stop))
        at = stop
    return tuple(segments)
