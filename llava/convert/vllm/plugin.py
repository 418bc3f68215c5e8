"""A vLLM plugin that reads checkpoints in the original layout: `vllm serve ./llava-v1.5-7b`, without a conversion on disk.

In: vLLM calls `register` in each of its processes (entry point `vllm.general_plugins`). Out: our configs, tokenizers and
models in its registries. What a conversion to transformers' layout would write is made on the fly: the small files in a
folder of the user's cache (`companion`), the tensors one by one (`converted_tensors`). The models are in models.py; vLLM is
not imported here before it calls.
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
from llava.model.checkpoints.hf_layout import HF_MODELS, is_transformers_layout
from llava.model.checkpoints.hub import resolve_checkpoint
from llava.model.checkpoints.inspect import read_config
from llava.model.config import is_multimodal

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedConfig

    from llava.convert.layouts.hf import HFLayout

logger = logging.getLogger(__name__)

# The model types of published checkpoints; the first is also that of transformers' own layout.
MODEL_TYPES = ("llava", "llava_llama", "llava_mistral", "llava_qwen", "llava_qwen2", "llava_qwen3")
# The architecture that a conversion would write, and our class for vLLM.
ARCHITECTURES = {
    "LlavaForConditionalGeneration": "OriginalLlava",
    "LlavaNextForConditionalGeneration": "OriginalLlavaNext",
    "LlavaOnevisionForConditionalGeneration": "OriginalLlavaOnevision",
}
VLLM_ASPECT_RATIO = "anyres_max_9"
MODELS = "llava.convert.vllm.models"
TOKENIZER_MODE = "hf"  # the default of vLLM


def register() -> None:
    """Register our models with vLLM; it may be called several times, and does not affect other models."""
    register_configs()
    try:
        from vllm import ModelRegistry
        from vllm.tokenizers.registry import TokenizerRegistry
    except ImportError as error:
        logger.warning(
            "this version of vLLM has other registries than the plugin of llava supports (%s): checkpoints in the original "
            "layout cannot be served; convert them with llava convert --to transformers",
            error,
        )
        return
    for name in ARCHITECTURES.values():
        if name not in ModelRegistry.models:
            ModelRegistry.register_model(name, f"{MODELS}:{name}")
    TokenizerRegistry.register(TOKENIZER_MODE, MODELS, "CompanionTokenizer")


def register_configs() -> None:
    """Let transformers' AutoConfig return its own LLaVA config for a folder in the original layout."""
    from transformers import AutoConfig, LlavaConfig

    from llava.model.language_model.registry import NAMED, llava_classes

    for language_model in NAMED:  # importing our own classes registers them in the same table: do that first
        llava_classes(language_model)
    for model_type in MODEL_TYPES:
        members = {"model_type": model_type, "from_dict": classmethod(_config_from_dict)}
        AutoConfig.register(model_type, type("OriginalLlavaConfig", (LlavaConfig,), members), exist_ok=True)


def _config_from_dict(_: type, values: dict[str, Any], **options: Any) -> PreTrainedConfig:
    import transformers

    if is_transformers_layout(values):
        return transformers.LlavaConfig.from_dict(values, **options)
    name = options.pop("name_or_path", None) or values.get("_name_or_path")
    if not name:
        raise InputError(
            "the config of an original LLaVA checkpoint is translated with its folder, which is not known here"
        )
    translated = read_json(companion(name) / "config.json")
    _check_served(translated, name)
    translated["architectures"] = [ARCHITECTURES[name] for name in translated["architectures"]]
    config_class: type[PreTrainedConfig] = getattr(transformers, f"{HF_MODELS[translated['model_type']].name}Config")
    return config_class.from_dict(translated, name_or_path=str(name), **options)


def _check_served(translated: dict[str, Any], name: object) -> None:
    """Raise an `InputError` for a model that vLLM has no class for, or whose class there computes something else."""
    architecture = translated["architectures"][0]
    if architecture not in ARCHITECTURES:
        raise InputError(f"{name} is a {architecture} in transformers' layout, which vLLM does not serve with images")
    tiles = translated.get("vision_aspect_ratio", VLLM_ASPECT_RATIO)
    if tiles != VLLM_ASPECT_RATIO:
        raise InputError(
            f"{name} has image_aspect_ratio {tiles!r}; vLLM counts features for {VLLM_ASPECT_RATIO!r} alone"
        )


def is_original(path: str | Path) -> bool:
    """Whether a folder is a LLaVA checkpoint in the original layout, which vLLM does not support itself."""
    folder = Path(path)
    if not (folder / "config.json").is_file():
        return False
    values = read_config(folder)
    return is_multimodal(values) and not is_transformers_layout(values)


@lru_cache(maxsize=4)
def companion(path: str | Path) -> Path:
    """Return a cached folder with config, tokenizer and processor as a conversion of this checkpoint would write them."""
    folder = resolve_checkpoint(path)
    target = cache_folder() / "vllm" / _fingerprint(folder)
    if not target.is_dir():
        target.parent.mkdir(parents=True, exist_ok=True)
        layout = open_layout(folder)
        try:
            with atomic_folder(target) as begun:
                layout.write_small_files(begun)
        except (InputError, OSError):
            if not target.is_dir():  # otherwise another process of the server has written it
                raise
    return target


def open_layout(folder: Path) -> HFLayout:
    from llava.convert.layouts.hf import HFLayout
    from llava.convert.source import open_source

    return HFLayout(open_source(folder))


def converted_tensors(path: str | Path) -> Iterator[tuple[str, Tensor]]:
    """Yield all tensors of a checkpoint as a conversion would write them, one at a time."""
    for planned in open_layout(resolve_checkpoint(path)).tensors():
        yield planned.name, planned.make()


def _fingerprint(folder: Path) -> str:
    """A hash that changes with every small file that the conversion depends on."""
    import llava

    files = sorted(file for file in folder.iterdir() if file.is_file() and file.suffix not in (".safetensors", ".bin"))
    facts = [
        llava.__version__,
        str(folder.absolute()),
        *(f"{f.name} {f.stat().st_mtime_ns} {f.stat().st_size}" for f in files),
    ]
    return hashlib.sha256("\n".join(facts).encode()).hexdigest()[:24]
