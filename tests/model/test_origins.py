"""Every weight of a loaded model was read from a file: nothing is initialised, left aside or exchanged in silence.

Checkpoints of every layout are damaged in the same ways, on every path that loads them.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import build, save_tokenizer, save_tower
from torch import Tensor, nn
from transformers import (
    BitsAndBytesConfig,
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
)
from transformers_kit import IMAGE_TOKEN, save_peer, small_llava

from llava.errors import InputError
from llava.model.builder import LoadedModel, load
from llava.model.checkpoints.loading import check_origins

IDS = torch.tensor([[1, 5, -200, 9]])
PIXELS = torch.randn(1, 3, 28, 28, generator=torch.Generator().manual_seed(0))


def logits(loaded: LoadedModel) -> Tensor:
    with torch.inference_mode():
        return loaded.model(IDS, images=PIXELS).logits[0, -1].float()


# Layouts and paths


def original(folder: Path) -> Path:
    return build(folder, hidden_size=64, intermediate_size=128)


def in_transformers_layout(folder: Path) -> Path:
    # In widths that bitsandbytes can pack.
    tower = CLIPVisionConfig(
        hidden_size=64, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, image_size=28, patch_size=14
    )
    model = small_llava(tower=tower)
    config = LlavaConfig.from_dict(
        model.config.to_dict() | {"text_config": model.config.text_config.to_dict() | {"intermediate_size": 128}}
    )
    return save_peer(folder, LlavaForConditionalGeneration(config).eval())


def language_model_alone(folder: Path) -> Path:
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=320, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
    )
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def packed(bits: str) -> Callable[[Path], Path]:
    def save(folder: Path) -> Path:
        plain = original(folder.with_name(f"{folder.name}-plain"))
        load(plain, device="cpu", quantization=bits).save(folder)
        shutil.copytree(plain / "tower", folder / "tower", dirs_exist_ok=True)
        return folder

    return save


def packed_in_transformers_layout(bits: str) -> Callable[[Path], Path]:
    """As transformers' own class saves a model that bitsandbytes has packed."""

    def save(folder: Path) -> Path:
        plain = in_transformers_layout(folder.with_name(f"{folder.name}-plain"))
        settings = {"4bit": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, "8bit": {"load_in_8bit": True}}[bits]
        settings["llm_int8_skip_modules"] = [
            "lm_head",
            "vision_tower",
        ]  # bitsandbytes cannot pack a tower of this width
        model = LlavaForConditionalGeneration.from_pretrained(
            plain, quantization_config=BitsAndBytesConfig(**settings), device_map={"": "cpu"}
        )
        model.save_pretrained(folder)
        for name in ("tokenizer.json", "tokenizer_config.json", "preprocessor_config.json"):
            if (plain / name).is_file():
                shutil.copyfile(plain / name, folder / name)
        return folder

    return save


LAYOUTS: dict[str, Callable[[Path], Path]] = {
    "original": original,
    "transformers": in_transformers_layout,
    "language model": language_model_alone,
    "original, 4 bits stored": packed("4bit"),
    "original, 8 bits stored": packed("8bit"),
    "transformers, 4 bits stored": packed_in_transformers_layout("4bit"),
    "transformers, 8 bits stored": packed_in_transformers_layout("8bit"),
}
WAYS = [
    *((layout, {}) for layout in LAYOUTS),
    ("original", {"quantization": "4bit"}),
    ("original", {"device_map": {"": "cpu"}}),
    ("transformers", {"quantization": "8bit"}),
    ("language model", {"device_map": {"": "cpu"}}),
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    pytest.importorskip("bitsandbytes")
    made: dict[str, Path] = {}

    def folder(layout: str) -> Path:
        if layout not in made:
            made[layout] = LAYOUTS[layout](tmp_path_factory.mktemp("layout") / "model")
        return made[layout]

    return folder


# Damage


def removed(state: dict[str, Tensor], name: str) -> None:
    del state[name]


def renamed(state: dict[str, Tensor], name: str) -> None:
    state[name.replace("weight", "weights")] = state.pop(name)


def added(state: dict[str, Tensor], name: str) -> None:
    state[name.replace("input_layernorm", "another_layernorm")] = state[name].clone()


def reshaped(state: dict[str, Tensor], name: str) -> None:
    state[name] = torch.cat([state[name], state[name][:1]])


@pytest.mark.parametrize("damage", [removed, renamed, added, reshaped])
@pytest.mark.parametrize(("layout", "options"), WAYS, ids=lambda value: str(value))
def test_damaged_checkpoints_are_refused(
    folders: Callable[[str], Path], layout: str, options: dict, damage: Callable, tmp_path: Path
) -> None:
    """A norm of the language model, which no layout packs; the error names it."""
    folder = shutil.copytree(folders(layout), tmp_path / "model")
    file = folder / "model.safetensors"
    state = load_file(file)
    name = next(name for name in state if name.endswith("layers.1.input_layernorm.weight"))
    damage(state, name)
    save_file(state, file, metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"layers\.1\.(input|another)_layernorm\.weight"):
        load(folder, device="cpu", **options)


@pytest.mark.parametrize("part", ["mm_projector.0.weight", "vision_model.encoder.layers.0.mlp.fc1.weight"])
@pytest.mark.parametrize("layout", ["original", "original, 4 bits stored"])
def test_no_part_begins_with_new_numbers(
    folders: Callable[[str], Path], layout: str, part: str, tmp_path: Path
) -> None:
    folder = shutil.copytree(folders(layout), tmp_path / "model")
    state = load_file(folder / "model.safetensors")
    del state[next(name for name in state if name.endswith(part))]
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=part.replace(".", r"\.")):
        load(folder, device="cpu")


@pytest.mark.parametrize("bits", ["4bit", "8bit"])
def test_packed_weights_give_the_logits_of_transformers_own_class(folders: Callable[[str], Path], bits: str) -> None:
    folder = folders(f"transformers, {bits[0]} bits stored")
    peer = LlavaForConditionalGeneration.from_pretrained(folder, device_map={"": "cpu"}).eval()
    ids = torch.tensor([[1, 5, *[IMAGE_TOKEN] * 4, 9]])
    with torch.inference_mode():
        want = peer(input_ids=ids, pixel_values=PIXELS).logits[0, -1].float()
    got = logits(load(folder, device="cpu", dtype="fp32"))
    assert torch.equal(logits(load(folder, device="cpu", dtype="fp32")), got)
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


def test_a_method_that_is_not_here_is_named(folders: Callable[[str], Path], tmp_path: Path) -> None:
    folder = shutil.copytree(folders("original, 4 bits stored"), tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4, "group_size": 128}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="stored quantized by gptq"):
        load(folder, device="cpu")


def test_the_guard_itself() -> None:
    """Tied weights need one origin; a parameter or a persistent buffer without one is refused."""
    model = nn.Module()
    model.first, model.second = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)
    model.second.weight = model.first.weight
    check_origins(model, {"first.weight": "a file"})
    model.register_buffer("scale", torch.ones(1))
    with pytest.raises(InputError, match="'scale'"):
        check_origins(model, {"first.weight": "a file"})
    check_origins(model, {"first.weight": "a file", "scale": "made for this test"})


# Towers


def logits_of_tower(folder: Path) -> Tensor:
    return logits(load(folder, device="cpu"))


TRAINED = [
    {"unfreeze_mm_vision_tower": True},
    {"mm_tunable_parts": "mm_vision_tower,mm_mlp_adapter,mm_language_model"},
    {"mm_tunable_parts": "mm_mlp_adapter, mm_vision_tower"},
    {"mm_vision_tower_lr": 2e-6},
]


@pytest.mark.parametrize("config", [*TRAINED, {"mm_tunable_parts": "mm_mlp_adapter"}, {}], ids=str)
def test_a_trained_tower_is_used_and_another_one_is_named(
    tmp_path: Path, config: dict, caplog: pytest.LogCaptureFixture
) -> None:
    """The public tower has other weights than the stored one."""
    stored = build(tmp_path / "stored", unfreeze_mm_vision_tower=True)
    folder = shutil.copytree(stored, tmp_path / "model")
    save_tower(folder / "tower", seed=5)
    values = json.loads((folder / "config.json").read_text())
    values.pop("unfreeze_mm_vision_tower")
    (folder / "config.json").write_text(json.dumps(values | config))
    is_trained = config in TRAINED
    assert torch.equal(logits_of_tower(folder), logits_of_tower(stored)) == is_trained
    assert ("stores 55 vision tower tensors that differ" in caplog.text) == (not is_trained)


def test_a_stored_copy_of_the_frozen_tower_is_no_matter(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Stored in half precision, as released checkpoints have it, beside the public tower in single precision."""
    folder = build(tmp_path / "model", unfreeze_mm_vision_tower=True)
    save_tower(folder / "tower")
    public = load_file(folder / "tower" / "model.safetensors")
    state = load_file(folder / "model.safetensors")
    prefix = "model.vision_tower.vision_tower."
    state |= {prefix + name: tensor.half() for name, tensor in public.items()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text()) | {"unfreeze_mm_vision_tower": False}
    (folder / "config.json").write_text(json.dumps(config))
    tower = load(folder, device="cpu").model.get_vision_tower()
    name = "vision_model.embeddings.class_embedding"
    assert torch.equal(tower.vision_tower.state_dict()[name], public[name])
    assert "differ" not in caplog.text


@pytest.mark.parametrize("quantization", [None, "4bit", "8bit"])
def test_a_model_with_a_frozen_tower_saves_and_loads(
    tmp_path: Path, quantization: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    """The saved folder holds a copy of the tower, which its config does not call trained."""
    folder = build(tmp_path / "model", hidden_size=64, intermediate_size=128)
    save_tower(folder / "tower")
    state = {
        name: tensor for name, tensor in load_file(folder / "model.safetensors").items() if "vision_tower" not in name
    }
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text()) | {"unfreeze_mm_vision_tower": False}
    (folder / "config.json").write_text(json.dumps(config))
    first = load(folder, device="cpu", quantization=quantization)
    first.save(tmp_path / "saved")
    assert any("vision_tower" in name for name in load_file(tmp_path / "saved" / "model.safetensors"))
    assert torch.equal(logits(load(tmp_path / "saved", device="cpu")), logits(first))
    assert "tensors that differ" not in caplog.text


def test_a_base_s_stored_tower_is_the_one_of_its_projector(tmp_path: Path) -> None:
    base = build(tmp_path / "base")
    state = load_file(base / "model.safetensors")
    projector = {name: tensor for name, tensor in state.items() if "mm_projector" in name}
    folder = tmp_path / "projector"
    folder.mkdir()
    shutil.copyfile(base / "config.json", folder / "config.json")
    torch.save(projector, folder / "mm_projector.bin")
    assert torch.equal(logits(load(folder, base=base, device="cpu")), logits(load(base, device="cpu")))
