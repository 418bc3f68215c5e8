"""Adapters that PEFT's `save_pretrained` wrote over a LLaVA, without a config.json: logits are those of PEFT's own model."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForImageTextToText
from transformers_kit import IMAGE_TOKEN, save_peer, small_llava, small_llava_next

from llava.convert.describe import describe_checkpoint
from llava.convert.merge_lora import merge_lora
from llava.diagnose.checks.checkpoint import examine_checkpoint
from llava.errors import InputError
from llava.model.builder import load, load_tokenizer
from llava.model.checkpoints.inspect import inspect

IDS = [5, 6, -200, 8, 9]
NUM_FEATURES = 4
TEXT = r".*language_model.*\.(q|v)_proj"
TOWER = r".*vision_tower.*\.(q_proj|fc1)"
PROJECTOR = r".*multi_modal_projector.*linear_\d"

ADAPTERS: dict[str, dict[str, Any]] = {
    "language model": {"target_modules": TEXT},
    "projector": {"target_modules": PROJECTOR},
    "tower": {"target_modules": TOWER},
    "everything": {"target_modules": "all-linear"},
    "convolution": {"target_modules": r".*(patch_embedding|q_proj)"},
    "convolution with DoRA": {"target_modules": r".*(patch_embedding)", "use_dora": True},
    "saved whole": {"target_modules": TEXT, "modules_to_save": ["multi_modal_projector", "lm_head", "embed_tokens"]},
    "DoRA": {"target_modules": f"{TEXT}|{TOWER}|{PROJECTOR}", "use_dora": True},
    "DoRA of embeddings": {"target_modules": ["embed_tokens"], "use_dora": True},
    "embeddings": {"target_modules": ["embed_tokens", "lm_head"]},
    "rank-stabilised": {"target_modules": TEXT, "use_rslora": True},
    "patterns": {
        "target_modules": TEXT,
        "rank_pattern": {"language_model.layers.0.self_attn.q_proj": 2},
        "alpha_pattern": {r"model.language_model.*v_proj": 3},
    },
    "all biases": {"target_modules": f"{TEXT}|{TOWER}|{PROJECTOR}", "bias": "all"},
    "own biases": {"target_modules": f"{TOWER}|{PROJECTOR}", "bias": "lora_only"},
    "biases of B": {"target_modules": f"{TOWER}|{PROJECTOR}", "lora_bias": True},
    "rows of tokens": {"target_modules": TEXT, "trainable_token_indices": [5, 9]},
    "rows by module": {"target_modules": TEXT, "trainable_token_indices": {"embed_tokens": [5, 9]}},
}


pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same model in both layouts; in the original one with its tower inside, and with the tower in its own folder."""
    root = tmp_path_factory.mktemp("bases")
    theirs = save_peer(root / "transformers", small_llava())
    loaded = load(theirs, device="cpu", dtype="fp32")
    loaded.save(root / "original")
    return {"transformers": theirs, "original": root / "original", "tower apart": with_tower_apart(root, loaded)}


def with_tower_apart(root: Path, loaded: Any) -> Path:
    folder = root / "apart"
    loaded.save(folder)
    state = load_file(folder / "model.safetensors")
    infix = "model.vision_tower.vision_tower."
    tower = {name.removeprefix(infix): tensor for name, tensor in state.items() if name.startswith(infix)}
    save_file(
        {n: t for n, t in state.items() if not n.startswith(infix)}, folder / "model.safetensors", {"format": "pt"}
    )
    loaded.model.get_vision_tower().config.save_pretrained(folder / "tower")
    loaded.image_processor.save_pretrained(folder / "tower")
    save_file(tower, folder / "tower" / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config |= {"mm_vision_tower": "tower", "unfreeze_mm_vision_tower": False}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def pixels() -> Tensor:
    return torch.randn(1, 3, 28, 28, generator=torch.Generator().manual_seed(0))


def save_adapter(base: Path, folder: Path, seed: int = 0, **settings: Any) -> Any:
    """Train an adapter by chance, save it as PEFT does, and return PEFT's model with it."""
    peft = pytest.importorskip("peft")
    model = AutoModelForImageTextToText.from_pretrained(base, dtype=torch.float32)
    model = peft.get_peft_model(model, peft.LoraConfig(**{"r": 4, "lora_alpha": 8} | settings))
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    assert not (folder / "config.json").exists()
    return model.eval()


@torch.no_grad()
def theirs(model: Any) -> Tensor:
    ids = torch.tensor([[IMAGE_TOKEN if id < 0 else id for id in IDS for _ in range(NUM_FEATURES if id < 0 else 1)]])
    return model(input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=pixels()).logits


@torch.no_grad()
def ours(folder: Path, base: Path | None = None) -> Tensor:
    return load(folder, base=base, device="cpu", dtype="fp32").model(torch.tensor([IDS]), images=pixels()).logits


@pytest.mark.parametrize("layout", ["transformers", "original", "tower apart"])
@pytest.mark.parametrize("case", ADAPTERS)
def test_logits_are_those_of_peft(bases: dict[str, Path], tmp_path: Path, case: str, layout: str) -> None:
    model = save_adapter(bases["transformers"], tmp_path / "adapter", **ADAPTERS[case])
    right = theirs(model)
    with model.disable_adapter():
        assert (right - theirs(model)).abs().max() > 1e-3
    torch.testing.assert_close(ours(tmp_path / "adapter", bases[layout]), right, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("settings", ["embeddings", "output", "both", "whole embeddings", "rows"])
def test_embeddings_that_the_base_ties(tmp_path: Path, settings: str) -> None:
    """PEFT changes the one and leaves the other, and so does a merged model; new rows are those of both."""
    base = save_peer(tmp_path / "base", small_llava("qwen2"))
    kinds: dict[str, dict[str, Any]] = {
        "embeddings": {"target_modules": ["embed_tokens"]},
        "output": {"target_modules": ["lm_head"]},
        "both": {"target_modules": ["embed_tokens", "lm_head"]},
        "whole embeddings": {"target_modules": TEXT, "modules_to_save": ["embed_tokens"]},
        "rows": {"target_modules": TEXT, "trainable_token_indices": [5, 9]},
    }
    model = save_adapter(base, tmp_path / "adapter", **kinds[settings])
    torch.testing.assert_close(ours(tmp_path / "adapter", base), theirs(model), atol=2e-5, rtol=1e-4)
    load(tmp_path / "adapter", base=base, device="cpu", dtype="fp32").save(tmp_path / "merged")
    torch.testing.assert_close(ours(tmp_path / "merged"), theirs(model), atol=2e-5, rtol=1e-4)


OLD_NAMES = {
    "model.language_model.": "language_model.model.",
    "model.vision_tower.": "vision_tower.vision_model.",
    "model.multi_modal_projector.": "multi_modal_projector.",
}
TRAINING_NAMES = {".lora_A.": ".lora_A.default.", ".lora_B.": ".lora_B.default."}


@pytest.mark.parametrize("names", [OLD_NAMES, TRAINING_NAMES], ids=["transformers 4.4", "a training process"])
def test_names_of_other_versions(bases: dict[str, Path], tmp_path: Path, names: dict[str, str]) -> None:
    model = save_adapter(bases["transformers"], tmp_path, target_modules="all-linear")
    file = tmp_path / "adapter_model.safetensors"
    state = load_file(file)
    for old, new in names.items():
        state = {name.replace(old, new): tensor for name, tensor in state.items()}
    assert state.keys() != load_file(file).keys()
    save_file(state, file)
    torch.testing.assert_close(ours(tmp_path, bases["original"]), theirs(model), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("layout", ["transformers", "original", "tower apart"])
def test_an_adapter_that_was_trained_over_our_class(bases: dict[str, Path], tmp_path: Path, layout: str) -> None:
    peft = pytest.importorskip("peft")
    base = load(bases["original"], device="cpu", dtype="fp32").model
    targets = r".*(q_proj|mm_projector\.[02]|fc2)"
    model = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=targets, modules_to_save=["lm_head"]))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        right = model.eval()(torch.tensor([IDS]), images=pixels()).logits
    torch.testing.assert_close(ours(tmp_path, bases[layout]), right, atol=2e-5, rtol=1e-4)


def test_an_adapter_over_a_next_model(tmp_path: Path) -> None:
    """Tiles need transformers' image processor; here only weights are compared, with those that PEFT merges."""
    base = save_peer(tmp_path / "base", small_llava_next())
    merged = save_adapter(base, tmp_path / "adapter", target_modules="all-linear").merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    shutil.copytree(base, tmp_path / "merged", dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.safetensors"))
    got = load(tmp_path / "adapter", base=base, device="cpu", dtype="fp32")
    want = load(tmp_path / "merged", device="cpu", dtype="fp32").model.state_dict()
    for name, tensor in got.model.state_dict().items():
        torch.testing.assert_close(tensor, want[name], atol=1e-5, rtol=1e-5)
    assert got.model.config.image_aspect_ratio == "anyres"


def test_adapters_that_were_trained_one_after_another(bases: dict[str, Path], tmp_path: Path) -> None:
    """The base that an adapter's file names is an adapter itself, which names a whole model."""
    first, second, base = tmp_path / "first", tmp_path / "second", bases["transformers"]
    peft = pytest.importorskip("peft")
    merged = save_adapter(base, first, target_modules=f"{TEXT}|{TOWER}").merge_and_unload()
    model = peft.get_peft_model(merged, peft.LoraConfig(r=2, target_modules=f"{TEXT}|{PROJECTOR}", use_dora=True))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(second)
    config = json.loads((second / "adapter_config.json").read_text())
    (second / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": str(first)}))
    for given in (None, first):
        torch.testing.assert_close(ours(second, given), theirs(model.eval()), atol=2e-5, rtol=1e-4)
    merge_lora(str(second), None, str(tmp_path / "whole"))
    torch.testing.assert_close(ours(tmp_path / "whole"), theirs(model), atol=2e-5, rtol=1e-4)
    assert examine_checkpoint(second).codes == examine_checkpoint(base).codes


def test_tokens_that_training_added(bases: dict[str, Path], tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = AutoModelForImageTextToText.from_pretrained(bases["transformers"], dtype=torch.float32)
    model.resize_token_embeddings(330)
    whole = ["embed_tokens", "lm_head"]
    model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=TEXT, modules_to_save=whole)).eval()
    model.save_pretrained(tmp_path)
    assert ours(tmp_path).shape[-1] == 330
    torch.testing.assert_close(ours(tmp_path), theirs(model), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("case", ["everything", "saved whole", "biases of B"])
@pytest.mark.parametrize("layout", ["transformers", "original", "tower apart"])
def test_merge_info_and_doctor_agree_with_loading(
    bases: dict[str, Path], tmp_path: Path, case: str, layout: str
) -> None:
    model = save_adapter(bases["transformers"], tmp_path / "adapter", **ADAPTERS[case])
    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": str(bases[layout])}))
    merge_lora(str(tmp_path / "adapter"), None, str(tmp_path / "merged"))
    torch.testing.assert_close(ours(tmp_path / "merged"), theirs(model), atol=2e-5, rtol=1e-4)

    description = describe_checkpoint(tmp_path / "adapter")
    whole = describe_checkpoint(bases[layout])
    assert description.facts["kind"].startswith("an adapter for a base model")
    same = ("language model", "projector", "images", "context")
    assert {key: description.facts[key] for key in same} == {key: whole.facts[key] for key in same}
    assert description.missing == ()
    assert description.parameters["vision tower"] == whole.parameters["vision tower"]
    assert description.readers["llava"] == "yes, with its base model"
    assert examine_checkpoint(tmp_path / "adapter").codes == examine_checkpoint(bases[layout]).codes
    assert len(load_tokenizer(tmp_path / "adapter")) == len(load_tokenizer(bases[layout]))


def test_an_adapter_without_its_base(bases: dict[str, Path], tmp_path: Path) -> None:
    save_adapter(bases["transformers"], tmp_path, target_modules=TEXT)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": "absent/base"}))
    description = describe_checkpoint(tmp_path)
    assert description.facts["kind"] == "an adapter for a base model"
    assert "absent/base" in description.missing[0]
    assert examine_checkpoint(tmp_path, quick=True).codes == ["base-missing"]
    with pytest.raises(InputError, match="--model-base"):
        load(tmp_path, device="cpu")
    given = describe_checkpoint(tmp_path, bases["original"])
    assert given.missing == ()
    assert given.facts["images"] == describe_checkpoint(bases["original"]).facts["images"]


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "another kind": ({"peft_type": "IA3"}, "type 'IA3'"),
    "PiSSA": ({"init_lora_weights": "pissa_niter_4"}, "pissa_niter_4"),
    "activated": ({"alora_invocation_tokens": [5, 6]}, "alora_invocation_tokens"),
    "no rank": ({"r": None}, "has r None"),
    "a rank in words": ({"r": "four"}, "has r 'four'"),
    "no alpha": ({"lora_alpha": None}, "has lora_alpha None"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_settings_that_cannot_be_merged(bases: dict[str, Path], tmp_path: Path, case: str) -> None:
    """Loading, `llava info` and `llava doctor` say the same."""
    save_adapter(bases["transformers"], tmp_path, target_modules=TEXT)
    changes, words = REFUSED[case]
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(InputError, match=words) as caught:
        load(tmp_path, device="cpu")
    with pytest.raises(InputError, match=re.escape(str(caught.value))):
        describe_checkpoint(tmp_path)
    assert [finding.what for finding in examine_checkpoint(tmp_path).findings] == [str(caught.value)]


def test_a_tensor_without_a_place_is_named(bases: dict[str, Path], tmp_path: Path) -> None:
    save_adapter(bases["transformers"], tmp_path, target_modules=TEXT)
    file = tmp_path / "adapter_model.safetensors"
    state = load_file(file)
    for extra in ("model.language_model.layers.7.mlp.up_proj.weight", "model.abstractor.weight"):
        save_file(state | {f"base_model.model.{extra}": torch.zeros(2, 2)}, file)
        name = extra.replace("model.language_model.", "model.")
        with pytest.raises(InputError, match=f"changes tensor '{name}', which the base model does not have"):
            load(tmp_path, device="cpu")


def test_a_base_that_is_stored_quantized(bases: dict[str, Path], tmp_path: Path) -> None:
    save_adapter(bases["transformers"], tmp_path / "adapter", target_modules=TEXT)
    base = shutil.copytree(bases["transformers"], tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "bitsandbytes"}}))
    with pytest.raises(InputError, match="stored quantized"):
        load(tmp_path / "adapter", base=base, device="cpu")


def test_an_adapter_of_a_named_kind_lies_in_a_folder_of_its_own(bases: dict[str, Path], tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = AutoModelForImageTextToText.from_pretrained(bases["transformers"], dtype=torch.float32)
    config = peft.LoraConfig(r=2, target_modules=TEXT, init_lora_weights=False)
    model = peft.get_peft_model(model, config, adapter_name="style").eval()
    model.save_pretrained(tmp_path)
    assert inspect(tmp_path / "style").kind == "lora"
    torch.testing.assert_close(ours(tmp_path / "style"), theirs(model), atol=2e-5, rtol=1e-4)
