"""Which graph serves a step, and when one is captured."""

from __future__ import annotations

import pytest

from bitdelta_core.engine.graphs import BASE, MAX_FAMILIES, DecodeGraphs, Shape
from bitdelta_core.models.device.kinds import StepKinds, single, step_union
from kernels.device import Kinds
from kernels.sampling.rows import GREEDY, Wants
from tests.unit.engine_device_fakes import LatePlain

SIGNS = StepKinds(layers=Kinds(signs=True))
ANY = Wants()


def graphs(max_rows: int = 8, sizes: tuple[int, ...] | None = (1, 2, 4, 8)) -> tuple[DecodeGraphs[Shape], LatePlain]:
    accelerator = LatePlain()
    return DecodeGraphs(accelerator, lambda shape: shape, max_rows=max_rows, sizes=sizes), accelerator


@pytest.mark.parametrize(("rows", "size"), [(1, 1), (2, 2), (3, 4), (5, 8), (8, 8)])
def test_a_step_is_padded_to_the_next_size(rows: int, size: int) -> None:
    assert graphs()[0].shape_for(rows, BASE, GREEDY).rows == size


def test_sizes_end_at_the_largest_step() -> None:
    assert graphs(20, None)[0].sizes == (1, 2, 4, 8, 16, 20)
    assert graphs(20, (4, 64))[0].sizes == (4, 20)
    assert graphs(20, ())[0].sizes == (20,)


def test_what_is_not_to_be_captured_is_launched() -> None:
    made, accelerator = graphs(20, (4,))
    shape = made.shape_for(5, SIGNS, ANY)
    assert not made.is_missing(shape)
    assert made.launch(shape) == shape
    assert accelerator.captures == 0


def test_each_shape_is_captured_once() -> None:
    made, accelerator = graphs()
    made.capture_all([])
    before = accelerator.captures
    assert before == 4 * 2 == made.captured
    for rows in (3, 4):
        shape = made.shape_for(rows, SIGNS, GREEDY)
        if made.is_missing(shape):
            made.capture(shape)
        assert made.launch(shape) == shape
    assert accelerator.captures == before + 1


def test_what_is_expected_is_captured_at_the_start() -> None:
    made, accelerator = graphs()
    made.capture_all([SIGNS, SIGNS, BASE])
    assert accelerator.captures == 2 * (4 + 4 + 3), (
        "the base; variants of one row each; of several, which one row is not"
    )
    for rows, kinds in ((1, single(SIGNS)), (3, single(SIGNS)), (3, SIGNS)):
        shape = made.shape_for(rows, kinds, GREEDY)
        assert shape.kinds == kinds
        assert not made.is_missing(shape)


def test_steps_of_single_rows_may_be_served_by_others_but_not_the_reverse() -> None:
    made, _ = graphs()
    assert made.shape_for(4, SIGNS, GREEDY).kinds == SIGNS
    assert made.shape_for(4, single(SIGNS), GREEDY).kinds == SIGNS, "covered"
    made, _ = graphs()
    assert made.shape_for(4, single(SIGNS), GREEDY).kinds == single(SIGNS)
    assert made.shape_for(4, SIGNS, GREEDY).kinds == SIGNS


def test_a_family_covers_what_it_was_made_for_and_less() -> None:
    made, _ = graphs()
    wide = StepKinds(Kinds(signs=True, planes=2), Kinds(rows=True), Kinds(rank=20, byte_rank=272))
    family = made.shape_for(1, wide, GREEDY).kinds
    assert (family.head.rank, family.head.byte_rank) == (32, 512), "few ranks"
    assert made.shape_for(1, SIGNS, GREEDY).kinds == family, "covered already"
    assert made.shape_for(1, BASE, GREEDY).kinds == BASE, "the narrowest"
    assert made.shape_for(1, StepKinds(Kinds(dense=True)), GREEDY).kinds == StepKinds(Kinds(dense=True))


def test_families_stay_few() -> None:
    made, _ = graphs()
    needs = [StepKinds(Kinds(planes=p, signs=True, columns=c)) for p in range(1, 9) for c in (False, True)]
    for kinds in [*needs, *reversed(needs)]:
        family = made.shape_for(1, kinds, GREEDY).kinds
        assert step_union([family, kinds]) == family
    first = {made.shape_for(1, kinds, GREEDY).kinds for kinds in needs}
    assert len(first) <= 2 * MAX_FAMILIES


@pytest.mark.parametrize(
    ("wants", "served"),
    [
        (GREEDY, GREEDY),
        (Wants(truncated=False, ranks=False), Wants(ranks=False)),
        (Wants(truncated=False), Wants()),
    ],
)
def test_sampling_is_captured_for_at_least_what_is_wanted(wants: Wants, served: Wants) -> None:
    assert graphs()[0].shape_for(1, BASE, wants).wants == served
