"""What `/metrics` answers: this application's series, gathered from the Ray agent of every node.

Replicas and ingress replicas write through Ray (`metrics.py`), and each node's agent exports what its processes wrote,
so the answer is whole and the same whichever ingress replica is asked. It is as old as Ray's reporting interval (10 s
unless configured). A Prometheus that scrapes the agents directly, as Ray's own service discovery sets it up, sees the
same names and must not scrape this as well.
"""

from __future__ import annotations

import logging
import urllib.request
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

import ray

from deployments.metrics import PREFIX

EXPORTED = f"ray_{PREFIX}"
TIMEOUT_S = 5.0
logger = logging.getLogger(__name__)


def of_application(name: str) -> str:
    """Prometheus text. Blocks. A node whose agent does not answer is left out, with a warning in the log."""
    agents = [f"http://{n['NodeManagerAddress']}:{n['MetricsExportPort']}/metrics" for n in ray.nodes() if n["Alive"]]
    with ThreadPoolExecutor(max_workers=max(1, min(32, len(agents)))) as pool:
        return merge(pool.map(_read, agents), name)


def merge(texts: Iterable[str], application: str) -> str:
    """The application's samples of all texts, each metric's HELP and TYPE once and before its samples."""
    heads: dict[str, list[str]] = {}
    samples: dict[str, list[str]] = {}
    for text in texts:
        head: list[str] = []
        family = ""
        for line in text.splitlines():
            if line.startswith(("# HELP ", "# TYPE ")):
                name = line.split(" ", 3)[2]
                head = [*head, line] if name == family else [line]
                family = name
            elif family.startswith(EXPORTED) and f'application="{application}"' in line:
                heads[family] = head
                samples.setdefault(family, []).append(line)
    return "".join(f"{line}\n" for family in sorted(samples) for line in (*heads[family], *samples[family]))


def _read(url: str) -> str:
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT_S) as answer:
            return answer.read().decode()
    except OSError as error:
        logger.warning("no metrics from %s: %s", url, error)
        return ""
