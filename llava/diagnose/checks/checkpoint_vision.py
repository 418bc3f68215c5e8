"""Checks of a checkpoint's vision side: settings, tower, pixels, tiles, projector, from headers and configs alone.

In: an `ExaminedCheckpoint` whose files can be read. Out: findings. Three widths have to agree: that of the tower's features,
mm_hidden_size, and the input width of the stored projector. The one that differs from the other two is reported as wrong.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from llava.diagnose.checks.checkpoint_files import ExaminedCheckpoint, set_in_json
from llava.diagnose.checks.findings import CheckSkipped, DoctorFinding, found, reported
from llava.errors import InputError
from llava.files import read_json
from llava.images.layout import TileRange, image_mode, merge_type, read_pinpoints
from llava.model.checkpoints.hub import HubOptions, looks_like_repository, resolve_vision_tower
from llava.model.checkpoints.inspect import TOWER_INFIX
from llava.model.checkpoints.weight_files import TensorHeader
from llava.model.config import OWN_FOLDER, check_projector_type, check_tower_type
from llava.model.multimodal_encoder.clip_encoder import CLIPVisionTower
from llava.model.multimodal_projector.builder import MLP_NAME

PROJECTOR_TENSOR = re.compile(r"(?:.*\.)?mm_projector\.(?:(\d+)\.)?weight")


def check_settings(checkpoint: ExaminedCheckpoint) -> Iterator[DoctorFinding]:
    """Check the values of config.json that this package reads, each by itself."""
    values = checkpoint.values
    readings: tuple[tuple[str, str, Callable[[Any], object]], ...] = (
        ("image-mode", "image_aspect_ratio", image_mode),
        ("pinpoints", "image_grid_pinpoints", partial(_read_pinpoints, values.get("image_aspect_ratio"))),
        ("image-mode", "mm_patch_merge_type", lambda name: merge_type(name or "flat")),
    )
    faults: list[DoctorFinding] = []
    for code, key, read in readings:
        try:
            read(values.get(key))
        except InputError as error:
            faults.append(found(code, str(error), f"set {key} as in training", value=values.get(key)))
    if faults:
        yield from faults
        return
    with reported("config-value", "set it as in training", file="config.json"):
        settings = checkpoint.settings
    if settings.padding_side not in ("left", "right"):
        yield found(
            "padding-side",
            f"tokenizer_padding_side is {settings.padding_side!r}; known: left, right",
            "set it to right, as training does",
            fix=set_in_json("config.json", tokenizer_padding_side="right"),
            value=settings.padding_side,
        )
    limit, positions = settings.max_length, values.get("max_position_embeddings")
    stretched = values.get("rope_scaling") or (values.get("rope_parameters") or {}).get("factor")
    if limit and positions and limit > positions and not stretched:
        yield found(
            "context-positions",
            f"tokenizer_model_max_length is {limit}, but the language model has {positions} positions",
            f"set tokenizer_model_max_length to {positions} or less",
            fix=set_in_json("config.json", tokenizer_model_max_length=positions),
            tokenizer_model_max_length=limit,
            max_position_embeddings=positions,
        )


def check_tower(checkpoint: ExaminedCheckpoint) -> Iterator[DoctorFinding]:
    """Check that the tower exists, is of a known kind, and has the selected layer; keep it for later checks."""
    vision = checkpoint.settings.vision
    if vision.tower is None:
        return
    view = checkpoint.view
    if vision.tower != OWN_FOLDER:
        try:
            folder = _tower_folder(checkpoint)
        except InputError as error:
            if looks_like_repository(vision.tower):
                raise CheckSkipped(f"the tower {vision.tower} is a hub repository and not on this disk") from error
            remedy = "set mm_vision_tower to the tower's folder or hub repository"
            yield found("tower-missing", str(error), remedy, mm_vision_tower=vision.tower)
            return
        with reported("tower-missing", "copy the tower's config.json again", mm_vision_tower=folder):
            described = read_json(Path(folder) / "config.json")
        view.mm_vision_tower = folder
    else:
        described = checkpoint.values.get("vision_config") or {}
    yield from _tower_parts(checkpoint, view, described)


def _tower_folder(checkpoint: ExaminedCheckpoint) -> str:
    """Find the folder where loading would (an adapter's config is a copy of its base's), without the network."""
    name = str(checkpoint.settings.vision.tower)
    folders = [checkpoint.folder] + ([checkpoint.base.folder] if checkpoint.base is not None else [])
    beside = next((folder for folder in folders if (folder / name / "config.json").is_file()), folders[0])
    return resolve_vision_tower(name, checkpoint_folder=beside, hub=HubOptions(local_files_only=True))


def _tower_parts(
    checkpoint: ExaminedCheckpoint, view: SimpleNamespace, described: dict[str, Any]
) -> Iterator[DoctorFinding]:
    from llava.images.image_processor import ClipImageProcessor
    from llava.model.multimodal_encoder.builder import build_vision_tower

    kind = str(described.get("model_type"))
    with reported("tower-type", "name another tower in mm_vision_tower", model_type=kind):
        check_tower_type(kind, checkpoint.settings.vision.tower)
    place = view.mm_vision_tower if view.mm_vision_tower != OWN_FOLDER else checkpoint.info.config_folder
    with reported("preprocessor", COPY_PREPROCESSOR, mm_vision_tower=view.mm_vision_tower):
        ClipImageProcessor.from_pretrained(place, vision_config=described)
    with reported("config-value", "set s2_scales to what the model was trained with"):  # if they do not fit the tower
        tower = build_vision_tower(view, delay_load=True)
    checkpoint.extras["tower"] = tower
    states = tower.num_layers + 1
    layers = [tower.select_layer] if isinstance(tower.select_layer, int) else tower.select_layer
    if not all(-states <= layer < states for layer in layers):
        yield found(
            "select-layer",
            f"mm_vision_select_layer is {tower.select_layer}, but the tower has {states} hidden states",
            f"set it to what the projector was trained with (-2 in LLaVA-1.5), between -{states} and {states - 1}",
            mm_vision_select_layer=tower.select_layer,
            hidden_states=states,
        )
    settings = checkpoint.settings
    if settings.vision.in_checkpoint and not any(TOWER_INFIX in name for name in checkpoint.tensors):
        folder = Path(view.mm_vision_tower)
        if not any(folder.glob("*.safetensors")) and not any(folder.glob("*.bin")):
            yield found(
                "tower-weights",
                f"unfreeze_mm_vision_tower says that the tower was trained, but neither the checkpoint nor {folder} holds "
                "its weights",
                "copy the weight file with the tower's tensors (model.vision_tower...) into the checkpoint",
                tensors=0,
            )


def tower_of(checkpoint: ExaminedCheckpoint) -> CLIPVisionTower:
    """Return the tower that `check_tower` built, without weights."""
    if "tower" not in checkpoint.extras:
        raise CheckSkipped("it is a language model without a vision tower")
    return checkpoint.extras["tower"]


COPY_PREPROCESSOR = "copy preprocessor_config.json from the tower's own repository"


def check_pixels(checkpoint: ExaminedCheckpoint) -> Iterator[DoctorFinding]:
    """Check the size and the range of the pixels that the image processor makes of a black and a white image."""
    from PIL import Image

    tower = tower_of(checkpoint)
    processor, side = tower.image_processor, tower.tile_size
    name = checkpoint.settings.vision.tower
    file = f"{name}/preprocessor_config.json" if name != OWN_FOLDER else "preprocessor_config.json"
    is_inside = (checkpoint.folder / file).is_file()
    images = [Image.new("RGB", (side, side), colour) for colour in ("black", "white")]
    with reported("preprocessor", COPY_PREPROCESSOR):
        pixels = processor.preprocess(images, return_tensors="np")["pixel_values"]
    if pixels.shape[-2:] != (side, side):
        key = {"shortest_edge": side} if "shortest_edge" in processor.size else {"height": side, "width": side}
        fix = set_in_json(file, size=key, crop_size={"height": side, "width": side})
        yield found(
            "preprocessor",
            f"the image processor makes {pixels.shape[-1]}x{pixels.shape[-2]} pixels, and the tower takes {side}x{side}",
            f"set size and crop_size of {file} to {side}",
            fix=fix if is_inside else None,
            pixels=list(pixels.shape[-2:]),
            tower_image_size=side,
        )
        return
    lowest, highest = float(pixels.min()), float(pixels.max())
    if not (-4 < lowest < -0.5 and 0.5 < highest < 4):
        yield found(
            "preprocessor",
            f"black becomes {lowest:.4g} and white {highest:.4g}; towers are trained on about -2 to 2",
            f"set do_rescale, rescale_factor, do_normalize, image_mean and image_std of {file} as the tower's repository "
            "has them",
            black=lowest,
            white=highest,
        )


def _read_pinpoints(aspect_ratio: str | None, value: Any) -> object:
    return read_pinpoints(value, "highres" if aspect_ratio == "highres" else "anyres")


def check_tiles(checkpoint: ExaminedCheckpoint) -> Iterator[DoctorFinding]:
    """Check the pinpoints against the tower, and the stored newline against the settings."""
    from llava.model.multimodal_encoder.builder import policy_of

    tower, image = tower_of(checkpoint), checkpoint.settings.image
    remedy = f"use pairs of multiples of {tower.tile_size}, those that the model was trained with"
    pinpoints = (
        str(image.pinpoints) if isinstance(image.pinpoints, TileRange) else [list(size) for size in image.pinpoints]
    )
    with reported("pinpoints", remedy, tile_size=tower.tile_size, pinpoints=pinpoints):
        checkpoint.extras["policy"] = policy_of(tower, image)
    newline = checkpoint.named("image_newline")
    if newline is not None and image.merge != "spatial_unpad":
        yield found(
            "image-mode",
            "the weights hold image_newline, which training with spatial_unpad learns, but config.json says "
            f"image_aspect_ratio {image.aspect_ratio!r} and mm_patch_merge_type {image.merge!r}",
            "set image_aspect_ratio (anyres) and mm_patch_merge_type (spatial_unpad) as in training, with its pinpoints",
            image_newline=list(newline.shape),
            image_aspect_ratio=image.aspect_ratio,
            mm_patch_merge_type=image.merge,
        )
    if newline is None and image.merge == "spatial_unpad":
        yield found(
            "newline-missing",
            "mm_patch_merge_type is spatial_unpad, which ends each row of features with image_newline, and no weight file "
            "holds that tensor",
            "set mm_patch_merge_type to what the model was trained with, or copy the file that holds image_newline",
            mm_patch_merge_type=image.merge,
        )


def stored_projector(tensors: dict[str, TensorHeader]) -> dict[int, TensorHeader]:
    """Return the weights of the projector's linear layers by index; a single linear layer has index 0."""
    found_at = {name: PROJECTOR_TENSOR.fullmatch(name) for name in tensors}
    return {int(match[1] or 0): tensors[name] for name, match in sorted(found_at.items()) if match}


def check_projector(checkpoint: ExaminedCheckpoint) -> Iterator[DoctorFinding]:
    settings = checkpoint.settings
    tower = checkpoint.extras.get("tower")
    if settings.vision.tower is None:
        raise CheckSkipped("it is a language model without a vision tower")
    if settings.projector.type == "identity":
        raise CheckSkipped("an identity projector has no weights")
    yield from judge_projector(
        stored_projector(checkpoint.tensors),
        kind=settings.projector.type,
        config_width=settings.projector.vision_dim,
        tower_width=tower.hidden_size if tower is not None else None,
        text_width=settings.projector.text_dim or checkpoint.values.get("d_model"),
        place=str(checkpoint.folder),
    )


def judge_projector(
    layers: dict[int, TensorHeader],
    *,
    kind: str,
    config_width: int | None,
    tower_width: int | None,
    text_width: int | None,
    place: str,
) -> Iterator[DoctorFinding]:
    """Check a projector's stored layers, headers by index, against config (`kind`, `config_width`), tower and language model.

    `tower_width` is None if there is no tower to compare with; `place` says in messages where the layers are stored.
    """
    if not layers:
        yield found(
            "projector-missing",
            f"{place} has no tensor mm_projector...; without its projector the model cannot see",
            "copy the weight file that holds it (mm_projector.bin of a pretraining run, non_lora_trainables.bin of a LoRA run)",
            mm_projector_type=kind,
            tensors=0,
        )
        return
    empty = [header for header in layers.values() if header.num_elements == 0]
    if empty:
        yield found(
            "projector-empty",
            f"{empty[0].file} holds {empty[0].name} with the shape {list(empty[0].shape)}, without numbers; saving under "
            "ZeRO-3 without gathering the weights leaves such tensors",
            "save it again with llava train, which gathers such tensors; or take it from a checkpoint by DeepSpeed's "
            "zero_to_fp32.py",
            shapes={header.name: list(header.shape) for header in empty},
        )
        return
    other = [header for header in layers.values() if len(header.shape) != 2]
    if other:
        yield found(
            "projector-type",
            f"{other[0].file} holds {other[0].name} with the shape {list(other[0].shape)}, which is no linear layer (a "
            f"norm has one dimension, a convolution four): mm_projector_type is {kind!r}, whose layers are all linear",
            "register the projector's type (docs/extend.md), or take the projector that belongs to this config.json",
            mm_projector_type=kind,
            shapes={header.name: list(header.shape) for header in other},
        )
        return
    remedy = f"set it to {_kind_of(layers)}, as the stored layers are"
    fix = set_in_json("config.json", mm_projector_type=_kind_of(layers))
    with reported("projector-type", remedy, fix=fix, mm_projector_type=kind, stored_layers=len(layers)):
        check_projector_type(kind)
        match = MLP_NAME.fullmatch(kind)
        if (int(match[2]) if match else 1) != len(layers):
            raise InputError(f"mm_projector_type is {kind!r}, and {len(layers)} linear layers are stored")
    takes, gives = layers[min(layers)].shape[1], layers[max(layers)].shape[0]
    yield from _judge_widths(takes, config_width, tower_width)
    if text_width is not None and gives != text_width:
        yield found(
            "projector-other-model",
            f"the projector gives features of width {gives}, and the language model is {text_width} wide: it was trained for "
            "another language model",
            "use the projector that was pretrained with this language model, or pretrain one",
            projector_out=gives,
            hidden_size=text_width,
        )


def _judge_widths(takes: int, config_width: int | None, tower_width: int | None) -> Iterator[DoctorFinding]:
    numbers: dict[str, Any] = {"projector_in": takes, "mm_hidden_size": config_width, "tower_width": tower_width}
    if tower_width in (None, takes):
        if config_width != takes:
            yield found(
                "config-width",
                f"mm_hidden_size is {config_width}, but the projector takes {takes}"
                + (" and the tower gives as many" if tower_width else ""),
                f"set mm_hidden_size to {takes}",
                fix=set_in_json("config.json", mm_hidden_size=takes),
                **numbers,
            )
        return
    yield found(
        "projector-width",
        f"the tower gives features of width {tower_width}, and the projector takes {takes}: it was trained with another tower",
        f"set mm_vision_tower to the tower of width {takes} that it was trained with, or pretrain a projector for this one",
        **numbers,
    )


def _kind_of(layers: dict[int, TensorHeader]) -> str:
    """Return the mm_projector_type of the stored layers."""
    named_alone = any(header.name.endswith("mm_projector.weight") for header in layers.values())
    return "linear" if named_alone else f"mlp{len(layers)}x_gelu"
