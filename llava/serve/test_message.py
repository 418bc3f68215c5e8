"""The original's test client: send a worker a question in the original's protocol.

In: flags. Out: the answer on stdout, streamed.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Sequence

from llava.cli.program import ArgumentParser
from llava.conversation import get_template
from llava.errors import InputError, require
from llava.serve.router.protocol import OK, read_chunks

TEMPLATE = "vicuna_v1"


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="python -m llava.serve.test_message", description="Send a worker a question in the original's protocol."
    )
    parser.add_argument(
        "--controller-address", metavar="URL", default="http://localhost:21001", help="(default: %(default)s)"
    )
    parser.add_argument("--worker-address", metavar="URL", help="(default: the one that the controller names)")
    parser.add_argument("--model-name", metavar="NAME", default="facebook/opt-350m", help="(default: %(default)s)")
    parser.add_argument("--max-new-tokens", type=int, metavar="N", default=32, help="(default: %(default)s)")
    parser.add_argument(
        "--message", metavar="TEXT", default="Tell me a story with more than 1000 words.", help="(default: %(default)s)"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    return build_parser().run(run, argv)


def run(args: Namespace) -> int:
    httpx = require("httpx", extra="serve")
    controller = args.controller_address.rstrip("/")
    try:
        worker = args.worker_address
        if not worker:
            httpx.post(f"{controller}/refresh_all_workers", timeout=30).raise_for_status()
            answer = httpx.post(f"{controller}/get_worker_address", json={"model": args.model_name}, timeout=10)
            worker = answer.raise_for_status().json()["address"]
        if not worker:
            raise InputError(f"no worker of {controller} serves {args.model_name!r}; name another one by --model-name")
        conversation = get_template(TEMPLATE)
        conversation.append_message(conversation.roles[0], args.message)
        conversation.append_message(conversation.roles[1], None)
        prompt = conversation.get_prompt()
        body = {"model": args.model_name, "prompt": prompt, "max_new_tokens": args.max_new_tokens}
        body |= {"temperature": 0.7, "stop": conversation.sep2}
        print(args.message)
        with httpx.stream("POST", f"{worker}/worker_generate_stream", json=body, timeout=600) as response:
            written = len(prompt)
            for chunk in read_chunks(response.iter_raw()):
                if chunk["error_code"] != OK:
                    raise InputError(f"{chunk['text']} (error_code: {chunk['error_code']})")
                print(chunk["text"][written:], end="", flush=True)
                written = len(chunk["text"])
        print()
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise InputError(f"the servers cannot be reached: {error}") from error
    return 0


if __name__ == "__main__":
    sys.exit(main())
