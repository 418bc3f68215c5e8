"""Print the functions of the package between a command and its first matrix product.

    python scripts/docs/call_stack.py                 chat, eval, serve, cli and train
    python scripts/docs/call_stack.py chat serve

Each command answers one question with the small model in the package, on the CPU (`train` computes one loss). The path ends
at the decoder's `hidden_states`, or at the model's `forward` where `model.generate` or the trainer calls it. Where a thread
or a task continues another one's work, the path goes on there: threads of a pool and tasks of an event loop are joined where
they are started, the engine's thread where it is given the request; of that thread, the calls below its loop count.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import io
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar, copy_context
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple
from unittest import mock

import llava

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = Path(llava.__file__).parent
IMAGE = str(ROOT / "images" / "demo.jpg")
QUESTION = "What colour is the star?"
LIMITS = {"chat": 8, "eval": 8, "serve": 10, "cli": 4, "train": 5}  # calls after the entry function


class Call(NamedTuple):
    file: str  # relative to the package
    function: str

    def __str__(self) -> str:
        return f"llava/{self.file}:{self.function}"


ENTRIES = {
    "chat": Call("cli/chat.py", "run"),
    "eval": Call("eval/harness/run.py", "run"),
    "serve": Call("serve/openai/routes.py", "ModelApi.chat_completions"),
    "cli": Call("serve/cli.py", "run"),
    "train": Call("train/run.py", "run"),
}
ENGINE_LOOP = "_loop"  # of engine/worker.py's subclasses
_started_by: ContextVar[tuple[Call, ...]] = ContextVar("started_by", default=())


class Found(BaseException):
    """Ends a training run at its first product."""


def path_of(command: str) -> list[Call]:
    """The calls of a command from its entry function to the first product, both included."""
    with recording() as paths:
        COMMANDS[command]()
    path = paths[0]
    return path[path.index(ENTRIES[command]) :]


@contextlib.contextmanager
def recording() -> Iterator[list[list[Call]]]:
    """Collect the path to each product that the package computes meanwhile."""
    from llava.engine.decoder import Decoder
    from llava.engine.worker import EngineWorker
    from llava.model.llava_arch import LlavaMetaForCausalLM

    paths: list[list[Call]] = []
    submitted: list[Call] = []  # by the request that is computed

    def add(self: EngineWorker, *args: Any, **kwargs: Any) -> None:
        if not submitted:
            submitted.extend([*path_here(), Call("engine/worker.py", "EngineWorker.add")])
        return plain_add(self, *args, **kwargs)

    def product(function: Callable[..., Any], name: Call, *, stops: bool) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            here = path_here()
            loops = [at for at, step in enumerate(here) if step.function.endswith(f".{ENGINE_LOOP}")]
            paths.append([*(submitted + here[loops[0] + 1 :] if loops else here), name])
            if stops and not loops:
                raise Found
            return function(*args, **kwargs)

        return call

    def submit(self: ThreadPoolExecutor, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        path = tuple(path_here())

        def start() -> Any:
            copy = copy_context()
            copy.run(_started_by.set, path)
            return copy.run(function, *args, **kwargs)

        return plain_submit(self, start)

    plain_add, plain_submit = EngineWorker.add, ThreadPoolExecutor.submit
    with (
        mock.patch.object(EngineWorker, "add", add),
        mock.patch.object(ThreadPoolExecutor, "submit", submit),
        mock.patch.object(
            Decoder,
            "hidden_states",
            product(Decoder.hidden_states, Call("engine/decoder.py", "hidden_states"), stops=False),
        ),
        mock.patch.object(
            LlavaMetaForCausalLM,
            "forward",
            product(LlavaMetaForCausalLM.forward, Call("model/llava_arch.py", "forward"), stops=True),
        ),
    ):
        yield paths


def path_here() -> list[Call]:
    """The package's functions on the stack, outermost first, after those that started this thread or task."""
    frame: FrameType | None = sys._getframe(1)
    calls: list[Call] = []
    while frame is not None:
        file, name = Path(frame.f_code.co_filename), frame.f_code.co_qualname
        if file.is_relative_to(PACKAGE) and not name.endswith(("<module>", "<lambda>", "comp>", "<genexpr>")):
            calls.append(Call(str(file.relative_to(PACKAGE)), name))
        frame = frame.f_back
    return [*_started_by.get(), *reversed(calls)]


# The commands, each with one question


def _chat() -> None:
    from llava.cli.chat import main

    main(["--device", "cpu", "--max-new-tokens", "1", IMAGE, QUESTION])


def _eval() -> None:
    from llava.eval.harness.main import main

    with tempfile.TemporaryDirectory() as out:
        data = str(ROOT / "playground" / "data" / "eval")
        main(["tiny-scenes", "--device", "cpu", "--data-dir", data, "--out", out, "--limit", "1", "--quiet"])


def _cli() -> None:
    from llava.serve.cli import main

    with mock.patch("sys.stdin", io.StringIO(f"{QUESTION}\n")):
        main(["--device", "cpu", "--max-new-tokens", "1", "--temperature", "0", "--image-file", IMAGE])


def _train() -> None:
    from llava.assets import embedded_model_path
    from llava.diagnose.tracer.training import run_arguments
    from llava.train.train import train

    with tempfile.TemporaryDirectory() as scratch, contextlib.suppress(Found):
        turns = [{"from": "human", "value": f"<image>\n{QUESTION}"}, {"from": "gpt", "value": "Yellow."}]
        data = Path(scratch) / "samples.json"
        data.write_text(json.dumps([{"id": "0", "image": Path(IMAGE).name, "conversations": turns}]), encoding="utf-8")
        flags = ["--max_steps", "1", "--use_cpu", "True", "--save_strategy", "no"]
        images = str(Path(IMAGE).parent)
        train(argv=run_arguments(str(data), str(embedded_model_path()), images, flags, output_dir=f"{scratch}/run"))


def _serve() -> None:
    asyncio.run(_serve_one())


async def _serve_one() -> None:
    import httpx
    from fastapi import FastAPI

    from llava.assets import embedded_model_path
    from llava.model.builder import load
    from llava.serve.backends.in_process import EngineBackend
    from llava.serve.http.limits import ServeLimits
    from llava.serve.http.memory_budget import MemoryBudget
    from llava.serve.openai.routes import ModelApi, openai_routes
    from llava.serve.service import Service

    asyncio.get_running_loop().set_task_factory(_joined_task)
    backend = EngineBackend(load(embedded_model_path(), device="cpu"), name="llava-v1.5-tiny")
    app = FastAPI()
    app.include_router(openai_routes(ModelApi(Service(backend, ServeLimits(), MemoryBudget()))))
    messages = [{"role": "user", "content": QUESTION}]
    body = {"model": "llava-v1.5-tiny", "messages": messages, "max_tokens": 1}
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as client:
        (await client.post("/v1/chat/completions", json=body)).raise_for_status()
    await backend.close()


def _joined_task(loop: asyncio.AbstractEventLoop, coroutine: Any, **kwargs: Any) -> asyncio.Task[Any]:
    """A task that knows the calls that started it."""
    context = kwargs.pop("context", None) or copy_context()
    context.run(_started_by.set, tuple(path_here()))
    return asyncio.Task(coroutine, loop=loop, context=context, **kwargs)


COMMANDS: dict[str, Callable[[], None]] = {"chat": _chat, "eval": _eval, "serve": _serve, "cli": _cli, "train": _train}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("commands", nargs="*", choices=[*COMMANDS, []], help="which (default: all)")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    for command in parser.parse_args().commands or COMMANDS:
        with contextlib.redirect_stdout(io.StringIO()):
            entry, *calls = path_of(command)
        print(f"{command}: {len(calls)} calls from {entry}, at most {LIMITS[command]}")
        for depth, call in enumerate(calls, 1):
            print(f"{'  ' * depth}{depth} {call}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
