"""Text to train on that every machine with Python has: its library's sources and documents, manual pages, packages.

Beside it, records of our own making: people, prices, dates, tables, so that a base knows names and digits.
"""

from __future__ import annotations

import gzip
import os
import random
import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from make_models_tasks import CITIES, JOBS, MONTHS, NAMES

SUFFIXES = (".py", ".rst", ".md", ".txt", ".pyi")
MANUALS = Path("/usr/share/man")
SHORTEST, LONGEST = 600, 120_000
"""Of a document, in characters; longer ones are cut."""
_RECORDS = 0.06
"""Of the text."""
_HELD_OUT = 25
"""Every so many documents one is kept for validation."""
_TROFF = re.compile(r"\\f[A-Z(]|\\[&|^/,]|^[.'](?:\\\"|[A-Za-z]{1,3}) ?|^\.\n", re.MULTILINE)


def gather(limit: int, seed: int = 0) -> tuple[list[str], list[str]]:
    """(documents to train on, held-out ones), about `limit` characters in all, the same on the same machine."""
    rng = random.Random(seed)
    documents, size = [], 0
    for file in _files(rng):
        if size > limit * (1 - _RECORDS):
            break
        text = _read(file)
        if len(text) >= SHORTEST:
            documents.append(text[:LONGEST])
            size += len(documents[-1])
    while size < limit:
        documents.append(records(rng))
        size += len(documents[-1])
    rng.shuffle(documents)
    held = documents[::_HELD_OUT]
    return [text for i, text in enumerate(documents) if i % _HELD_OUT], held


def records(rng: random.Random) -> str:
    """A page of made-up records in one of several layouts."""
    line = rng.choice((_person, _price, _row, _day))
    return "\n".join(line(rng) for _ in range(rng.randint(30, 90)))


def _files(rng: random.Random) -> Iterator[Path]:
    """Python's own library first, then manual pages, then what is installed beside it; each part shuffled."""
    paths = sysconfig.get_paths()
    library, packages = Path(paths["stdlib"]), {Path(paths["purelib"]), Path(paths["platlib"])}
    yield from _shuffled(library, rng, skip=("site-packages", "dist-packages"))
    yield from _shuffled(MANUALS, rng)[:4000]
    for root in sorted(packages):
        yield from _shuffled(root, rng)


def _shuffled(root: Path, rng: random.Random, skip: tuple[str, ...] = ()) -> list[Path]:
    found = []
    for directory, names, files in os.walk(root):
        names[:] = sorted(name for name in names if name not in skip)
        suffixes = ".gz" if root == MANUALS else SUFFIXES
        found += [Path(directory) / name for name in sorted(files) if name.endswith(suffixes)]
    rng.shuffle(found)
    return found


def _read(file: Path) -> str:
    """Empty where it cannot be read or looks like data rather than text."""
    try:
        raw = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
        text = raw.decode()
    except (OSError, UnicodeDecodeError, EOFError):
        return ""
    if file.suffix == ".gz":
        text = _TROFF.sub("", text).replace("\\-", "-")
    lines = text.count("\n") + 1
    return text if len(text) / lines < 120 else ""


def _person(rng: random.Random) -> str:
    return f"{rng.choice(NAMES)}, {rng.randint(18, 90)}, {rng.choice(JOBS)}, {rng.choice(CITIES)}"


def _price(rng: random.Random) -> str:
    return f"item {rng.randint(1, 999)}: {rng.randint(0, 999)}.{rng.randint(0, 99):02d}"


def _row(rng: random.Random) -> str:
    return " ".join(str(rng.randint(0, 999)) for _ in range(8))


def _day(rng: random.Random) -> str:
    return f"On {rng.choice(MONTHS)} {rng.randint(1, 28)}, {rng.randint(1950, 2030)}, in {rng.choice(CITIES)}."
