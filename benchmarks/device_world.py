"""A device decoder of random weights with random variants in its slab, and steps of it at a given context."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import gpu_timing
import numpy as np
import synthetic
import torch
from synthetic import Kind, Shape

from bitdelta_core.delta.spec import TensorEntry
from bitdelta_core.models.config import ModelConfig
from bitdelta_core.models.device.decoder import DeviceDecoder
from bitdelta_core.models.device.factors import ByteFactors
from bitdelta_core.models.device.kinds import StepKinds, single
from bitdelta_core.models.device.kv_cache import DeviceKVCache
from bitdelta_core.models.device.layout import DeviceLayout, widest_vocabulary
from bitdelta_core.models.device.step import StepBuffers, StepSize
from bitdelta_core.models.device.tables import DeltaTables
from bitdelta_core.models.parameters import EMBED, Parameters
from bitdelta_core.models.weights import Weights
from kernels.device import segment_table
from kernels.sampling import sample
from kernels.sampling.rows import RowValues, Sampled
from kernels.sampling.workspace import Workspace

BLOCK = 16


@dataclass(frozen=True)
class RandomDelta:
    """What a layout is planned from, and what it is filled with."""

    tensors: Mapping[str, TensorEntry]
    config_overrides: Mapping[str, Any] = field(default_factory=dict)

    def part(self, entry: TensorEntry, part: str) -> torch.Tensor:
        dtype, shape = entry.parts()[part]
        return synthetic.random_part(dtype, shape, torch.Generator(synthetic.device()).manual_seed(0))


def random_weights(config: ModelConfig, dtype: torch.dtype) -> Weights:
    """Of the size of trained ones, made on the device."""
    parameters, device = Parameters.of(config), gpu_timing.device()
    rows: dict[str, int] = {}
    columns: dict[str, int] = {}
    for place in parameters.linears.values():
        rows[place.target] = max(rows.get(place.target, 0), place.start + place.rows)
        columns[place.target] = place.columns
    targets = {
        name: torch.empty(n, columns[name], dtype=dtype, device=device).normal_(0.0, columns[name] ** -0.5)
        for name, n in rows.items()
    }
    return Weights(targets, torch.ones(parameters.vector_elements, dtype=dtype, device=device), parameters)


class World:
    """One base, `variants` variants of one kind that differ in address alone."""

    def __init__(self, shape: Shape, kind: Kind | None, variants: int, dtype: torch.dtype, *, rank: int = 16) -> None:
        self.shape, self.dtype, self.device = shape, dtype, gpu_timing.device()
        self.config = shape.model()
        self.weights = random_weights(self.config, dtype)
        found = synthetic.entries(self.config, kind, rank=rank) if kind else []
        delta = RandomDelta({entry.name: entry for entry in found})
        self.layout = DeviceLayout.plan(delta, self.config, dtype)
        read = RandomDelta({name: entry for name, entry in delta.tensors.items() if name != EMBED})
        self.delta_bytes = DeviceLayout.plan(read, self.config, dtype).nbytes
        """What a step reads of one variant: everything but the embedding, of which it reads a row"""
        self.variants = variants if kind else 0
        base_bytes = DeltaTables.base_bytes(self.weights.vectors_V)
        self.slab = torch.zeros(base_bytes + self.variants * self.layout.nbytes, dtype=torch.uint8, device=self.device)
        self.tables = DeltaTables(self.config, self.weights.vectors_V, self.slab, 0, max(1, self.variants))
        self.decoder = DeviceDecoder(self.config, self.weights, self.tables)
        self._fill(delta, base_bytes)

    def _fill(self, delta: RandomDelta, start: int) -> None:
        if not self.variants:
            return
        host = torch.zeros(self.layout.nbytes, dtype=torch.uint8)
        for part in self.layout.parts:
            if isinstance(part, ByteFactors):
                _fill_factors(part, host)
            else:
                part.fill(delta, host, self.weights.linear_weight)
        one = host.to(self.device)
        for slot in range(self.variants):
            at = start + slot * self.layout.nbytes
            self.slab[at : at + self.layout.nbytes] = one
            self.tables.publish(slot, self.layout, at)

    @property
    def base_bytes(self) -> int:
        """What a step reads of the base: everything but the embedding's other rows."""
        linears = {name: w.nbytes for name, w in self.weights.targets.items() if name != "embed"}
        return sum(linears.values()) + self.weights.vectors_V.nbytes

    def kv_bytes(self, rows: int, context: int) -> int:
        c = self.config
        return rows * context * c.num_layers * 2 * c.num_kv_heads * c.head_dim * self.dtype.itemsize


def _fill_factors(part: ByteFactors, host: torch.Tensor) -> None:
    """Small integers, and scales; nothing is decoded, which takes longer than all else here."""
    part.b.view(host).random_(-3, 4)
    a, values = part.a.view(host), len(part.target.members) * part.rank * part.target.inputs
    a[:values].random_(-3, 4)
    a[values:].view(torch.float32).fill_(1e-4)


class DecodeStep:
    """`rows` sequences at `context`, row i of variant i % variants; sampled greedily, all inside one call."""

    def __init__(self, world: World, rows: int, variants: int, context: int) -> None:
        self.world, self.rows, self.context = world, rows, context
        self.blocks = -(-context // BLOCK)
        self.kv = DeviceKVCache(world.config, rows * self.blocks + 1, BLOCK, device=world.device, dtype=world.dtype)
        self.kv.blocks_LB2GSD.normal_()
        world.decoder.reserve(rows, 0)
        self.buffers = StepBuffers(StepSize.decode(rows, self.blocks), world.device)
        self.sampled = Sampled.empty(rows, world.device)
        self.workspace = Workspace.empty(rows, widest_vocabulary(world.config), world.device)
        self.kinds = world.layout.kinds if variants else StepKinds()
        if variants == rows:
            self.kinds = single(self.kinds)
        self._write([i * variants // rows + 1 for i in range(rows)] if variants else [0] * rows)

    def _write(self, entries: Sequence[int]) -> None:
        step, last = self.buffers.begin(), self.context - 1
        step.tokens_T[:] = np.arange(self.rows) % 200 + 5
        step.positions_T[:] = last
        step.entry_T[:] = entries
        order = np.random.default_rng(0).permutation(self.rows * self.blocks) + 1
        step.block_tables_SM[:] = order.reshape(self.rows, self.blocks)
        step.kv_slots_T[:] = step.block_tables_SM[:, last // BLOCK] * BLOCK + last % BLOCK
        step.context_lens_S[:] = self.context
        step.set_starts(list(range(self.rows + 1)))
        distinct = [e for e in dict.fromkeys(entries) if e > 0]
        runs = [(e, entries.index(e), entries.index(e) + entries.count(e)) for e in distinct]
        for segments_G4 in (step.segments_G4, step.logit_segments_G4):
            table = segment_table(runs)
            segments_G4[: len(table)] = np.array(table).reshape(-1, 4)
        step.logit_rows_L[:] = np.arange(self.rows)
        line = RowValues(vocab=self.world.config.vocab_size, temperature=0.0)
        step.sampling_LF[:] = np.frombuffer(line.pack(0), np.int32)
        self.wants = line.wants
        self.buffers.upload()

    def __call__(self) -> None:
        logits = self.world.decoder.decode(self.buffers.rows, self.sampled.token_S, self.kv, self.kinds)
        sample(logits, self.buffers.sampling, None, self.sampled, self.workspace, self.wants, impl="triton")
