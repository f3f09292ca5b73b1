"""The composition root: one configuration in, one Ray Serve application out.

serve run deployments.app:build_app base=/models/base repo=s3://bucket/deltas
serve deploy deployments/serve.yaml
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ray
from ray import serve
from ray.serve import Application, Deployment
from ray.serve.config import RequestRouterConfig

from deployments.config import AppConfig
from deployments.direct import PICKER, DirectReplica, Picker, with_picker
from deployments.gateway import INGRESS, REPLICAS
from deployments.ingress import Ingress
from deployments.replica import ModelReplica

ROUTING_STATS_PERIOD_S, ROUTING_STATS_TIMEOUT_S = 0.5, 5.0
DRAIN_S, DRAIN_POLL_S = 120.0, 0.2
HEALTH_PERIOD_S = 5.0
INGRESS_ONGOING = 10_000
RUNTIME_ENV = {"env_vars": {"RAY_SERVE_REPLICA_GRPC_MAX_MESSAGE_LENGTH": str(256 * 2**20)}}
"""Between front and replicas: bodies of 32 MiB pass, and the logprobs of a long prompt are one event."""


def build_app(args: AppConfig) -> Application:
    """Ingress -> model replicas; with `direct_streaming`, HAProxy -> model replicas. `args` in YAML, or `name=value` on
    the command line of `serve run`."""
    replicas = serve.deployment(
        name=REPLICAS,
        num_replicas=args.num_replicas,
        ray_actor_options={**resources(args), "runtime_env": RUNTIME_ENV},
        max_ongoing_requests=args.max_ongoing_requests,
        health_check_period_s=HEALTH_PERIOD_S,
        graceful_shutdown_timeout_s=DRAIN_S,
        graceful_shutdown_wait_loop_s=DRAIN_POLL_S,
        request_router_config=_router(args),
    )
    if args.direct_streaming:
        direct = replicas(DirectReplica).bind(args)
        return with_picker(direct, _front(PICKER, 1)(Picker).bind(args, direct))
    return _front(INGRESS, args.ingresses)(Ingress).bind(args, replicas(ModelReplica).bind(args))


def _front(name: str, count: int) -> Callable[[type], Deployment]:
    return serve.deployment(
        name=name,
        num_replicas=count,
        ray_actor_options={"num_cpus": 0, "runtime_env": RUNTIME_ENV},
        max_ongoing_requests=INGRESS_ONGOING,
        graceful_shutdown_timeout_s=DRAIN_S,
        graceful_shutdown_wait_loop_s=DRAIN_POLL_S,
    )


def _router(args: AppConfig) -> RequestRouterConfig:
    fields: dict[str, Any] = {
        "request_router_class": "deployments.router.DeltaRouter",
        "request_router_kwargs": {"spill_queue": args.spill_queue, "load_factor": args.load_factor},
        "request_routing_stats_period_s": ROUTING_STATS_PERIOD_S,
        "request_routing_stats_timeout_s": ROUTING_STATS_TIMEOUT_S,
    }
    return RequestRouterConfig(**fields)


def resources(args: AppConfig) -> dict[str, float]:
    """What one replica takes. Looks at the cluster, not at the node that builds the application."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]] if ray.is_initialized() else []
    if args.num_gpus is not None:
        gpus = args.num_gpus
    elif args.device == "auto":
        gpus = 1.0 if any(node.get("GPU", 0) >= 1 for node in nodes) else 0.0
    else:
        gpus = 0.0 if args.device == "cpu" else 1.0
    share = max((node.get("CPU", 0) for node in nodes), default=1) // args.num_replicas
    return {"num_cpus": args.num_cpus or (1 if gpus else max(1, share)), "num_gpus": gpus}
