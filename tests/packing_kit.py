"""Pack the weights of a small model as AWQ, GPTQ, compressed-tensors, torchao and fp8 do, from the formats' descriptions."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

Parts = dict[str, Tensor]


def in_int32(numbers: Tensor, bits: int, order: tuple[int, ...] | None = None) -> Tensor:
    """Pack the last dimension, the first number into the lowest bits; with `order`, the position of each of eight."""
    per = 32 // bits
    columns = numbers.reshape(*numbers.shape[:-1], -1, per).to(torch.int64)
    words = torch.zeros(columns.shape[:-1], dtype=torch.int64)
    for position in range(per):
        words |= columns[..., order[position] if order else position] << (bits * position)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def awq(weight: Tensor, group: int = 16) -> tuple[Parts, Tensor]:
    """(O, I) -> the parts, and the numbers that they stand for."""
    grouped = weight.float().reshape(weight.shape[0], -1, group)
    low, high = grouped.amin(-1, keepdim=True), grouped.amax(-1, keepdim=True)
    scale = ((high - low) / 15).to(torch.float16)
    zero = (-low / scale.float()).round().clamp(0, 15)
    numbers = (grouped / scale.float() + zero).round().clamp(0, 15)
    read = ((numbers - zero).half() * scale).reshape(weight.shape)
    interleaved = (0, 2, 4, 6, 1, 3, 5, 7)
    parts = {
        "qweight": in_int32(numbers.reshape(weight.shape).t(), 4, interleaved),
        "qzeros": in_int32(zero.squeeze(-1).t(), 4, interleaved),
        "scales": scale.squeeze(-1).t().contiguous(),
    }
    return parts, read


def gptq(
    weight: Tensor, *, bits: int = 4, group: int = 16, offset: int = 1, shuffled: bool = False
) -> tuple[Parts, Tensor]:
    groups = torch.arange(weight.shape[1]) // group
    if shuffled:  # the order of activations decided which columns share a scale
        groups = groups[torch.randperm(len(groups), generator=torch.Generator().manual_seed(1))]
    largest = 2**bits - 1
    scale = (
        torch.stack([weight[:, groups == g].abs().amax(1) for g in range(int(groups.max()) + 1)])
        .mul(2 / largest)
        .half()
    )
    zero = torch.randint(0, largest + 1, scale.shape, generator=torch.Generator().manual_seed(2))  # (G, O)
    numbers = (weight.t() / scale[groups].float() + zero[groups]).round().clamp(0, largest)  # (I, O)
    read = ((numbers - zero[groups]).half() * scale[groups]).t()
    parts = {
        "qweight": in_int32(numbers.t(), bits).t().contiguous(),
        "qzeros": in_int32((zero - offset) % (largest + 1), bits),
        "scales": scale,
        "g_idx": groups.to(torch.int32),
    }
    return parts, read


def fp8_blocks(weight: Tensor, side: int = 24) -> tuple[Parts, Tensor]:
    rows, columns = weight.shape
    scale = torch.rand(-(-rows // side), -(-columns // side), generator=torch.Generator().manual_seed(3)) / 100 + 1e-3
    spread = scale.repeat_interleave(side, 0)[:rows].repeat_interleave(side, 1)[:, :columns]
    stored = (weight.float() / spread).clamp(-448, 448).to(torch.float8_e4m3fn)
    return {"weight": stored, "weight_scale_inv": scale}, stored.float() * spread


def fp8_with_one_scale(weight: Tensor) -> tuple[Parts, Tensor]:
    scale = weight.abs().amax() / 448
    stored = (weight / scale).to(torch.float8_e4m3fn)
    return {"weight": stored, "weight_scale": scale, "input_scale": torch.ones(())}, stored.float() * scale


def fp8_by_outputs(weight: Tensor) -> tuple[Parts, Tensor]:
    scale = weight.abs().amax(1, keepdim=True) / 448
    stored = (weight / scale).to(torch.float8_e4m3fn)
    return {"weight": stored, "weight_scale": scale}, stored.float() * scale


def w4a16(weight: Tensor, group: int = 16) -> tuple[Parts, Tensor]:
    grouped = weight.float().reshape(weight.shape[0], -1, group)
    scale = (grouped.abs().amax(-1, keepdim=True) / 7).to(torch.bfloat16)
    numbers = (grouped / scale.float()).round().clamp(-8, 7)
    read = (numbers.to(torch.bfloat16) * scale).reshape(weight.shape)
    parts = {
        "weight_packed": in_int32(numbers.reshape(weight.shape) + 8, 4),
        "weight_scale": scale.squeeze(-1),
        "weight_shape": torch.tensor(weight.shape),
    }
    return parts, read


def int8_activations(weight: Tensor) -> tuple[Parts, Tensor]:
    scale = (weight.abs().amax(1, keepdim=True) / 127).to(torch.bfloat16)
    numbers = (weight.float() / scale.float()).round().clamp(-128, 127)
    parts = {"weight": numbers.to(torch.int8), "weight_scale": scale, "input_scale": torch.ones(1)}
    return parts, numbers.to(torch.bfloat16) * scale


def compressed(form: str, **weights: object) -> dict[str, object]:
    group = {"targets": ["Linear"], "weights": weights, "format": form}
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "ignore": ["lm_head"],
        "config_groups": {"group_0": group},
    }


def torchao(weight: Tensor) -> tuple[Parts, Tensor]:
    scale = weight.abs().amax(1, keepdim=True) / 127
    numbers = (weight / scale).round()
    return {"_weight_qdata": numbers.to(torch.int8), "_weight_scale": scale}, numbers * scale


METHODS: dict[str, tuple[dict[str, object], Callable[[Tensor], tuple[Parts, Tensor]]]] = {
    "awq": ({"quant_method": "awq", "bits": 4, "group_size": 16, "version": "gemm", "zero_point": True}, awq),
    "gptq": ({"quant_method": "gptq", "bits": 4, "group_size": 16, "desc_act": False}, gptq),
    "gptq, 8 bits": ({"quant_method": "gptq", "bits": 8, "group_size": 16}, lambda w: gptq(w, bits=8)),
    "gptq, 2 bits": ({"quant_method": "gptq", "bits": 2, "group_size": 16}, lambda w: gptq(w, bits=2)),
    "gptq in order of activations": (
        {"quant_method": "gptq", "bits": 4, "group_size": 16, "desc_act": True}, lambda w: gptq(w, shuffled=True),
    ),
    "gptq's second form": (
        {"quant_method": "gptq", "bits": 4, "checkpoint_format": "gptq_v2"}, lambda w: gptq(w, offset=0),
    ),
    "fp8": ({"quant_method": "fp8", "weight_block_size": [24, 24], "activation_scheme": "dynamic"}, fp8_blocks),
    "fp8 of AutoFP8": ({"quant_method": "fp8", "activation_scheme": "static"}, fp8_with_one_scale),
    "fp8 of ModelOpt": ({"quant_method": "modelopt", "quant_algo": "FP8"}, fp8_with_one_scale),
    "fp8 of FBGEMM": ({"quant_method": "fbgemm_fp8"}, fp8_by_outputs),
    "w4a16": (compressed("pack-quantized", num_bits=4, group_size=16, strategy="group"), w4a16),
    "torchao": ({"quant_method": "torchao"}, torchao),
    "w8a8": (compressed("int-quantized", num_bits=8, strategy="channel"), int8_activations),
}  # fmt: skip


def pack(folder: Path, method: str, target: Path) -> tuple[Path, Path]:
    """Copies of a folder with the layers' matrices packed, and with the numbers that these stand for."""
    settings, packer = METHODS[method]
    state = load_file(folder / "model.safetensors")
    packed, plain = dict(state), dict(state)
    for name, tensor in state.items():
        if "layers." not in name or tensor.ndim != 2 or "vision" in name:
            continue
        parts, numbers = packer(tensor)
        del packed[name]
        packed |= {f"{name.removesuffix('weight')}{part}": value.contiguous() for part, value in parts.items()}
        plain[name] = numbers.contiguous()
    folders = (target / "packed", target / "plain")
    for place, tensors in zip(folders, (packed, plain), strict=True):
        shutil.copytree(folder, place)
        save_file(tensors, place / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text()) | {"quantization_config": settings}
    (folders[0] / "config.json").write_text(json.dumps(config))
    return folders
