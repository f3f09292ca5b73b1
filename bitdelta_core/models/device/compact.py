"""`deltadq` members whose masks are shared by blocks of outputs, in the slab as they are stored: kept values alone.

Every other form of a dropout has all inputs of a matrix, most of them zeros. This one takes `bits` / alpha bits a
weight, a byte for each kept input of a mask block, and a scale for each output.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

import torch

from bitdelta_core.delta import deltadq
from bitdelta_core.delta.quant import unpack
from bitdelta_core.delta.spec import TensorEntry
from bitdelta_core.models.forms import BaseWeight, Member, Reader, Region, Take, check_finite
from kernels.device import UNIT, Field, Kinds, Target
from kernels.fragments import TILE_ROWS, tiles
from kernels.kept import MASK_ROWS, MAX_BITS, MAX_GROUP, MAX_KEPT, Form, pack_inputs, pack_values

CHUNK_ROWS = 64 * TILE_ROWS
"""Rows packed at a time: a multiple of every mask block"""


def compact_members(members: Sequence[Member]) -> list[Member]:
    """Those of one target that can stand in one compact part: of the form of the first that has one."""
    able = [member for member in members if _is_compact(member.entry)]
    return [member for member in able if _alike(member.entry, able[0].entry)]


def _is_compact(entry: TensorEntry) -> bool:
    """Masks of blocks, whose places in a group are bytes; and something is dropped at all."""
    if entry.codec != "deltadq" or entry.mask_rows not in MASK_ROWS:
        return False
    fits = entry.group <= MAX_GROUP and entry.group // entry.alpha <= MAX_KEPT and entry.bits <= MAX_BITS
    return fits and entry.alpha > 1


def _alike(a: TensorEntry, b: TensorEntry) -> bool:
    return (a.bits, a.group, a.alpha, a.mask_rows) == (b.bits, b.group, b.alpha, b.mask_rows)


@dataclass(frozen=True, slots=True)
class Compact:
    """Kept values among nothing."""

    target: Target
    members: tuple[Member, ...]
    form: Form
    values: Region
    inputs: Region

    @classmethod
    def plan(cls, target: Target, outputs: int, members: Sequence[Member], take: Take) -> Compact:
        entry = members[0].entry
        # Where a member begins inside a block of 64, each 16 rows have the block's inputs for themselves.
        whole = all(start % entry.mask_rows == 0 for start in target.members)
        mask_rows = entry.mask_rows if whole else TILE_ROWS
        form = Form(entry.bits, entry.group, entry.group // entry.alpha, mask_rows)
        high = tiles(outputs, 1)[0]
        values = take(form.tile_shape(outputs, target.inputs), torch.int32)
        nbytes = 4 * TILE_ROWS * high + prod(form.input_shape(outputs, target.inputs))
        return cls(target, tuple(members), form, values, take((nbytes,), torch.uint8))

    @property
    def fields(self) -> Mapping[Field, int]:
        return {
            Field.KEPT: self.values.start // UNIT,
            Field.INPUTS: self.inputs.start // UNIT,
            Field.FORM: self.form.code,
        }

    @property
    def kinds(self) -> Kinds:
        return Kinds(compact=self.form.bits, tall=self.form.mask_rows == 64)

    def fill(self, reader: Reader, buffer: torch.Tensor, base: BaseWeight) -> None:
        values_HPCLc, inputs = self.values.view(buffer), self.inputs.view(buffer).zero_()
        high = values_HPCLc.shape[0]
        step_N = inputs[: 4 * TILE_ROWS * high].view(torch.float32)
        blocks = -(-high * TILE_ROWS // self.form.mask_rows)
        places_MCLj = inputs[4 * TILE_ROWS * high :].view(-1, *self.form.input_shape(1, self.target.inputs)[1:])[
            :blocks
        ]
        if sum(tiles(member.entry.shape[0], 1)[0] for member in self.members) < high:
            values_HPCLc.zero_()
        for member in self.members:
            start, first = member.place.start, member.place.start // TILE_ROWS
            steps = step_N[start : start + member.entry.shape[0]]
            scales = {part: reader.part(member.entry, part) for part in member.entry.parts() if part != "code"}
            steps.copy_(deltadq.half_scales(member.entry, scales))
            check_finite(steps, member.entry, "scale")
            _fill_values(member.entry, reader.part(member.entry, "code"), self.form, values_HPCLc[first:])
            _fill_inputs(member.entry, self.form, places_MCLj[start // self.form.mask_rows :])


def _fill_values(entry: TensorEntry, code_Nk: torch.Tensor, form: Form, out_HPCLc: torch.Tensor) -> None:
    for at in range(0, code_Nk.shape[0], CHUNK_ROWS):  # what is worked on stays in the cache
        q_RV = unpack(code_Nk[at : at + CHUNK_ROWS], entry.bits, entry.kept)
        first = at // TILE_ROWS
        pack_values(q_RV, form, out_HPCLc[first : first + tiles(q_RV.shape[0], 1)[0]])


def _fill_inputs(entry: TensorEntry, form: Form, out_MCLj: torch.Tensor) -> None:
    blocks = form.blocks(entry.shape[0])
    columns_MV = deltadq.kept_columns(entry).repeat_interleave(entry.mask_rows // form.mask_rows, 0)[:blocks]
    pack_inputs(columns_MV, form, out_MCLj[:blocks])
