"""What is in deploy/: commands that parse, and the application for Ray Serve, with Ray itself left out."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import sys
import types
from collections.abc import Callable
from typing import Any

import httpx
import pytest
import yaml
from pydantic import ValidationError
from serve_kit import ROOT, running

from llava.serve import controller, gradio_web_server, model_worker
from llava.serve import serve as all_in_one


def test_the_deployed_commands_parse() -> None:
    """Every llava command of the unit files, the Dockerfile and the compose file is one that its program takes."""
    parsers = {
        "serve": all_in_one.build_parser(),
        "controller": controller.build_parser(),
        "worker": model_worker.build_parser(),
        "web": gradio_web_server.build_parser(),
    }
    commands: list[list[str]] = []
    for unit in sorted((ROOT / "deploy").glob("*.service")):
        (line,) = (line for line in unit.read_text().splitlines() if line.startswith("ExecStart="))
        words = line.partition("llava ")[2].replace("%i", "0").split()
        commands.append(words)
    docker = (ROOT / "deploy/Dockerfile").read_text()
    commands.append(json.loads(next(line for line in docker.splitlines() if line.startswith("CMD"))[4:]))
    compose = yaml.safe_load((ROOT / "deploy/compose.yaml").read_text())
    commands += [[str(word) for word in service["command"]] for service in compose["services"].values()]
    assert len(commands) == 3 + 1 + 4
    for word, *rest in commands:
        parsers[word].parse_args(rest)


class Deployment:
    """What is given to Ray, kept."""

    def __init__(self, target: Any, **options: Any) -> None:
        self.target, self.options = target, options

    def bind(self, *arguments: Any) -> Deployment:
        self.arguments = arguments
        return self


@pytest.fixture
def ray_serve(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module over a Ray that hands its arguments back."""

    def ingress(application: Callable[[], Any]) -> Callable[[type], Any]:
        return lambda replica: (application, replica)

    ray = types.ModuleType("ray")
    ray.serve = types.SimpleNamespace(deployment=Deployment, ingress=ingress)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "ray", ray)
    spec = importlib.util.spec_from_file_location("ray_serve", ROOT / "deploy/ray_serve.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_replica_of_ray_serve_answers(ray_serve: Any) -> None:
    deployment = ray_serve.build({"replicas": "2", "gpus": "0", "flags": "--device cpu --max-images 1"})
    assert deployment.options["num_replicas"] == 2
    assert deployment.options["ray_actor_options"] == {"num_gpus": 0, "num_cpus": 1}
    application, replica = deployment.target
    with running(application()) as address:  # its end closes the engine
        (model,) = httpx.get(f"{address}/v1/models").json()["data"]
        body = {"model": model["id"], "messages": [{"role": "user", "content": "hi"}], "max_tokens": 3}
        assert httpx.post(f"{address}/v1/chat/completions", json=body).json()["usage"]["completion_tokens"] == 3
        assert httpx.post(f"{address}/list_models").json() == {"models": [model["id"]]}
        check = replica(*deployment.arguments).check_health
        asyncio.run(check())
    with pytest.raises(RuntimeError, match="does not answer any more"):
        asyncio.run(check())


def test_a_misspelt_option_of_ray_serve_is_refused(ray_serve: Any) -> None:
    with pytest.raises(ValidationError, match="replica"):
        ray_serve.build({"replica": "2"})
