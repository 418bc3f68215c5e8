"""The base model of a checkpoint, and the config that the two have together. torch is not needed.

In: a folder, or the `CheckpointInfo` of one. Out: that of its base; its own, completed by the base's config; the config in
the original layout. What a folder holds by itself is found out in inspect.py; config objects are made in model_config.py.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from llava.errors import InputError
from llava.model.checkpoints.foreign import ForeignModelError
from llava.model.checkpoints.hf_layout import is_transformers_layout, translate_config
from llava.model.checkpoints.hub import DEFAULT_HUB, HubOptions, resolve_checkpoint
from llava.model.checkpoints.inspect import CheckpointInfo, inspect, survey
from llava.model.config import check_types, is_causal_language_model, language_model_type

logger = logging.getLogger(__name__)

# Names of the language model's tensors within a model that has other parts, as it is stored by several versions.
LANGUAGE_PART = re.compile(
    r"(?:model\.)?language_model\.(?:model\.)?(?!lm_head)(?P<inner>.+)|(?:.+\.)?(?P<head>lm_head\..+)"
)


def inspect_base(path: str | Path) -> CheckpointInfo:
    """Inspect a folder for the language model of a LLaVA; of a model that takes images in another way, that part alone.

    Raises:
        ForeignModelError: It holds a model that is not read, and no causal language model as a part of it.
        InputError: It is no model folder, or its files are damaged.
    """
    info = survey(path)
    if info.foreign is None:
        return info
    part = language_part(info)
    if part is None:
        raise ForeignModelError(info.foreign, info.folder)
    logger.warning(
        "%s holds %s: its language model is used, and none of its other parts", info.folder, info.foreign.name
    )
    return part


def language_part(info: CheckpointInfo) -> CheckpointInfo | None:
    """The causal language model in a model that has other parts too, as a checkpoint of its own; None where there is none."""
    text = info.config.get("text_config")
    if not isinstance(text, Mapping) or not is_causal_language_model(str(text.get("model_type"))):
        return None
    tensors = {}
    for name, header in info.tensors.items():
        match = LANGUAGE_PART.fullmatch(name)
        if match is not None:
            tensors[match["head"] or f"model.{match['inner']}"] = header
    if not any(name.startswith("model.") for name in tensors):
        return None
    tied = text.get("tie_word_embeddings", info.config.get("tie_word_embeddings", False))
    config = {**text, "tie_word_embeddings": bool(tied) or "lm_head.weight" not in tensors}
    kind = str(text["model_type"])
    return replace(info, kind="language", config=config, language_model=kind, tensors=tensors, foreign=None)


def inspect_with_base(
    path: str | Path, base: str | Path | None = None, *, hub: HubOptions = DEFAULT_HUB
) -> tuple[CheckpointInfo, CheckpointInfo | None]:
    """Inspect a checkpoint and the base that it needs; an adapter without a config of its own has its base's.

    Args:
        path: A model folder or hub repository.
        base: The base model; None takes the one that the checkpoint's files name.

    Raises:
        InputError: One of them is no model folder, or the base is needed and not found.
    """
    info = inspect(resolve_checkpoint(path, hub=hub))
    base_info = find_base(info, base, hub=hub.for_other_repositories)
    return over_base(info, base_info), base_info


def find_base(info: CheckpointInfo, base: str | Path | None, *, hub: HubOptions = DEFAULT_HUB) -> CheckpointInfo | None:
    """Find the base model of a checkpoint: the one given, or the one that its files name.

    A whole model needs none (None); a base that is given for it is used for the files that the model lacks, with a warning.

    Raises:
        InputError: The base is needed and not found, or is no whole model itself.
    """
    if base is None:
        if not info.needs_base:
            return None
        base = named_base(info)
    elif not info.needs_base:
        logger.warning("%s is a whole model: the base %s is used only for what it lacks", info.folder, base)
    try:
        found = inspect_base(resolve_checkpoint(base, what="base model", hub=hub))
    except InputError as error:
        raise InputError(
            f"{info.folder} needs its base model: {error}; pass its path as model_base (--model-base)"
        ) from error
    if found.stores_quantized and info.needs_base:
        raise InputError(
            f"the base {found.folder} is stored quantized, so that nothing can be merged into it; pass the checkpoint that it "
            f"was quantized from as model_base (--model-base)"
        )
    if found.kind == "lora":  # trained one after another
        below = find_base(found, None, hub=hub)
        return found if below is None else stacked(found, below)
    if found.needs_base:
        raise InputError(
            f"the base {found.folder} is itself without a language model; pass the folder of a whole model as model_base"
        )
    return found


def named_base(info: CheckpointInfo) -> str:
    """The base model that a checkpoint's own files name, as a folder or hub repository."""
    what = "a LoRA adapter" if info.kind == "lora" else "a projector without a language model"
    if info.base_hint is None:
        raise InputError(f"{info.folder} is {what}; pass the folder of its base model as model_base (--model-base)")
    logger.info("%s is %s; its files name the base model %s", info.folder, what, info.base_hint)
    beside = base_on_disk(info)
    return info.base_hint if beside is None else str(beside)


def base_on_disk(info: CheckpointInfo) -> Path | None:
    """The folder of the base model that a checkpoint's files name, if it is on this disk.

    A run writes its base's absolute path, and the path relative to its own folder for folders that are moved together; other
    programs write what they were given.
    """
    if info.base_hint is None:
        return None
    relative = str(info.config.get("base_model_relative_path") or info.base_hint)
    places = (
        Path(info.base_hint),
        info.folder / relative,
        info.folder.parent / relative,
    )  # a checkpoint-N lies one deeper
    own = info.folder.resolve()
    return next((place for place in places if place.is_dir() and place.resolve() != own), None)


def over_base(info: CheckpointInfo, base: CheckpointInfo | None) -> CheckpointInfo:
    """Complete what `inspect` found by the base's config, where an adapter has none in the original layout."""
    if info.kind != "lora" or base is None or (info.config and not is_transformers_layout(info.config)):
        return info
    return replace(
        info, config=base.config, config_folder=base.config_folder, language_model=base.language_model,
        has_legacy_config=base.has_legacy_config,
    )  # fmt: skip


def stacked(adapter: CheckpointInfo, base: CheckpointInfo) -> CheckpointInfo:
    """An adapter and its base as the base of another adapter."""
    complete = over_base(adapter, base)
    return replace(
        base,
        config=complete.config,
        config_folder=complete.config_folder,
        language_model=complete.language_model,
        extras={**base.extras, **adapter.extras},
        adapters_below=(*base.adapters_below, complete),
    )


def with_config(
    info: CheckpointInfo, *, replaced: Mapping[str, Any] | None = None, changed: Mapping[str, Any] | None = None
) -> CheckpointInfo:
    """Give a checkpoint another config than its file: `replaced` whole, or with the keys of `changed`, of the original layout.

    Raises:
        InputError: A value has another type than its key.
    """
    for name, values in (("customized_config", replaced), ("overwrite_config", changed)):
        if values is not None and not (isinstance(values, Mapping) and all(isinstance(key, str) for key in values)):
            raise InputError(f"{name} is {values!r}; it must be an object with the keys of config.json")
    if replaced is None and not changed:
        return info
    packed = {key: info.config[key] for key in ("quantization_config",) if key in info.config}
    values = (
        original_config(info if replaced is None else replace(info, config=replaced)) | packed | dict(changed or {})
    )
    check_types(values, "the given config")
    return replace(info, config=values, language_model=language_model_type(values))


def original_config(info: CheckpointInfo) -> dict[str, Any]:
    """The config of a checkpoint in the original layout, whatever layout its file has."""
    values = dict(info.config)
    if is_transformers_layout(values):
        values = translate_config(values, folder=info.config_folder)
    if info.adapter_changes_tower:
        values["unfreeze_mm_vision_tower"] = True  # the merged tower is the checkpoint's own
    if info.adapter_changes_vocabulary:
        values["tie_word_embeddings"] = False
        values["vocab_size"] = max(int(values.get("vocab_size", 0)), info.adapter_vocabulary_size)
    return values
