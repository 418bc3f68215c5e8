"""Good checkpoints, data and runs, and ways to break them, for the tests of `llava doctor`.

`CHECKPOINT_FAULTS` maps a name to (which good folder, how to break a copy, the code that names the cause). Folders are in the
folder of recordings, where configs name their towers relative to it, or are built by tiny.py.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tiny
import torch
from safetensors.torch import load_file, save_file

VICUNA, LINEAR, ANYRES = "llava-v1.5-tiny-vicuna", "llava-v1-tiny-linear", "llava-v1.6-tiny-vicuna"
LORA, PRETRAIN, MPT = "llava-v1.5-tiny-lora", "llava-v1.5-tiny-pretrain", "llava-tiny-mpt"
TINY, TINY_ANYRES = "tiny", "tiny-anyres"
SHARDS = "model.safetensors.index.json"

Break = Callable[[Path], object]


def good(name: str, target: Path) -> Path:
    """A copy of a good folder that may be broken."""
    if name.startswith("tiny"):
        return tiny.build(target, **(tiny.ANYRES if name == TINY_ANYRES else {}))
    shutil.copytree(Path("checkpoints") / name, target)
    return target


# Ways to break


def edit(file: str, **values: Any) -> Break:
    """Set keys of a JSON file; None takes a key away."""

    def broken(folder: Path) -> None:
        content = json.loads((folder / file).read_text())
        for key, value in values.items():
            content.pop(key, None) if value is None else content.update({key: value})
        (folder / file).write_text(json.dumps(content))

    return broken


def config(**values: Any) -> Break:
    return edit("config.json", **values)


def undeclared_tower(folder: Path) -> None:
    """Beside the public tower, from which it was trained away."""
    tiny.save_tower(folder / "tower")
    config(unfreeze_mm_vision_tower=False)(folder)


def also_found(source: str) -> list[str]:
    """What is found in a recorded checkpoint that nobody broke: two were saved with another tower than they name."""
    return ["tower-unused"] if source in (LINEAR, MPT) else []


def write(file: str, text: str) -> Break:
    return lambda folder: (folder / file).write_text(text)


def delete(*files: str) -> Break:
    return lambda folder: [(folder / file).unlink() for file in files]


def cut(file: str, keep: float = 0.5) -> Break:
    def broken(folder: Path) -> None:
        content = (folder / file).read_bytes()
        (folder / file).write_bytes(content[: int(len(content) * keep)])

    return broken


def tensors(change: Callable[[dict[str, torch.Tensor]], object], file: str = "model.safetensors") -> Break:
    """Change a weight file's table of tensors in place."""

    def broken(folder: Path) -> None:
        path = folder / file
        is_pickle = path.suffix == ".bin"
        table = torch.load(path, weights_only=True) if is_pickle else load_file(path)
        change(table)
        table = {name: tensor.contiguous() for name, tensor in table.items()}
        torch.save(table, path) if is_pickle else save_file(table, path, metadata={"format": "pt"})

    return broken


def replaced(name: str, tensor: torch.Tensor) -> Callable[[dict[str, torch.Tensor]], object]:
    return lambda table: table.update({name: tensor})


def without(part: str) -> Callable[[dict[str, torch.Tensor]], object]:
    return lambda table: [table.pop(name) for name in list(table) if part in name]


def scaled(name: str, factor: float) -> Callable[[dict[str, torch.Tensor]], object]:
    return lambda table: table.update({name: table[name] * factor})


def all_zero(part: str) -> Callable[[dict[str, torch.Tensor]], object]:
    return lambda table: [table.update({name: table[name] * 0}) for name in list(table) if part in name]


def in_float16(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[dict[str, torch.Tensor]], object]:
    def both(table: dict[str, torch.Tensor]) -> None:
        change(table)
        table.update({name: tensor.half() for name, tensor in table.items()})

    return both


def with_nan(name: str) -> Callable[[dict[str, torch.Tensor]], object]:
    def spoil(table: dict[str, torch.Tensor]) -> None:
        table[name] = table[name].clone()
        table[name].view(-1)[3] = float("nan")

    return spoil


def each(*steps: Break) -> Break:
    return lambda folder: [step(folder) for step in steps]


def ordinary_end_mark(folder: Path) -> None:
    """`<|im_end|>` as a token like any other."""
    for file, key in (("tokenizer.json", "added_tokens"), ("tokenizer_config.json", "added_tokens_decoder")):
        content = json.loads((folder / file).read_text())
        entries = content.get(key) or []
        for entry in entries.values() if isinstance(entries, dict) else entries:
            if entry["content"] == "<|im_end|>":
                entry["special"] = False
        if "additional_special_tokens" in content:
            content["additional_special_tokens"] = []
        (folder / file).write_text(json.dumps(content))
    (folder / "special_tokens_map.json").unlink(missing_ok=True)


def extra_tokens(folder: Path) -> None:
    """A tokenizer that gained tokens after the model was saved."""
    from llava.text.tokenization import load_tokenizer

    tokenizer = load_tokenizer(folder)
    tokenizer.add_tokens([f"<extra{number}>" for number in range(100)])
    tokenizer.save_pretrained(folder)


def scrambled_tokens(folder: Path) -> None:
    """A vocabulary whose letters changed places."""
    content = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["a"], vocabulary["e"], vocabulary["s"] = vocabulary["e"], vocabulary["s"], vocabulary["a"]
    content["decoder"] = {"type": "Replace", "pattern": {"String": "e"}, "content": "x"}
    (folder / "tokenizer.json").write_text(json.dumps(content))


def swapped_index(folder: Path) -> None:
    index = json.loads((folder / SHARDS).read_text())
    files = sorted(set(index["weight_map"].values()))
    first = next(name for name, file in index["weight_map"].items() if file == files[0])
    index["weight_map"][first] = files[1]
    (folder / SHARDS).write_text(json.dumps(index))


def another_tower(folder: Path) -> None:
    """A tower twice as wide beside a projector for the old one."""
    edit("tower/config.json", hidden_size=64, intermediate_size=96)(folder)
    config(mm_hidden_size=64)(folder)


CHAT_TEMPLATE = "{% for m in messages %}### {{ m['role'] }}:\n{{ m['content'] }}\n{% endfor %}"

CHECKPOINT_FAULTS: dict[str, tuple[str, Break, str]] = {
    "no config": (TINY, delete("config.json"), "config-unreadable"),
    "half a config": (TINY, cut("config.json"), "config-unreadable"),
    "half a generation config": (VICUNA, write("generation_config.json", "{"), "generation-config"),
    "no weights": (TINY, delete("model.safetensors"), "weights-missing"),
    "half a safetensors file": (TINY, cut("model.safetensors"), "shard-corrupt"),
    "half a .bin shard": (VICUNA, cut("pytorch_model-00002-of-00003.bin"), "shard-corrupt"),
    "a web page in place of weights": (TINY, write("model.safetensors", "<html>404</html>" * 9), "shard-corrupt"),
    "a shard not copied": (VICUNA, delete("pytorch_model-00003-of-00003.bin"), "shard-missing"),
    "a shard and the index not copied": (
        ANYRES,
        delete("model-00002-of-00003.safetensors", SHARDS),
        "shard-missing",
    ),
    "an index of another save": (ANYRES, swapped_index, "shard-index"),
    "an index without a map": (ANYRES, edit(SHARDS, weight_map=None), "shard-index"),
    "an unknown language model": (TINY, config(model_type="llava_gpt9"), "model-type"),
    "an unknown layer choice": (TINY, config(mm_vision_select_feature="cls"), "config-value"),
    "an unknown aspect ratio": (TINY, config(image_aspect_ratio="stretch"), "image-mode"),
    "anyres weights with pad": (ANYRES, config(image_aspect_ratio="pad", mm_patch_merge_type="flat"), "image-mode"),
    "no newline": (TINY_ANYRES, tensors(without("image_newline")), "newline-missing"),
    "no pinpoints": (TINY_ANYRES, config(image_grid_pinpoints=[]), "pinpoints"),
    "pinpoints of another tower": (TINY_ANYRES, config(image_grid_pinpoints=[[50, 100], [100, 50]]), "pinpoints"),
    "pinpoints that are no list": (TINY_ANYRES, config(image_grid_pinpoints="(6x6),...,(1x1)"), "pinpoints"),
    "no tower": (TINY, config(mm_vision_tower="no/such/folder/at/all"), "tower-missing"),
    "a tower of an unknown kind": (TINY, edit("tower/config.json", model_type="resnet"), "tower-type"),
    "a trained tower that no key declares": (TINY, undeclared_tower, "tower-unused"),
    "a trained tower left behind": (TINY, tensors(without("vision_tower.")), "tower-weights"),
    "a layer that is not there": (TINY, config(mm_vision_select_layer=-9), "select-layer"),
    "pixels of another size": (
        TINY,
        edit("tower/preprocessor_config.json", size={"shortest_edge": 14}, crop_size={"height": 14, "width": 14}),
        "preprocessor",
    ),
    "pixels not normalised": (TINY, edit("tower/preprocessor_config.json", do_normalize=False), "preprocessor"),
    "pixels not rescaled": (TINY, edit("tower/preprocessor_config.json", do_rescale=False), "preprocessor"),
    "an unknown image processor": (
        TINY,
        edit("tower/preprocessor_config.json", image_processor_type="MyImageProcessor"),
        "preprocessor",
    ),
    "no projector": (TINY, tensors(without("mm_projector")), "projector-missing"),
    "an empty projector": (
        TINY,
        tensors(lambda t: [t.update({n: torch.empty(0)}) for n in list(t) if "mm_projector" in n]),
        "projector-empty",
    ),
    "an empty projector file": (
        PRETRAIN,
        tensors(lambda t: [t.update({n: torch.empty(0)}) for n in list(t)], "mm_projector.bin"),
        "projector-empty",
    ),
    "another projector type": (TINY, config(mm_projector_type="mlp3x_gelu"), "projector-type"),
    "another tower's projector": (TINY, another_tower, "projector-width"),
    "a wrong width in the config": (TINY, config(mm_hidden_size=48), "config-width"),
    "another model's projector": (
        PRETRAIN,
        tensors(
            lambda t: t.update(
                {
                    n: torch.ones(96, 96 if v.shape[-1] == 64 else 32) if v.ndim == 2 else torch.ones(96)
                    for n, v in t.items()
                }
            ),
            "mm_projector.bin",
        ),
        "projector-other-model",
    ),
    "a projector of zeros": (TINY, tensors(all_zero("mm_projector.0.weight")), "projector-dead"),
    "a projector that ends in nothing": (
        TINY,
        tensors(lambda t: t.update({"model.mm_projector.0.bias": t["model.mm_projector.0.bias"] * 0 - 900.0})),
        "image-ignored",
    ),
    "no tokenizer": (VICUNA, delete("tokenizer.model"), "tokenizer-missing"),
    "half a tokenizer": (VICUNA, cut("tokenizer.model"), "tokenizer-unreadable"),
    "a tokenizer that changes text": (TINY, scrambled_tokens, "tokenizer-roundtrip"),
    "tokens without rows": (TINY, extra_tokens, "vocabulary-small"),
    "markers without rows": (VICUNA, config(mm_use_im_start_end=True), "marker-rows"),
    "another vocabulary size": (TINY, config(vocab_size=400), "vocabulary-config"),
    "an output layer of another save": (
        TINY,
        tensors(replaced("lm_head.weight", torch.full((300, 64), 0.1))),
        "vocabulary-head",
    ),
    "another model's tokenizer": (
        VICUNA,
        each(delete("tokenizer.model", "tokenizer_config.json", "special_tokens_map.json"), tiny.save_tokenizer),
        "vocabulary-other",
    ),
    "no begin token": (VICUNA, edit("tokenizer_config.json", add_bos_token=False), "begin-token"),
    "another end token": (
        VICUNA,
        each(config(eos_token_id=13), write("generation_config.json", '{"eos_token_id": 13}')),
        "end-token",
    ),
    "an end mark that is no special token": (MPT, ordinary_end_mark, "special-token"),
    "an ordinary padding token": (TINY, edit("tokenizer_config.json", pad_token="a"), "pad-token"),
    "an unknown template": (TINY, config(conv_mode="vicuna_v9"), "template-unknown"),
    "another model's template": (TINY, config(conv_mode="chatml_direct"), "template-mismatch"),
    "another chat template": (
        VICUNA,
        each(config(conv_mode="v1"), edit("tokenizer_config.json", chat_template=CHAT_TEMPLATE)),
        "chat-template",
    ),
    "a damaged chat template": (VICUNA, write("chat_template.jinja", "{% for %}"), "template-unreadable"),
    "a limit beyond the positions": (TINY, config(tokenizer_model_max_length=4096), "context-positions"),
    "a context full of image": (TINY_ANYRES, config(tokenizer_model_max_length=24), "context-short"),
    "an unknown padding side": (TINY, config(tokenizer_padding_side="middle"), "padding-side"),
    "one layer more": (TINY, config(num_hidden_layers=3), "weights-config"),
    "another width": (TINY, config(intermediate_size=128), "weights-config"),
    "a layer saved empty": (
        TINY,
        tensors(replaced("model.layers.1.mlp.up_proj.weight", torch.empty(0))),
        "weights-empty",
    ),
    "NaN in the weights": (TINY, tensors(with_nan("model.layers.0.self_attn.q_proj.weight")), "weights-damaged"),
    "a flipped bit": (TINY, tensors(scaled("model.layers.1.mlp.down_proj.weight", 1e30)), "weights-damaged"),
    "activations beyond float16": (
        TINY,
        tensors(in_float16(lambda t: [scaled("model.norm.weight", 1e5)(t), scaled("lm_head.weight", 1e3)(t)])),
        "overflow",
    ),
    "no base": (
        LORA,
        each(config(_name_or_path="gone"), edit("adapter_config.json", base_model_name_or_path="gone")),
        "base-missing",
    ),
    "another base": (LORA, edit("adapter_config.json", base_model_name_or_path=f"checkpoints/{MPT}"), "lora-base"),
    "an empty adapter": (
        LORA,
        tensors(lambda t: [t.update({n: torch.empty(0)}) for n in list(t)], "adapter_model.safetensors"),
        "lora-empty",
    ),
    "another rank": (LORA, edit("adapter_config.json", r=64), "lora-rank"),
    "an adapter never trained": (LORA, tensors(all_zero("lora_B"), "adapter_model.safetensors"), "lora-untrained"),
    "an adapter without its projector": (LORA, delete("non_lora_trainables.bin"), "projector-missing"),
}


# Training data

SAMPLES = [
    {
        "id": "gradient",
        "image": "grad_64x48.png",
        "conversations": [
            {"from": "human", "value": "<image>\nWhat colours do you see?"},
            {"from": "gpt", "value": "Red, green and blue."},
        ],
    },
    {
        "id": "text",
        "image": "text_200x80.png",
        "conversations": [
            {"from": "human", "value": "<image>\nWhat does it say?"},
            {"from": "gpt", "value": "Hello."},
            {"from": "human", "value": "In how many words?"},
            {"from": "gpt", "value": "One."},
        ],
    },
    {
        "id": "rome",
        "conversations": [
            {"from": "human", "value": "What is the capital of Italy?"},
            {"from": "gpt", "value": "Rome."},
        ],
    },
]

Change = Callable[[list[dict[str, Any]]], object]


def turn(sample: int, number: int, **values: str) -> Change:
    return lambda samples: samples[sample]["conversations"][number].update(values)


DATA_FAULTS: dict[str, tuple[Change, str]] = {
    "an image that is not there": (lambda s: s[0].update(image="gone.png"), "data-missing-image"),
    "an image outside the folder": (lambda s: s[0].update(image="../../secret.png"), "data-missing-image"),
    "an image that is text": (lambda s: s[0].update(image="expected.json"), "data-broken-image"),
    "no placeholder": (turn(0, 0, value="What colours do you see?"), "data-placeholders"),
    "a placeholder without an image": (turn(2, 0, value="<image>\nWhat is it?"), "data-placeholders"),
    "two answers": (lambda s: s[1]["conversations"].pop(2), "data-turn-order"),
    "an unknown speaker": (turn(1, 1, **{"from": "bing"}), "data-turn-order"),
    "an empty answer": (turn(1, 3, value=" "), "data-empty-answer"),
    "no answer": (lambda s: s[2]["conversations"].pop(), "data-nothing-to-train"),
    "a key that says an answer is worse": (lambda s: s[1].update(rejected="A dog."), "data-unread-key"),
    "an id twice": (lambda s: s[1].update(id="gradient"), "data-duplicate-id"),
    "no conversations": (lambda s: s[2].pop("conversations"), "data-malformed"),
    "an answer without end": (turn(2, 1, value="Rome. " * 2000), "data-too-long"),
}

# Training runs

RUN = {
    "model_name_or_path": "checkpoints/vicuna-tiny-base",
    "version": "v1",
    "vision_tower": "checkpoints/vision/clip-tiny-56",
    "pretrain_mm_mlp_adapter": "checkpoints/llava-v1.5-tiny-pretrain/mm_projector.bin",
    "mm_vision_select_layer": -2,
    "mm_projector_type": "mlp2x_gelu",
    "mm_use_im_patch_token": False,
    "image_aspect_ratio": "pad",
    "data_path": "train_data/samples.json",
    "image_folder": "images",
    "output_dir": "run",
    "learning_rate": 2e-5,
    "model_max_length": 2048,
    "report_to": "none",
}
GO_ON = {"model_name_or_path": f"checkpoints/{VICUNA}", "pretrain_mm_mlp_adapter": None}

RUN_FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "a flag that does not exist": ({"learning_speed": 1}, "run-arguments"),
    "adapters of a projector run": ({"lora_enable": True, "tune_mm_mlp_adapter": True}, "run-arguments"),
    "no model": ({"model_name_or_path": "nowhere"}, "run-base"),
    "a frozen projector run": ({"tune_mm_mlp_adapter": True, "freeze_mm_mlp_adapter": True}, "run-frozen"),
    "a learning rate of zero": ({"learning_rate": 0}, "run-frozen"),
    "a new projector, frozen": (
        {"pretrain_mm_mlp_adapter": None, "freeze_mm_mlp_adapter": True},
        "run-projector-frozen",
    ),
    "no tower": ({"vision_tower": "no/such/tower/here"}, "tower-missing"),
    "a layer that is not there": ({"mm_vision_select_layer": -7}, "select-layer"),
    "an unknown aspect ratio": ({"image_aspect_ratio": "wide"}, "image-mode"),
    "another aspect ratio than the model's": ({**GO_ON, "image_aspect_ratio": "square"}, "image-mode"),
    "anyres without pinpoints": ({"image_aspect_ratio": "anyres"}, "pinpoints"),
    "pinpoints of another tower": (
        {"image_aspect_ratio": "anyres", "image_grid_pinpoints": "[(50, 100)]"},
        "pinpoints",
    ),
    "no projector file": ({"pretrain_mm_mlp_adapter": "gone.bin"}, "run-adapter"),
    "a projector of another type": ({"mm_projector_type": "linear"}, "projector-type"),
    "another projector than the model has": ({**GO_ON, "mm_projector_type": "mlp3x_gelu"}, "projector-type"),
    "a projector of another model": ({"model_name_or_path": "checkpoints/wide"}, "projector-other-model"),
    "another layer than in pretraining": ({"mm_vision_select_layer": -1}, "run-adapter-settings"),
    "markers that pretraining had not": ({"mm_use_im_start_end": True}, "run-adapter-settings"),
    "an unknown template": ({"version": "v9"}, "run-template"),
    "another model's template": ({"version": "mpt"}, "template-mismatch"),
    "another template than the model's": ({**GO_ON, "version": "llava_llama_2"}, "run-template"),
    "no data": ({"data_path": "gone.json"}, "data-unreadable"),
    "no image folder": ({"image_folder": "gone"}, "data-missing-image"),
    "a limit shorter than an image": ({"model_max_length": 20}, "data-nothing-to-train"),
    "float16 for bfloat16 weights": ({"model_name_or_path": "checkpoints/bf16", "fp16": True}, "run-precision"),
}


def write_run(file: Path, **changes: Any) -> Path:
    values = {**RUN, **changes}
    lines = [f"{key}: {json.dumps(value)}" for key, value in values.items() if value is not None]
    file.write_text("\n".join(lines) + "\n")
    return file


# What the fake server of the tests does wrong
SERVER_FAULTS: dict[str, tuple[str]] = {
    "unhealthy": ("server-unhealthy",),
    "no model": ("server-no-model",),
    "fails": ("server-fails",),
    "empty": ("server-empty",),
    "blind": ("server-image-ignored",),
    "special": ("server-special-token",),
    "stream": ("server-stream",),
}
