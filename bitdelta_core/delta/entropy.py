"""Entropy coding of small integers: interleaved rANS with tables that follow from integers alone.

Each row of symbols has a class, 0 to CLASSES - 1, that says how widely its values spread: a sampled Gaussian, worked
out in integers so that every machine has the same table. Symbol t * lanes + w belongs to lane w, so that one step
decodes all lanes at once. docs/delta-format.md, "Coded integers", is the specification. (rANS: Duda, arXiv 1311.2540.)
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch

LIMIT = 127
"""Values are -LIMIT to LIMIT."""
MAX_LANES, STEPS = 4096, 4096
_COUNTED = 1 << 26
"""Values that are counted at once."""
_LOW = 1 << 16
_TOTAL = 1 << 16
_DECAY = (
    729529,
    5968934,
    29356949,
    98176606,
    245104289,
    490321026,
    829266427,
    1234945025,
    1670020873,
    2099218396,
    2496548602,
    2847039003,
    3145080763,
    3391566764,
    3591156252,
    3750204082,
    3875415305,
    3973084909,
    4048740935,
    4107035638,
    4151773203,
    4186002260,
    4212130884,
    4232041259,
    4247193169,
    4258712293,
    4267462963,
    4274106705,
    4279148609,
    4282973619,
    4285874712,
    4288074638,
    4289742623,
    4291007150,
    4291965732,
    4292692343,
    4293243094,
    4293660531,
    4293976917,
    4294216708,
)
"""exp(-1 / (2 s^2)) in units of 2^-32 for s = 0.24 * 2^(c / 5), class c."""
CLASSES = len(_DECAY)


class BadCode(ValueError):
    """The bytes are no code of so many symbols of these classes."""


@lru_cache(maxsize=1)
def frequencies() -> np.ndarray:
    """uint32 [CLASSES, 2 * LIMIT + 1]: of -LIMIT .. LIMIT, each row adding up to 2^16; 0: not in the class."""
    table = np.zeros((CLASSES, 2 * LIMIT + 1), np.uint32)
    for c, decay in enumerate(_DECAY):
        weights = _weights(decay)
        total = 2 * sum(weights) - weights[0]
        counts = [max(1, weight * _TOTAL // total) for weight in weights[1:]]
        table[c, LIMIT] = _TOTAL - 2 * sum(counts)
        for q, count in enumerate(counts, 1):
            table[c, LIMIT - q] = table[c, LIMIT + q] = count
    return table


@lru_cache(maxsize=1)
def costs() -> torch.Tensor:
    """float32 [CLASSES, LIMIT + 1]: bits of a value of each magnitude; inf where the class does not have it."""
    counts = torch.from_numpy(frequencies()[:, LIMIT:].astype(np.float32))
    return 16 - counts.log2()


def best_classes(q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(uint8 [R], fp32 [R]): the class that codes each row of int8 [R, M] in fewest bits, and those bits."""
    prices = _prices(q.device)
    found = [_counted(rows) @ prices for rows in q.split(max(1, _COUNTED // max(1, q.shape[1])))]
    least = (torch.cat(found) if found else prices[:0]).min(1)
    return least.indices.to(torch.uint8), least.values


@lru_cache(maxsize=4)
def _prices(device: torch.device) -> torch.Tensor:
    return costs().nan_to_num(posinf=1e9).T.to(device)


def _counted(q: torch.Tensor) -> torch.Tensor:
    """fp32 [R, LIMIT + 1]: how often each magnitude is in each row."""
    counts = torch.zeros(q.shape[0], LIMIT + 1, device=q.device)
    return counts.scatter_add_(1, q.abs().long(), torch.ones(1, 1, device=q.device).expand(q.shape))


def encode(symbols: np.ndarray, classes: np.ndarray) -> bytes:
    """Code int8 [S] values, each of the class that stands in uint8 [S]."""
    lanes, steps = lanes_of(len(symbols)), -(-len(symbols) // lanes_of(len(symbols)))
    counts, starts = frequencies(), _starts()
    values = symbols.astype(np.int64) + LIMIT
    state = np.full(lanes, _LOW, np.uint64)
    words: list[np.ndarray] = []
    for step in reversed(range(steps)):
        span = slice(step * lanes, min((step + 1) * lanes, len(symbols)))
        count = counts[classes[span], values[span]].astype(np.uint64)
        assert count.all(), "a value that its class does not have"
        x = state[: len(count)]
        full = x >= count << np.uint64(16)
        words.append((x[full] & np.uint64(0xFFFF)).astype("<u2"))
        x = np.where(full, x >> np.uint64(16), x)
        state[: len(count)] = (x // count << np.uint64(16)) + x % count + starts[classes[span], values[span]]
    return state.astype("<u4").tobytes() + b"".join(chunk.tobytes() for chunk in reversed(words))


def decode(code: np.ndarray, classes: np.ndarray) -> np.ndarray:
    """int8 [S] values from uint8 [bytes], each of the class that stands in uint8 [S].

    Raises:
        BadCode: too short, too long, or not what an encoder leaves.
    """
    return decode_together([(code, classes)])[0]


def decode_together(items: Sequence[tuple[np.ndarray, np.ndarray]]) -> list[np.ndarray]:
    """As `decode`, of each (code, classes): a step is some twenty small array operations for all of them together.

    Raises:
        BadCode: one of them is bad.
    """
    if not items:
        return []
    order = sorted(range(len(items)), key=lambda i: -(len(items[i][1]) // lanes_of(len(items[i][1]))))
    found = _Lanes([items[i] for i in order]).values()
    return [found[order.index(i)] for i in range(len(items))]


class _Lanes:
    """The lanes of several codes side by side, those with most steps first: who still has some is at the front."""

    def __init__(self, items: Sequence[tuple[np.ndarray, np.ndarray]]) -> None:
        self.classes = [classes for _, classes in items]
        for code, classes in items:
            lanes = lanes_of(len(classes))
            if len(code) < 4 * lanes or len(code) % 2 or (classes >= CLASSES).any():
                raise BadCode(f"{len(code)} bytes for {len(classes)} symbols in {lanes} lanes")
        widths = [lanes_of(len(classes)) for classes in self.classes]
        self.edges = np.cumsum([0, *widths])
        heads = [code[: 4 * width].view("<u4") for (code, _), width in zip(items, widths, strict=True)]
        tails = [code[4 * width :].view("<u2") for (code, _), width in zip(items, widths, strict=True)]
        self.state = np.concatenate(heads).astype(np.uint32)
        self.words = np.concatenate([*tails, np.zeros(1, "<u2")]).astype(np.uint32)
        self.ends = np.cumsum([len(tail) for tail in tails])
        self.at = self.ends - [len(tail) for tail in tails]
        self.steps = [len(classes) // width for classes, width in zip(self.classes, widths, strict=True)]

    def values(self) -> list[np.ndarray]:
        """int8 of each."""
        found = np.empty((max(self.steps), self.edges[-1]), np.uint8)
        grid = np.zeros_like(found)
        for i, classes in enumerate(self.classes):
            whole = self.steps[i] * self._width(i)
            grid[: self.steps[i], self._span(i)] = classes[:whole].reshape(self.steps[i], -1)
        active = len(self.steps)
        for step in range(len(found)):
            while self.steps[active - 1] <= step:
                active -= 1
            width = self.edges[active]
            found[step, :width] = self._step(grid[step, :width], 0, active)
        parts = [
            np.concatenate([found[: self.steps[i], self._span(i)].ravel(), self._last(i)])
            for i in range(len(self.steps))
        ]
        if (self.at != self.ends).any() or (self.state != _LOW).any():
            raise BadCode("it does not end where its last symbol does")
        return [part.view(np.int8) - np.int8(LIMIT) for part in parts]

    def _step(self, classes: np.ndarray, first: int, past: int) -> np.ndarray:
        """The next value, LIMIT more, of the lanes of items first .. past, or of so many as there are classes."""
        start = self.edges[first]
        x = self.state[start : start + len(classes)]
        values, counts, starts = _decoding()
        own = classes.astype(np.intp)
        slot = x & np.uint32(0xFFFF)
        value = values.take(slot + (own << 16))
        symbol = (own << 8) + value
        x >>= np.uint32(16)
        x *= counts.take(symbol)  # up to 2^16 (2^16 - 1), and less than 2^16 more below: 32 bits hold it
        x += slot
        x -= starts.take(symbol)
        short = np.flatnonzero(x < _LOW)
        x[short] = x[short] << np.uint32(16) | self._pulled(short, start, first, past)
        return value

    def _pulled(self, short: np.ndarray, start: int, first: int, past: int) -> np.ndarray:
        """The next words for these lanes, counted from start, of items first .. past; beyond all words the last one."""
        if past - first == 1:
            at = self.at[first]
            self.at[first] += len(short)
            return self.words.take(np.arange(at, at + len(short)), mode="clip")
        bounds = np.searchsorted(short, self.edges[first : past + 1] - start)
        taken = bounds[1:] - bounds[:-1]
        before = (self.at[first:past] - bounds[:-1]).astype(np.intp)
        source = np.arange(len(short)) + before.repeat(taken)
        self.at[first:past] += taken
        return self.words.take(source, mode="clip")

    def _last(self, i: int) -> np.ndarray:
        """Of the step that does not fill all lanes of an item."""
        rest = self.classes[i][self.steps[i] * self._width(i) :]
        return self._step(rest, i, i + 1) if len(rest) else np.empty(0, np.uint8)

    def _width(self, i: int) -> int:
        return int(self.edges[i + 1] - self.edges[i])

    def _span(self, i: int) -> slice:
        return slice(self.edges[i], self.edges[i + 1])


def lanes_of(symbols: int) -> int:
    """The largest power of two up to symbols / STEPS, 1 to MAX_LANES."""
    return 1 << min(MAX_LANES, max(1, symbols // STEPS)).bit_length() - 1


@lru_cache(maxsize=1)
def _decoding() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The value, LIMIT more, at every place of each class, uint8 [CLASSES * 2^16]; count and start of each value of
    each class, uint32 [CLASSES * 256]."""
    counts, starts = frequencies(), _starts()
    values = np.concatenate([np.repeat(np.arange(2 * LIMIT + 1), own) for own in counts]).astype(np.uint8)
    counts, starts = (np.pad(table.astype(np.uint32), ((0, 0), (0, 1))).ravel() for table in (counts, starts))
    return values, counts, starts


@lru_cache(maxsize=1)
def _starts() -> np.ndarray:
    counts = frequencies().astype(np.uint64)
    return np.cumsum(counts, 1) - counts


def _weights(decay: int) -> list[int]:
    """2^32 exp(-q^2 / (2 s^2)) for q = 0, 1, … while it is 64 or more: each from the one before, rounding down."""
    weights, ratio, square = [1 << 32], decay, decay * decay >> 32
    while len(weights) <= LIMIT:
        following = weights[-1] * ratio >> 32
        if following < 64:
            break
        weights.append(following)
        ratio = ratio * square >> 32
    return weights
