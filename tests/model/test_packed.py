"""Weights that are stored quantized are read as the numbers that the library which packed them reads."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from family import theirs
from golden_data import golden
from packing_kit import METHODS, compressed, pack
from safetensors.torch import load_file, save_file
from tiny import build
from torch import Tensor
from transformers import LlavaForConditionalGeneration
from transformers_kit import small_llava

from llava.convert.convert import ConversionOptions, convert
from llava.convert.describe import describe_checkpoint
from llava.diagnose.checks.checkpoint import examine_checkpoint
from llava.errors import InputError
from llava.model.builder import load
from llava.model.checkpoints.packed import find_packed
from llava.model.checkpoints.weight_files import read_headers, read_tensor

IDS = torch.tensor([[1, 5, -200, 9]])
PIXELS = torch.randn(1, 3, 28, 28, generator=torch.Generator().manual_seed(0))
RECORDED = json.loads(golden("packed/recorded.json").read_text())


def logits(folder: Path, **options: object) -> Tensor:
    with torch.inference_mode():
        return (
            load(folder, device="cpu", **({"dtype": "fp32"} | options)).model(IDS, images=PIXELS).logits[0, -1].float()
        )


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("original") / "model", conv_mode="llava_v1")


# --- tests ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", RECORDED)
def test_numbers_are_those_of_the_library(scheme: str, tmp_path: Path) -> None:
    """Recorded from the library by golden/packed/record.py."""
    recorded = load_file(golden("packed/recorded.safetensors"))
    parts = {name.removeprefix(f"{scheme}."): t for name, t in recorded.items() if name.startswith(f"{scheme}.")}
    want = parts.pop("expected")
    save_file({f"layer.{part}": tensor for part, tensor in parts.items()}, tmp_path / "model.safetensors")
    packing = find_packed(read_headers(tmp_path / "model.safetensors"), RECORDED[scheme], tmp_path / "config.json")
    assert packing is not None
    (header,) = packing.headers.values()
    got = read_tensor(header)
    assert (header.name, got.shape) == ("layer.weight", header.shape)
    assert torch.equal(got.to(want.dtype), want)


@pytest.mark.parametrize("method", METHODS)
def test_a_packed_model_is_the_one_that_its_numbers_make(
    method: str, original: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    packed, plain = pack(original, method, tmp_path)
    assert torch.equal(logits(packed), logits(plain))
    name = METHODS[method][0]["quant_method"]
    assert f"stored quantized ({'fp8' if method.startswith('fp8') else name}" in caplog.text
    assert ("quantized activations" in caplog.text) == (method in ("w8a8", "fp8 of AutoFP8", "fp8 of ModelOpt"))
    found, want = describe_checkpoint(packed), describe_checkpoint(plain)
    assert (found.parameters, found.readers["llava"]) == (want.parameters, "yes")
    assert sum(found.stored_bytes.values()) < sum(want.stored_bytes.values())


def test_every_way_of_loading_and_every_command_reads_it(original: Path, tmp_path: Path) -> None:
    packed, plain = pack(original, "awq", tmp_path)
    want = logits(plain)
    assert torch.equal(logits(packed, device_map={"": "cpu"}), want)
    assert examine_checkpoint(packed).codes == []
    report = convert(packed, tmp_path / "converted", to="original")
    assert report.tensors.is_exact
    assert "quantization_config" not in json.loads((tmp_path / "converted" / "config.json").read_text())
    assert torch.equal(logits(tmp_path / "converted"), want)


@pytest.mark.parametrize("method", ["awq", "w4a16", "gptq"])
def test_the_layout_of_transformers(method: str, tmp_path: Path) -> None:
    folder = theirs(small_llava)(tmp_path / "model")
    packed, plain = pack(folder, method, tmp_path)
    assert torch.equal(logits(packed), logits(plain))


def test_an_adapter_over_packed_weights_is_merged_into_their_numbers(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    packed, plain = pack(theirs(small_llava)(tmp_path / "model"), "gptq", tmp_path)
    torch.manual_seed(1)
    settings = peft.LoraConfig(r=2, target_modules=r".*language_model.*q_proj", init_lora_weights=False)
    peft.get_peft_model(LlavaForConditionalGeneration.from_pretrained(plain), settings).save_pretrained(
        tmp_path / "adapter"
    )
    ours, want = (logits(tmp_path / "adapter", base=base) for base in (packed, plain))
    assert torch.equal(ours, want)
    assert not torch.equal(ours, logits(plain))


def test_it_converts_to_transformers_layout(original: Path, tmp_path: Path) -> None:
    """Whose own class then gives the same logits, which the conversion compares."""
    packed, _ = pack(original, "w4a16", tmp_path)
    report = convert(packed, tmp_path / "theirs", to="transformers")
    assert report.logits is not None
    assert "quantization_config" not in json.loads((tmp_path / "theirs" / "config.json").read_text())


def test_scales_of_activations_are_accounted_for(original: Path, tmp_path: Path) -> None:
    packed, _ = pack(original, "w8a8", tmp_path)
    report = convert(packed, tmp_path / "converted", to="original", options=ConversionOptions(verification="tensors"))
    ((reason, names),) = report.left_out.items()
    assert reason.startswith("scales of quantized activations")
    assert len(names) == sum(name.endswith("input_scale") for name in load_file(packed / "model.safetensors"))


def test_a_language_model_alone(original: Path, tmp_path: Path) -> None:
    packed, plain = pack(original, "awq", tmp_path)
    for folder in (packed, plain):
        config = json.loads((folder / "config.json").read_text())
        config = {k: v for k, v in config.items() if "mm_" not in k} | {
            "model_type": "llama",
            "architectures": ["LlamaForCausalLM"],
        }
        (folder / "config.json").write_text(json.dumps(config))
        state = load_file(folder / "model.safetensors")
        state = {n: t for n, t in state.items() if "vision_tower" not in n and "mm_projector" not in n}
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    ids = torch.tensor([[1, 5, 9]])
    ours, want = (load(folder, device="cpu", dtype="fp32").model(ids).logits for folder in (packed, plain))
    assert torch.equal(ours, want)


def test_settings_in_a_file_of_their_own(original: Path, tmp_path: Path) -> None:
    """As the first programs wrote them."""
    packed, plain = pack(original, "awq", tmp_path)
    config = json.loads((packed / "config.json").read_text())
    del config["quantization_config"]
    (packed / "config.json").write_text(json.dumps(config))
    (packed / "quant_config.json").write_text(json.dumps({"w_bit": 4, "q_group_size": 16, "version": "GEMM"}))
    assert torch.equal(logits(packed), logits(plain))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"quant_method": "gptq", "bits": 3}, "3 bits"),
        ({"quant_method": "awq", "version": "marlin"}, "version 'marlin'"),
        ({"quant_method": "gptq", "checkpoint_format": "marlin"}, "checkpoint_format 'marlin'"),
        ({"quant_method": "fp8", "weight_block_size": "x"}, "weight_block_size 'x'"),
        (compressed("nvfp4-pack-quantized", num_bits=4), "'nvfp4-pack-quantized'"),
        (compressed("pack-quantized") | {"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparse or rotated"),
        ({"quant_method": "fp8"}, "no tensor is"),
        ({"quant_method": "quip"}, "method 'quip' is not known"),
        ({"quant_method": "hqq"}, "package hqq is not installed"),
    ],
)
def test_other_forms_are_one_sentence(original: Path, tmp_path: Path, settings: dict[str, object], words: str) -> None:
    packed, _ = pack(original, "awq", tmp_path)
    config = json.loads((packed / "config.json").read_text()) | {"quantization_config": settings}
    (packed / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=words) as refusal:
        load(packed, device="cpu")
    try:
        said = describe_checkpoint(packed).readers["llava"].removeprefix("no: ")
    except InputError as error:
        said = str(error)
    assert said == str(refusal.value)
    assert examine_checkpoint(packed).findings[0].what == said


@pytest.mark.parametrize("part", ["qzeros", "scales", "qweight"])
def test_a_part_that_is_missing_or_of_another_shape(original: Path, tmp_path: Path, part: str) -> None:
    packed, _ = pack(original, "awq", tmp_path)
    name = f"model.layers.1.mlp.up_proj.{part}"
    state = load_file(packed / "model.safetensors")
    save_file({k: v for k, v in state.items() if k != name}, packed / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=rf"'model.layers.1.mlp.up_proj.weight' lacks its {part}"):
        load(packed, device="cpu")
    save_file(state | {name: state[name][:, :-3].contiguous()}, packed / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"layers\.1\.mlp\.up_proj\.(weight|qweight)"):
        load(packed, device="cpu")
