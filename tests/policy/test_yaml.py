"""The files that are given to Ray, KubeRay and `ray up`: what Ray's own schemas say, and what they let pass."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.serve.schema import ServeDeploySchema

from deployments import app
from deployments.check import check_file, problems
from deployments.client import APP

ROOT = Path(__file__).parents[2]
SERVE = ROOT / "deployments" / "serve.yaml"
RAYSERVICE = ROOT / "deployments" / "rayservice.yaml"


def load(path: Path) -> dict[str, Any]:
    return yaml.safe_load(path.read_text())


@pytest.mark.parametrize("path", [SERVE, RAYSERVICE], ids=lambda path: path.name)
def test_our_serve_configs_are_sound(path: Path) -> None:
    assert check_file(path) == []


def test_the_rayservice_embeds_serve_yaml_word_for_word() -> None:
    lines = SERVE.read_text().splitlines()
    body = "\n".join(line for line in lines[2:]) + "\n"
    assert load(RAYSERVICE)["spec"]["serveConfigV2"] == body


def test_names_in_serve_yaml_are_those_that_clients_use() -> None:
    application = load(SERVE)["applications"][0]
    assert application["name"] == APP
    module, _, function = application["import_path"].partition(":")
    assert (module, hasattr(app, function)) == ("deployments.app", True)


def set_at(config: dict[str, Any], path: list[Any], value: Any) -> dict[str, Any]:
    changed = copy.deepcopy(config)
    at: Any = changed
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = value
    return changed


DEPLOYMENT = ["applications", 0, "deployments", 1]


@pytest.mark.parametrize(
    "path",
    [
        ["bogus"],
        ["http_options", "prot"],
        ["applications", 0, "bogus"],
        [*DEPLOYMENT, "num_replica"],
        [*DEPLOYMENT, "ray_actor_options", "num_gpu"],
        [*DEPLOYMENT, "request_router_config"],
    ],
    ids=lambda path: ".".join(map(str, path)),
)
def test_keys_that_ray_would_ignore_are_refused(path: list[Any]) -> None:
    changed = set_at(load(SERVE), path, {"request_router_clas": "x"} if path[-1] == "request_router_config" else 1)
    ServeDeploySchema.model_validate(changed)  # the day that this raises, our own check can go
    assert any("does not know" in line for line in problems(changed))


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (["applications", 0, "args", "slab_byte"], 1),
        (["applications", 0, "args", "num_replicas"], 0),
        ([*DEPLOYMENT, "name"], "Engine"),
        ([*DEPLOYMENT, "num_replicas"], -1),
    ],
    ids=lambda value: str(value),
)
def test_values_that_mean_nothing_are_refused(path: list[Any], value: Any) -> None:
    assert problems(set_at(load(SERVE), path, value))


def test_cluster_yaml_is_what_ray_up_takes() -> None:
    validate_config(prepare_config(load(ROOT / "cluster.yaml")))


def test_the_check_of_cluster_yaml_can_fail() -> None:
    with pytest.raises(Exception, match="worker_ip"):
        validate_config(prepare_config(load(ROOT / "cluster.yaml") | {"worker_ip": []}))


def test_cluster_yaml_avoids_known_traps() -> None:
    config = load(ROOT / "cluster.yaml")
    start = " ".join(config["head_start_ray_commands"])
    assert "RAY_enable_autoscaler_v2=0" in start
    assert "~/.ray/auth_token" in config["file_mounts"]
    for commands in (config["head_start_ray_commands"], config["worker_start_ray_commands"]):
        assert any("RAY_AUTH_MODE=token" in line for line in commands)
