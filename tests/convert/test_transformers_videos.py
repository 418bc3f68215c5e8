"""LLaVA-OneVision and LLaVA-NeXT-Video of transformers' own and ours: logits of images and videos, pixels, prompts, answers.

transformers puts an id of `<image>` or `<video>` into the ids for every feature and refuses another number of them than its
model makes, so that these tests also compare the numbers of features.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPVisionConfig
from transformers_kit import (
    GENERATIONS,
    IMAGE_TOKEN,
    TOWER,
    VIDEO_TOKEN,
    save_peer,
    small_granite_vision,
    small_next_video,
    small_onevision,
    small_vipllava,
)

from llava.constants import IMAGE_TOKEN_INDEX
from llava.conversation import get_template
from llava.convert.convert import ConversionOptions, convert
from llava.convert.verify import hf_processor
from llava.engine import Engine, Request, SamplingParams
from llava.images.frames import Video
from llava.images.layout import plan_images
from llava.images.video_layout import plan_video
from llava.model.builder import load

Entry = tuple[int, int] | int  # the (width, height) of an image, or the number of a video's frames
SIDE = 28


def tiles(num: int, seed: int) -> torch.Tensor:
    return torch.randn(num, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))


def compare(peer: Any, ours: Any, rows: list[list[Entry]]) -> None:
    """Compare logits and losses of a batch; a row is a question with these images and videos between its words."""
    pixels, sizes, kinds, own_rows, their_rows = [], [], [], [], []
    their_images, their_videos, numbers = [], [], []
    for index, row in enumerate(rows):
        images = [entry for entry in row if not isinstance(entry, int)]
        layouts = iter(plan_images(images, ours.image_policy()))
        numbers.append(len(images))
        own, theirs = [1, 5 + index], [1, 5 + index]
        for entry in row:
            if isinstance(entry, int):
                count, token = plan_video(entry, ours.image_policy(), ours.video_policy()).num_features, VIDEO_TOKEN
                pixels.append(tiles(entry, seed=len(pixels)))
                their_videos.append(pixels[-1])
            else:
                layout, token = next(layouts), IMAGE_TOKEN
                count = layout.num_features
                pixels.append(tiles(layout.num_tiles, seed=len(pixels)))
                their_images.append((pixels[-1], entry))
            kinds.append("video" if isinstance(entry, int) else "image")
            sizes.append((SIDE, SIDE) if isinstance(entry, int) else entry)
            own += [IMAGE_TOKEN_INDEX, 9, 10 + index]
            theirs += [token] * count + [9, 10 + index]
        own_rows.append(own)
        their_rows.append(theirs)
    ids, mask = padded(their_rows)
    own_ids, own_mask = padded(own_rows)
    extra: dict[str, Any] = {}
    if their_images:
        most = max(len(image) for image, _ in their_images)
        extra["pixel_values"] = torch.stack(
            [torch.cat([image, image.new_zeros(most - len(image), *image.shape[1:])]) for image, _ in their_images]
        )
        extra["image_sizes"] = torch.tensor([(height, width) for _, (width, height) in their_images])
        if "Onevision" in type(peer).__name__:
            extra["batch_num_images"] = torch.tensor([number for number in numbers if number])
    if their_videos:
        extra["pixel_values_videos"] = torch.stack(their_videos)
    labels = torch.where((ids == IMAGE_TOKEN) | (ids == VIDEO_TOKEN) | (mask == 0), -100, ids)
    own_labels = torch.where((own_ids == IMAGE_TOKEN_INDEX) | (own_mask == 0), -100, own_ids)
    with torch.no_grad():
        theirs_out = peer(input_ids=ids, attention_mask=mask, labels=labels, **extra)
        mine = ours(
            own_ids, attention_mask=own_mask, labels=own_labels, images=pixels, image_sizes=sizes, modalities=kinds
        )
    assert theirs_out.logits.std() > 0.1  # the numbers say something
    torch.testing.assert_close(mine.logits[mask.bool()], theirs_out.logits[mask.bool()], atol=1e-4, rtol=0)
    torch.testing.assert_close(mine.loss, theirs_out.loss, atol=1e-4, rtol=0)


def padded(rows: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    return ids, torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])


# Square, wide, tall, tiny, and larger than nine tiles, whose features are reduced.
LAYOUTS: list[list[list[Entry]]] = [
    [[(28, 28)]],
    [[(130, 30)]],
    [[(30, 130)]],
    [[(3, 2)]],
    [[(200, 120)]],
    [[(168, 168)]],
    [[(500, 499)], [(20, 60)]],
]
TOGETHER: list[list[list[Entry]]] = [
    [[(100, 50), (20, 90)]],
    [[(100, 50), (20, 90), (28, 28)], [(300, 100)]],
    [[4]],
    [[3], [3]],
    [[2, (50, 90)], [(100, 50), 2]],
    [[(100, 50), 2, (20, 90)], [2]],
]


@pytest.mark.parametrize("rows", [*LAYOUTS, *TOGETHER], ids=str)
def test_onevision(tmp_path: Path, rows: list[list[Entry]]) -> None:
    peer = small_onevision()
    compare(peer, load(save_peer(tmp_path, peer), device="cpu").model, rows)


@pytest.mark.parametrize("rows", [*LAYOUTS, *TOGETHER], ids=str)
def test_next_video(tmp_path: Path, rows: list[list[Entry]]) -> None:
    peer = small_next_video()
    compare(peer, load(save_peer(tmp_path, peer), device="cpu").model, rows)


@pytest.mark.parametrize("generation", GENERATIONS)
@pytest.mark.parametrize("text", ["llama", "mistral", "qwen2"])
@pytest.mark.parametrize("make", [small_onevision, small_next_video])
def test_every_language_model_and_spelling(
    tmp_path: Path, make: Callable[..., Any], text: str, generation: str
) -> None:
    peer = make(text)
    compare(peer, load(save_peer(tmp_path, peer, generation), device="cpu").model, [[(60, 20)], [2]])


OTHERS: dict[str, Callable[[], Any]] = {
    "an odd number of features a side": lambda: small_onevision(patch=4),
    "one feature a tile": lambda: small_onevision(patch=14),
    "fewer tiles": lambda: small_onevision(vision_aspect_ratio="anyres_max_4"),
    "over CLIP": lambda: small_onevision(
        tower=CLIPVisionConfig(**TOWER, image_size=28, patch_size=7), vision_feature_select_strategy="default"
    ),
    "several layers": lambda: small_onevision(vision_feature_layer=[-3, 1, -1]),
    "frames by their largest features": lambda: small_next_video(spatial_pool_mode="max"),
    "frames of an odd side": lambda: small_next_video(patch=4),
    "another stride": lambda: small_next_video(spatial_pool_stride=4),
    "several layers before the pool": lambda: small_next_video(vision_feature_layer=[-2, 1]),
}


@pytest.mark.parametrize("case", OTHERS)
def test_other_settings(tmp_path: Path, case: str) -> None:
    peer = OTHERS[case]()
    compare(peer, load(save_peer(tmp_path, peer), device="cpu").model, [[(130, 30)], [3, (200, 120)], [3]])


# Files, pixels, answers


def image(width: int, height: int) -> Image.Image:
    across, down = np.meshgrid(np.arange(width), np.arange(height))
    return Image.fromarray(np.stack([across * 3 % 256, down * 5 % 256, (across + down) % 256], -1).astype(np.uint8))


def converted(folder: Path, make: Callable[..., Any]) -> Path:
    """A folder with all the files of such a checkpoint, as our conversion writes them."""
    convert(save_peer(folder / "peer", make()), folder / "ours", to="original")
    convert(folder / "ours", folder / "theirs", to="transformers", options=ConversionOptions(verification="tensors"))
    return folder / "theirs"


@pytest.mark.parametrize("is_nested", [False, True])
@pytest.mark.parametrize("make", [small_onevision, small_next_video, small_vipllava, small_granite_vision])
def test_pixels_and_ids_are_those_of_their_processor(tmp_path: Path, make: Callable[..., Any], is_nested: bool) -> None:
    """One image, several images and tiles; with the image processor's file as older versions write it, and as newer do."""
    folder = converted(tmp_path, make)
    processor = hf_processor(folder)
    if is_nested:
        inner = json.loads((folder / "preprocessor_config.json").read_text())
        outer = json.loads((folder / "processor_config.json").read_text())
        (folder / "processor_config.json").write_text(json.dumps(outer | {"image_processor": inner}))
        (folder / "preprocessor_config.json").unlink()
    ours = load(folder, device="cpu")
    assert ours.processor is not None
    given = [image(170, 130), image(40, 90), image(28, 28)]
    for images in (given[:1], given[1:2], given):
        content = [*({"type": "image"} for _ in images), {"type": "text", "text": "What?"}]
        prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        theirs = processor(text=prompt, images=[images], return_tensors="pt", add_special_tokens=True)
        mine = ours.processor(prompt, images)
        ids = theirs["input_ids"][0].tolist()
        token = processor.tokenizer.convert_tokens_to_ids("<image>")
        # Images may follow each other without a line between.
        assert ids.count(token) == sum(layout.num_features for layout in mine.layouts)
        assert [i for i in ids if i != token] == [i for i in mine.input_ids.tolist() if i != IMAGE_TOKEN_INDEX]
        assert mine.images is not None
        for pixels, expected in zip(mine.images, theirs["pixel_values"], strict=True):
            several = pixels if pixels.ndim == 4 else pixels[None]
            expected = expected if expected.ndim == 4 else expected[None]
            torch.testing.assert_close(several, expected[: len(several)], atol=1e-5, rtol=0)
            assert not expected[len(several) :].any()  # what fills a batch


@pytest.mark.parametrize("make", [small_onevision, small_next_video, small_vipllava])
def test_the_engine_answers_as_generate_does(tmp_path: Path, make: Callable[..., Any]) -> None:
    ours = load(converted(tmp_path, make), device="cpu")
    assert ours.processor is not None
    questions = []
    shown = [[image(170, 130)], [image(40, 90), image(28, 28)], []]
    if make is not small_vipllava:
        clip = Video(tuple(image(60 + 10 * step, 50) for step in range(3)))
        shown += [[clip], [image(40, 90), clip]]
    for images in shown:
        conversation = get_template(ours.conv_mode)
        conversation.append_message(conversation.roles[0], "<image>\n" * len(images) + "What?")
        conversation.append_message(conversation.roles[1], None)
        questions.append((conversation, images))
    sampling = SamplingParams(temperature=0, max_new_tokens=8, min_new_tokens=8)
    with Engine.from_loaded(ours) as engine:
        results = engine.generate([Request(asked, images, sampling) for asked, images in questions])
    for (asked, images), result in zip(questions, results, strict=True):
        inputs = ours.processor(asked, images)
        expected = ours.model.generate(
            inputs.input_ids[None], images=inputs.images if images else None, image_sizes=inputs.image_sizes,
            modalities=inputs.modalities, do_sample=False, max_new_tokens=8, min_new_tokens=8,
        )  # fmt: skip
        assert list(result.completions[0].token_ids) == expected[0].tolist()
