"""Record what compressed-tensors (0.20.1) and torchao (0.18.0) make of weights, and the numbers that they read back.

python tests/golden/packed/record.py        with the libraries installed; it writes recorded.safetensors and recorded.json
"""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

HERE = Path(__file__).parent
OUTPUTS, INPUTS = 28, 44  # neither is a multiple of a block, nor of the numbers in 32 bits
SCHEMES = {
    "w4a16": ("pack-quantized", {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 4}),
    "w4a16_asym": ("pack-quantized", {"num_bits": 4, "type": "int", "symmetric": False, "strategy": "group", "group_size": 4}),
    "w8a16": ("pack-quantized", {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}),
    "int8": ("int-quantized", {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}),
    "int8_asym": ("int-quantized", {"num_bits": 8, "type": "int", "symmetric": False, "strategy": "channel"}),
    "fp8": ("float-quantized", {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "tensor"}),
    "fp8_dynamic": ("float-quantized", {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel"}),
    "fp8_block": (
        "float-quantized",
        {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "block", "block_structure": [8, 8]},
    ),
}  # fmt: skip


def main() -> None:
    from compressed_tensors.compressors.base import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    tensors, configs = {}, {}
    for seed, (name, (form, weights)) in enumerate(SCHEMES.items()):
        torch.manual_seed(seed)
        args = QuantizationArgs(**weights)
        scheme = QuantizationScheme(targets=["Linear"], weights=args, format=form)
        weight = torch.randn(OUTPUTS, INPUTS).to(torch.bfloat16)
        shape = {"group": (OUTPUTS, INPUTS // 4), "channel": (OUTPUTS, 1), "tensor": (1,), "block": (4, 6)}
        span = 448.0 if args.type == "float" else 2.0 ** (args.num_bits - 1)
        scale = (torch.rand(shape[weights["strategy"]]) * 2 + 2).to(torch.bfloat16) / span
        state = {"weight": weight, "weight_scale": scale}
        if not args.symmetric:
            half = 2 ** (args.num_bits - 1)
            state["weight_zero_point"] = torch.randint(-half, half, scale.shape, dtype=torch.int8)
        compressor = BaseCompressor.get_value_from_registry(form)
        packed = compressor.compress(state, scheme)
        expected = compressor.decompress(packed, scheme)["weight"]
        tensors |= {f"{name}.{part}": value.contiguous() for part, value in packed.items()}
        tensors[f"{name}.expected"] = expected.contiguous()
        configs[name] = {
            "quant_method": "compressed-tensors", "format": form, "ignore": ["lm_head"],
            "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, "format": form}},
        }  # fmt: skip
    for name in ("Int8WeightOnlyConfig", "Float8WeightOnlyConfig"):
        tensors |= of_torchao(name)
        configs[name] = {"quant_method": "torchao"}
    save_file(tensors, HERE / "recorded.safetensors")
    (HERE / "recorded.json").write_text(json.dumps(configs, indent=1) + "\n")


def of_torchao(name: str) -> dict[str, torch.Tensor]:
    from torchao import quantization
    from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict

    torch.manual_seed(0)
    layer = torch.nn.Linear(INPUTS, OUTPUTS, bias=False, dtype=torch.bfloat16)
    quantization.quantize_(layer, getattr(quantization, name)())
    parts, _ = flatten_tensor_state_dict({f"{name}.weight": layer.weight.data})
    return parts | {f"{name}.expected": layer.weight.data.dequantize()}


if __name__ == "__main__":
    main()
