"""The question and the image that checks ask a model; the image is drawn, so that no file is needed.

In: perhaps a loaded model. Out: an image, or the model's inputs for a question about images.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL import Image

    from llava.conversation import Conversation
    from llava.model.builder import LoadedModel
    from llava.processor import ModelInputs

QUESTION = "What is in this picture?"


def sample_image(*, inverted: bool = False) -> Image.Image:
    """Draw coloured shapes on white, or the negative of that image (320 x 240 pixels)."""
    from PIL import Image, ImageChops, ImageDraw

    image = Image.new("RGB", (320, 240), "white")
    pen = ImageDraw.Draw(image)
    pen.ellipse((20, 20, 150, 150), fill="red")
    pen.rectangle((180, 60, 300, 200), fill="blue")
    pen.polygon([(60, 230), (120, 160), (170, 230)], fill="green")
    return ImageChops.invert(image) if inverted else image


def prepare_question(
    loaded: LoadedModel, question: str, images: Sequence[Image.Image]
) -> tuple[Conversation, ModelInputs]:
    """Build a conversation about images (none without a vision tower) in the model's template, and the inputs for it."""
    from llava.conversation import get_template, with_image_placeholders
    from llava.processor import Processor

    processor = loaded.processor or Processor(loaded.tokenizer)
    images = images if loaded.processor is not None else []
    conversation = get_template(loaded.conv_mode)
    conversation.messages = []
    question = with_image_placeholders(question, len(images), processor.image_placeholder)
    conversation.append_message(conversation.roles[0], question)
    conversation.append_message(conversation.roles[1], None)
    return conversation, processor(conversation, images)
