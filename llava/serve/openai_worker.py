"""A worker in front of any server with the OpenAI API, which registers that server's model with a controller.

In: flags; then requests in both protocols. Out: the remote server's answers. Requests to it are made in backends/remote.py;
sglang_worker.py has the original's flags.
"""

from __future__ import annotations

import os
import sys
from argparse import Namespace
from collections.abc import Sequence

from llava.cli.program import ArgumentParser
from llava.conversation import get_template, web_conv_mode_for_model_name
from llava.errors import InputError
from llava.serve.http.flags import add_limit_flags, add_server_flags, limits_from, listen_address_from
from llava.serve.model_worker import add_worker_flags, serve_worker
from llava.serve.process import end_with_stdin

LIST_S = 10.0  # for the list of models
ENDPOINT_KEY_VARIABLE = "LLAVA_ENDPOINT_KEY"
EXAMPLES = """\
examples:
  python -m llava.serve.openai_worker --endpoint http://localhost:8000 --model-name llava-v1.5-7b      vLLM, llama.cpp, ...
  python -m llava.serve.sglang_worker --sgl-endpoint http://localhost:30000
"""


def build_parser(prog: str = "python -m llava.serve.openai_worker", endpoint: str = "--endpoint") -> ArgumentParser:
    parser = ArgumentParser(
        prog=prog,
        description="Register a server with the OpenAI API with a controller, and forward requests to it.",
        epilog=EXAMPLES,
    )
    remote = parser.add_argument_group("the server that answers")
    remote.add_argument(endpoint, required=True, metavar="URL", help="its address, as http://localhost:8000")
    remote.add_argument("--endpoint-model", metavar="NAME", help="its name for the model (default: the first it lists)")
    remote.add_argument(
        "--conv-mode", metavar="NAME", help="template of the prompts that clients send (default: by the model's name)"
    )
    remote.add_argument(
        "--chat-only",
        action="store_true",
        help="use its chat route only: finished prompts are parsed to messages, with images or not",
    )
    add_worker_flags(parser)
    add_server_flags(parser, port=21002)
    add_limit_flags(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    return build_parser().run(run, argv)


def run(args: Namespace) -> int:
    if args.conv_mode is not None:
        get_template(args.conv_mode)
    limits = limits_from(args)
    address = listen_address_from(args, is_worker=True)
    if args.end_with_stdin:
        end_with_stdin()
    from dataclasses import replace

    from llava.serve.backends.base import ModelCard
    from llava.serve.backends.remote import RemoteBackend
    from llava.serve.service import Service

    key = os.environ.get(ENDPOINT_KEY_VARIABLE)
    model = args.endpoint_model or first_model(args.endpoint, key)
    name = args.model_name or model.rstrip("/").rpartition("/")[2]
    conv_mode = args.conv_mode or web_conv_mode_for_model_name(name)
    card = ModelCard(
        name, get_template(conv_mode), conv_mode, context_len=None, image_placeholder="<image>", takes_grammar=False
    )
    if args.limit_model_concurrency is not None:
        limits = replace(limits, max_requests=args.limit_model_concurrency)
    backend = RemoteBackend(args.endpoint, model=model, card=card, key=key, chat_only=args.chat_only)
    return serve_worker(Service(backend, limits, address.access.memory), args, address)


def first_model(endpoint: str, key: str | None) -> str:
    """Return the name of the model that a server lists first."""
    from llava.cli.http_client import HttpFailureError, send

    url = endpoint.rstrip("/").removesuffix("/v1") + "/v1/models"
    try:
        reply = send(url, key=key, timeout_s=LIST_S)
        if reply.status != 200:
            raise HttpFailureError(f"status {reply.status}")
        name = reply.json()["data"][0]["id"]  # type: ignore[index]
        if not isinstance(name, str):
            raise TypeError("the name of its model is none")
    except (HttpFailureError, KeyError, IndexError, TypeError) as error:
        raise InputError(f"{url} does not list a model ({error}); is the server running?") from error
    return name


if __name__ == "__main__":
    sys.exit(main())
