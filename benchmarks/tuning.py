"""What searches for fast settings share: compiling ahead, timing what is right, filing the best where kernels look.

Compiling is most of a search's work, so processes of their own compile ahead into Triton's cache.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import gpu_timing
import torch
from gpu_timing import Call, Report
from synthetic import SHAPES

from kernels import configs

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Case = TypeVar("Case")
Config = TypeVar("Config", bound="DataclassInstance")
Filed = dict[str, dict[str, Any]]
"""Settings by what they are filed under"""


class Run(Protocol):
    """A case's tensors. What does not run raises."""

    def calls(self, config: Any) -> Sequence[Call]: ...

    def error(self, config: Any) -> float:
        """Relative, against float64."""
        ...


def parser(description: str | None, rows: list[int]) -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--shapes", nargs="+", choices=sorted(SHAPES), default=["llama-2-7b", "llama-3.1-8b"])
    made.add_argument("--rows", type=int, nargs="+", default=rows)
    made.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 2) - 2))
    made.add_argument("--dry-run", action="store_true", help="tiny, one configuration: tests the search")
    return made


@contextmanager
def compilers(workers: int, dry: bool) -> Iterator[ProcessPoolExecutor | None]:
    """Processes that compile; none in a dry run."""
    if dry:
        yield None
        return
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield pool


def compile_ahead(
    pool: ProcessPoolExecutor | None, launch: Callable[[Case, Config], object], tasks: Iterable[tuple[Case, Config]]
) -> None:
    """`launch`, of a module, in the workers. What does not run there is told and found out again when it is timed."""
    if pool is None:
        return
    for failed in pool.map(partial(_attempt, launch), dict.fromkeys(tasks), chunksize=1):
        if failed:
            print(failed, flush=True)


def _attempt(launch: Callable[[Case, Config], object], task: tuple[Case, Config]) -> str:
    case, config = task
    try:
        launch(case, config)
        torch.cuda.synchronize()
    except Exception as error:
        return _does_not_run(config, error)
    return ""


def _does_not_run(config: object, error: Exception) -> str:
    return f"does not run: {config}: {str(error)[:200]}"


def timed(
    report: Report, case: Mapping[str, Any], run: Run, found: Iterable[Config], *, limit: float, nbytes: int,
    less: float = 0.0,
) -> dict[Config, float]:  # fmt: skip
    """Microseconds of the settings that run and whose error is within the limit. less: of what else a call does."""
    times: dict[Config, float] = {}
    for config in dict.fromkeys(found):
        try:
            if not report.check(f"{case} {config}", run.error(config), limit):
                continue
            times[config] = gpu_timing.graph_us(run.calls(config), replays=5, target_us=1500) - less
        except Exception as error:
            print(_does_not_run(config, error), flush=True)
            continue
        report.write({**case, "us": times[config], "bytes": nbytes, "settings": asdict(config)})
    return times


def best(times: Mapping[Config, float], count: int) -> list[Config]:
    return sorted(times, key=lambda config: times[config])[:count]


def file(op: str, found: Filed) -> None:
    """Beside what is filed already of this op (its folder's name) on this device."""
    path = configs.path(op, torch.cuda.get_device_name())
    path.parent.mkdir(exist_ok=True)
    filed = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(dict(sorted({**filed, **found}.items())), indent=1) + "\n")
