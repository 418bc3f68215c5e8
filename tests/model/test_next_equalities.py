"""Equalities of models with tiles and videos: batch and rows, packed and padded, cached and not, engine and generate.

Also what layouts count: features of the model, of the prompt and of drawn boxes are the same number.
"""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from next_models import next_model
from PIL import Image
from torch import Tensor

from llava.conversation import conv_templates
from llava.engine.engine import Engine
from llava.engine.request import Request, SamplingParams
from llava.errors import InputError
from llava.images.feature_boxes import feature_boxes
from llava.images.layout import ImagePolicy, crop_split, plan, plan_images
from llava.images.video_layout import VideoPolicy, plan_video
from llava.model.config import ImageSettings
from llava.model.features import read_modalities
from llava.model.video import merge_frames
from llava.train.data import DataCollatorForSupervisedDataset, LazySupervisedDataset
from llava.train.packing import item_length

ONEVISION, VIDEO, LLAMA = "onevision-siglip28-qwen", "llava-video-siglip28-qwen", "llama3-next-clip28"
TEXT = [5, 6, 7]


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    random = torch.Generator().manual_seed(seed)
    values = torch.randint(0, 256, (height, width, 3), generator=random, dtype=torch.uint8)
    return Image.fromarray(values.numpy())


def frames(count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, 3, 28, 28, generator=torch.Generator().manual_seed(seed))


def tiles(name: str, image: Image.Image) -> Tensor:
    processor = next_model(name).processor
    assert processor is not None
    return processor.pixels([image], processor.plan([image.size]))[0]


def mixed(name: str) -> tuple[list[list[int]], list[Tensor], list[tuple[int, int]], list[str]]:
    """Rows with an image in many tiles, a text, a video, and a video beside an image."""
    wide, tall = noise(100, 40), noise(60, 170, 1)
    rows = [[5, -200, 8, 9], [5, 6, 7], [-200, 11], [5, -200, 6, -200, 7, 8]]
    images = [tiles(name, wide), frames(4), frames(3, 1), tiles(name, tall)]
    return rows, images, [wide.size, (28, 28), (28, 28), tall.size], ["image", "video", "video", "image"]


def padded(rows: list[list[int]]) -> tuple[Tensor, Tensor]:
    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    return ids, torch.tensor([[True] * len(row) + [False] * (width - len(row)) for row in rows])


@pytest.mark.parametrize("name", [ONEVISION, VIDEO, LLAMA])
def test_a_batch_equals_its_rows(name: str) -> None:
    model = next_model(name).model
    rows, images, sizes, kinds = mixed(name)
    ids, mask = padded(rows)
    options: dict[str, Any] = {"do_sample": False, "max_new_tokens": 4, "min_new_tokens": 4}
    together = model.generate(ids, attention_mask=mask, images=images, image_sizes=sizes, modalities=kinds, **options)
    first = 0
    for number, row in enumerate(rows):
        count = row.count(-200)
        own = slice(first, first + count)
        shown = {"images": images[own], "image_sizes": sizes[own], "modalities": kinds[own]} if count else {}
        first += count
        alone = model.generate(torch.tensor([row]), **shown, **options)
        assert torch.equal(alone[0], together[number])
        uncached = model.generate(torch.tensor([row]), use_cache=False, **shown, **options)
        assert torch.equal(alone, uncached)


@pytest.mark.parametrize("name", [ONEVISION, VIDEO])
def test_packed_equals_padded(name: str) -> None:
    model = next_model(name).model
    rows, images, sizes, kinds = mixed(name)
    ids, mask = padded(rows)
    labels = ids.masked_fill(~mask | (ids < 0), -100)
    given = {"attention_mask": mask, "labels": labels, "images": images, "image_sizes": sizes, "modalities": kinds}
    model.train()
    try:
        with torch.no_grad():
            losses = [model(ids, packed=packed, **given).loss.item() for packed in (False, True)]
    finally:
        model.eval()
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


@pytest.mark.parametrize("sizes", [((100, 40),), ((100, 40), (60, 170)), ((28, 28), (28, 28), (500, 400))])
@pytest.mark.parametrize(
    ("name", "changes"),
    [(ONEVISION, {}), (ONEVISION, {"image_aspect_ratio": "anyres_max_1"}), (LLAMA, {}),
     (ONEVISION, {"image_aspect_ratio": "pad"}),
     (ONEVISION, {"image_aspect_ratio": "highres", "image_grid_pinpoints": "28,56"}),
     (ONEVISION, {"mm_patch_merge_type": "spatial_unpad_nobase"}), (LLAMA, {"mm_patch_merge_type": "unpad_maxpool2x2"}),
     (LLAMA, {"image_aspect_ratio": "crop_split", "image_crop_resolution": 56, "image_split_resolution": 28})],
    ids=lambda value: value if isinstance(value, str) else "-".join(map(str, value.values())) or "published",
)  # fmt: skip
def test_the_engine_equals_generate(name: str, changes: dict[str, Any], sizes: tuple[tuple[int, int], ...]) -> None:
    loaded = next_model(name, **changes)
    assert loaded.processor is not None
    images = [noise(*size, seed=index) for index, size in enumerate(sizes)]
    ids = [token for _ in images for token in (-200, 8)] + TEXT
    inputs = loaded.processor.inputs(ids, images)
    options: dict[str, Any] = {"do_sample": False, "max_new_tokens": 5, "eos_token_id": None, "pad_token_id": 0}
    expected = loaded.model.generate(
        inputs.input_ids[None], images=inputs.images, image_sizes=inputs.image_sizes, **options
    )
    *_, embeds, _ = loaded.model.prepare_inputs_labels_for_multimodal(
        inputs.input_ids[None], None, None, None, None, inputs.images, inputs.image_sizes
    )
    assert embeds is not None
    assert embeds.shape[1] == inputs.num_tokens
    with Engine.from_loaded(loaded) as engine:
        params = SamplingParams(max_new_tokens=5, temperature=0, ignore_eos=True)
        result = engine.submit(Request(ids, images, params)).result()
    assert list(result.completions[0].token_ids) == expected[0].tolist()


def test_several_images_are_one_padded_tile_each() -> None:
    """As LLaVA-NeXT's training prepares them for models with anyres_max; one image alone is cut into tiles."""
    processor = next_model(ONEVISION).processor
    assert processor is not None
    images = [noise(100, 40), noise(60, 170, 1)]
    inputs = processor.inputs([-200, -200], images)
    assert [tuple(pixels.shape) for pixels in inputs.pixels] == [(1, 3, 28, 28)] * 2
    assert [layout.num_features for layout in inputs.layouts] == [50, 50]  # each ends with the newline
    square = Image.new("RGB", (100, 100), tuple(int(255 * value) for value in processor.image_processor.image_mean))
    square.paste(images[0], (0, 30))
    assert torch.equal(
        inputs.pixels[0][0], processor.image_processor.preprocess(square, return_tensors="pt").pixel_values[0]
    )
    assert len(processor.inputs([-200], images[:1]).pixels[0]) == 9
    assert len(next_model(LLAMA).processor.inputs([-200, -200], images).pixels[0]) == 4  # learned from tiles


POLICIES = [
    ImagePolicy(settings.mode, 28, 4, settings.pinpoints, settings.merge, max_tiles=settings.max_tiles, pools=settings.pools,
                keeps_overview=settings.keeps_overview, crop_split=crop_split(84, 28))
    for aspect in ("anyres", "anyres_max_4", "highres", "crop_split", "pad", "square")
    for merge in ("flat", "spatial", "spatial_unpad", "unpad_anyres_max", "spatial_unpad_nobase", "spatial_maxpool2x2",
                  "spatial_unpad_maxpool2x2_nobase")
    for settings in [ImageSettings.of(aspect, merge, "28,84" if aspect == "highres" else "(1x1),...,(6x6)")]
]  # fmt: skip


def test_boxes_are_as_many_as_features_and_lie_in_the_image() -> None:
    for policy in POLICIES:
        for size in ((28, 28), (100, 40), (40, 100), (500, 400), (37, 1), (1, 37), (60, 170)):
            for layout in (plan(size, policy), plan(size, policy, num_tiles=1), *plan_images([size, size], policy)):
                boxes = feature_boxes(layout, policy)
                assert len(boxes) == layout.num_features
                shown = [box for box in boxes if box is not None]
                side = max(size)
                assert all(-side <= box.left < box.right <= 2 * side for box in shown)
                if (
                    policy.merge == "spatial_unpad"
                    and layout.has_overview
                    and not layout.pools
                    and policy.mode == "anyres"
                ):
                    # Nothing but the image is left, to within a feature.
                    slack = max(max(box.right - box.left, box.bottom - box.top) for box in shown)
                    assert all(box.left > -slack and box.right < size[0] + slack for box in shown)


@pytest.mark.parametrize("pool", ["average", "max", "bilinear"])
@pytest.mark.parametrize("stride", [1, 2, 3, 4, 7])
def test_videos_are_reduced_by_the_stride_of_the_config(pool: Any, stride: int) -> None:
    """Against loops over windows; the original reduces by 2 whatever the config says."""
    policy = ImagePolicy("anyres", 28, 4, ((28, 28),), "spatial_unpad")
    features = torch.randn(2, 49, 8, generator=torch.Generator().manual_seed(0))
    layout = plan_video(2, policy, VideoPolicy(pool, stride, "no_token"))
    merged = merge_frames(features, layout, None, None)
    side = -(-7 // stride) if pool == "bilinear" else 7 // stride
    assert merged.shape == (2 * side * side, 8)
    if pool == "bilinear":
        return
    grid = features.view(2, 7, 7, 8)
    for frame in range(2):
        for row in range(side):
            for col in range(side):
                window = grid[frame, row * stride : (row + 1) * stride, col * stride : (col + 1) * stride].flatten(0, 1)
                wanted = window.mean(0) if pool == "average" else window.amax(0)
                torch.testing.assert_close(merged[frame * side * side + row * side + col], wanted)


def test_faster_videos() -> None:
    """Every third frame keeps its detail, the others are reduced twice as much, and each ends with the faster token."""
    policy = ImagePolicy("anyres", 28, 4, ((28, 28),), "spatial_unpad")
    newline, faster = torch.full((8,), 100.0), torch.full((8,), 200.0)
    features = torch.randn(5, 49, 8, generator=torch.Generator().manual_seed(0))
    video_policy = VideoPolicy("average", 2, "grid", slow_every=3)
    layout = plan_video(5, policy, video_policy)
    slow, fast = 3 * (3 + 1) + 1, 1 * (1 + 1) + 1
    assert layout.frame_lengths == [slow, fast, fast, slow, fast]
    merged = merge_frames(features, layout, newline, faster)
    assert len(merged) == layout.num_features == 2 * slow + 3 * fast
    assert layout.num_newlines == 2 * 3 + 3
    assert (merged == 100).all(-1).sum() == layout.num_newlines
    assert (merged == 200).all(-1).nonzero().flatten().tolist() == [12, 15, 18, 31, 34]
    plain = merge_frames(features, plan_video(5, policy, replace(video_policy, slow_every=None)), newline, faster)
    assert torch.equal(merged[:12], plain[:12])
    quarter = features[1].view(7, 7, 8)[:4, :4].flatten(0, 1).mean(0)
    torch.testing.assert_close(merged[13], quarter)
    with pytest.raises(InputError, match="mm_newline_position 'grid'"):
        plan_video(5, policy, VideoPolicy(newline="frame", slow_every=2))


def test_a_model_learns_the_faster_token() -> None:
    loaded = next_model(VIDEO)
    with pytest.raises(InputError, match="faster_token"):
        next_model(VIDEO, add_faster_video=True)
    assert not hasattr(loaded.model.get_model(), "faster_token")


def test_settings_of_videos_that_cannot_work() -> None:
    policy = ImagePolicy("anyres", 28, 4, ((28, 28),), "spatial")
    for position in ("grid", "frame"):
        with pytest.raises(InputError, match="image_newline"):
            plan_video(1, policy, VideoPolicy(newline=position))  # type: ignore[arg-type]
    assert plan_video(2, policy, VideoPolicy()).num_features == 2 * 16
    with pytest.raises(InputError, match="leaves nothing"):
        plan_video(1, policy, VideoPolicy("max", 8))
    with pytest.raises(InputError, match="0 frames"):
        plan_video(0, policy, VideoPolicy())
    for values in ({"stride": 0}, {"stride": True}, {"slow_every": 0}):
        with pytest.raises(InputError, match="whole number"):
            VideoPolicy(**values)


def test_modalities() -> None:
    assert (
        read_modalities(None, 2) == read_modalities(["image"], 2) == read_modalities("image", 2) == ["image", "image"]
    )
    assert read_modalities(["text", "video"], 1) == ["video"]
    assert read_modalities(["text", "video"], 2) == ["text", "video"]
    for given in (["video"], ["video", "image", "image"]):
        with pytest.raises(InputError, match="for 2 images and videos"):
            read_modalities(given, 2)


def test_entries_that_cannot_be_joined() -> None:
    model, ids = next_model(VIDEO).model, torch.tensor([[5, -200, -200, 6]])
    for second, said in (
        (frames(0), "video 2 of 2 has no frames"),
        (torch.zeros(1, 3, 56, 56), r"shape \[3, 56, 56\]"),
    ):
        with pytest.raises(InputError, match=said):
            model(ids, images=[frames(2), second], modalities=["video", "video"])


def test_the_last_arguments_in_either_order() -> None:
    model = next_model(VIDEO).model
    ids, clip, wide = torch.tensor([[5, -200, -200, 6]]), frames(2), noise(100, 40)
    images, sizes, kinds = [clip, tiles(VIDEO, wide)], [(28, 28), wide.size], ["video", "image"]
    with torch.no_grad():
        calls = [
            model.prepare_inputs_labels_for_multimodal(ids, None, None, None, None, images, *rest, **named)[4]
            for rest, named in (
                ((kinds, sizes), {}), ((sizes, kinds), {}),
                ((sizes,), {"modalities": kinds}), ((kinds,), {"image_sizes": sizes}),
                ((), {"image_sizes": torch.tensor(sizes), "modalities": tuple(kinds)}),
            )
        ]  # fmt: skip
        assert all(torch.equal(calls[0], other) for other in calls)
        one = model(ids[:, [0, 1, 3]], images=clip, modalities=["video"]).logits
        assert torch.equal(one, model(ids[:, [0, 1, 3]], images=[clip], modalities="video").logits)


def test_training_counts_what_the_model_makes(tmp_path: Path) -> None:
    """One image in tiles, several as one tile each, a text, and a small image: lengths of samples, alone and in batches."""
    loaded = next_model(ONEVISION)
    model, tokenizer = loaded.model, copy.deepcopy(loaded.tokenizer)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    for number, size in enumerate([(100, 40), (60, 170), (28, 28)]):
        noise(*size, seed=number).save(tmp_path / f"{number}.png")
    shown = {"a": "0.png", "b": ["0.png", "1.png"], "c": None, "d": "2.png"}
    records = []
    for name, image in shown.items():
        count = 0 if image is None else 1 if isinstance(image, str) else len(image)
        turns = [{"from": "human", "value": f"{'<image>' * count}\nWhat?"}, {"from": "gpt", "value": "That is it."}]
        records.append({"id": name, "conversations": turns} | ({"image": image} if image else {}))
    (tmp_path / "samples.json").write_text(json.dumps(records))
    settings = SimpleNamespace(
        image_folder=str(tmp_path), image_processor=loaded.image_processor, image_aspect_ratio="anyres_max_9",
        image_grid_pinpoints=model.config.image_grid_pinpoints, is_multimodal=True, mm_use_im_start_end=False,
        ends_with_newline=True,
    )  # fmt: skip
    samples = LazySupervisedDataset(
        str(tmp_path / "samples.json"), tokenizer, settings, conv=conv_templates["qwen_1_5"]
    )
    items = [samples[index] for index in range(len(samples))]
    lengths = [item_length(item, model.image_policy()) for item in items]
    assert len(set(lengths)) == 4
    collate = DataCollatorForSupervisedDataset(tokenizer)
    for rows in ([0], [1], [2], [3], [1, 2], [2, 3], [0, 1, 2, 3]):
        batch = collate([items[row] for row in rows])
        with torch.no_grad():
            logits = model(**batch).logits
            packed = model(**batch, packed=True)
        assert logits.shape[1] == max(lengths[row] for row in rows)
        assert packed.logits.shape[1] == sum(lengths[row] for row in rows)
