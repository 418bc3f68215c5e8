"""Replicas of one model behind one address, on the machines and GPUs of a Ray cluster.

In: the number of replicas, the resources of each, and the flags of `llava serve` for all of them. Out: an application for Ray
Serve, with both APIs of `llava serve` but not its page. Each replica is an engine of its own; Ray picks the less busy of two,
restarts one that fails, and adds machines where it is configured to.

    pip install 'llava[serve]' 'ray[serve]'
    serve run deploy.ray_serve:build replicas=4 flags="./llava-v1.5-7b"
    serve run deploy.ray_serve:build replicas=2 gpus=0 flags="--device cpu"        the small model in the package, without a GPU
"""

from __future__ import annotations

import shlex
from functools import cache
from typing import Any

from pydantic import BaseModel
from ray import serve

from llava.serve.http.flags import access_from, limits_from
from llava.serve.model_worker import check_model_flags
from llava.serve.serve import build_parser, model_app


class Options(BaseModel, extra="forbid"):
    replicas: int = 1
    gpus: float = 1  # of each replica
    cpus: float = 1
    at_once: int = 256  # requests that Ray sends to a replica at once; others wait in Ray
    flags: str = ""  # of `llava serve`; those for addresses and workers have no effect here


@cache
def loaded(flags: str) -> tuple[Any, Any]:
    """Return the model of this process, and its application."""
    from llava.serve.model_worker import load_backend
    from llava.serve.service import Service

    args = build_parser().parse_args(shlex.split(flags))
    args.model_path = args.model or args.model_path
    check_model_flags(args)
    access = access_from(args)
    service = Service(load_backend(args), limits_from(args), access.memory)
    return service, model_app(service, access)[1]


class Replica:
    def __init__(self, flags: str) -> None:
        self._flags = flags

    async def check_health(self) -> None:
        """Called by Ray every few seconds, which restarts a replica that raises."""
        if problem := await loaded(self._flags)[0].liveness():
            raise RuntimeError(problem)


def build(given: dict[str, str]) -> Any:
    options = Options.model_validate(given)
    flags = options.flags

    def application() -> Any:
        return loaded(flags)[1]

    deployment = serve.deployment(
        serve.ingress(application)(Replica),
        name="llava",
        num_replicas=options.replicas,
        max_ongoing_requests=options.at_once,
        ray_actor_options={"num_gpus": options.gpus, "num_cpus": options.cpus},
    )
    return deployment.bind(flags)
