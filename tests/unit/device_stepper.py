"""Feeds the device decoder steps the way the engine does, in memory where nothing but what was written makes sense."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

import pytest
import torch

from bitdelta_core.checkpoint import Checkpoint
from bitdelta_core.models.config import ModelConfig
from bitdelta_core.models.device.decoder import DeviceDecoder
from bitdelta_core.models.device.layout import DeviceLayout
from bitdelta_core.models.device.loading import load_weights
from bitdelta_core.models.device.passes import WideStep
from bitdelta_core.models.device.step import HostStep, StepBuffers, StepSize
from bitdelta_core.models.device.tables import DeltaTables
from bitdelta_core.models.variant import DeltaConfigLike
from bitdelta_core.models.weights import Weights
from kernels.delta_linear import choice, compact
from kernels.delta_linear.row_tiles import row_tiles
from kernels.device import UNIT, segment_table
from tests.unit.models_harness import Running

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPE: torch.dtype = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32
BLOCK, BLOCKS = 8, 64
BUCKETS = (1, 2, 4, 8, 16, 32)
WIDE_ROWS = 192
SAMPLED = 16


def pretend_b1(patch: pytest.MonkeyPatch) -> None:
    """Choose as on a chip with a binary tensor core."""
    rule = choice.rule
    patch.setattr(choice, "rule", lambda target, rows, kinds, b1, *rest: rule(target, rows, kinds, True, *rest))
    patch.setattr(compact, "choose", lambda target, rows, kinds, device: compact.rule(kinds))


def error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """In units of the expected values' root mean square: the largest in float32, in 16 bits the root mean square."""
    off = actual - expected
    size = off.abs().max() if DEVICE.type == "cpu" else off.square().mean().sqrt()
    return float(size / expected.square().mean().sqrt())


class Rig:
    """A base on the device, and a slab of poison with variants in it."""

    def __init__(self, base: Path, *, slots: int = 16, slab_bytes: int = 8 << 20) -> None:
        checkpoint = Checkpoint(base)
        self.config = ModelConfig.from_hf(checkpoint.config)
        self.weights: Weights = load_weights(checkpoint, self.config, device=DEVICE, dtype=DTYPE)
        slab = torch.full((slab_bytes,), 255, dtype=torch.uint8, device=DEVICE)
        self.tables = DeltaTables(self.config, self.weights.vectors_V, slab, UNIT, slots)
        self.decoder = DeviceDecoder(self.config, self.weights, self.tables)
        self.decoder.reserve(BUCKETS[-1], WIDE_ROWS)
        self.at = 2 * UNIT + DeltaTables.base_bytes(self.weights.vectors_V)
        self.layouts: dict[int, DeviceLayout] = {}
        self.starts: dict[int, int] = {}

    def add(self, slot: int, delta: DeltaConfigLike, reader: object = None) -> DeviceLayout:
        """Fill, copy and publish; poison stays around it."""
        layout = DeviceLayout.plan(delta, self.config, DTYPE)
        host = torch.full((layout.nbytes,), 255, dtype=torch.uint8)
        layout.fill(reader or delta, host, self.weights)  # pyright: ignore[reportArgumentType]
        self.tables.deltas.slab[self.at : self.at + layout.nbytes] = host.to(DEVICE)
        self.tables.publish(slot, layout, self.at)
        self.layouts[slot], self.starts[slot] = layout, self.at
        self.at += -(-layout.nbytes // UNIT) * UNIT + UNIT
        return layout

    def vocabulary(self, slot: int) -> int:
        return self.config.vocab_size if slot < 0 else self.layouts[slot].config.vocab_size


class DeviceStepper:
    """Rows that stand alone go through `decode`, padded to a graph's size; chunks through `prefill`."""

    def __init__(self, rig: Rig, *, alone: bool = True) -> None:
        """`alone`: False sends single rows through `prefill` too."""
        self.rig = rig
        self.alone = alone
        self.kv = rig.decoder.new_kv_cache(BLOCKS, BLOCK)
        self.kv.blocks_LB2GSD.fill_(torch.nan)
        self._free = torch.randperm(BLOCKS - 1, generator=torch.Generator().manual_seed(5)).add(1).tolist()
        blocks = BLOCKS // 4
        self._narrow = {rows: StepBuffers(StepSize.decode(rows, blocks), DEVICE) for rows in BUCKETS}
        size = StepSize(rows=WIDE_ROWS, sequences=24, segments=WIDE_ROWS, logits=WIDE_ROWS, blocks=blocks, tiles=64)
        self._wide = StepBuffers(size, DEVICE)
        self._sampled_S = torch.full((SAMPLED,), -1, dtype=torch.int32, device=DEVICE)

    def run(self, sequences: Sequence[Running], chunks: Sequence[int]) -> list[torch.Tensor]:
        """All rows' logits of all sequences: each step takes the next chunk size."""
        out: dict[int, list[torch.Tensor]] = {i: [] for i in range(len(sequences))}
        step = 0
        while pending := [(i, s) for i, s in enumerate(sequences) if s.done < len(s.tokens)]:
            sizes = [min(chunks[(step + i) % len(chunks)], len(s.tokens) - s.done) for i, s in pending]
            todo = [(i, s, n) for (i, s), n in zip(pending, sizes, strict=True)]
            for alone in (True, False):
                part = [t for t in todo if (self.alone and t[2] == 1) == alone]
                work = [(s, n) for _, s, n in part]
                logits = [] if not work else self.decode([s for s, _ in work]) if alone else self.prefill(work)
                for (i, _, _), rows in zip(part, logits, strict=True):
                    out[i].append(rows)
            step += 1
        return [torch.cat(parts) for parts in out.values()]

    def decode(self, sequences: Sequence[Running]) -> list[torch.Tensor]:
        """The next row of each."""
        buffers = self._narrow[next(b for b in BUCKETS if b >= len(sequences))]
        self._write(buffers.begin(), [(s, 1) for s in sequences])
        buffers.upload()
        self._poison()
        logits = self.rig.decoder.decode(buffers.rows, self._sampled_S, self.kv, self.rig.tables.kinds)
        return list(logits[: len(sequences)].to("cpu", copy=True).split(1))

    def prefill(self, work: Sequence[tuple[Running, int]]) -> list[torch.Tensor]:
        """The next rows of each sequence, with the logits of all of them."""
        host, rows = self._wide.begin(), sum(n for _, n in work)
        segments = self._write(host, work)
        tiles = row_tiles(segments)
        host.tiles_I4[: len(tiles)] = tiles
        self._wide.upload()
        self._poison()
        step = WideStep(
            rows=self._wide.narrowed(rows, len(work), len(segment_table(segments)), rows),
            segments=segments,
            tiles_I4=self._wide.tiles(len(tiles)),
            max_query=max(n for _, n in work),
        )
        logits = self.rig.decoder.prefill(step, self._sampled_S, self.kv, self.rig.tables.kinds)
        return list(logits.to("cpu", copy=True).split([n for _, n in work]))

    def _write(self, host: HostStep, work: Sequence[tuple[Running, int]]) -> list[tuple[int, int, int]]:
        """All rows want logits. Every third token comes from the device's memory of the last step."""
        at, starts = 0, [0]
        for i, (seq, rows) in enumerate(work):
            positions = range(seq.done, seq.done + rows)
            while len(seq.blocks) * BLOCK < positions.stop:
                seq.blocks.append(self._free.pop())
            for p in positions:
                host.tokens_T[at] = seq.tokens[p]
                if at % 3 == 0 and at // 3 < SAMPLED:
                    host.tokens_T[at], host.source_T[at] = 0, SAMPLED - 1 - at // 3
                    self._sampled_S[SAMPLED - 1 - at // 3] = seq.tokens[p]
                host.positions_T[at], host.entry_T[at] = p, seq.slot + 1
                host.kv_slots_T[at] = seq.blocks[p // BLOCK] * BLOCK + p % BLOCK
                host.logit_rows_L[at] = at
                at += 1
            host.context_lens_S[i] = seq.done = positions.stop
            host.block_tables_SM[i, : len(seq.blocks)] = seq.blocks
            host.block_tables_SM[i, len(seq.blocks) :] = -1
            starts.append(at)
        host.set_starts(starts)
        segments = _segments([(seq.slot + 1, rows) for seq, rows in work])
        table = segment_table(segments)
        host.segments_G4[: len(table)] = host.logit_segments_G4[: len(table)] = table or 0
        return segments

    def _poison(self) -> None:
        """NaN in every float of the working memory."""
        self.rig.decoder.work.fill_(255)


def _segments(work: Sequence[tuple[int, int]]) -> list[tuple[int, int, int]]:
    segments, at = [], 0
    for entry, group in groupby(work, key=lambda item: item[0]):
        stop = at + sum(rows for _, rows in group)
        segments.append((entry, at, stop))
        at = stop
    return segments
