"""Greedy tokens of this package's own model, for the comparisons with other programs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from PIL import Image

from llava.conversation import get_template
from llava.model.builder import LoadedModel
from llava.processor import ModelInputs


def greedy_answer(loaded: LoadedModel, question: str, image: Path, num_tokens: int) -> tuple[ModelInputs, Any, str]:
    """Return the inputs, the output of `generate` (with logits), and the text of a prompt with an image."""
    assert loaded.processor is not None
    conversation = get_template(loaded.conv_mode)
    conversation.append_message(conversation.roles[0], f"{loaded.processor.image_placeholder}\n{question}")
    conversation.append_message(conversation.roles[1], None)
    inputs = loaded.processor(conversation, [Image.open(image)])
    output = loaded.model.generate(
        inputs.input_ids[None], images=inputs.images, image_sizes=inputs.image_sizes, do_sample=False,
        max_new_tokens=num_tokens, output_logits=True, return_dict_in_generate=True,
    )  # fmt: skip
    return inputs, output, conversation.get_prompt()
