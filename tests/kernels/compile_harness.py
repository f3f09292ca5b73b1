"""Compiles the kernel launches of the `cases_*` modules for a chip that need not be here, and inspects the code.

A case launches through the product's own launcher, on meta tensors; a driver that only names the chip makes Triton
specialise and compile as it would there. No kernel runs. As a program it must not see TRITON_INTERPRET:

    python -m tests.kernels.compile_harness --arch 90 [--only PATTERN]
"""

from __future__ import annotations

import argparse
import importlib
import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

ARCHS = (80, 90)


@dataclass(frozen=True)
class Case:
    """A launch: `tests/kernels/cases_<area>.py` has a list CASES of these."""

    name: str
    launch: Callable[[], object]
    """Calls a launcher with meta tensors (`meta`); it may start several kernels."""
    needs: Mapping[int, tuple[str, ...]] = field(default_factory=dict)
    """Per architecture, regular expressions that the machine code of one of its kernels must match"""
    archs: tuple[int, ...] = ARCHS
    """Others cannot run it"""


@dataclass(frozen=True)
class Compiled:
    case: str
    kernel: str
    registers: int
    stack: int
    """Bytes of local memory: spills, or arrays that are indexed at run time"""
    spilled: int
    """Accesses to it in the innermost loops that multiply matrices; where there are none, the bytes"""
    shared: int
    counts: dict[str, int]
    """How often each instruction stands in the machine code"""
    dropped: int
    """Matrix products whose result goes nowhere: what ptxas makes of some unrolled loops"""
    fragments: list[str]
    """Which elements each lane holds where inline assembly multiplies matrices, or lanes trade words"""


class Chip:
    """As much of a Triton driver as compiling asks for."""

    def __init__(self, arch: int) -> None:
        self.target = GPUTarget("cuda", arch, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return int(self.target.arch)  # compiled kernels are kept by device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> str:
        return "meta"


@contextmanager
def recording(arch: int) -> Iterator[list[Any]]:
    """While it lasts, every launch compiles for `arch`, starts nothing and is appended to the list. The chip stays."""
    run, found = JITFunction.run, []

    def compile_only(self: JITFunction, *args: Any, **kwargs: Any) -> None:
        found.append(run(self, *args, **{**kwargs, "warmup": True}))

    JITFunction.run = compile_only
    driver.set_active(Chip(arch))  # pyright: ignore[reportArgumentType]
    try:
        yield found
    finally:
        JITFunction.run = run


def inspect(case: str, kernel: Any) -> Compiled:
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = subprocess.run(
            [tools / "cuobjdump", "-res-usage", file.name], capture_output=True, text=True, check=True
        )
        sass = subprocess.check_output([tools / "nvdisasm", "-c", file.name], text=True)
    found = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage.stdout + usage.stderr)}
    counts = Counter(re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", sass, re.M))
    dropped = len(re.findall(r"HGMMA\S* RZ, gdesc\[URZ\]", sass))
    shared, local = kernel.metadata.shared, max(found["STACK"], found["LOCAL"])
    layouts = fragments(kernel.asm["ttgir"])
    spilled = local and spills(sass, local)
    return Compiled(
        case, kernel.metadata.name, found["REG"], local, spilled, shared, dict(counts.most_common()), dropped, layouts
    )


def spills(sass: str, local: int) -> int:
    """Accesses to local memory in the innermost loops that multiply matrices; `local` where no loop does."""
    lines = sass.splitlines()
    labels = {match[1]: i for i, line in enumerate(lines) if (match := re.match(r"(\.L_x_\d+):", line.strip()))}
    branches = ((i, re.search(r"BRA `\((\.L_x_\d+)\)", line)) for i, line in enumerate(lines))
    loops = [(labels[m[1]], i) for i, m in branches if m and labels.get(m[1], i) < i]
    multiply = [(a, b) for a, b in loops if any(re.search(r"\b(H|B|I)G?MMA\b|\b[HBI]MMA\.", x) for x in lines[a:b])]
    inner = [(a, b) for a, b in multiply if not any(a <= c and d <= b and (c, d) != (a, b) for c, d in multiply)]
    if not inner:
        return local
    return sum(bool(re.search(r"\b(LDL|STL)\b", line)) for a, b in inner for line in lines[a:b])


def fragments(ttgir: str) -> list[str]:
    layouts = dict(re.findall(r"^(#\w+) = (.*)$", ttgir, re.M))
    asm = [line for line in ttgir.splitlines() if "elementwise_inline_asm" in line]
    asm = [line for line in asm if "mma.sync" in line or "shfl.sync" in line]
    return sorted({layouts[name] for line in asm for name in re.findall(r"(#\w+)>", line.split(" : ")[-1])})


def cases(arch: int, only: str = "") -> list[Case]:
    modules = sorted(Path(__file__).parent.glob("cases_*.py"))
    listed = [case for m in modules for case in importlib.import_module(f"tests.kernels.{m.stem}").CASES]
    return [case for case in listed if arch in case.archs and re.search(only, case.name)]


def compile_all(arch: int, only: str = "") -> list[Compiled]:
    """Raises AssertionError for a case whose machine code lacks what it needs."""
    compiled = []
    for case in cases(arch, only):
        with recording(arch) as kernels:
            case.launch()
        assert kernels, f"{case.name} launched nothing"
        made = [inspect(case.name, kernel) for kernel in kernels]
        code = {name for c in made for name in c.counts}
        for wanted in case.needs.get(arch, ()):
            assert any(re.search(wanted, name) for name in code), f"{case.name}, sm_{arch}: no {wanted}: {sorted(code)}"
        compiled += made
    return compiled


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--arch", type=int, default=90)
    parser.add_argument("--only", default="")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--counts", type=int, default=0, help="print this many of the most frequent instructions")
    args = parser.parse_args()
    for c in compile_all(args.arch, args.only):
        if args.json:
            print(json.dumps(asdict(c)))
            continue
        lost = f" {c.dropped} products dropped" if c.dropped else ""
        memory = f"{c.stack:5} B stack {c.spilled:3} spilled {c.shared:7} B shared"
        print(f"{c.case:48} {c.kernel:24} {c.registers:4} registers {memory}{lost}")
        if args.counts:
            print("    " + " ".join(f"{k}:{v}" for k, v in list(c.counts.items())[: args.counts]))


if __name__ == "__main__":
    sys.exit(main())
