"""The HTTP front as a deployment of its own. Also callable through handles: `resolve` is how Python clients resolve
names."""

from ray import serve
from ray.serve.handle import DeploymentHandle

from deployments.catalog import Catalog, open_repository
from deployments.config import AppConfig
from deployments.front import Front, new_api
from deployments.gateway import Gateway


@serve.ingress(new_api())
class Ingress(Front):
    """Every request and every token passes through here."""

    def __init__(self, config: AppConfig, replicas: DeploymentHandle) -> None:
        super().__init__(config, Gateway(replicas), Catalog(open_repository(config)))
