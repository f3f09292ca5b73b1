"""What factors are trained on where benchmarks/fidelity.py trains them: rows of the task that no seed judges."""

from __future__ import annotations

import argparse
import json
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any


def write_examples(
    args: argparse.Namespace, name: str, rows: Sequence[Any], judged: Collection[int], out: Path
) -> Path:
    """A file for `bitdelta compress --examples`. `judged`: which of the task's `rows` are not to be seen.

    Rows of DIR/examples.json, where a task has some there, else what is left of its own.
    """
    file = args.eval.parent / "examples.json" if args.eval else None
    others = json.loads(file.read_text()).get(name) if file and file.is_file() else None
    chosen = others or [row for i, row in enumerate(rows) if i not in judged]
    out.write_text("".join(json.dumps(_line(row)) + "\n" for row in chosen))
    return out


def _line(row: Any) -> dict[str, Any]:
    if isinstance(row, str):
        return {"text": row}
    if isinstance(row, dict):
        return {"messages": [*row["messages"], {"role": "assistant", "content": row["answer"]}]}
    return {"prompt": row[0], "completion": row[1]}
