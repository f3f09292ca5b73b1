"""All that one application can be told: flags, `BITDELTA_*` variables, YAML. Names are vLLM's where it has them."""

from __future__ import annotations

import hashlib
import socket
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ByteSize, ConfigDict, Field, SecretStr, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from deployments.auth import Account, HashedKey
from storage import open_store, repository_uri

DIRECT_ENVIRONMENT = {
    "RAY_SERVE_ENABLE_HA_PROXY": "1",
    "RAY_SERVE_INGRESS_REQUEST_ROUTER_FORWARD_BODY": "1",
    "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "1",
}
"""What every Ray process, and whoever builds the application, must be started with for `direct_streaming`."""


def direct_environment() -> dict[str, str]:
    """DIRECT_ENVIRONMENT for a Ray of our own, with free ports for what HAProxy tells of itself: its own defaults would
    keep a second one from starting on the same machine."""
    with socket.socket() as metrics, socket.socket() as stats:
        metrics.bind(("", 0))
        stats.bind(("", 0))
        ports = {"METRICS": metrics.getsockname()[1], "STATS": stats.getsockname()[1]}
    return DIRECT_ENVIRONMENT | {f"RAY_SERVE_HAPROXY_{name}_PORT": str(port) for name, port in ports.items()}


class ApiKey(BaseModel):
    """One key. Give the key itself, or its sha256 so that the file holds no secret."""

    model_config = ConfigDict(extra="forbid")

    tenant: str = "default"
    """Whose share of the engine its requests count against."""
    key: SecretStr | None = None
    sha256: str | None = Field(default=None, pattern="^[0-9a-f]{64}$")
    owners: list[str] | None = None
    """Whose variants it may use. Left out: everybody's."""

    @model_validator(mode="after")
    def _one_form(self) -> Self:
        if (self.key is None) == (self.sha256 is None):
            raise ValueError("give either `key` or `sha256`")
        if self.key is not None and not self.key.get_secret_value().strip():
            raise ValueError("`key` is empty")
        return self

    def hashed(self) -> HashedKey:
        owners = None if self.owners is None else frozenset(self.owners)
        digest = self.sha256 or hashlib.sha256(self._plain().encode()).hexdigest()
        return HashedKey(sha256=digest, account=Account(tenant=self.tenant, owners=owners))

    def _plain(self) -> str:
        assert self.key is not None
        return self.key.get_secret_value().strip()


class AppConfig(BaseSettings):
    """One base, one repository, any number of replicas. Unknown names are refused. Sizes take units: `2GiB`."""

    model_config = SettingsConfigDict(env_prefix="BITDELTA_", extra="forbid")

    base: Path
    """Directory of the base checkpoint, at the same place on every node."""
    repo: str | None = None
    """Path, `file://`, `s3://bucket/prefix`. None: `~/.local/share/bitdelta/repo`."""
    served_model_name: str = ""
    """What clients call the base. Empty: the name of its directory."""

    generation_config: Literal["auto", "none"] = "auto"
    """auto: what a request leaves out is as the variant's generation_config.json says, or else the base's."""

    device: str = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    decoder: Literal["auto", "device", "torch"] | None = None
    enforce_eager: bool | None = None
    cuda_graph_sizes: tuple[int, ...] | None = None
    cuda_graph_deltas: tuple[Path, ...] = ()
    """Directories of deltas like those that will be asked for, at the same place on every node: steps for such are
    captured at the start, not when a request first needs them. Empty: like what is published
    (`deployments.published`)."""
    async_scheduling: bool | None = None
    gpu_memory_utilization: float | None = Field(default=None, gt=0, le=1)
    max_model_len: int | None = Field(default=None, ge=1)
    max_num_seqs: int | None = Field(default=None, ge=1)
    max_num_batched_tokens: int | None = Field(default=None, ge=1)
    block_size: int | None = Field(default=None, ge=1)
    slab_bytes: ByteSize | None = None
    max_resident_variants: int | None = Field(default=None, ge=1)
    host_cache_bytes: ByteSize | None = None
    loader: Literal["auto", "thread", "process"] | None = None
    kv_cache_bytes: ByteSize | None = None
    seed: int | None = None

    cache_dir: Path | None = None
    """Fetched deltas on local disk. None: `~/.cache/bitdelta/deltas`."""
    cache_bytes: ByteSize = Field(default=ByteSize(50 * 10**9), gt=0)

    direct_streaming: bool = False
    """Replicas answer HTTP themselves, behind HAProxy: `deployments.direct`. All of Ray needs DIRECT_ENVIRONMENT."""
    num_replicas: int = Field(default=1, ge=1)
    num_gpus: float | None = Field(default=None, ge=0)
    """Per replica. None: 1 when `device` is a GPU, or auto and the cluster has one."""
    num_cpus: float | None = Field(default=None, gt=0)
    """Per replica. Ray makes it the number of threads that torch computes with. None: 1 beside a GPU; without one, an
    equal share of the largest node."""
    max_ongoing_requests: int = Field(default=4096, ge=1)
    """Per replica. Far above the batch: waiting is the engine's business, Serve's own queue polls."""
    spill_queue: int = Field(default=12, ge=1)
    load_factor: float = Field(default=1.25, ge=1)
    catalog_ttl_s: float = Field(default=2.0, ge=0)
    """How long a name keeps its meaning: a new version or a moved alias is served after this time at the latest."""
    keep_alive_s: float = Field(default=15.0, gt=0)
    stream_messages_per_s: int = Field(default=400, ge=0)
    """Of a replica's streams together. With more streams each sends rarer, several tokens at once, at most 0.1 s late.
    0: every token at once."""
    max_body_bytes: ByteSize = Field(default=ByteSize(32 * 2**20), gt=0)
    api_key: Annotated[tuple[SecretStr, ...], NoDecode] = ()
    """Keys that may use everything; one, or several."""
    api_keys: tuple[ApiKey, ...] = ()
    """Keys with a tenant and the owners whose variants they may use."""

    @model_validator(mode="before")
    @classmethod
    def _one_key_is_a_list_of_one(cls, values: dict) -> dict:
        if isinstance(values.get("api_key"), str | SecretStr):
            values = values | {"api_key": (values["api_key"],)}
        return values

    @property
    def base_name(self) -> str:
        return self.served_model_name or self.base.resolve().name

    @property
    def ingresses(self) -> int:
        """One for three replicas, whose `stream_messages_per_s` take a good half of a core of it."""
        return -(-self.num_replicas // 3)

    @property
    def cache_path(self) -> Path:
        return self.cache_dir or Path.home() / ".cache" / "bitdelta" / "deltas"

    def absolute(self) -> Self:
        """The same with paths that mean the same in every process of this machine."""
        paths = {"base": self.base.resolve(), "cache_dir": self.cache_path.resolve()}
        paths |= {"cuda_graph_deltas": tuple(path.resolve() for path in self.cuda_graph_deltas)}
        return self.model_copy(update={**paths, "repo": open_store(repository_uri(self.repo)).uri})

    def keys(self) -> tuple[HashedKey, ...]:
        """All configured keys, hashed. None configured: everybody may use everything."""
        plain = (ApiKey(key=key) for key in self.api_key)
        return tuple(key.hashed() for key in (*plain, *self.api_keys))

    def engine_options(self) -> dict:
        """The EngineConfig fields that were given."""
        names = (
            "device dtype decoder enforce_eager cuda_graph_sizes async_scheduling gpu_memory_utilization max_model_len "
            "max_num_seqs max_num_batched_tokens block_size slab_bytes max_resident_variants host_cache_bytes "
            "loader kv_cache_bytes seed"
        )
        given = {name: getattr(self, name) for name in names.split()}
        given |= {"cuda_graph_deltas": tuple(map(str, self.cuda_graph_deltas))}
        return {name: value for name, value in given.items() if value is not None}
