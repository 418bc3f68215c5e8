"""Conversations and images to model inputs: marks, labels, layouts, and the room that a prompt takes."""

from __future__ import annotations

import pytest
import torch
from golden_data import golden
from PIL import Image

from llava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava.conversation import get_template
from llava.errors import InputError
from llava.images.image_processor import ClipImageProcessor
from llava.images.layout import ImagePolicy, ImageSize
from llava.mm_utils import tokenizer_image_token
from llava.processor import Processor
from llava.text.tokenization import load_tokenizer

PINPOINTS = tuple(ImageSize(*size) for size in ((28, 56), (56, 28), (56, 56)))


def processor(mode: str, *, use_im_start_end: bool = False) -> Processor:
    merge = "spatial_unpad" if mode == "anyres" else "flat"
    policy = ImagePolicy(mode, 28, 14, pinpoints=PINPOINTS, merge=merge)
    pixels = ClipImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    tokenizer = load_tokenizer(golden("tokenizers/llama-mini1k-legacy"))
    return Processor(tokenizer, pixels, policy, use_im_start_end=use_im_start_end)


def conversation(*messages: str | None):
    conv = get_template("v1")
    for index, message in enumerate(messages):
        conv.append_message(conv.roles[index % 2], message)
    return conv


@pytest.mark.parametrize(
    ("mode", "shapes"),
    [("square", [(3, 28, 28)] * 2), ("pad", [(3, 28, 28)] * 2), ("anyres", [(3, 3, 28, 28), (5, 3, 28, 28)])],
)
def test_inputs_agree_with_each_other(mode, shapes):
    images = [Image.new("RGB", (40, 20), "red"), Image.new("L", (50, 50), 90)]
    make = processor(mode)
    conv = conversation("<image>\nFirst?", "One.", "<image>\nSecond?", None)
    inputs = make(conv, images)
    assert inputs.input_ids.tolist() == tokenizer_image_token(conv.get_prompt(), make.tokenizer)
    assert inputs.labels is None
    assert inputs.image_sizes == [(40, 20), (50, 50)]
    assert [tuple(pixels.shape) for pixels in inputs.pixels] == shapes
    assert [layout.num_tiles for layout in inputs.layouts] == [shape[0] if len(shape) == 4 else 1 for shape in shapes]
    features = sum(layout.num_features for layout in inputs.layouts)
    assert inputs.num_image_tokens == features
    assert inputs.num_tokens == int((inputs.input_ids != IMAGE_TOKEN_INDEX).sum()) + features
    assert isinstance(inputs.images, list) == (mode == "anyres")
    if mode != "anyres":
        assert inputs.images.shape == (2, 3, 28, 28)
        assert features == 2 * (28 // 14) ** 2


def test_labels_are_made_on_request():
    make = processor("pad")
    inputs = make(conversation("<image>\nWhat?", "A cat."), [Image.new("RGB", (9, 9))], with_labels=True)
    trained = inputs.labels[inputs.labels != IGNORE_INDEX]
    assert make.tokenizer.decode(trained).split() == ["A", "cat.</s>"]
    assert torch.equal(trained, inputs.input_ids[inputs.labels != IGNORE_INDEX])


def test_text_alone_has_no_images():
    inputs = processor("anyres")("Just text.", [])
    assert (inputs.images, inputs.layouts, inputs.num_tokens) == (None, [], len(inputs.input_ids))


@pytest.mark.parametrize(("prompt", "num_images"), [("<image> and <image>", 1), ("none", 2), ("<image>", 0)])
def test_marks_and_images_must_match(prompt, num_images):
    with pytest.raises(InputError, match=f"{prompt.count('<image>')} <image> placeholders? for {num_images} image"):
        processor("pad")(prompt, [Image.new("RGB", (9, 9))] * num_images)


def test_a_processor_without_policy_says_so():
    make = processor("pad")
    bare = Processor(make.tokenizer, make.image_processor)
    assert len(bare("text", []).input_ids)
    with pytest.raises(InputError, match="policy="):
        bare("<image>", [Image.new("RGB", (9, 9))])


def test_image_placeholder():
    assert processor("pad").image_placeholder == "<image>"
    assert processor("pad", use_im_start_end=True).image_placeholder == "<im_start><image><im_end>"
