"""Load a model folder, whatever layout it is in: `load_pretrained_model` (the 4-tuple) and `load` (the typed result).

In: a folder or hub repository, a base where the folder needs one, and where and how the model shall run. Out: tokenizer,
model, image processor, context length; `load` adds the conversation template and the Processor. What a folder holds is
decided in model/checkpoints/inspect.py, tensors are placed by model/checkpoints/loading.py, device and dtype are picked
in device.py.
"""

from __future__ import annotations

import copy
import importlib.util
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from llava.conversation import get_model_name_from_path
from llava.errors import InputError, require
from llava.files import holds_tokenizer, read_json
from llava.model.checkpoints.hf_layout import translate_config
from llava.model.checkpoints.hub import resolve_checkpoint, resolve_vision_tower
from llava.model.checkpoints.inspect import CheckpointInfo, inspect
from llava.model.checkpoints.loading import build_with_transformers, load_weights, plan_sources
from llava.model.config import OWN_FOLDER, LlavaSettings, is_multimodal
from llava.model.device import is_present, pick_device, pick_dtype, pick_placement
from llava.model.tokenizer_setup import (
    ConfigView,
    context_len,
    conv_mode,
    fit_vocabulary,
    read_generation_config,
    read_tokenizer,
)
from llava.model.transformers_internals import set_attention

if TYPE_CHECKING:
    from llava.processor import Processor

logger = logging.getLogger(__name__)

# Arguments that callers of the original pass and that decide nothing any more.
OBSOLETE_OPTIONS = ("multimodal", "low_cpu_mem_usage", "trust_remote_code", "use_fast")


@dataclass(frozen=True)
class LoadedModel:
    """A model that is ready to answer, and what belongs to it."""

    tokenizer: Any
    model: Any
    image_processor: Any  # None for a language model without a vision tower
    context_len: int
    conv_mode: str
    processor: Processor | None
    info: CheckpointInfo

    def save(self, folder: str | Path) -> None:
        """Write a checkpoint in the original layout that loads by itself, the tower's config included where it needs it."""
        self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)


def load_pretrained_model(
    model_path: str | Path,
    model_base: str | Path | None,
    model_name: str | None = None,
    load_8bit: bool = False,
    load_4bit: bool = False,
    device_map: Any = "auto",
    device: str | torch.device = "cuda",
    use_flash_attn: bool = False,
    **kwargs: Any,
) -> tuple[Any, Any, Any, int]:
    """Load as the original does: `(tokenizer, model, image_processor, context_len)`.

    `model_name` is only a hint (it decides nothing that the files say). `dtype` or `torch_dtype`, `attn_implementation`
    and `quantization_config` may be given by keyword. On a machine without a GPU the default device becomes the CPU.
    """
    options = {key: value for key, value in kwargs.items() if key not in OBSOLETE_OPTIONS}
    dtype = options.pop("dtype", None) or options.pop("torch_dtype", None) or "auto"
    options.pop("torch_dtype", None)
    attn_implementation = options.pop("attn_implementation", None)
    given_config = options.pop("quantization_config", None)
    load_8bit, load_4bit = options.pop("load_in_8bit", load_8bit), options.pop("load_in_4bit", load_4bit)
    if options:
        raise InputError(f"load_pretrained_model does not know the argument {next(iter(options))!r}")
    if load_8bit and load_4bit:
        raise InputError("load_8bit and load_4bit exclude each other; give one of them")
    if use_flash_attn:
        attn_implementation = "flash_attention_2"
    if device == "cuda" and not is_present(torch.device("cuda")):
        found = pick_device("auto")
        if device_map in ("auto", None):
            logger.warning("this machine has no CUDA device; loading on %s", found)
        device = found
    elif device != "cuda":
        device_map = {"": str(device)}
    loaded = _load(
        Path(model_path) if isinstance(model_path, Path) else model_path,
        base=model_base,
        name=model_name,
        device=device,
        device_map=device_map,
        dtype=dtype,
        quantization=given_config or ("8bit" if load_8bit else "4bit" if load_4bit else None),
        attn_implementation=attn_implementation,
    )
    return loaded.tokenizer, loaded.model, loaded.image_processor, loaded.context_len


def load(
    path: str | Path,
    *,
    base: str | Path | None = None,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    quantization: Any = None,
    attn_implementation: str | None = None,
    device_map: Any = None,
) -> LoadedModel:
    """Load a model folder or hub repository for answering.

    `quantization` is "4bit" or "8bit" (extra `quant`), or a configuration object of transformers; `device_map` spreads
    the model over several devices and wins over `device`.
    """
    return _load(
        path,
        base=base,
        name=None,
        device=device,
        device_map=device_map,
        dtype=dtype,
        quantization=quantization,
        attn_implementation=attn_implementation,
    )


def load_tokenizer(path: str | Path, *, base: str | Path | None = None) -> Any:
    """The tokenizer of a model folder alone, with the marker tokens that its config asks for; no weights are read."""
    folder = resolve_checkpoint(path)
    config = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    holder = folder
    if not holds_tokenizer(folder):
        holder = resolve_checkpoint(base or _base_of(inspect(folder)), what="base model")
    return read_tokenizer(holder, ConfigView(config))


# --- loading ----------------------------------------------------------------------------------------------------------


def _load(
    path: str | Path,
    *,
    base: str | Path | None,
    name: str | None,
    device: str | torch.device,
    device_map: Any,
    dtype: str | torch.dtype,
    quantization: Any,
    attn_implementation: str | None,
) -> LoadedModel:
    info = inspect(path)
    base_info = find_base(info, base)
    _check_attention(attn_implementation)
    needed_bytes = info.stored_bytes + (base_info.stored_bytes if base_info is not None else 0)
    placement = pick_placement(device, device_map, needed_bytes=needed_bytes)
    target = placement.device
    chosen_dtype = pick_dtype(dtype, target)
    loader_options: dict[str, Any] = {}
    if quantization is not None:
        from llava.model.quantization import quantization_config

        own = quantization_config(quantization, chosen_dtype) if isinstance(quantization, str) else quantization
        loader_options["quantization_config"] = own
    if placement.device_map is not None or quantization is not None:
        require("accelerate", extra="quant")
        loader_options["device_map"] = placement.device_map or {"": str(target)}

    config = build_config(info, base_info)
    if attn_implementation is not None:
        set_attention(config, attn_implementation)
    build = _build_multimodal if is_multimodal(config.to_dict()) else _build_language_model
    model = build(info, base_info, config, target, chosen_dtype, loader_options)
    read_generation_config(model, info, base_info)

    holder = info.folder if holds_tokenizer(info.folder) or base_info is None else base_info.folder
    tokenizer = read_tokenizer(holder, model.config)
    fit_vocabulary(model, tokenizer)
    model.eval()

    tower = model.get_vision_tower() if hasattr(model, "get_vision_tower") else None
    image_processor = tower.image_processor if tower is not None else None
    processor = None
    if image_processor is not None:
        from llava.processor import Processor

        processor = Processor(
            tokenizer, image_processor, LlavaSettings.from_hf(model.config), policy=model.image_policy()
        )
    return LoadedModel(
        tokenizer=tokenizer,
        model=model,
        image_processor=image_processor,
        context_len=context_len(model.config),
        conv_mode=conv_mode(info.config, tokenizer, name or get_model_name_from_path(str(path))),
        processor=processor,
        info=info,
    )


def _check_attention(name: str | None) -> None:
    """Refuse an attention function that is not here before anything is read."""
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


def find_base(info: CheckpointInfo, base: str | Path | None) -> CheckpointInfo | None:
    """The base model to build on: needed, given without need, or absent."""
    if base is None:
        if not info.needs_base:
            return None
        base = _base_of(info)
    elif not info.needs_base:
        logger.warning("%s is a whole model: the base %s is used only for what it lacks", info.folder, base)
    try:
        found = inspect(resolve_checkpoint(base, what="base model"))
    except InputError as error:
        raise InputError(
            f"{info.folder} needs its base model: {error}; pass its path as model_base (--model-base)"
        ) from error
    if found.needs_base:
        raise InputError(
            f"the base {found.folder} is itself without a language model; pass the folder of a whole model as model_base"
        )
    return found


def _base_of(info: CheckpointInfo) -> str:
    what = "a LoRA adapter" if info.kind == "lora" else "a projector without a language model"
    if info.base_hint is None:
        raise InputError(f"{info.folder} is {what}; pass the folder of its base model as model_base (--model-base)")
    logger.info("%s is %s; its files name the base model %s", info.folder, what, info.base_hint)
    beside = info.folder / info.base_hint
    return str(beside) if beside.is_dir() and beside != info.folder else info.base_hint


def build_config(info: CheckpointInfo, base_info: CheckpointInfo | None) -> Any:
    values: Mapping[str, Any] = info.config
    if info.kind == "transformers":
        values = translate_config(values, folder=info.folder)
    elif not values and base_info is not None:  # an adapter for a plain language model comes without a config
        values = base_info.config
    values = {key: value for key, value in values.items() if key != "quantization_config" or info.stores_quantized}
    from huggingface_hub.errors import StrictDataclassError

    try:
        config = _config_object(values, info.language_model)
    except InputError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError, StrictDataclassError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{info.folder / 'config.json'} does not describe a model: {reason}") from error
    config.name_or_path = str(info.folder)
    return config


def _config_object(values: Mapping[str, Any], language_model: str) -> Any:
    if is_multimodal(values):
        from llava.model.language_model.registry import llava_classes

        config_class, _ = llava_classes(language_model)
        return config_class.from_dict({key: value for key, value in values.items() if key != "model_type"})
    from transformers import AutoConfig

    return AutoConfig.for_model(**values)


def _build_multimodal(
    info: CheckpointInfo,
    base_info: CheckpointInfo | None,
    config: Any,
    device: torch.device,
    dtype: torch.dtype,
    loader_options: dict[str, Any],
) -> Any:
    from transformers.initialization import no_init_weights

    from llava.model.language_model.registry import llava_classes

    _, model_class = llava_classes(info.language_model)
    sources = plan_sources(info, base_info, prefix=model_class.base_model_prefix)
    with resolved_tower_path(config, info, base_info, stored=sources.stores_tower):
        if info.stores_quantized:  # its tensors are packed in ways that only the library which packed them knows
            place = loader_options.get("device_map", {"": str(device)})
            model = model_class.from_pretrained(info.folder, config=config, dtype=dtype, device_map=place)
        elif loader_options:
            model = build_with_transformers(model_class, config, sources, dtype, loader_options)
        else:
            with _default_dtype(dtype), device, no_init_weights():
                model = model_class(copy.deepcopy(config))
            load_weights(model, sources)
        tower = model.get_vision_tower()
        if not tower.is_loaded:
            with _default_dtype(dtype), device, no_init_weights():
                tower.load_model()
    restore_config(model.config, config)
    return model


def _build_language_model(
    info: CheckpointInfo,
    base_info: CheckpointInfo | None,
    config: Any,
    device: torch.device,
    dtype: torch.dtype,
    loader_options: dict[str, Any],
) -> Any:
    from transformers import AutoModelForCausalLM

    folder = base_info.folder if info.needs_base and base_info is not None else info.folder
    model = AutoModelForCausalLM.from_pretrained(folder, config=config, dtype=dtype, **loader_options)
    if info.adapter:
        if loader_options:
            raise InputError(
                f"{info.folder} is an adapter for a plain language model; merge it before quantizing or spreading it"
            )
        from llava.model.checkpoints.lora import load_adapter, merge_into

        merge_into(model, load_adapter(info.adapter, info.adapter_config or {}))
    return model if loader_options else model.to(device)


@contextmanager
def resolved_tower_path(
    config: Any, info: CheckpointInfo, base_info: CheckpointInfo | None, *, stored: bool
) -> Iterator[None]:
    """While a model is built, let its config name the tower by an absolute path, and say where its weights really are.

    An adapter's config is a copy of its base's, so a folder that it names may be the base's.
    """
    folders = [info.folder] + ([base_info.folder] if base_info is not None else [])
    name, unfrozen = config.mm_vision_tower, getattr(config, "unfreeze_mm_vision_tower", None)
    if name != OWN_FOLDER:
        beside = next((folder for folder in folders if (folder / name / "config.json").is_file()), info.folder)
        config.mm_vision_tower = resolve_vision_tower(name, checkpoint_folder=beside)
    config.unfreeze_mm_vision_tower = stored
    try:
        yield
    finally:
        config.mm_vision_tower = name
        config.unfreeze_mm_vision_tower = unfrozen
        if unfrozen is None:
            del config.unfreeze_mm_vision_tower


def restore_config(built: Any, config: Any) -> None:
    """Give a built model's config, a copy, the names that its file had."""
    built.name_or_path = config.name_or_path
    for key in ("mm_vision_tower", "unfreeze_mm_vision_tower"):
        if hasattr(config, key):
            setattr(built, key, getattr(config, key))
        elif hasattr(built, key):
            delattr(built, key)


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
