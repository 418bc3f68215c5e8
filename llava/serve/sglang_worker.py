"""A worker in front of SGLang: openai_worker.py with the original's flags, since SGLang has the OpenAI API.

In: flags. Out: the remote server's answers.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Sequence

from llava.cli.program import ArgumentParser
from llava.serve import openai_worker


def build_parser() -> ArgumentParser:
    return openai_worker.build_parser("python -m llava.serve.sglang_worker", "--sgl-endpoint")


def main(argv: Sequence[str] | None = None) -> int:
    return build_parser().run(run, argv)


def run(args: Namespace) -> int:
    return openai_worker.run(Namespace(**vars(args), endpoint=args.sgl_endpoint))


if __name__ == "__main__":
    sys.exit(main())
