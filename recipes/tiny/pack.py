"""Turn the result of stage 2 into the folder that ships: fp16, small shards, the tower's files inside.

In: the folder that llava.train.train wrote, the tower's folder. Out: FOLDER with config.json, model-*.safetensors and their
index, the tokenizer's files, and vision_tower/ (configuration only: the weights are in the shards).
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

SHARD_BYTES = 15 * 2**20
TOKENIZER_FILES = ("tokenizer.model", "tokenizer_config.json", "special_tokens_map.json")
TOWER_FILES = ("config.json", "preprocessor_config.json")


def pack(trained: Path, tower: Path, tokenizer: Path, out: Path, *, shard_bytes: int = SHARD_BYTES) -> int:
    """Write the folder; returns its size in bytes."""
    out.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, Tensor] = {}
    for file in sorted(trained.glob("*.safetensors")):
        tensors |= {name: tensor.to(torch.float16) for name, tensor in load_file(file).items()}
    if not any(".vision_tower." in name for name in tensors):
        raise ValueError(f"no tower weights in {trained}; stage 2 must run with --unfreeze_mm_vision_tower True")
    write_shards(tensors, out, shard_bytes)
    config = json.loads((trained / "config.json").read_text())
    config |= {"mm_vision_tower": "vision_tower", "unfreeze_mm_vision_tower": True, "dtype": "float16"}
    config.pop("_name_or_path", None)
    (out / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    for name in TOKENIZER_FILES:
        shutil.copyfile(tokenizer / name, out / name)
    generation = trained / "generation_config.json"
    if generation.exists():
        shutil.copyfile(generation, out / generation.name)
    (out / "vision_tower").mkdir(exist_ok=True)
    for name in TOWER_FILES:
        shutil.copyfile(tower / name, out / "vision_tower" / name)
    return sum(p.stat().st_size for p in out.rglob("*") if p.is_file())


def write_shards(tensors: dict[str, Tensor], out: Path, shard_bytes: int) -> None:
    shards: list[dict[str, Tensor]] = [{}]
    used = 0
    for name in sorted(tensors):
        size = tensors[name].numel() * tensors[name].element_size()
        if shards[-1] and used + size > shard_bytes - 2**16:  # room for the header
            shards.append({})
            used = 0
        shards[-1][name] = tensors[name].contiguous()
        used += size
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, out / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
    total = sum(t.numel() * t.element_size() for t in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (out / "model.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trained", type=Path, required=True, help="output folder of stage 2")
    parser.add_argument("--tower", type=Path, required=True, help="output folder of clip.py")
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(argv)
    size = pack(args.trained, args.tower, args.tokenizer, args.out)
    print(json.dumps({"stage": "pack", "bytes": size}), flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
