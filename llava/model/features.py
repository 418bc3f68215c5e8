"""Turn the encoded tiles and frames of a batch into one sequence of features per image or video.

In: features per tile, what each entry of a batch is ("image", "video", "text"), sizes and policies. Out: one (n, D) tensor per
entry. The features of one image are merged in merge.py, those of one video in video.py; layouts are planned in images/.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

from torch import Tensor

from llava.errors import InputError
from llava.images.layout import ImagePolicy, plan
from llava.images.video_layout import VideoPolicy, plan_video
from llava.model.merge import merge_tiles, with_newline_in_graph
from llava.model.video import merge_frames

MODALITIES = ("image", "video", "text")
_PARTS = {"image": "tiles", "video": "frames", "text": "tiles"}

Pixels: TypeAlias = Tensor | Sequence[Tensor] | None
Sizes: TypeAlias = Sequence[Sequence[int]] | None
Modalities: TypeAlias = Sequence[str] | str | None


class VisionInputs(NamedTuple):
    """What a batch shows: pixels of images and videos, in the order of their placeholders.

    `images` is a batch (N, 3, H, W) of single tiles; or a list of (tiles, 3, H, W) or (F, 3, H, W), or a tensor of such.
    `sizes` are (width, height) of images. `modalities` has a name of `MODALITIES` for each entry; None where all are images.
    """

    images: Pixels
    sizes: Sizes
    modalities: Modalities


class LearnedEnds(NamedTuple):
    """The learned features (D,) that end rows, images and frames, where a model has them."""

    newline: Tensor | None
    faster_token: Tensor | None


def read_modalities(modalities: Modalities, num_entries: int) -> list[str]:
    """Name the modality of each of `num_entries` images and videos.

    Callers of LLaVA-NeXT pass one name for a row, with "text" for a row that shows nothing, and leave `["image"]` whatever
    the number of images.

    Raises:
        InputError: A name is unknown, or it is not clear which entries are videos.
    """
    names = [modalities] if isinstance(modalities, str) else list(modalities or ())
    unknown = [name for name in names if name not in MODALITIES]
    if unknown:
        raise InputError(f"modalities has {unknown[0]!r}; known: {', '.join(MODALITIES)}")
    if "video" not in names:
        return ["image"] * num_entries
    if len(names) != num_entries:
        names = [name for name in names if name != "text"]
    if len(names) > num_entries and set(names) == {"video"}:  # one for each frame, as VLMEvalKit names them
        names = names[:num_entries]
    if len(names) != num_entries:
        raise InputError(
            f"modalities has {len(names)} entries for {num_entries} images and videos; give one for each, in the order of the "
            "<image> placeholders"
        )
    return names


def read_positional(
    images: Pixels, rest: Sequence[Modalities | Sizes], modalities: Modalities, sizes: Sizes
) -> VisionInputs:
    """Tell apart the last arguments of `prepare_inputs_labels_for_multimodal`, by what they hold.

    LLaVA has `image_sizes` as its seventh argument, LLaVA-NeXT has `modalities` there and `image_sizes` behind.
    """
    for given in rest:
        if isinstance(given, str) or (given is not None and len(given) and isinstance(given[0], str)):
            modalities = given  # type: ignore[assignment]
        elif given is not None:
            sizes = given  # type: ignore[assignment]
    return VisionInputs(images, sizes, modalities)


def split_entries(images: Tensor | Sequence[Tensor], modalities: Modalities) -> tuple[Tensor | list[Tensor], list[str]]:
    """The tiles of a batch, and the modality of each entry.

    A batch (N, 3, H, W) of single tiles stays one tensor, unless it is a video; anything else becomes a list of
    (tiles, 3, H, W). One video may be given as the batch of its frames.
    """
    is_batch = isinstance(images, Tensor) and images.ndim == 4
    if is_batch and modalities in ("video", ["video"]):
        return [images], ["video"]  # type: ignore[list-item]
    kinds = read_modalities(modalities, len(images))
    if isinstance(images, Tensor) and is_batch and "video" not in kinds:
        return images, kinds
    tiles = [image[None] if image.ndim == 3 else image for image in images]
    for number, entry in enumerate(tiles):
        if not len(entry):
            raise InputError(
                f"{kinds[number]} {number + 1} of {len(tiles)} has no {_PARTS[kinds[number]]}; leave it out"
            )
        if entry.shape[1:] != tiles[0].shape[1:]:
            raise InputError(
                f"{kinds[number]} {number + 1} of {len(tiles)} has pixels of the shape {list(entry.shape[1:])}, and the first "
                f"has {list(tiles[0].shape[1:])}; all are given as the model's image processor makes them"
            )
    return tiles, kinds


def merge_features(
    per_entry: Sequence[Tensor],
    kinds: Sequence[str],
    sizes: Sizes,
    policy: ImagePolicy,
    video_policy: VideoPolicy,
    ends: LearnedEnds,
) -> list[Tensor]:
    """Merge the features of each image or video, (tiles, P, D) or (F, P, D) -> (n, D).

    Args:
        kinds: The modality of each entry.
        sizes: (width, height) of each entry, needed where an image's tiles are merged by position.
    """
    by_position = policy.merge != "flat" and any(
        kind != "video" and len(tiles) > 1 for kind, tiles in zip(kinds, per_entry, strict=True)
    )
    if by_position and (sizes is None or len(sizes) != len(per_entry)):
        given = "none" if sizes is None else len(sizes)
        raise InputError(
            f"mm_patch_merge_type {policy.merge!r} needs image_sizes for {len(per_entry)} images, got {given}"
        )
    merged, ends_used = [], False
    for index, (tiles, kind) in enumerate(zip(per_entry, kinds, strict=True)):
        if kind == "video":
            video = plan_video(len(tiles), policy, video_policy)
            if video.fast_grid is not None and ends.faster_token is None:
                raise InputError(
                    "add_faster_video needs the model's faster_token, which this model was not trained with; leave it false"
                )
            merged.append(merge_frames(tiles, video, *ends))
            ends_used |= video.num_newlines > 0
        elif policy.merge == "flat":
            merged.append(tiles.flatten(0, 1))
        else:
            size = sizes[index] if sizes is not None and len(tiles) > 1 else (policy.tile_size, policy.tile_size)
            layout = plan(size, policy, num_tiles=len(tiles))
            merged.append(merge_tiles(tiles, layout, ends.newline))
            ends_used |= layout.num_newlines > 0
    return with_newline_in_graph(with_newline_in_graph(merged, None if ends_used else ends.newline), ends.faster_token)
