"""Encode samples as a model's training would, without its weights: ids, labels, and the tokens of each image.

In: a model folder, of which only the config and the tokenizer are read. Out: `SampleReader`, for programs that inspect
data (check.py, show.py). Ids and labels are those of training, since both come from text/labels.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

from llava.constants import IMAGE_TOKEN_INDEX
from llava.conversation import Conversation, conv_templates, get_template
from llava.data.formats import Sample, media_sources
from llava.errors import InputError
from llava.images.layout import ImagePolicy, plan_images
from llava.text.labels import Source, encode_spans, preprocess_multimodal, sample_spans
from llava.text.tokenization import Tokenizer, encode_with_offsets


@dataclass(frozen=True)
class EncodedSample:
    """A sample as tokens. `ends` has, for each token, the offset in `text` behind its last character."""

    text: str
    ids: list[int]
    labels: list[int]
    ends: list[int]


@dataclass(frozen=True)
class SampleReader:
    """The parts of a model that decide how a sample is encoded."""

    tokenizer: Tokenizer
    policy: ImagePolicy | None  # None: a model without a vision tower
    conv: Conversation
    max_length: int
    use_im_start_end: bool = False
    conv_mode: str = ""  # the name of `conv`, as --version takes it

    def read(self, sample: Sample) -> EncodedSample:
        images = media_sources(sample)
        turns: Sequence[Source] = [sample["conversations"]]
        if images:
            settings = SimpleNamespace(is_multimodal=True, mm_use_im_start_end=self.use_im_start_end)
            turns = preprocess_multimodal(turns, settings, conv=self.conv, move_placeholders=len(images) == 1)
        spans = sample_spans(turns[0], self.conv)
        text = "".join(span.text for span in spans)
        image_id = IMAGE_TOKEN_INDEX if images else None
        ids, labels = encode_spans(spans, self.tokenizer, image_token_index=image_id)
        _, offsets = encode_with_offsets(text, self.tokenizer, image_id)
        ends = [0] * len(offsets)
        for index, offset in enumerate(offsets):
            ends[index] = offset + 1 if offset >= 0 else (ends[index - 1] if index else 0)
        return EncodedSample(text, ids, labels, ends)

    def image_tokens(self, sizes: Sequence[tuple[int, int]]) -> list[int]:
        """The number of tokens of each image."""
        if not sizes:
            return []
        if self.policy is None:
            raise InputError("this model has no vision tower, so it takes no images")
        return [layout.num_features for layout in plan_images(sizes, self.policy)]


def read_model(path: str | Path, *, conv_mode: str | None = None, max_length: int | None = None) -> SampleReader:
    """Make the reader of a model folder, also of a language model without a vision tower.

    `conv_mode` (the name of a template) and `max_length` (in tokens) replace the model's own.
    """
    from llava.model import builder
    from llava.model.checkpoints.base_model import inspect_with_base, original_config
    from llava.model.checkpoints.hub import resolve_checkpoint
    from llava.model.checkpoints.inspect import inspect
    from llava.model.config import LlavaSettings
    from llava.model.multimodal_encoder.builder import build_vision_tower, policy_of
    from llava.model.tokenizer_setup import context_len
    from llava.model.tokenizer_setup import conv_mode as template_name

    folder = resolve_checkpoint(path)
    info = inspect(folder)
    tokenizer = builder.load_tokenizer(folder)
    if not info.config:
        info, _ = inspect_with_base(folder)
    name = conv_mode or template_name(info.config, tokenizer, folder.name)
    try:
        template = get_template(name)
    except InputError as error:
        raise InputError(f"--conv-mode is {name!r}; known: {', '.join(sorted(conv_templates))}") from error
    config = SimpleNamespace(**{**original_config(info), "name_or_path": str(info.config_folder)})
    settings = LlavaSettings.from_hf(config)
    has_tower = bool(settings.vision.tower)
    limit = max_length or context_len(config)
    # The limit holds for text and image features together, so the tokenizer must not warn about text alone.
    tokenizer.model_max_length = int(1e9)
    return SampleReader(
        tokenizer=tokenizer,
        policy=policy_of(build_vision_tower(config, delay_load=True), settings.image) if has_tower else None,
        conv=template,
        max_length=int(limit),
        use_im_start_end=settings.tokens.use_im_start_end,
        conv_mode=name,
    )
