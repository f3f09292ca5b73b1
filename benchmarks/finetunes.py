"""The options that name a base, fine-tunes of it, and what they are judged on."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fidelity_tasks import TEXT

MODELS = "BITDELTA_MODELS"


def add_models(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--models", type=Path, help=f"by default what ${MODELS} names")
    parser.add_argument("--base", type=Path)
    parser.add_argument("--finetunes", nargs="+", help="directories, or names in --models; each perhaps with =TASK")
    parser.add_argument("--eval", type=Path, help="JSON of tasks")
    parser.add_argument("--text", type=Path, help="JSON list of documents")


def completed(args: argparse.Namespace, parser: argparse.ArgumentParser) -> argparse.Namespace:
    """With what --models says where nothing else does."""
    if args.models is None and MODELS in os.environ:
        args.models = Path(os.environ[MODELS])
    if args.models is None and (args.base is None or args.finetunes is None):
        parser.error(f"give --models (or set {MODELS}), or --base and --finetunes")
    if args.models is None:
        return args
    args.base = args.base or args.models / "base"
    args.eval = args.eval or args.models / "eval.json"
    args.text = args.text or args.models / "valid.json"
    found = sorted(
        d.name
        for d in args.models.iterdir()
        if d != args.base and ((d / "config.json").is_file() or (d / "adapter_config.json").is_file())
    )
    named = args.finetunes or found
    args.finetunes = [name if "/" in name else str(args.models / name) for name in named]
    return args


def rows_of(args: argparse.Namespace, directory: str, named: str) -> tuple[str, Sequence[Any]]:
    """(task, its rows) of a fine-tune's directory; `named`: the task that was asked for, if any."""
    tasks = json.loads(args.eval.read_text()) if args.eval else {}
    name = named or next((key for key in tasks if directory.startswith(key)), TEXT)
    if name != TEXT:
        return name, tasks[name]
    if args.text is None:
        raise SystemExit(f"{directory}: no task of this name in --eval, and no --text to judge it on")
    return name, json.loads(args.text.read_text())
