"""The original's programs for checkpoints, built on `convert`: make_delta, apply_delta and consolidate.

They are started as `python -m llava.model.make_delta` and so on: each of those three files runs a `*_main` of this one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from llava.cli.program import ArgumentParser
from llava.convert.convert import ConversionOptions, convert
from llava.model.utils import auto_upgrade


def make_delta(base_model_path: str, target_model_path: str, delta_path: str, hub_repo_id: str | None = None) -> None:
    """Write `target - base` to `delta_path`, and upload it if a hub repository is given."""
    print("Calculating delta")
    print(convert(target_model_path, delta_path, to="delta", base=base_model_path).summary())
    if hub_repo_id is not None:
        from huggingface_hub import HfApi

        HfApi().create_repo(hub_repo_id, exist_ok=True)
        HfApi().upload_folder(repo_id=hub_repo_id, folder_path=delta_path)


def apply_delta(base_model_path: str, target_model_path: str, delta_path: str) -> None:
    """Write `delta + base` to `target_model_path`."""
    print("Applying delta")
    print(convert(delta_path, target_model_path, to="from-delta", base=base_model_path).summary())


def consolidate_ckpt(src_path: str, dst_path: str) -> None:
    """Write the checkpoint at `src_path`, whatever its layout and shards, as one file in the original layout."""
    print("Loading model")
    auto_upgrade(src_path)
    convert(src_path, dst_path, to="original", options=ConversionOptions(shard_bytes=10**15))


def make_delta_main(argv: Sequence[str] | None = None) -> int:
    flags = {"target-model-path": "the LLaVA checkpoint", "delta-path": "where the difference goes"}
    parser = _parser("make_delta", "Subtract a base model's weights.", {"base-model-path": "the base model"} | flags)
    parser.add_argument("--hub-repo-id", metavar="OWNER/NAME", help="a hub repository to upload it to as well")
    return parser.run(lambda args: make_delta(**vars(args)), argv)


def apply_delta_main(argv: Sequence[str] | None = None) -> int:
    flags = {"target-model-path": "where the whole model goes", "delta-path": "the published difference"}
    parser = _parser("apply_delta", "Add a base model's weights.", {"base-model-path": "the base model"} | flags)
    return parser.run(lambda args: apply_delta(**vars(args)), argv)


def consolidate_main(argv: Sequence[str] | None = None) -> int:
    flags = {"src": "the checkpoint", "dst": "where the result goes; does not exist yet"}
    parser = _parser("consolidate", "Write a checkpoint as one file.", flags)
    return parser.run(lambda args: consolidate_ckpt(args.src, args.dst), argv)


def _parser(name: str, description: str, folders: Mapping[str, str]) -> ArgumentParser:
    parser = ArgumentParser(prog=f"python -m llava.model.{name}", description=description)
    for flag, what in folders.items():
        parser.add_argument(f"--{flag}", required=True, metavar="FOLDER", help=what)
    return parser
