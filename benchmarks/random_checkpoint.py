"""Checkpoints of real sizes with random weights, written to a disk shard by shard; or models in memory.

In: a size and a folder. Out: a checkpoint in the original layout, in several shards, that every program of this package
reads: LLaVA-1.5's shapes, the tower inside, the embedded model's tokenizer. A block of numbers is drawn once and repeated,
so that the whole model is never in memory. `in_memory` returns such a model as `llava.load` does, drawn on its device, with
a tokenizer that has text for every id.

    python -m benchmarks.random_checkpoint /tmp/random-7b --size 7b
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import struct
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch

from llava.assets import embedded_model_path
from llava.convert.writer import PlannedTensor, write_json, write_shards
from llava.files import atomic_folder
from llava.model.builder import LoadedModel
from llava.model.checkpoints.meta_model import build_empty_model

SIZES: dict[str, dict[str, int]] = {
    "tiny": {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4},
    "7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
    "13b": {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40},
}
TOWERS: dict[bool, dict[str, int]] = {
    False: {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16},
    True: {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4},
}
PINPOINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
BLOCK = 2**24
STD = 0.02


def config_of(size: str, *, tiles: bool, dtype: str) -> dict[str, Any]:
    tower = TOWERS[size == "tiny"]
    return {
        **SIZES[size],
        "architectures": ["LlavaLlamaForCausalLM"],
        "model_type": "llava_llama",
        "num_key_value_heads": SIZES[size]["num_attention_heads"],
        "vocab_size": 32000,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "tie_word_embeddings": False,
        "torch_dtype": dtype,
        "conv_mode": "v1",
        "image_aspect_ratio": "anyres" if tiles else "pad",
        "image_grid_pinpoints": PINPOINTS if tiles else None,
        "mm_hidden_size": tower["hidden_size"],
        "mm_patch_merge_type": "spatial_unpad" if tiles else "flat",
        "mm_projector_type": "mlp2x_gelu",
        "mm_use_im_patch_token": False,
        "mm_use_im_start_end": False,
        "mm_vision_select_feature": "patch",
        "mm_vision_select_layer": -2,
        "mm_vision_tower": "vision_tower",
        "tokenizer_model_max_length": 4096,
        "unfreeze_mm_vision_tower": True,
        "use_mm_proj": True,
    }


def make(
    folder: Path, size: str, *, tiles: bool = False, dtype: str = "bfloat16", shard_bytes: int = 5 * 10**9
) -> None:
    from llava.model.language_model.registry import llava_classes

    values = config_of(size, tiles=tiles, dtype=dtype)
    config_class, model_class = llava_classes("llama")
    with atomic_folder(folder) as begun:
        _write_files(begun, size, values)
        config = config_class(**values)
        config.name_or_path = str(begun)
        model = build_empty_model(lambda: model_class(config))
        generator = torch.Generator().manual_seed(0)
        block = (torch.randn(BLOCK, generator=generator) * STD).to(getattr(torch, dtype))
        largest = max(value.numel() for value in model.state_dict().values())
        drawn = block.repeat(-(-largest // BLOCK) + 1)
        label = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}[dtype]
        tensors = [
            PlannedTensor(name, label, tuple(value.shape), partial(_numbers, drawn, number, value.shape, name))
            for number, (name, value) in enumerate(model.state_dict().items())
        ]
        write_shards(begun, tensors, shard_bytes=shard_bytes)


def in_memory(size: str, device: str = "auto") -> LoadedModel:
    """The model as `llava.load` gives it; the prompt of a 7B is tokenized and decoded at the cost of LLaVA-1.5's."""
    from llava.model.checkpoints.inspect import inspect
    from llava.model.device import pick_device, pick_dtype
    from llava.model.language_model.registry import llava_classes
    from llava.model.tokenizer_setup import read_tokenizer
    from llava.processor import Processor

    place = pick_device(device)
    dtype = pick_dtype("auto", place)
    values = config_of(size, tiles=False, dtype=str(dtype).removeprefix("torch."))
    config_class, model_class = llava_classes("llama")
    usual = torch.get_default_dtype()
    with tempfile.TemporaryDirectory() as folder:
        _write_files(Path(folder), size, values)
        file = Path(folder) / "tokenizer.model"
        file.write_bytes(_with_pieces(file.read_bytes(), values["vocab_size"]))
        config = config_class(**values)
        config.name_or_path = folder
        torch.set_default_dtype(dtype)
        try:
            with torch.device(place):
                model = model_class(config).eval()
        finally:
            torch.set_default_dtype(usual)
        tokenizer = read_tokenizer(Path(folder), model.config)
        info = inspect(embedded_model_path())  # these weights are in no folder
    for name, parameter in model.named_parameters():
        is_scale = "norm" in name and name.endswith("weight")
        torch.nn.init.constant_(parameter.data, 1.0) if is_scale else torch.nn.init.normal_(parameter.data, std=STD)
    images = model.get_vision_tower().image_processor
    processor = Processor(tokenizer, images, model.image_policy())
    return LoadedModel(tokenizer, model, images, values["tokenizer_model_max_length"], "v1", processor, info)


def _with_pieces(model: bytes, num_pieces: int) -> bytes:
    """Return a sentencepiece model with meaningless words appended until it has `num_pieces`.

    Its file is a protocol buffer whose first field is the repeated list of pieces (text, score), so that pieces at the end of
    the file are appended to the list.
    """
    import sentencepiece

    present = sentencepiece.SentencePieceProcessor(model_proto=model).get_piece_size()
    added = []
    for number in range(present, num_pieces):
        word = f"▁zq{number}".encode()
        piece = b"\x0a" + bytes([len(word)]) + word + b"\x15" + struct.pack("<f", -1e6 - number)
        added.append(b"\x0a" + bytes([len(piece)]) + piece)
    return model + b"".join(added)


def _numbers(drawn: torch.Tensor, number: int, shape: torch.Size, name: str) -> torch.Tensor:
    """Return norms near one and other weights near zero; each tensor begins at another offset of the block."""
    start = number * 7919 % BLOCK
    numbers = drawn[start : start + math.prod(shape)].reshape(shape)
    return numbers + 1 if "norm" in name and name.endswith("weight") else numbers


def _write_files(folder: Path, size: str, values: dict[str, Any]) -> None:
    """Write everything of a checkpoint but its weights."""
    _write_tower(folder / "vision_tower", TOWERS[size == "tiny"])
    for name in ("tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json"):
        shutil.copyfile(embedded_model_path() / name, folder / name)
    write_json(folder / "config.json", values)


def _write_tower(folder: Path, sizes: dict[str, int]) -> None:
    folder.mkdir()
    values = {
        "model_type": "clip_vision_model",
        "image_size": 336,
        "patch_size": 14,
        "hidden_act": "quick_gelu",
        **sizes,
    }
    (folder / "config.json").write_text(json.dumps(values))
    processor = {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 336}, "crop_size": 336}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Write a checkpoint of a real size with random weights.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--size", choices=SIZES, default="7b")
    parser.add_argument("--tiles", action="store_true", help="cut images into tiles, as LLaVA-1.6 does")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    args = parser.parse_args()
    make(args.folder, args.size, tiles=args.tiles, dtype=args.dtype)
