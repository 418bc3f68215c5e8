"""Load a model folder in any layout: `load_pretrained_model` (the original's 4-tuple) and `load` (a dataclass).

In: a folder or hub repository, a base where the folder needs one, device and dtype. Out: tokenizer, model, image processor,
context length; `load` adds the conversation template and the Processor. What a folder holds is decided in
checkpoints/inspect.py, its base is found in checkpoints/base_model.py, its config is built in checkpoints/model_config.py,
tensors are loaded by checkpoints/loading.py, device and dtype are picked in device.py.
"""

from __future__ import annotations

import copy
import importlib.util
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils.quantization_config import QuantizationConfigMixin

from llava.conversation import get_model_name_from_path
from llava.errors import InputError, require
from llava.files import holds_tokenizer, read_json
from llava.images.image_processor import ClipImageProcessor
from llava.model.checkpoints.base_model import inspect_with_base, original_config, with_config
from llava.model.checkpoints.hub import DEFAULT_HUB, HubOptions, resolve_checkpoint
from llava.model.checkpoints.inspect import CheckpointInfo, tokenizer_folder, tower_headers
from llava.model.checkpoints.loading import (
    Origins,
    WeightSources,
    build_with_transformers,
    check_origins,
    check_structure,
    expected_tensors,
    load_weights,
    load_with_transformers,
    plan_sources,
    warn_of_unused_tower,
    with_own_tower,
)
from llava.model.checkpoints.model_config import build_config, resolved_tower_path, restore_config
from llava.model.checkpoints.quantized import load_quantized
from llava.model.config import LlavaSettings, described_by, is_multimodal, unused_settings
from llava.model.device import DeviceMap, is_present, pick_device, pick_dtype, pick_placement
from llava.model.language_model import (  # noqa: F401  # for AutoConfig
    llava_gemma,
    llava_llama,
    llava_mistral,
    llava_mixtral,
    llava_mpt,
    llava_qwen,
)
from llava.model.protocols import LlavaModel
from llava.model.tokenizer_setup import (
    context_len,
    fit_vocabulary,
    read_generation_config,
    read_tokenizer,
    template_choice,
)
from llava.model.transformers_internals import set_attention
from llava.processor import Processor
from llava.text.tokenization import Tokenizer

logger = logging.getLogger(__name__)

# Arguments that callers of the original pass and that have no effect: the files say what they would say.
OBSOLETE_OPTIONS = ("multimodal", "low_cpu_mem_usage", "trust_remote_code", "use_fast", "use_safetensors")
# Arguments of `load` under other names, and those that are handed on to it as they are.
OTHER_NAMES = {"torch_dtype": "dtype", "use_auth_token": "token"}
HANDED_ON = ("attn_implementation", "customized_config", "dtype", "max_memory", "overwrite_config")
HUB_OPTIONS = tuple(field.name for field in fields(HubOptions))


@dataclass(frozen=True)
class LoadedModel:
    """A loaded model with its tokenizer, image processor and settings."""

    tokenizer: Tokenizer
    model: LlavaModel  # a plain LanguageModel where there is no vision tower
    image_processor: ClipImageProcessor | None  # None where there is no vision tower
    context_len: int
    conv_mode: str  # the name of its template, or the file of its folder's chat template
    processor: Processor | None
    info: CheckpointInfo
    template_origin: str = "by the caller"  # what decided `conv_mode`

    def save(self, folder: str | Path) -> None:
        """Write a checkpoint in the original layout that loads by itself, with the tower's config where it needs one."""
        self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)


def load_pretrained_model(
    model_path: str | Path,
    model_base: str | Path | None,
    model_name: str | None = None,
    load_8bit: bool = False,
    load_4bit: bool = False,
    device_map: DeviceMap = "auto",
    device: str | torch.device = "cuda",
    use_flash_attn: bool = False,
    **kwargs: Any,
) -> tuple[Tokenizer, LlavaModel, ClipImageProcessor | None, int]:
    """Load a model with the signature of the original.

    Args:
        model_path: A model folder or hub repository.
        model_base: The base model of an adapter or projector.
        model_name: A hint for the conversation template; it decides nothing that the files say.
        device_map: How accelerate shards the model; "auto" where it does not fit on one GPU.
        device: The device; without a GPU the default becomes the best device that is present.
        use_flash_attn: Short for `attn_implementation="flash_attention_2"`.
        **kwargs: `dtype` or `torch_dtype`, `attn_implementation`, `quantization_config`, `customized_config`,
            `overwrite_config`, `max_memory`, as `load` takes them; `cache_dir`, `revision`, `local_files_only`, `token` for hub
            repositories. Those of `OBSOLETE_OPTIONS` are ignored, None counts as not given, any other is an `InputError`.

    Returns:
        Tokenizer, model, image processor (None for a plain language model), context length in tokens.
    """
    options = {OTHER_NAMES.get(name, name): value for name, value in kwargs.items() if value is not None}
    for name in OBSOLETE_OPTIONS:
        options.pop(name, None)
    load_8bit, load_4bit = options.pop("load_in_8bit", load_8bit), options.pop("load_in_4bit", load_4bit)
    if load_8bit and load_4bit:
        raise InputError("load_8bit and load_4bit exclude each other; give one of them")
    quantization = options.pop("quantization_config", None) or ("8bit" if load_8bit else "4bit" if load_4bit else None)
    if options.pop("use_flash_attention_2", False) or use_flash_attn:
        options["attn_implementation"] = "flash_attention_2"
    if options.pop("offload_folder", None) is not None:
        logger.warning("offload_folder is not used: all weights stay in memory")
    hub = HubOptions(**{name: options.pop(name) for name in HUB_OPTIONS if name in options})
    unknown = [name for name in options if name not in HANDED_ON]
    if unknown:
        raise InputError(f"load_pretrained_model does not know the argument {unknown[0]!r}")
    device_map = device_map or None  # some callers give "" for it
    if device == "cuda" and not is_present(torch.device("cuda")):
        found = pick_device("auto")
        if device_map in ("auto", None):
            logger.warning("this machine has no CUDA device; loading on %s", found)
        device = found
    elif device != "cuda":
        device_map = {"": str(device)}
    loaded = load(
        model_path,
        base=model_base,
        name=model_name,
        device=device,
        device_map=device_map,
        quantization=quantization,
        hub=hub,
        **options,
    )
    return loaded.tokenizer, loaded.model, loaded.image_processor, loaded.context_len


def load(
    path: str | Path,
    *,
    base: str | Path | None = None,
    name: str | None = None,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    quantization: str | QuantizationConfigMixin | None = None,
    attn_implementation: str | None = None,
    device_map: DeviceMap = None,
    max_memory: Mapping[int | str, int | str] | None = None,
    overwrite_config: Mapping[str, Any] | None = None,
    customized_config: PreTrainedConfig | Mapping[str, Any] | str | Path | None = None,
    hub: HubOptions = DEFAULT_HUB,
) -> LoadedModel:
    """Load a model for inference.

    Args:
        path: A model folder or hub repository.
        base: The base model of an adapter or projector; None takes the one that the folder's files name.
        name: The model's name, which may decide the conversation template; None takes it from `path`.
        device: "auto", "cpu", "cuda", "cuda:1", "mps" or a torch device.
        dtype: "auto", "fp16", "bf16", "fp32" or a torch dtype.
        quantization: "4bit" or "8bit" (extra `quant`), or a quantization config of transformers.
        device_map: Shards the model over several devices; takes precedence over `device`.
        max_memory: How much each device may hold where `device_map` shards the model, as `{0: "10GiB", "cpu": "30GiB"}`.
        overwrite_config: Keys of config.json, in the original layout, with other values than the file's.
        customized_config: A config in place of the folder's: an object, its keys, or a JSON file.
        hub: How hub repositories are looked up; a revision is that of `path` alone.

    Raises:
        InputError: The folder is no complete model, or this machine cannot do what was asked for.
    """
    info, base_info = inspect_with_base(path, base, hub=hub)
    info = with_config(info, replaced=_config_values(customized_config), changed=overwrite_config)
    _check_attention(attn_implementation)
    needed_bytes = info.stored_bytes + (base_info.stored_bytes if base_info is not None else 0)
    placement = pick_placement(device, device_map, needed_bytes=needed_bytes, max_memory=max_memory)
    target = placement.device
    chosen_dtype = pick_dtype(dtype, target)
    loader_options: dict[str, object] = {}
    if quantization is not None:
        from llava.model.quantization import quantization_config

        own = quantization_config(quantization, chosen_dtype) if isinstance(quantization, str) else quantization
        loader_options["quantization_config"] = own
    if placement.device_map is not None or quantization is not None:
        require("accelerate", extra="quant")
        loader_options["device_map"] = placement.device_map or {"": str(target)}
        if placement.max_memory is not None:
            loader_options["max_memory"] = dict(placement.max_memory)

    if unused := unused_settings(info.config):
        logger.warning("%s has settings that are not used: %s", info.config_folder / "config.json", ", ".join(unused))
    for part in (info, base_info):
        if part is not None and part.packing is not None:
            logger.warning(
                "%s: the weights are stored quantized (%s); they are read as the numbers that they stand for, in %s, and take "
                "the memory of unquantized ones",
                part.folder, part.packing.description, chosen_dtype,
            )  # fmt: skip
    config = build_config(info)
    if attn_implementation is not None:
        set_attention(config, attn_implementation)
    build = _build_multimodal if is_multimodal(config.to_dict()) else _build_language_model
    model, origins = build(info, base_info, config, target, chosen_dtype, loader_options, hub.for_other_repositories)
    read_generation_config(model, info, base_info)

    tokenizer = read_tokenizer(tokenizer_folder(info, base_info), model.config)
    fit_vocabulary(model, tokenizer)
    check_origins(model, origins)
    model.eval()

    tower = model.get_vision_tower() if hasattr(model, "get_vision_tower") else None
    image_processor = tower.image_processor if tower is not None else None
    processor = None
    if image_processor is not None:
        use_im_start_end = LlavaSettings.from_hf(model.config).tokens.use_im_start_end
        settings = LlavaSettings.from_hf(model.config)
        processor = Processor(
            tokenizer,
            image_processor,
            model.image_policy(),
            video_policy=model.video_policy() if settings.takes_videos else None,
            use_im_start_end=use_im_start_end,
            tells_times=settings.tells_times,
        )
    template = template_choice(info.config, tokenizer, name or get_model_name_from_path(str(path)))
    return LoadedModel(
        tokenizer=tokenizer,
        model=model,
        image_processor=image_processor,
        context_len=context_len(model.config),
        conv_mode=template.name,
        processor=processor,
        info=info,
        template_origin=template.origin,
    )


def load_tokenizer(path: str | Path, *, base: str | Path | None = None) -> Tokenizer:
    """Load the tokenizer of a model folder alone, with the tokens that its config adds; no weights are read."""
    folder = resolve_checkpoint(path)
    if holds_tokenizer(folder):
        config = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
        return read_tokenizer(folder, SimpleNamespace(**config))
    info, base_info = inspect_with_base(folder, base)
    return read_tokenizer(tokenizer_folder(info, base_info), SimpleNamespace(**original_config(info)))


def _config_values(given: PreTrainedConfig | Mapping[str, Any] | str | Path | None) -> Mapping[str, Any] | None:
    if isinstance(given, (str, Path)):
        return read_json(Path(given) / "config.json" if Path(given).is_dir() else Path(given))
    return given.to_dict() if isinstance(given, PreTrainedConfig) else given


# --- building ---------------------------------------------------------------------------------------------------------


def _check_attention(name: str | None) -> None:
    """Check that an attention implementation is installed, before anything is read."""
    if name is None:
        return
    from transformers import AttentionInterface

    if name == "flash_attention_2" and importlib.util.find_spec("flash_attn") is None:
        raise InputError(
            "flash_attention_2 needs the package flash-attn, which is not installed; install it (pip install flash-attn) "
            "or leave use_flash_attn and attn_implementation out to use PyTorch's own attention"
        )
    known = ["eager", *AttentionInterface().valid_keys()]
    if name not in known:
        raise InputError(f"unknown attn_implementation {name!r}; known: {', '.join(known)}")


def _build_multimodal(
    info: CheckpointInfo,
    base_info: CheckpointInfo | None,
    config: PreTrainedConfig,
    device: torch.device,
    dtype: torch.dtype,
    loader_options: dict[str, object],
    hub: HubOptions,
) -> tuple[LlavaModel, Origins]:
    from transformers.initialization import no_init_weights

    from llava.model.language_model.registry import llava_classes

    _, model_class = llava_classes(info.language_model)
    sources = plan_sources(info, base_info, prefix=model_class.base_model_prefix)
    stored = sources.stores_tower or sources.merges_tower
    with resolved_tower_path(config, info, base_info, stored=stored, names=sources.headers, hub=hub):
        if not sources.stores_tower:
            tower_headers(Path(config.mm_vision_tower))  # files that are missing are an error before weights are read
        if sources.merges_tower and not sources.stores_tower:
            sources = with_own_tower(sources, Path(config.mm_vision_tower), prefix=model_class.base_model_prefix)
        if info.stores_quantized:  # packed in a form that only the library which packed them reads
            place = loader_options.get("device_map", {"": str(device)})
            model, origins = load_quantized(model_class, config, info, dtype, place, unused=sources.unused_tower)
        elif loader_options:
            model, origins = build_with_transformers(model_class, config, sources, dtype, loader_options)
        else:
            check_structure(lambda: model_class(copy.deepcopy(config)), sources, info.config_folder / "config.json")
            with default_dtype(dtype), device, no_init_weights():
                model = model_class(copy.deepcopy(config))
            origins = load_weights(model, sources)
        tower = model.get_vision_tower()
        if not tower.is_loaded:
            with default_dtype(dtype), device, no_init_weights():
                tower.load_model()
            prefix = f"{model_class.base_model_prefix}.vision_tower."
            warn_of_unused_tower(sources, Path(tower.vision_tower_name))
            origins |= {prefix + name: tower.vision_tower_name for name in expected_tensors(tower)}
    restore_config(model.config, config)
    return model, origins


def _build_language_model(
    info: CheckpointInfo,
    base_info: CheckpointInfo | None,
    config: PreTrainedConfig,
    device: torch.device,
    dtype: torch.dtype,
    loader_options: dict[str, object],
    hub: HubOptions,
) -> tuple[PreTrainedModel, Origins]:
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM

    whole = base_info if info.needs_base and base_info is not None else info
    with described_by(whole.folder / "config.json"):
        if whole.packing is not None:  # transformers cannot unpack
            model_class = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
            sources = WeightSources(whole.tensors, str(whole.folder))
            model, origins = build_with_transformers(model_class, config, sources, dtype, loader_options)
        else:
            model, origins = load_with_transformers(
                AutoModelForCausalLM, whole.folder, config=config, dtype=dtype, **loader_options
            )
    if info.adapter:
        if loader_options:
            raise InputError(
                f"{info.folder} is an adapter for a plain language model; merge it before quantizing or sharding it"
            )
        from llava.model.checkpoints.lora import load_adapter, merge_into

        merge_into(model, load_adapter(info.adapter, info.adapter_config or {}))
    return model if loader_options else model.to(device), origins


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Within the block, create tensors in `dtype`."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
