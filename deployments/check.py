"""Whether a Serve config file says what it means: Ray accepts keys that it does not know, and ignores them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from bitdelta_core.errors import InvalidRequest
from deployments.config import AppConfig
from deployments.gateway import INGRESS, REPLICAS

OURS = "deployments.app:build_app"


def check_file(path: Path) -> list[str]:
    """What is wrong with a Serve config, or with the one inside a KubeRay RayService; empty when nothing is.

    Raises:
        InvalidRequest: not a readable YAML mapping.
    """
    try:
        body = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"{path}: {error}") from error
    if isinstance(body, dict) and body.get("kind") == "RayService":
        body = yaml.safe_load(body.get("spec", {}).get("serveConfigV2", ""))
    if not isinstance(body, dict):
        raise InvalidRequest(f"{path} is not a Serve config: expected a mapping with `applications`")
    return problems(body)


def problems(config: dict[str, Any]) -> list[str]:
    """As `check_file`, of a parsed config."""
    from ray.serve.schema import ServeDeploySchema

    found = [f"{where}: Ray does not know this key" for where in _unknown(ServeDeploySchema, config, "")]
    try:
        ServeDeploySchema.model_validate(config)
    except ValidationError as error:
        found += _lines(error, "")
    for number, application in enumerate(config.get("applications") or []):
        if isinstance(application, dict) and application.get("import_path") == OURS:
            found += _application_problems(application, f"applications[{number}]")
    return found


def _application_problems(application: dict[str, Any], where: str) -> list[str]:
    found = []
    try:
        AppConfig(**(application.get("args") or {}))
    except ValidationError as error:
        found += _lines(error, f"{where}.args.")
    for deployment in application.get("deployments") or []:
        if deployment.get("name") not in (INGRESS, REPLICAS):
            found.append(f"{where}.deployments: no deployment is called {deployment.get('name')!r}")
    return found


def _lines(error: ValidationError, prefix: str) -> list[str]:
    return [f"{prefix}{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors(include_url=False)]


def _unknown(schema: type[BaseModel], value: Any, where: str) -> list[str]:
    """Paths of the keys that no field of the schema, or of a schema below it, takes."""
    if not isinstance(value, dict):
        return []
    found = []
    for key, inner in value.items():
        path = f"{where}.{key}" if where else str(key)
        field = schema.model_fields.get(key)
        if field is None:
            found.append(path)
            continue
        for model in _models(field.annotation):
            items = list(enumerate(inner)) if isinstance(inner, list) else [(None, inner)]
            for number, item in items:
                found += _unknown(model, item, path if number is None else f"{path}[{number}]")
    return found


def _models(annotation: Any) -> list[type[BaseModel]]:
    """The pydantic models that an annotation names, at any depth."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for argument in get_args(annotation) for model in _models(argument)]
