"""Adapters beside their base: what a request gets is what the merged model gives, whoever shares its steps."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engine_kit import WAYS, answers_together, greedy, random_image
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText
from transformers_kit import save_peer, small_llava

from llava.engine.config import EngineConfig
from llava.engine.engine import Engine
from llava.engine.hf_engine import HFEngine
from llava.engine.request import EmbedRequest, Request, ScoreRequest
from llava.errors import InputError
from llava.model.builder import LoadedModel, load

pytestmark = pytest.mark.filterwarnings("ignore")

TEXT = r".*language_model.*\.(q|v|o|up|down)_proj"
KINDS: dict[str, dict[str, Any]] = {
    "language": {"target_modules": TEXT, "r": 4},
    "everything": {"target_modules": r".*(_proj|fc1|linear_\d)", "r": 8, "use_rslora": True},
    "projector": {
        "target_modules": r".*language_model.*\.k_proj",
        "r": 2,
        "modules_to_save": ["multi_modal_projector"],
    },
    "patterns": {"target_modules": TEXT, "r": 2, "rank_pattern": {"q_proj": 5}, "alpha_pattern": {"v_proj": 9}},
}
QUESTIONS = [
    ("what is it?", [0]),
    ("and this one, or that? " * 3, [1]),
    ("what is it?", []),
    ("a, b?", [0, 1]),
]
PROMPTS = [("<image>\n" * len(images) + text, [random_image(seed) for seed in images]) for text, images in QUESTIONS]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A base, adapters over it as PEFT saves them, and one with a whole projector as LLaVA's training saves it."""
    peft = pytest.importorskip("peft")
    root = tmp_path_factory.mktemp("adapters")
    base = save_peer(root / "base", small_llava())
    folders = {"base": base}
    for number, (name, settings) in enumerate(KINDS.items()):
        model = AutoModelForImageTextToText.from_pretrained(base, dtype=torch.float32)
        model = peft.get_peft_model(model, peft.LoraConfig(**{"lora_alpha": 8} | settings))
        torch.manual_seed(number)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter) * 0.2)
        folders[name] = root / name
        model.save_pretrained(root / name)
    folders["llava"] = as_llava_saves(root / "llava", folders)
    return folders


def as_llava_saves(folder: Path, folders: dict[str, Path]) -> Path:
    """The adapter "language" with a config and a projector of its own, `non_lora_trainables`."""
    original = load(folders["base"], device="cpu", dtype="fp32")
    original.save(folder)
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.manual_seed(9)
    trained = {f"base_model.model.{name}": tensor + 0.1 for name, tensor in state.items() if "mm_projector" in name}
    torch.save(trained, folder / "non_lora_trainables.bin")
    tensors = load_file(folders["language"] / "adapter_model.safetensors")
    renamed = {name.replace("model.language_model.", "model.") for name in tensors}
    assert len(renamed) == len(tensors)
    save_file(
        {name.replace("model.language_model.", "model."): tensor for name, tensor in tensors.items()},
        folder / "adapter_model.safetensors",
    )
    config = json.loads((folders["language"] / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": str(folders["base"])}))
    return folder


NAMES = [*KINDS, "llava"]


@pytest.fixture(scope="module")
def merged(folders: dict[str, Path]) -> dict[str | None, LoadedModel]:
    models: dict[str | None, LoadedModel] = {
        name: load(folders[name], base=folders["base"], device="cpu", dtype="fp32") for name in NAMES
    }
    models[None] = load(folders["base"], device="cpu", dtype="fp32")
    return models


@pytest.fixture(scope="module")
def right(merged: dict[str | None, LoadedModel]) -> dict[str | None, list[tuple[int, ...]]]:
    """The answers of each model by itself."""
    answers = {}
    for name, model in merged.items():
        with Engine.from_loaded(model) as engine:
            answers[name] = [
                engine.generate(Request(prompt, images, greedy(12, ignore_eos=True))).completions[0].token_ids
                for prompt, images in PROMPTS
            ]
    assert len({tuple(tokens) for tokens in answers.values()}) == len(answers)
    return answers


def with_adapters(folders: dict[str, Path], config: EngineConfig | None = None) -> Engine:
    engine = Engine.from_loaded(load(folders["base"], device="cpu", dtype="fp32"), config)
    for name in NAMES:
        engine.adapters.load(name, folders[name])
    return engine


@pytest.mark.parametrize("way", WAYS)
def test_answers_are_those_of_the_merged_models(
    folders: dict[str, Path], right: dict[str | None, list[tuple[int, ...]]], way: str
) -> None:
    cases = [(name, index) for index in range(len(PROMPTS)) for name in (None, *NAMES)]
    requests = [Request(*PROMPTS[index], greedy(12, ignore_eos=True), adapter=name) for name, index in cases]
    with with_adapters(folders, WAYS[way]) as engine:
        for _ in range(2):  # the second time from the caches
            results = answers_together(engine, requests)
            for (name, index), result in zip(cases, results, strict=True):
                assert result.completions[0].token_ids == right[name][index], (name, index)


@pytest.mark.parametrize("name", NAMES)
def test_states_and_scores_are_those_of_the_merged_model(
    folders: dict[str, Path], merged: dict[str | None, LoadedModel], name: str
) -> None:
    prompt, images = PROMPTS[1]
    with with_adapters(folders) as engine, Engine.from_loaded(merged[name]) as alone:
        for asked in ({"layer": 0}, {"layer": 1}, {"layer": -1}, {"stage": "tower"}, {"stage": "projector"}):
            given = {} if "stage" in asked else {"prompt": prompt}
            one = engine.embed(EmbedRequest(images=images, adapter=name, pooling="none", **given, **asked))
            other = alone.embed(EmbedRequest(images=images, pooling="none", **given, **asked))
            np.testing.assert_allclose(one.vectors, other.vectors, atol=2e-5, rtol=1e-5)
        scored = engine.score(ScoreRequest(prompt, " a dog", images, adapter=name))
        assert scored.logprobs == pytest.approx(alone.score(ScoreRequest(prompt, " a dog", images)).logprobs, abs=1e-5)


def test_rounded_weights_take_adapters_too(folders: dict[str, Path]) -> None:
    """The base in 8 bits; the adapters' products are not rounded."""
    with with_adapters(folders, EngineConfig(weights="int8")) as engine:
        states = [
            engine.embed(EmbedRequest("hello", adapter=name, pooling="none")).vectors for name in (None, "language")
        ]
    with with_adapters(folders) as engine:
        whole = [
            engine.embed(EmbedRequest("hello", adapter=name, pooling="none")).vectors for name in (None, "language")
        ]
    assert abs(states[1] - whole[1]).max() < 0.3 * abs(whole[1] - whole[0]).max()


def test_loading_and_unloading_while_requests_run(
    folders: dict[str, Path], right: dict[str | None, list[tuple[int, ...]]]
) -> None:
    """A request keeps the adapter that it began with; one of the same name that is loaded later shares nothing with it."""
    prompt, images = PROMPTS[0]
    with Engine.from_loaded(load(folders["base"], device="cpu", dtype="fp32")) as engine:
        engine.adapters.load("mine", folders["llava"])
        first = engine.submit(Request(prompt, images, greedy(12, ignore_eos=True), adapter="mine"))
        engine.adapters.load("mine", folders["everything"])
        second = engine.submit(Request(prompt, images, greedy(12, ignore_eos=True), adapter="mine"))
        engine.adapters.unload("mine")
        with pytest.raises(InputError, match="no adapter 'mine'; none is loaded"):
            engine.submit(Request(prompt, images, adapter="mine"))
        assert first.result().completions[0].token_ids == right["llava"][0]
        assert second.result().completions[0].token_ids == right["everything"][0]
        assert engine.adapters.names == []


def test_adapters_beyond_the_bound_wait_on_the_host(
    folders: dict[str, Path], right: dict[str | None, list[tuple[int, ...]]]
) -> None:
    with with_adapters(folders, EngineConfig(adapter_bytes=0)) as engine:
        assert (len(engine.adapters._on_device), len(engine.adapters._on_host)) == (1, len(NAMES) - 1)
        for name in (*NAMES, *reversed(NAMES)):
            result = engine.generate(Request(*PROMPTS[0], greedy(12, ignore_eos=True), adapter=name))
            assert result.completions[0].token_ids == right[name][0]
            assert list(engine.adapters._on_device) == [name]


def changed(source: Path, target: Path, **config: Any) -> Path:
    shutil.copytree(source, target)
    file = target / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))
    return target


def test_what_cannot_be_an_adapter_here(folders: dict[str, Path], tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = AutoModelForImageTextToText.from_pretrained(folders["base"], dtype=torch.float32)
    settings = {"target_modules": r".*q_proj", "use_dora": True}
    peft.get_peft_model(model, peft.LoraConfig(**settings)).save_pretrained(tmp_path / "dora")
    model = AutoModelForImageTextToText.from_pretrained(folders["base"], dtype=torch.float32)
    whole = peft.get_peft_model(model, peft.LoraConfig(target_modules=r".*q_proj", modules_to_save=["lm_head"]))
    with torch.no_grad():
        for name, parameter in whole.named_parameters():
            if "modules_to_save" in name:
                parameter.add_(1)
    whole.save_pretrained(tmp_path / "head")
    elsewhere = changed(folders["language"], tmp_path / "elsewhere", base_model_name_or_path="somebody/other-base")
    other = shutil.copytree(folders["llava"], tmp_path / "other")
    values = json.loads((other / "config.json").read_text()) | {"mm_vision_select_layer": -1}
    (other / "config.json").write_text(json.dumps(values))
    tiles = shutil.copytree(folders["llava"], tmp_path / "tiles")
    values = json.loads((folders["llava"] / "config.json").read_text()) | {"mm_newline_position": "frame"}
    (tiles / "config.json").write_text(json.dumps(values))
    broken = shutil.copytree(folders["language"], tmp_path / "broken")
    tensors = load_file(broken / "adapter_model.safetensors")
    name = next(name for name in tensors if "lora_A" in name)
    save_file({**tensors, name: torch.zeros(4, 5)}, broken / "adapter_model.safetensors")
    with Engine.from_loaded(load(folders["base"], device="cpu", dtype="fp32")) as engine:
        for path, words in (
            (tmp_path / "dora", "more than two matrices"),
            (tmp_path / "head", "lm_head"),
            (elsewhere, "somebody/other-base"),
            (other, "mm_vision_select_layer"),
            (tiles, "video newline 'frame'"),
            (broken, "another base model"),
            (folders["base"], "no LoRA adapter"),
            (tmp_path / "nowhere", "nowhere"),
        ):
            with pytest.raises(InputError, match=words):
                engine.adapters.load("x", path)
        assert engine.adapters.names == []
        engine.adapters.load("x", elsewhere, any_base=True)
        with pytest.raises(InputError, match="there is no adapter 'y'; loaded are x"):
            engine.generate(Request("hello", adapter="y"))
        with pytest.raises(InputError, match="name"):
            engine.adapters.load(" ", elsewhere)
    with (
        HFEngine.from_loaded(load(folders["base"], device="cpu", dtype="fp32")) as engine,
        pytest.raises(InputError, match="takes no adapter"),
    ):
        engine.generate(Request("hello", adapter="x"))


def test_an_adapter_of_another_template_is_told(
    folders: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    other = shutil.copytree(folders["llava"], tmp_path / "other")
    values = json.loads((other / "config.json").read_text()) | {"conv_mode": "mpt"}
    (other / "config.json").write_text(json.dumps(values))
    with Engine.from_loaded(load(folders["base"], device="cpu", dtype="fp32")) as engine:
        engine.adapters.load("same", folders["llava"])
        assert "template" not in caplog.text
        engine.adapters.load("other", other)
        assert "the template mpt" in caplog.text
