"""The model of gpu.py, with random weights, and requests for it."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.shapes import Shapes, random_llava
from llava.engine.request import Request, SamplingParams
from llava.processor import Processor

NUM_TEXT = 58
PINPOINTS = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))  # tiles across and down


class Workload:
    """A model with random weights, a tokenizer that has text for every id, and requests of random content."""

    def __init__(self, shapes: Shapes, device: torch.device) -> None:
        self.shapes, self.device = shapes, device
        self.side = shapes.vision["image_size"]
        self.rng = np.random.default_rng(0)
        self.model: Any = random_llava(
            shapes,
            device,
            image_aspect_ratio="anyres",
            mm_patch_merge_type="spatial_unpad",
            image_grid_pinpoints=[[x * self.side, y * self.side] for x, y in PINPOINTS],
            tokenizer_model_max_length=shapes.text["max_position_embeddings"],
        ).eval()
        for name, parameter in self.model.named_parameters():
            if "norm" in name and parameter.dim() == 1 and name.endswith("weight"):
                parameter.data.fill_(1.0)
        self.tokenizer = word_tokenizer(shapes.image_id)
        self.set_tiling(False)

    def set_tiling(self, anyres: bool) -> None:
        """Cut images into tiles as LLaVA-1.6 does, or pad them to one as LLaVA-1.5 does."""
        self.model.config.image_aspect_ratio = "anyres" if anyres else "pad"
        self.model.config.mm_patch_merge_type = "spatial_unpad" if anyres else "flat"
        self.processor = Processor(
            self.tokenizer, self.model.get_vision_tower().image_processor, self.model.image_policy()
        )

    def image(self, side: int | None = None) -> Image.Image:
        side = side or self.side
        return Image.fromarray(self.rng.integers(0, 255, (side, side, 3), dtype=np.uint8))

    def words(self, count: int) -> list[int]:
        return self.rng.integers(100, self.shapes.image_id, count).tolist()

    def request(self, num_new: int, num_text: int = NUM_TEXT, image: Image.Image | None = None) -> Request:
        first = num_text // 2
        ids = [1, *self.words(first), -200, *self.words(num_text - first)]
        return Request(ids, [image or self.image()], SamplingParams(max_new_tokens=num_new, ignore_eos=True))


def word_tokenizer(num_tokens: int) -> Any:
    """Return a tokenizer in which every token is a short word, so that decoding text costs what it usually does."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = ["<unk>", "<s>", "</s>", *alphabet]
    words += [f"Ġw{number}" for number in range(num_tokens - len(words))]
    tokenizer = Tokenizer(models.BPE(vocab={word: place for place, word in enumerate(words)}, merges=[]))
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def allocated(device: torch.device) -> int:
    """Return the bytes allocated on a GPU, or the peak resident memory of a process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated()
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
