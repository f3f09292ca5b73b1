"""What kernels in Gluon share: names, the places of a ring, segments."""

# Triton's language is not Python's:
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportAssignmentType=false, reportAttributeAccessIssue=false, reportIndexIssue=false
# pyright: reportOperatorIssue=false

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import async_copy, mbarrier, tma

from kernels.delta_linear.triton_parts import OUTPUTS, PLANES, SCALE, SIGN, has

# Their names differ between versions of Triton.
load_box = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
copy = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared
UNDERSCORE = gl.constexpr(hasattr(gl.shared_memory_descriptor, "_reinterpret"))
"""Whether that is its name"""

ARRIVALS = gl.constexpr(33)
"""That make a place full: all lanes' copies and the warp's word, or a bulk copy that counts bytes, and 32 words"""


@gluon.jit
def slot_of(place, PLACES: gl.constexpr):
    """Where in the ring, and how many times it has been gone round, as a bit."""
    return place % PLACES, place // PLACES & 1


@gluon.jit
def await_room(full, empty, place, PLACES: gl.constexpr, FIRST: gl.constexpr, WINDOW: gl.constexpr):
    """Wait until the place is free, and no more than WINDOW are under way; FIRST, as long as the ring has not been full
    once. More keep the memory no busier, and what others ask for beside them waits for them all: the norm that makes
    this linear's rows, above all. Returns where it is."""
    slot, phase = slot_of(place, PLACES)
    mbarrier.wait(empty.index(slot), phase ^ 1)
    window = gl.where(place < PLACES, FIRST, WINDOW)
    before, phase = slot_of(gl.maximum(place - window, 0), PLACES)
    mbarrier.wait(full.index(before), phase, pred=place >= window)
    return slot


@gluon.jit
def segment(TABLE, table_stride, SEGMENTS, g, base_outputs):
    """(its entry's place in the table, first row, outputs that have signs)."""
    at = gl.load(SEGMENTS + g * 4) * table_stride
    own = gl.load(TABLE + at + OUTPUTS)
    outputs = gl.where(own > 0, own, base_outputs)
    there = has(TABLE, at, SIGN) & has(TABLE, at, SCALE) & (gl.load(TABLE + at + PLANES) > 0)
    return at, gl.load(SEGMENTS + g * 4 + 1), gl.where(there, outputs, 0)


@gluon.jit
def piece(member, tile, end, M1, M2, tiles, MEMBERS: gl.constexpr):
    """What of tiles tile .. end is of one member."""
    if MEMBERS > 1:
        tile = gl.maximum(tile, gl.where(member == 0, 0, gl.where(member == 1, M1, M2)))
        end = gl.minimum(end, gl.where(member == 0, M1, gl.where(member == 1, M2, tiles)))
    return tile, end
