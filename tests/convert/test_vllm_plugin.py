"""What vLLM is given for a checkpoint in the original layout, as far as it can be looked at without vLLM.

That vLLM then gives our tokens is measured by benchmarks/convert/vllm_plugin.py, on a GPU.
"""

from __future__ import annotations

import ast
import json
import tomllib
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_kit import run_python
from golden_data import HERE
from tiny import ANYRES, build
from transformers import AutoConfig, AutoModelForImageTextToText, LlavaOnevisionConfig

from llava.convert.convert import ConversionOptions, convert
from llava.convert.vllm import plugin as vllm_plugin
from llava.convert.vllm.plugin import ARCHITECTURES, _config_from_dict, companion, converted_tensors, is_original
from llava.errors import InputError
from llava.model.checkpoints.hf_layout import published_name
from llava.model.checkpoints.inspect import read_config, stored_tensors
from llava.model.checkpoints.meta_model import build_empty_model
from llava.model.checkpoints.weight_files import read_tensor

ROOT = HERE.parents[1]
V15, V16 = "checkpoints/llava-v1.5-tiny-vicuna", "checkpoints/llava-v1.6-tiny-vicuna"


@pytest.fixture(autouse=True)
def in_recordings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(HERE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    companion.cache_clear()


def test_the_entry_point_leads_to_the_function() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    module, _, name = project["entry-points"]["vllm.general_plugins"]["llava"].partition(":")
    assert getattr(import_module(module), name) is vllm_plugin.register
    # Nobody but the file that vLLM itself imports may import vLLM when it is imported.
    for path in (ROOT / "llava").rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        names = {alias.name for node in tree.body if isinstance(node, ast.Import) for alias in node.names}
        names |= {str(node.module) for node in tree.body if isinstance(node, ast.ImportFrom)}
        assert path.parent.name == "vllm" or not [name for name in names if name.split(".")[0] == "vllm"], path


def test_classes_that_are_named_are_defined() -> None:
    tree = ast.parse((ROOT / "llava/convert/vllm/models.py").read_text(encoding="utf-8"))
    defined = {node.name for node in tree.body if isinstance(node, ast.ClassDef)}
    assert {*ARCHITECTURES.values(), "CompanionTokenizer"} <= defined


CONFIGS = """
import json, sys
from llava.convert.vllm.plugin import register, register_configs
register_configs(); register()  # without vLLM: a warning, and nothing else
from transformers import AutoConfig, LlavaConfig
results = {}
for path in sys.argv[1:]:
    config = AutoConfig.from_pretrained(path)
    results[path] = [type(config).__name__, config.architectures, config.to_dict()]
    assert AutoConfig.from_pretrained(path).to_dict() == config.to_dict()
print("RESULTS", json.dumps(results))
"""


@pytest.mark.slow
def test_configs_are_those_of_a_conversion(tmp_path: Path) -> None:
    """Asked of transformers as vLLM asks; folders in transformers' own layout keep their answer."""
    mistral = build(tmp_path / "mistral", "mistral", **ANYRES)
    qwen = build(tmp_path / "qwen", "qwen2")
    plain = build(tmp_path / "plain")  # of the type `llava`, which is transformers' own word too
    values = json.loads((plain / "config.json").read_text())
    (plain / "config.json").write_text(json.dumps({**values, "model_type": "llava"}))
    sources = [V15, V16, str(mistral), str(qwen), str(plain)]
    targets = []
    for number, source in enumerate(sources):
        targets.append(str(tmp_path / f"theirs{number}"))
        convert(source, targets[-1], to="transformers", options=ConversionOptions(verification="tensors"))
    done = run_python("-c", CONFIGS, *sources, *targets)
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout.rsplit("RESULTS", 1)[1])
    for source, target in zip(sources, targets, strict=True):
        (kind, architectures, config), (their_kind, their_architectures, theirs) = results[source], results[target]
        assert kind == their_kind
        assert architectures == [ARCHITECTURES[their_architectures[0]]]
        different = {key for key in theirs if config[key] != theirs[key]}
        assert different <= {"architectures", "_name_or_path"}
        assert is_original(source)
        assert not is_original(target)


@pytest.mark.parametrize("checkpoint", [V15, V16, "qwen2", "onevision"])
def test_tensors_are_those_of_a_conversion_and_fill_the_model(checkpoint: str, tmp_path: Path) -> None:
    if checkpoint == "onevision":
        source = onevision(tmp_path / "source")
    elif checkpoint == "qwen2":
        source = build(tmp_path / "source", "qwen2", tie_word_embeddings=True)
    else:
        source = Path(checkpoint)
    convert(source, tmp_path / "theirs", to="transformers", options=ConversionOptions(verification="tensors"))
    given = dict(converted_tensors(source))
    written = {name: read_tensor(header) for name, header in stored_tensors(tmp_path / "theirs").items()}
    assert given.keys() == written.keys()
    assert all(torch.equal(given[name], written[name]) for name in written)
    # Bijective onto the parameters of the class that vLLM's is modelled on; tied ones are one.
    config = AutoConfig.from_pretrained(tmp_path / "theirs")
    model = build_empty_model(lambda: AutoModelForImageTextToText.from_config(config))
    expected = {published_name(name) for name, _ in model.named_parameters()}
    named = [published_name(name) for name in given if "post_layernorm" not in name]
    assert len(named) == len(set(named))
    assert set(named) == {name for name in expected if "post_layernorm" not in name}


def onevision(folder: Path, **changes: Any) -> Path:
    """With the keys of the published ones: of the type `llava`, by the class's name over Qwen2."""
    values = ANYRES | {"image_aspect_ratio": "anyres_max_9", "mm_newline_position": "one_token"} | changes
    source = build(folder, "qwen2", siglip=True, **values)
    keys = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(keys | {"model_type": "llava"}))
    return source


def test_onevision_is_given_as_its_own_class(tmp_path: Path) -> None:
    source = onevision(tmp_path / "source")
    assert is_original(source)
    config = _config_from_dict(object, read_config(source), name_or_path=str(source))
    assert isinstance(config, LlavaOnevisionConfig)
    assert config.architectures == ["OriginalLlavaOnevision"]
    assert (config.vision_aspect_ratio, config.vision_feature_select_strategy) == ("anyres_max_9", "full")
    assert config.text_config.model_type == "qwen2"
    folder = companion(source)
    written = {file.name for file in folder.iterdir()}
    assert written >= {"video_preprocessor_config.json", "processor_config.json", "chat_template.jinja"}
    assert json.loads((folder / "video_preprocessor_config.json").read_text())["size"] == {"height": 28, "width": 28}
    assert {config.image_token_index, config.video_token_index} < set(range(config.text_config.vocab_size))
    # The names that vLLM's class maps to its modules.
    known = (
        "language_model.model.",
        "language_model.lm_head.",
        "vision_tower.",
        "multi_modal_projector.",
        "image_newline",
    )
    assert all(name.startswith(known) for name, _ in converted_tensors(source))


def test_what_vllm_would_compute_otherwise_is_refused(tmp_path: Path) -> None:
    fewer = onevision(tmp_path / "fewer", image_aspect_ratio="anyres_max_4")
    listed = build(
        tmp_path / "vip", mm_projector_type="norm_mlp2x_gelu", mm_vision_select_layer=[-2, 1], mm_hidden_size=64
    )
    for source, words in ((fewer, "anyres_max_9"), (listed, "VipLlavaForConditionalGeneration")):
        with pytest.raises(InputError, match=words):
            _config_from_dict(object, read_config(source), name_or_path=str(source))


def test_the_companion_is_made_once_and_anew_when_the_checkpoint_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = build(tmp_path / "source")
    first = companion(source)
    assert {file.name for file in first.iterdir()} >= {"config.json", "tokenizer.json", "processor_config.json"}
    assert not list(first.glob("*.safetensors"))
    companion.cache_clear()  # another process
    opened: list[Any] = []
    monkeypatch.setattr(vllm_plugin, "open_layout", opened.append)
    assert companion(source) == first
    assert opened == []
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    values = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**values, "conv_mode": "plain"}))
    companion.cache_clear()
    assert companion(source) != first
