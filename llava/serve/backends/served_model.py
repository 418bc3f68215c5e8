"""What a server knows of a model whose files are on this machine: its card, image layouts, and the text of tokens.

In: a loaded model. Out: a `ServedModel`, without the weights, so that it can go from one process to another.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from llava.conversation import Conversation, get_template, image_placeholder
from llava.engine.prompt import prompt_bytes
from llava.engine.request import Detail
from llava.model.config import LlavaSettings
from llava.processor import Processor
from llava.serve.backends.base import ModelCard
from llava.text.tokenization import Tokenizer

if TYPE_CHECKING:
    from torch import Tensor

    from llava.images.layout import ImageLayout
    from llava.model.builder import LoadedModel


def _num_parameters(parameters: Iterable[Tensor]) -> int:
    # Packed weights have two parameters in a byte.
    return sum(tensor.numel() * (2 if tensor.element_size() == 1 else 1) for tensor in parameters)


@dataclass
class LocalModel:
    card: ModelCard
    tokenizer: Tokenizer
    processor: Processor | None
    tile_side: int  # 0 where it does not see
    _texts: dict[int, str] = field(default_factory=dict)
    _counter: Processor | None = None

    @classmethod
    def of(cls, loaded: LoadedModel, *, name: str, conv_mode: str | None, context_len: int) -> LocalModel:
        conv_mode = conv_mode or loaded.conv_mode
        card = ModelCard(
            name=name,
            template=get_template(conv_mode),
            conv_mode=conv_mode,
            context_len=context_len,
            image_placeholder=image_placeholder(LlavaSettings.from_hf(loaded.model.config).tokens.use_im_start_end),
            takes_images=loaded.processor is not None,
            architecture=str(loaded.model.config.model_type),
            num_parameters=_num_parameters(loaded.model.parameters()),
            dtype=str(loaded.model.dtype).removeprefix("torch."),
        )
        side = 0 if loaded.processor is None else loaded.model.image_policy().tile_size
        return cls(card, loaded.tokenizer, loaded.processor, side)

    def plan(self, sizes: Sequence[tuple[int, int]], details: Sequence[Detail]) -> list[ImageLayout]:
        assert self.processor is not None
        return self.processor.plan(sizes, details)

    def held_bytes(self, layouts: Sequence[ImageLayout]) -> int:
        return sum(prompt_bytes(layout, self.tile_side) for layout in layouts)

    def num_tokens(self, prompt: Conversation | str | Sequence[int], layouts: Sequence[ImageLayout]) -> int:
        if self._counter is None:  # a tokenizer of its own: they change settings while they work
            self._counter = Processor(deepcopy(self.tokenizer))
        ids: Sequence[int]
        if isinstance(prompt, (Conversation, str)):
            ids = self._counter.encode_ids(prompt, len(layouts))
        else:
            ids = prompt
        return len(ids) - len(layouts) + sum(layout.num_features for layout in layouts)

    def token_text(self, token_id: int) -> str:
        """Its text inside a text, which for many tokenizers is not what the token decodes to by itself."""
        text = self._texts.get(token_id)
        if text is None:
            decode = self.tokenizer.decode
            before = self.tokenizer("a", add_special_tokens=False)["input_ids"]
            alone = decode(before, skip_special_tokens=False)
            text = decode([*before, token_id], skip_special_tokens=False)[len(alone) :]
            self._texts[token_id] = text
        return text
