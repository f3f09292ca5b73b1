"""A step on a device: a decode pass from a graph, then wide passes for prompts, and nothing waited for.

Rows take tokens that the host has not seen from what the last step sampled. The host writes metadata, launches, and
copies what was sampled into memory of its own; a step is over when the mark behind that copy is reached.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Protocol

import torch

from bitdelta_core.engine import rehearsal
from bitdelta_core.engine.accelerator import Accelerator, Mark
from bitdelta_core.engine.api import SamplingParams
from bitdelta_core.engine.device_sampler import DeviceSampler, Place, Tops
from bitdelta_core.engine.graphs import DecodeGraphs, Shape
from bitdelta_core.engine.pieces import Piece, cut, write
from bitdelta_core.engine.prompt_logprobs import PromptPart, prompt_part
from bitdelta_core.engine.runner import Outcome, Task
from bitdelta_core.engine.sequence import Sequence as EngineSequence
from bitdelta_core.models.device.decoder import MAX_ROWS
from bitdelta_core.models.device.kinds import StepKinds, few_ranks, single, step_union
from bitdelta_core.models.device.passes import WideStep
from bitdelta_core.models.device.step import StepBuffers, StepSize
from kernels.delta_linear.row_tiles import most_row_tiles, row_tiles
from kernels.device import SEGMENT_ROWS, StepRows, segment_table
from kernels.sampling import sample
from kernels.sampling.rows import SamplingRows

_VOID = 1
"""An entry without a variant, while none has been loaded"""


class PassDecoder(Protocol):
    """`models.device.decoder.DeviceDecoder`."""

    def decode(self, rows: StepRows, sampled_S: torch.Tensor, kv: Any, kinds: StepKinds) -> torch.Tensor: ...

    def prefill(self, step: WideStep, sampled_S: torch.Tensor, kv: Any, kinds: StepKinds) -> torch.Tensor: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """The largest steps there will be."""

    sequences: int
    rows: int
    blocks: int
    """Per sequence"""
    block_size: int
    vocab: int
    """Columns of logits"""

    @property
    def wide(self) -> StepSize:
        return StepSize(
            rows=self.rows,
            sequences=self.sequences,
            segments=self.sequences + MAX_ROWS // SEGMENT_ROWS,
            logits=min(MAX_ROWS, self.rows),
            blocks=self.blocks,
            tiles=most_row_tiles(self.rows, self.sequences),
        )


@dataclass(slots=True)
class DeviceStep:
    """A step under way."""

    tasks: Sequence[Task]
    places: dict[int, Place]
    tops: dict[int, tuple[Tops, int]]
    prompts: dict[int, list[PromptPart]]
    words: torch.Tensor
    mark: Mark

    def ready(self) -> bool:
        return self.mark.reached()

    def result(self) -> list[Outcome]:
        self.mark.wait()
        words = self.words.numpy()
        return [self._outcome(i, task, words) for i, task in enumerate(self.tasks)]

    def _outcome(self, index: int, task: Task, words: Any) -> Outcome:
        prompt = [row for part in self.prompts.get(index, ()) for row in part.rows()]
        place = self.places.get(index)
        if place is None:
            return Outcome(None, prompt)
        return Outcome(place.read(words, self._top(index, task)), prompt)

    def _top(self, index: int, task: Task) -> tuple[tuple[int, float], ...] | None:
        wanted = task.state.params.logprobs
        if not wanted:
            return None if wanted is None else ()
        tops, row = self.tops[index]
        return tops.of(row, wanted)


class DeviceRunner:
    """Owns the decoder, the KV cache, the buffers of steps and the sampler."""

    def __init__(
        self,
        decoder: PassDecoder,
        kv: Any,
        accelerator: Accelerator,
        limits: Limits,
        *,
        sizes: Sequence[int] | None,
        depth: int,
    ) -> None:
        """Args:
        sizes: of decode passes that are captured: see `DecodeGraphs`.
        depth: 1: the next step is launched while this one runs.
        """
        self.depth = depth
        self._decoder = decoder
        self._kv = kv
        self._accelerator = accelerator
        self._limits = limits
        self.graphs: DecodeGraphs[torch.Tensor] = DecodeGraphs(
            accelerator, self._launch_decode, max_rows=limits.sequences, sizes=sizes
        )
        sizes = self.graphs.sizes
        self._narrow = {n: StepBuffers(StepSize.decode(n, limits.blocks), accelerator.device) for n in sizes}
        self._wide = StepBuffers(limits.wide, accelerator.device)
        self.sampler = DeviceSampler(
            accelerator,
            vocab=limits.vocab,
            decode_rows=limits.sequences,
            wide_rows=limits.rows,
            pass_rows=max(limits.sequences, limits.wide.logits),
            sequences=limits.sequences,
        )
        self._prepared: tuple[StepKinds, ...] = ()
        self._place_of: dict[EngineSequence, int] = {}
        """Where the last step's tokens are."""

    @property
    def nbytes(self) -> int:
        """Device memory of the buffers, the decoder's not included."""
        return self._wide.nbytes + sum(b.nbytes for b in self._narrow.values()) + self.sampler.nbytes

    def is_synchronous(self, params: SamplingParams) -> bool:
        """Never: penalties are counted on the device, all else depends on the number of tokens alone."""
        return False

    @torch.inference_mode()
    def launch_each(self, kinds: Sequence[StepKinds] = ()) -> None:
        """The steps of `rehearsal`, and all that `warm_up` captures, for the bare base and variants with these kinds of
        deltas, by themselves and together: once, without graphs, so that `kernels.compiling.together` compiles it."""
        limits = self._limits
        steps = rehearsal.steps(limits.rows, limits.sequences, self._longest(limits.rows), limits.wide.logits)
        self._prepared = tuple(map(few_ranks, kinds))
        with self._accelerator.in_steps():
            for known in dict.fromkeys((StepKinds(), *self._prepared, step_union(self._prepared))):
                for lengths, logits in steps:
                    self._launch_wide(lengths, logits, known)
            for shape in self.graphs.expected(kinds):
                self._launch_decode(shape)

    @torch.inference_mode()
    def warm_up(self, kinds: Sequence[StepKinds] = ()) -> None:
        """The largest wide pass, then the graphs of the bare base and of variants with these kinds of deltas. All rows
        are padding, which nobody reads."""
        with self._accelerator.in_steps():
            self._launch_wide([self._longest(self._limits.rows)], 1, StepKinds())
            for buffers in self._narrow.values():
                self._pad(buffers)
            self.graphs.capture_all(kinds)

    def _longest(self, rows: int) -> int:
        """As much of a prompt of so many rows as there may be."""
        return min(rows, self._limits.rows, self._limits.blocks * self._limits.block_size)

    def _launch_wide(self, lengths: Sequence[int], logits: int, kinds: StepKinds) -> None:
        """Sequences of so many rows, all of whose blocks are block 0. Products look for the parts of an entry that has
        none yet; all else is the base's, whose numbers are finite."""
        host, ends = self._wide.begin(), list(accumulate(lengths))
        count = ends[-1]
        entry = 0 if kinds == StepKinds() else _VOID
        segments = [(entry, end - rows, end) for rows, end in zip(lengths, ends, strict=True)]
        tiles = row_tiles(segments)
        host.tiles_I4[: len(tiles)] = tiles
        host.positions_T[:count] = [place for rows in lengths for place in range(rows)]
        host.context_lens_S[: len(lengths)] = lengths
        host.set_starts([0, *ends])
        self._wide.upload()
        step = WideStep(
            rows=self._wide.narrowed(count, len(lengths), 1, logits),
            segments=segments,
            tiles_I4=self._wide.tiles(len(tiles)),
            max_query=max(lengths),
        )
        logits_LV = self._decoder.prefill(step, self.sampler.words, self._kv, kinds)[:logits]
        self.sampler.sample_padding(logits_LV, SamplingRows(self._wide.sampling.fields_SF[:logits]))

    @torch.inference_mode()
    def launch(self, tasks: Sequence[Task]) -> DeviceStep:
        narrow, wide = cut(tasks)
        prompts: dict[int, list[PromptPart]] = {}
        with self._accelerator.in_steps():
            self.sampler.begin(tasks)
            if narrow:
                self._decode(narrow)
            for pieces in wide:
                self._prefill(pieces, prompts)
            words = self._accelerator.to_host(self.sampler.words)
            mark = self._accelerator.mark()
        places = self.sampler.places
        self._place_of = {tasks[i].work.seq: place.token for i, place in places.items()}
        return DeviceStep(tasks, places, self.sampler.tops, prompts, words, mark)

    def _decode(self, pieces: Sequence[Piece]) -> None:
        shape = self.graphs.shape_for(len(pieces), _kinds(pieces), self.sampler.wants(pieces))
        buffers = self._narrow[shape.rows]
        if self.graphs.is_missing(shape):
            self._pad(buffers)
            self.graphs.capture(shape)
        host = buffers.begin()
        write(host, pieces, self._limits.block_size, self._place_of, wide=False)
        self.sampler.write_lines(host.sampling_LF, pieces)
        buffers.upload()
        logits_TV = self.graphs.launch(shape)
        self.sampler.note_decode(pieces, shape.rows)
        self.sampler.sample_apart(pieces, logits_TV)

    def _pad(self, buffers: StepBuffers) -> None:
        """A step that writes to nobody's memory, samples nothing and counts nothing."""
        buffers.begin()
        buffers.upload()

    def _launch_decode(self, shape: Shape) -> torch.Tensor:
        """What a graph holds: the decoder and the sampler."""
        buffers = self._narrow[shape.rows]
        logits_TV = self._decoder.decode(buffers.rows, self.sampler.words, self._kv, shape.kinds)
        out, s = self.sampler.decode_region(shape.rows), self.sampler
        sample(logits_TV, buffers.sampling, s.counts_QV, out, s.workspace, shape.wants)
        return logits_TV

    def _prefill(self, pieces: Sequence[Piece], prompts: dict[int, list[PromptPart]]) -> None:
        buffers = self._wide
        host = buffers.begin()
        runs, logit_runs = write(host, pieces, self._limits.block_size, self._place_of, wide=True)
        tiles = row_tiles(runs)
        host.tiles_I4[: len(tiles)] = tiles
        self.sampler.write_lines(host.sampling_LF, pieces)
        buffers.upload()
        rows, logits = sum(p.rows for p in pieces), sum(p.logits for p in pieces)
        step = WideStep(
            rows=buffers.narrowed(rows, len(pieces), max(1, len(segment_table(logit_runs))), logits),
            segments=runs,
            tiles_I4=buffers.tiles(len(tiles)),
            max_query=max(p.rows for p in pieces),
        )
        kinds = few_ranks(_kinds(pieces), self._prepared)
        logits_LV = self._decoder.prefill(step, self.sampler.words, self._kv, kinds)[:logits]
        self.sampler.sample_wide(pieces, logits_LV, SamplingRows(buffers.sampling.fields_SF[:logits]))
        self.sampler.sample_apart(pieces, logits_LV)
        at = 0
        for piece in pieces:
            if piece.task.work.prompt_logprobs:
                part = prompt_part(self._accelerator, piece, logits_LV[at : at + piece.logits])
                prompts.setdefault(piece.index, []).append(part)
            at += piece.logits

    def check_integrity(self) -> None:
        self.sampler.check_integrity()


def _kinds(pieces: Sequence[Piece]) -> StepKinds:
    """What the pieces' variants may have."""
    layouts = {piece.entry: piece.task.weights for piece in pieces if piece.entry}
    found = step_union([layout.kinds for layout in layouts.values()])
    return single(found) if sum(piece.rows for piece in pieces if piece.entry) == len(layouts) else found
