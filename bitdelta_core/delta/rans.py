"""Entropy codes of many matrices at once, on any device: the same bytes as `entropy.py` makes and reads.

In torch's operations, for a GPU, for which a step's size hardly matters, so that it codes a layer in the time of a
matrix. On a CPU `entropy.decode_together` is several times as fast.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache

import torch

from bitdelta_core.delta import entropy
from bitdelta_core.delta.entropy import CLASSES, LIMIT, BadCode, lanes_of

_VALUES = 2 * LIMIT + 1
_NOTHING = CLASSES * _VALUES
"""The symbol, and CLASSES the class, of a lane that has no value in a step: it leaves the state as it is."""
_LOW = 1 << 16
_CELLS = 1 << 24
"""Of a grid of steps and lanes, worked on at once."""
Item = tuple[torch.Tensor, torch.Tensor]


def encode(items: Sequence[Item], device: torch.device) -> list[torch.Tensor]:
    """The code, uint8 on the CPU, of each pair (int8 [S] values, uint8 [S] classes)."""
    if not items:
        return []
    spans = _spans([len(values) for values, _ in items])
    grid = _grid([c.to(device).short() * _VALUES + v.to(device).short() + LIMIT for v, c in items], _NOTHING, device)
    counts, starts = (table.to(device) for table in _tables())
    state = torch.full((grid.shape[1],), _LOW, dtype=torch.int64, device=device)
    words: list[list[torch.Tensor]] = [[] for _ in items]
    for chunk in reversed(list(_chunks(grid))):
        symbol = chunk.int()
        state, word, full = _pushed(state, counts[symbol], starts[symbol])
        for found, span in zip(words, spans, strict=True):
            found.append(word[:, span][full[:, span]].cpu())
    last = state.cpu()
    return [
        torch.cat([_bytes(last[span], 4), *(_bytes(part, 2) for part in reversed(found))])
        for found, span in zip(words, spans, strict=True)
    ]


def decode(items: Sequence[Item], device: torch.device) -> list[torch.Tensor]:
    """int8 [S] values on the device, of each pair (uint8 code, uint8 [S] classes).

    Raises:
        BadCode: one is too short, too long, or not what an encoder leaves.
    """
    if not items:
        return []
    sizes = [len(classes) for _, classes in items]
    spans = _spans(sizes)
    for code, classes in items:
        lanes = lanes_of(len(classes))
        if len(code) < 4 * lanes or len(code) % 2 or bool((classes >= CLASSES).any()):
            raise BadCode(f"{len(code)} bytes for {len(classes)} symbols in {lanes} lanes")
    pull = _Pull(items, spans, device)
    grid = _grid([classes.to(device).short() for _, classes in items], CLASSES, device)
    values = torch.cat([pull.steps(chunk) for chunk in _chunks(grid)])
    pull.check()
    return [values[:, span].flatten()[:size] for span, size in zip(spans, sizes, strict=True)]


class _Pull:
    """The states of all lanes while decoding, and where in its words each item is."""

    def __init__(self, items: Sequence[Item], spans: Sequence[slice], device: torch.device) -> None:
        codes = [code.to(device) for code, _ in items]
        heads = [4 * (span.stop - span.start) for span in spans]
        self.state = torch.cat([_numbers(code[:head], 4) for code, head in zip(codes, heads, strict=True)])
        tails = [_numbers(code[head:], 2) for code, head in zip(codes, heads, strict=True)]
        ends = torch.tensor([0, *(len(tail) for tail in tails)]).cumsum(0).to(device)
        self.words = torch.cat([*tails, torch.zeros(1, dtype=torch.int64, device=device)])
        first, past = (
            torch.tensor([getattr(span, side) for span in spans], device=device) for side in ("start", "stop")
        )
        self.heads, sizes = first, past - first
        self.first, self.past, self.at, self.ends = (
            x.repeat_interleave(sizes) for x in (first, past, ends[:-1], ends[1:])
        )
        self.before = torch.zeros(len(self.first) + 1, dtype=torch.int64, device=device)
        self.values, self.counts, self.offsets = (table.to(device) for table in _places())

    def steps(self, classes: torch.Tensor) -> torch.Tensor:
        """int8: the values of so many steps."""
        found = torch.empty(classes.shape, dtype=torch.int8, device=classes.device)
        last = len(self.words) - 1
        for row, start in zip(found, classes.long() * _LOW, strict=True):
            place = (self.state & 0xFFFF) + start
            torch.index_select(self.values, 0, place, out=row)
            state = torch.addcmul(self.offsets[place], self.counts[place], self.state >> 16)
            short = state < _LOW
            torch.cumsum(short, 0, out=self.before[1:])
            own = self.at - self.before[self.first]
            word = self.words[(self.before[:-1] + own).clamp_(max=last)]
            self.state = torch.where(short, state << 16 | word, state)
            self.at = own + self.before[self.past]
        return found

    def check(self) -> None:
        bad = (self.at != self.ends) | (self.state != _LOW)
        if bad.any():
            item = int((self.heads <= bad.nonzero()[0, 0]).sum()) - 1
            raise BadCode(f"item {item} does not end where its last symbol does")


def _pushed(
    state: torch.Tensor, counts: torch.Tensor, starts: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(states, words, which of them count) after these steps, the last one first."""
    full = torch.empty(counts.shape, dtype=torch.bool, device=counts.device)
    word = torch.empty_like(counts)
    limits, rests = counts << 16, _LOW - counts
    for step in reversed(range(len(counts))):
        torch.ge(state, limits[step], out=full[step])
        word[step].copy_(state)
        state = torch.where(full[step], state >> 16, state)
        # (x // c << 16) + x % c + start
        state = torch.addcmul(state + starts[step], state // counts[step], rests[step])
    return state, word & 0xFFFF, full


def _spans(sizes: Sequence[int]) -> list[slice]:
    """The lanes of each item in a grid."""
    found, start = [], 0
    for size in sizes:
        found.append(slice(start, start + lanes_of(size)))
        start = found[-1].stop
    return found


def _grid(items: Sequence[torch.Tensor], nothing: int, device: torch.device) -> torch.Tensor:
    """int16 [steps, lanes]: the items side by side, as many steps as the longest takes."""
    spans = _spans([len(item) for item in items])
    steps = max(-(-len(item) // (span.stop - span.start)) for item, span in zip(items, spans, strict=True))
    grid = torch.full((steps, spans[-1].stop), nothing, dtype=torch.int16, device=device)
    for item, span in zip(items, spans, strict=True):
        lanes = span.stop - span.start
        whole, rest = divmod(len(item), lanes)
        grid[:whole, span] = item[: whole * lanes].view(whole, lanes)
        if rest:
            grid[whole, span.start : span.start + rest] = item[whole * lanes :]
    return grid


def _chunks(grid: torch.Tensor) -> Iterator[torch.Tensor]:
    yield from grid.split(max(1, _CELLS // grid.shape[1]))


@lru_cache(maxsize=1)
def _tables() -> tuple[torch.Tensor, torch.Tensor]:
    """int64 [_NOTHING + 1] each: count and start of every symbol, those of `_NOTHING` last."""
    counts = torch.from_numpy(entropy.frequencies().astype("int64"))
    starts = counts.cumsum(1) - counts
    return torch.cat([counts.flatten(), torch.tensor([_LOW])]), torch.cat([starts.flatten(), torch.tensor([0])])


@lru_cache(maxsize=1)
def _places() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """[(CLASSES + 1) * 2^16] each, of every place of each class: value (int8), count, and place less start (int64)."""
    counts, starts = (table[:-1].view(CLASSES, _VALUES) for table in _tables())
    values = torch.cat([torch.arange(_VALUES).repeat_interleave(row) for row in counts])
    classes = torch.arange(CLASSES).repeat_interleave(_LOW)
    inside = torch.arange(_LOW).repeat(CLASSES)
    nothing = torch.zeros(_LOW, dtype=torch.int64)
    return (
        torch.cat([values - LIMIT, nothing]).to(torch.int8),
        torch.cat([counts[classes, values], nothing + _LOW]),
        torch.cat([inside - starts[classes, values], torch.arange(_LOW)]),
    )


def _bytes(numbers: torch.Tensor, width: int) -> torch.Tensor:
    """uint8: little-endian."""
    return (numbers[:, None] >> torch.arange(0, 8 * width, 8)).bitwise_and_(0xFF).to(torch.uint8).flatten()


def _numbers(data: torch.Tensor, width: int) -> torch.Tensor:
    """int64 of little-endian bytes."""
    shifts = torch.arange(0, 8 * width, 8, device=data.device)
    return (data.view(-1, width).long() << shifts).sum(1)
