"""What a server knows of a model whose files are on this machine: its card, image layouts, and the text of tokens.

In: a loaded model. Out: a `ServedModel`, without the weights, so that it can go from one process to another.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llava.conversation import Conversation, get_template, image_placeholder
from llava.engine.prompt import prompt_bytes
from llava.engine.request import Detail, SamplingDefaults
from llava.model.config import LlavaSettings
from llava.processor import Processor
from llava.serve.backends.base import ModelCard
from llava.text.token_bytes import TokenPiece, TokenSpelling
from llava.text.tokenization import Tokenizer

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

    from llava.images.frames import Video
    from llava.model.builder import LoadedModel
    from llava.processor import Layout


def _num_parameters(parameters: Iterable[Tensor]) -> int:
    # Packed weights have two parameters in a byte.
    return sum(tensor.numel() * (2 if tensor.element_size() == 1 else 1) for tensor in parameters)


@dataclass
class LocalModel:
    card: ModelCard
    tokenizer: Tokenizer
    processor: Processor | None
    tile_side: int  # 0 where it does not see
    _spelling: TokenSpelling | None = None
    _counter: Processor | None = None

    @classmethod
    def of(
        cls, loaded: LoadedModel, *, name: str, conv_mode: str | None, context_len: int, adapters: Iterable[str] = ()
    ) -> LocalModel:
        conv_mode = conv_mode or loaded.conv_mode
        card = ModelCard(
            name=name,
            template=get_template(conv_mode),
            conv_mode=conv_mode,
            context_len=context_len,
            image_placeholder=image_placeholder(LlavaSettings.from_hf(loaded.model.config).tokens.use_im_start_end),
            takes_images=loaded.processor is not None,
            takes_videos=loaded.processor is not None and loaded.processor.video_policy is not None,
            sampling_defaults=SamplingDefaults.of(loaded.model.generation_config),
            architecture=str(loaded.model.config.model_type),
            num_parameters=_num_parameters(loaded.model.parameters()),
            dtype=str(loaded.model.dtype).removeprefix("torch."),
            adapters=tuple(adapters),
        )
        side = 0 if loaded.processor is None else loaded.model.image_policy().tile_size
        return cls(card, loaded.tokenizer, loaded.processor, side)

    def plan(self, images: Sequence[Image.Image | Video], details: Sequence[Detail]) -> list[Layout]:
        assert self.processor is not None
        return self.processor.layouts(images, details)

    def with_times(
        self, prompt: Conversation | str | Sequence[int], images: Sequence[Image.Image | Video]
    ) -> Conversation | str | Sequence[int]:
        if self.processor is None or not isinstance(prompt, (Conversation, str)):
            return prompt
        return self.processor.with_times(prompt, images)

    def held_bytes(self, layouts: Sequence[Layout]) -> int:
        return sum(prompt_bytes(layout, self.tile_side) for layout in layouts)

    def num_tokens(self, prompt: Conversation | str | Sequence[int], layouts: Sequence[Layout]) -> int:
        is_text = isinstance(prompt, (Conversation, str))
        ids = self._encoder().encode_ids(prompt, len(layouts)) if is_text else prompt  # type: ignore[arg-type]
        return len(ids) - len(layouts) + sum(layout.num_features for layout in layouts)  # type: ignore[arg-type]

    def token_ids(self, prompt: str) -> list[int]:
        return self._encoder().encode_ids(prompt, 0)

    def _encoder(self) -> Processor:
        """One with a tokenizer of its own: they change settings while they work."""
        if self._counter is None:
            self._counter = Processor(deepcopy(self.tokenizer))
        return self._counter

    def token_piece(self, token_id: int) -> TokenPiece:
        return self._spelled().piece(token_id)

    def text_of(self, token_ids: Sequence[int]) -> str:
        return self._spelled().text(token_ids)

    def _spelled(self) -> TokenSpelling:
        if self._spelling is None:
            self._spelling = TokenSpelling(self.tokenizer)
        return self._spelling
