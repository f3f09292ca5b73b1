"""One real application on a real Ray, on tiny models, for all tests of serving."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import httpx
import openai
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from bitdelta_core.checkpoint import Checkpoint
from bitdelta_core.delta.compress import compress
from bitdelta_core.delta.planning import CompressOptions
from bitdelta_core.delta.restore import restore
from bitdelta_core.engine.api import EngineStats
from storage import Catalog, Manifest, open_store
from tests.ports import free_ports
from tests.tiny import make_base, make_finetune

KEY, ACME_KEY = "key-of-everything", "key-of-acme"
REPLICAS = 2
VARIANTS: dict[str, tuple[CompressOptions, dict[str, Any]]] = {
    "acme/plain": (CompressOptions(scale_layout="row"), {"seed": 1}),
    "acme/chat": (CompressOptions(embeddings="exact"), {"seed": 2, "new_tokens": ("<|user|>", "<|assistant|>")}),
    "zeta/dense": (CompressOptions(codec="dense", embeddings="exact"), {"seed": 3}),
    "zeta/bits": (CompressOptions(bits=2, embeddings="int8"), {"seed": 4}),
}


def wait_for(what: str, condition: Callable[[], Any], timeout_s: float = 90.0) -> Any:
    """Poll until the condition gives something true; what it gave."""
    deadline = time.monotonic() + timeout_s
    while not (found := condition()):
        assert time.monotonic() < deadline, f"{what}: not within {timeout_s} s"
        time.sleep(0.05)
    return found


@dataclass
class Models:
    """A base with a long context, fine-tunes of it, their deltas, and what transformers answers for them."""

    root: Path
    restored: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def base(self) -> Path:
        return make_base(self.root / "base", max_position_embeddings=8192)

    @cached_property
    def base_sha256(self) -> str:
        return Checkpoint(self.base).sha256()

    def delta(self, name: str, options: CompressOptions | None = None, **changes: Any) -> Path:
        """The delta of a random fine-tune."""
        path = self.root / name.replace("/", "-")
        fine = make_finetune(self.base, path / "fine", scale=0.3, **changes)
        return compress(self.base, fine, path / "delta", options)

    def answer(self, delta: Path | None, prompt: str, count: int) -> str:
        """Greedy text, from the restored checkpoint in transformers."""
        path = self.base
        if delta is not None:
            path = delta.with_name("restored")
            if not path.exists():
                restore(self.base, delta, path, dtype=torch.float32)
        if str(path) not in self.restored:
            model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
            self.restored[str(path)] = (model, AutoTokenizer.from_pretrained(path))
        model, tokenizer = self.restored[str(path)]
        ids = torch.tensor([tokenizer.encode(prompt, add_special_tokens=True)])
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False)
        return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)


@dataclass
class Server:
    """A running application and the repository that it serves from."""

    models: Models
    repo: Path
    port: int
    deltas: dict[str, Path]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @cached_property
    def catalog(self) -> Catalog:
        return Catalog(open_store(str(self.repo)))

    def push(self, name: str, delta: Path) -> Manifest:
        return self.catalog.publish(delta, name, base_sha256=self.models.base_sha256)

    def client(self, key: str = KEY, **options: Any) -> openai.OpenAI:
        options = {"max_retries": 0, "timeout": 60, **options}
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, **options)

    def http(self, key: str | None = KEY) -> httpx.Client:
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        return httpx.Client(base_url=self.url, headers=headers, timeout=60)

    def stats(self) -> list[EngineStats]:
        """Of each replica that lives."""
        from ray import serve
        from ray.exceptions import RayActorError

        from deployments.client import APP
        from deployments.gateway import REPLICAS as name

        def ask() -> list[EngineStats]:
            try:
                return serve.get_deployment_handle(name, APP).broadcast("stats").results()
            except RayActorError:
                return []  # one has just died, and the handle does not know yet

        return wait_for("the replicas to answer", ask)

    def idle(self) -> bool:
        """Whether no replica holds anything for anybody."""
        return all(
            not (s.running or s.waiting or s.waiting_for_delta or s.kv_blocks_used or s.pinned) for s in self.stats()
        )

    @contextmanager
    def store_down(self) -> Iterator[None]:
        """Whatever is read from the repository's file system is an error, and not that it is missing."""
        away = self.repo.with_name("away")
        self.repo.rename(away)
        self.repo.symlink_to(self.repo)
        try:
            yield
        finally:
            self.repo.unlink()
            away.rename(self.repo)


def texts(answer: Any) -> list[str]:
    return [choice.text for choice in answer.choices]


@contextmanager
def running(root: Path) -> Iterator[Server]:
    """Ray, Serve and the application; all of it is gone afterwards."""
    os.environ |= {"RAY_AUTH_MODE": "disabled", "XDG_CACHE_HOME": str(root / "home-cache")}
    import ray
    from ray import serve

    from deployments.app import build_app
    from deployments.client import APP
    from deployments.config import AppConfig

    models = Models(root)
    deltas = {name: models.delta(name, options, **changes) for name, (options, changes) in VARIANTS.items()}
    server = Server(models, root / "repo", free_ports(1)[0], deltas)
    for name, delta in deltas.items():
        server.push(name, delta)
    fields: dict[str, Any] = {
        "base": models.base,
        "repo": str(server.repo),
        "cache_dir": root / "cache",
        "num_replicas": REPLICAS,
        "num_cpus": 1,
        "slab_bytes": 32 * 2**20,
        "kv_cache_bytes": 32 * 2**20,
        "catalog_ttl_s": 0.3,
        "api_key": [KEY],
        "api_keys": [{"tenant": "acme", "key": ACME_KEY, "owners": ["acme"]}],
    }
    reporting = {"metrics_report_interval_ms": 500}
    ray.init(
        "local",
        num_cpus=8,
        include_dashboard=False,
        log_to_driver=False,
        object_store_memory=100 * 2**20,
        _system_config=reporting,
    )
    try:
        serve.start(http_options={"port": server.port})
        serve.run(build_app(AppConfig(**fields)), name=APP, route_prefix="/")
        yield server
        serve.shutdown()
    finally:
        ray.shutdown()
