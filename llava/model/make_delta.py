"""Subtract a base model's weights from a LLaVA's, for a checkpoint that is of no use without the base.

python -m llava.model.make_delta --base-model-path ./llama-7b --target-model-path ./llava-7b --delta-path ./llava-7b-delta
"""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Sequence

from llava.cli.program import ArgumentParser
from llava.convert.convert import convert
from llava.convert.options import describe


def make_delta(base_model_path: str, target_model_path: str, delta_path: str, hub_repo_id: str | None = None) -> None:
    """Write `target - base` to `delta_path`, and upload it where a hub repository is named."""
    print("Calculating delta")
    report = convert(target_model_path, delta_path, to="delta", base=base_model_path)
    print("\n".join(describe(report)))
    if hub_repo_id is not None:
        from huggingface_hub import HfApi

        HfApi().create_repo(hub_repo_id, exist_ok=True)
        HfApi().upload_folder(repo_id=hub_repo_id, folder_path=delta_path)


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(prog="python -m llava.model.make_delta", description="Subtract a base model's weights.")
    parser.add_argument("--base-model-path", required=True, metavar="FOLDER", help="the base model")
    parser.add_argument("--target-model-path", required=True, metavar="FOLDER", help="the LLaVA checkpoint")
    parser.add_argument("--delta-path", required=True, metavar="FOLDER", help="where the difference goes")
    parser.add_argument("--hub-repo-id", metavar="OWNER/NAME", help="a hub repository to upload it to as well")
    return parser


def run(args: Namespace) -> None:
    make_delta(args.base_model_path, args.target_model_path, args.delta_path, args.hub_repo_id)


def main(argv: Sequence[str] | None = None) -> int:
    return build_parser().run(run, argv)


if __name__ == "__main__":
    sys.exit(main())
