"""A layout filled into a slab, and read back through its table row by the definitions of `Field`."""

from __future__ import annotations

from itertools import pairwise
from math import prod

import numpy as np
import torch

from bitdelta_core.models.decoder import Decoder
from bitdelta_core.models.device.layout import DeviceLayout
from bitdelta_core.models.device.targets import targets_of
from bitdelta_core.models.parameters import Parameters
from kernels.delta_linear.reference import unpack_values
from kernels.device import BYTES, NONE, UNIT, Field, Target
from kernels.fragments import tiles, unpack
from kernels.kept import Form
from tests.unit.models_harness import FakeDelta

START = 3 * UNIT


class Filled:
    """A layout in a poisoned slab, and what its table row says of a target."""

    def __init__(self, decoder: Decoder, delta: FakeDelta) -> None:
        self.layout = DeviceLayout.plan(delta, decoder.config, torch.float32)
        self.slab = torch.full((START + self.layout.nbytes + UNIT,), 255, dtype=torch.uint8)
        host = torch.full((self.layout.nbytes,), 255, dtype=torch.uint8)
        self.layout.fill(delta, host, decoder)
        self.slab[START : START + self.layout.nbytes] = host
        self.table = self.layout.row(START)

    def part(self, target: Target, field: Field, dtype: torch.dtype, *shape: int) -> torch.Tensor:
        at = int(self.table[target.index, field])
        assert at != NONE
        nbytes = torch.Size(shape).numel() * dtype.itemsize
        return self.slab[at * UNIT : at * UNIT + nbytes].view(dtype).view(shape)

    def matrix(self, target: Target, base_NK: torch.Tensor) -> torch.Tensor:
        """The variant's whole matrix."""
        row = {field: int(self.table[target.index, field]) for field in Field}
        n, k = row[Field.OUTPUTS] or target.outputs, target.inputs
        whole = torch.zeros(n, k)
        whole[: base_NK.shape[0]] = base_NK
        if row[Field.PLANES]:
            whole += self._signs(target, n, row)
        if row[Field.FORM]:
            whole += self._kept(target, n, Form.of(row[Field.FORM]))
        if row[Field.RANK]:
            whole += self._low_rank(target, n, row[Field.RANK])
        if row[Field.DENSE] != NONE:
            whole += self.part(target, Field.DENSE, torch.float32, n, k)
        if count := row[Field.ROWS]:
            index = self.part(target, Field.ROW_INDEX, torch.int32, count)
            assert (index[1:] > index[:-1]).all()
            whole[index.long()] = self.part(target, Field.ROW_VALUE, torch.float32, count, k)
        return whole

    def _low_rank(self, target: Target, n: int, field: int) -> torch.Tensor:
        rank, stored = field // 16 * 16, torch.int8 if field % 16 == BYTES else torch.float32
        count = len(target.members) * rank * target.inputs
        a_mrK = self.part(target, Field.LORA_A, stored, count).view(-1, rank, target.inputs).float()
        b_Nr = self.part(target, Field.LORA_B, stored, n, rank).float()
        if stored == torch.int8:
            room = self.part(target, Field.LORA_A, torch.uint8, count + 4 * len(target.members) * rank)
            a_mrK = a_mrK * room[count:].view(torch.float32).view(-1, rank, 1)
        spans = pairwise([*target.members, n])
        return torch.cat([b_Nr[start:stop] @ a_mrK[m] for m, (start, stop) in enumerate(spans)])

    def _signs(self, target: Target, n: int, row: dict[Field, int]) -> torch.Tensor:
        planes, k, (high, wide) = row[Field.PLANES], target.inputs, tiles(n, target.inputs)
        words = self.part(target, Field.SIGN, torch.int32, planes, high, wide, 32, 4)
        signs = unpack_values(unpack(words, n, k).flatten(0, 1), 1)[:, :k].view(planes, n, k) * 2 - 1
        scale = self.part(target, Field.SCALE, torch.float32, planes, high * 16)
        assert (scale[:, n:] == 0).all()
        col = torch.ones(planes, n, k)
        if row[Field.COL] != NONE:
            cols = self.part(target, Field.COL, torch.float32, planes, len(target.members), wide * 256)
            assert (cols[..., k:] == 0).all()
            for m, (start, stop) in enumerate(pairwise([*target.members, n])):
                col[:, start:stop] = cols[:, m, None, :k]
        difference = (signs * scale[:, :n, None] * col).sum(0)
        if row[Field.ZERO] != NONE:
            zero = self.part(target, Field.ZERO, torch.float32, high * 16)
            assert row[Field.COL] == NONE
            assert (zero[n:] == 0).all()
            difference += zero[:n, None]
        return difference

    def _kept(self, target: Target, n: int, form: Form) -> torch.Tensor:
        """Element by element, as `kernels.kept` and `kernels.fragments` define the orders."""
        k, high = target.inputs, tiles(n, 1)[0]
        packed = self.part(target, Field.KEPT, torch.int32, *form.tile_shape(n, k)).view(torch.uint8)
        bits = np.unpackbits(packed.numpy(), axis=-1, bitorder="little").reshape(*packed.shape[:3], 8, 4, 4, 32)
        room = 64 * high + prod(form.input_shape(n, k))
        inputs = self.part(target, Field.INPUTS, torch.uint8, room)
        step, places = inputs[: 64 * high].view(torch.float32), inputs[64 * high :].view(form.input_shape(n, k))
        assert (step[n:] == 0).all()
        whole = torch.zeros(n, form.values(k) // form.kept * form.group)
        for v in range(form.values(k)):
            c, j, lane = v // 256, v // 32 % 8, v % 32
            g, q = lane // 4, lane % 4
            column = v // form.kept * form.group + places[:, c, lane, j].long()
            for row in range(n):
                word = bits[row // 16, :, c, row % 8, q, row % 16 // 8 + 2 * (g // 4)]
                value = sum(int(bit) << p for p, bit in enumerate(word[:, 8 * (g % 4) + j]))
                whole[row, column[row // form.mask_rows]] += (2 * value - (2**form.bits - 1)) * step[row]
        return whole[:, :k]


def check(decoder: Decoder, delta: FakeDelta, base: dict[str, torch.Tensor], *, untied: bool = False) -> Filled:
    """Every matrix and vector of the merged model, from table and slab alone."""
    filled = Filled(decoder, delta)
    merged, config = delta.merged(base, untied=untied), filled.layout.config
    targets = targets_of(decoder.config)
    for name, place in Parameters.of(config).linears.items():
        target = targets[place.target]
        own = filled.matrix(target, decoder.weights.targets[place.target])[place.start : place.start + place.rows]
        torch.testing.assert_close(own, merged[name], rtol=1e-5, atol=1e-6)
    if (at := filled.layout.vectors_at(START)) is not None:
        block = filled.slab[at * UNIT :][: decoder.vectors_V.nbytes].view(torch.float32)
        for name, span in Parameters.of(config).vectors.items():
            assert torch.equal(block[span.start : span.stop], merged[name])
    return filled
