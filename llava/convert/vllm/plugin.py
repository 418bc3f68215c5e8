"""vLLM reads checkpoints in the original layout: `vllm serve ./llava-v1.5-7b`, without a conversion on the disk.

In: vLLM, which calls `register` in each of its processes (entry point `vllm.general_plugins`). Out: its tables know our
configs, tokenizers and models. What a conversion to transformers' layout would write is made on the way: the small files
into a folder of the user's cache (`companion`), the tensors one by one (`converted_tensors`). Models are in
models.py; nothing here imports vLLM before it calls.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava.errors import InputError
from llava.files import atomic_folder, cache_folder, read_json
from llava.model.checkpoints.hf_layout import is_transformers_layout
from llava.model.checkpoints.hub import resolve_checkpoint
from llava.model.checkpoints.inspect import read_config
from llava.model.config import is_multimodal

if TYPE_CHECKING:
    from torch import Tensor

    from llava.convert.layouts.hf import HFLayout

logger = logging.getLogger(__name__)

# The model types of published checkpoints; the first means transformers' own layout too.
MODEL_TYPES = ("llava", "llava_llama", "llava_mistral", "llava_qwen", "llava_qwen2", "llava_qwen3")
# What transformers calls a model that we translated, and our class for vLLM.
ARCHITECTURES = {
    "LlavaForConditionalGeneration": "OriginalLlava",
    "LlavaNextForConditionalGeneration": "OriginalLlavaNext",
}
MODELS = "llava.convert.vllm.models"
TOKENIZER_MODE = "hf"  # the one that vLLM takes by itself


def register() -> None:
    """What vLLM calls: may be called several times, and must not disturb other models."""
    register_configs()
    try:
        from vllm import ModelRegistry
        from vllm.tokenizers.registry import TokenizerRegistry
    except ImportError as error:
        logger.warning(
            "this version of vLLM has other tables than the plugin of llava knows (%s): checkpoints in the original layout "
            "cannot be served; write them anew with llava convert --to transformers",
            error,
        )
        return
    for name in ARCHITECTURES.values():
        if name not in ModelRegistry.models:
            ModelRegistry.register_model(name, f"{MODELS}:{name}")
    TokenizerRegistry.register(TOKENIZER_MODE, MODELS, "CompanionTokenizer")


def register_configs() -> None:
    """Let transformers' AutoConfig answer with its own LLaVA config for a folder in the original layout."""
    from transformers import AutoConfig, LlavaConfig

    from llava.model.language_model.registry import NAMED, llava_classes

    for language_model in NAMED:  # our own classes enter the same table when they are imported: let that be over
        llava_classes(language_model)
    for model_type in MODEL_TYPES:
        members = {"model_type": model_type, "from_dict": classmethod(_config_from_dict)}
        AutoConfig.register(model_type, type("OriginalLlavaConfig", (LlavaConfig,), members), exist_ok=True)


def _config_from_dict(_: Any, values: dict[str, Any], **options: Any) -> Any:
    from transformers import LlavaConfig, LlavaNextConfig

    if is_transformers_layout(values):
        return LlavaConfig.from_dict(values, **options)
    name = options.pop("name_or_path", None) or values.get("_name_or_path")
    if not name:
        raise InputError(
            "the config of an original LLaVA checkpoint is translated with its folder, which is not known here"
        )
    translated = read_json(companion(name) / "config.json")
    translated["architectures"] = [ARCHITECTURES[name] for name in translated["architectures"]]
    config_class = LlavaNextConfig if translated["model_type"] == "llava_next" else LlavaConfig
    return config_class.from_dict(translated, name_or_path=str(name), **options)


def is_original(path: str | Path) -> bool:
    """Whether a folder is a LLaVA checkpoint that vLLM would not know by itself."""
    folder = Path(path)
    if not (folder / "config.json").is_file():
        return False
    values = read_config(folder)
    return is_multimodal(values) and not is_transformers_layout(values)


@lru_cache(maxsize=4)
def companion(path: str | Path) -> Path:
    """A folder with what a conversion of this checkpoint would write beside the weights: config, tokenizer, processor."""
    folder = resolve_checkpoint(path)
    target = cache_folder() / "vllm" / _fingerprint(folder)
    if not target.is_dir():
        target.parent.mkdir(parents=True, exist_ok=True)
        layout = open_layout(folder)
        try:
            with atomic_folder(target) as begun:
                layout.write_small_files(begun)
        except (InputError, OSError):
            if not target.is_dir():  # else another process of the same server was faster
                raise
    return target


def open_layout(folder: Path) -> HFLayout:
    from llava.convert.layouts.hf import HFLayout
    from llava.convert.source import open_source

    return HFLayout(open_source(folder))


def converted_tensors(path: str | Path) -> Iterator[tuple[str, Tensor]]:
    """All tensors of a checkpoint as a conversion would write them, one at a time."""
    for planned in open_layout(resolve_checkpoint(path)).tensors():
        yield planned.name, planned.make()


def _fingerprint(folder: Path) -> str:
    """Changes with every small file that a translation depends on."""
    import llava

    files = sorted(file for file in folder.iterdir() if file.is_file() and file.suffix not in (".safetensors", ".bin"))
    facts = [
        llava.__version__,
        str(folder.absolute()),
        *(f"{f.name} {f.stat().st_mtime_ns} {f.stat().st_size}" for f in files),
    ]
    return hashlib.sha256("\n".join(facts).encode()).hexdigest()[:24]
