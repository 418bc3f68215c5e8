"""A worker in front of SGLang, with the flags of the original.

In: flags. Out: the same as openai_worker.py, which it is by another name: SGLang speaks the OpenAI API.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from llava.program import ArgumentParser, run_program
from llava.serve import openai_worker


def build_parser() -> ArgumentParser:
    return openai_worker.build_parser("python -m llava.serve.sglang_worker", "--sgl-endpoint")


def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    args.endpoint = args.sgl_endpoint
    return run_program(openai_worker.run, args)


if __name__ == "__main__":
    sys.exit(main())
