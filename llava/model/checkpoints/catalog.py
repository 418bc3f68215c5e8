"""Short names of published models, and what `llava models` says of each. Nothing is imported or looked up here.

In: a name such as `llava-1.5-7b`. Out: its repository on the hub, its size, its licence. Only models that this package reads
are listed (docs/checkpoints.md); any other is given by its repository or folder. Numbers of parameters are those of the
architectures, in billions.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass

EMBEDDED = "tiny"  # the name of the model in the package

BYTES_OF_LAYERS = {"bf16": 2.0, "8-bit": 1.0, "4-bit": 0.5625}  # a parameter; all others have 2


@dataclass(frozen=True)
class CatalogModel:
    """A model on the hub."""

    repository: str
    parameters: float  # in billions
    in_layers: float  # of them in the layers of the language model, which quantization makes smaller
    licence: str  # of the language model
    good_at: str

    @property
    def download_bytes(self) -> int:
        return int(self.parameters * 2e9)

    def memory_bytes(self, precision: str) -> int:
        """The memory of the weights in a precision of `BYTES_OF_LAYERS`."""
        return int(1e9 * (self.in_layers * BYTES_OF_LAYERS[precision] + (self.parameters - self.in_layers) * 2))


_PHOTOGRAPHS = "photographs, short and long answers"
_ALL_KINDS = "details, several images, videos"
_DETAILS = "text and details, by tiles of an image"
CATALOG = {
    "llava-1.5-7b": CatalogModel("llava-hf/llava-1.5-7b-hf", 7.06, 6.48, "Llama 2", _PHOTOGRAPHS),
    "llava-1.5-13b": CatalogModel("llava-hf/llava-1.5-13b-hf", 13.35, 12.69, "Llama 2", _PHOTOGRAPHS),
    "llava-1.6-mistral-7b": CatalogModel("llava-hf/llava-v1.6-mistral-7b-hf", 7.57, 6.98, "Apache 2.0", _DETAILS),
    "llava-1.6-vicuna-7b": CatalogModel("llava-hf/llava-v1.6-vicuna-7b-hf", 7.06, 6.48, "Llama 2", _DETAILS),
    "llava-1.6-vicuna-13b": CatalogModel("llava-hf/llava-v1.6-vicuna-13b-hf", 13.35, 12.69, "Llama 2", _DETAILS),
    "llava-1.6-34b": CatalogModel("llava-hf/llava-v1.6-34b-hf", 34.75, 33.47, "Apache 2.0", _DETAILS),
    "llava-next-llama3-8b": CatalogModel("llava-hf/llama3-llava-next-8b-hf", 8.36, 6.98, "Llama 3", _DETAILS),
    "llava-next-72b": CatalogModel("llava-hf/llava-next-72b-hf", 72.7, 69.8, "Tongyi Qianwen", _DETAILS),
    "llava-next-110b": CatalogModel("llava-hf/llava-next-110b-hf", 111.6, 108.7, "Tongyi Qianwen", _DETAILS),
    "llava-interleave-0.5b": CatalogModel(
        "llava-hf/llava-interleave-qwen-0.5b-hf", 0.87, 0.31, "Tongyi Qianwen", "several images in a question; small"
    ),
    "llava-interleave-7b": CatalogModel(
        "llava-hf/llava-interleave-qwen-7b-hf", 8.14, 6.48, "Tongyi Qianwen", "several images in a question"
    ),
    "llava-onevision-0.5b": CatalogModel(
        "llava-hf/llava-onevision-qwen2-0.5b-ov-hf", 0.89, 0.36, "Apache 2.0", f"{_ALL_KINDS}; small"
    ),
    "llava-onevision-7b": CatalogModel("llava-hf/llava-onevision-qwen2-7b-ov-hf", 8.03, 6.53, "Apache 2.0", _ALL_KINDS),
    "llava-onevision-72b": CatalogModel(
        "llava-hf/llava-onevision-qwen2-72b-ov-hf", 73.18, 70.21, "Tongyi Qianwen", _ALL_KINDS
    ),
    "llava-next-video-7b": CatalogModel("llava-hf/LLaVA-NeXT-Video-7B-hf", 7.06, 6.48, "Llama 2", "videos"),
    "vip-llava-7b": CatalogModel("llava-hf/vip-llava-7b-hf", 7.08, 6.48, "Llama 2", "marks drawn on images"),
    "vip-llava-13b": CatalogModel("llava-hf/vip-llava-13b-hf", 13.37, 12.69, "Llama 2", "marks drawn on images"),
    "llava-llama3-8b": CatalogModel("xtuner/llava-llama-3-8b-v1_1-transformers", 8.36, 6.98, "Llama 3", _PHOTOGRAPHS),
    "llava-phi3-mini": CatalogModel("xtuner/llava-phi-3-mini-hf", 4.14, 3.62, "MIT", "photographs; small"),
    "llava-gemma-2b": CatalogModel("Intel/llava-gemma-2b", 2.82, 1.98, "Gemma", "photographs; small"),
    "tiny-llava-1b": CatalogModel("bczhou/tiny-llava-v1-hf", 1.42, 0.97, "Apache 2.0", "photographs; small"),
    "bakllava": CatalogModel("llava-hf/bakLlava-v1-hf", 7.57, 6.98, "Apache 2.0", _PHOTOGRAPHS),
    "joycaption": CatalogModel(
        "fancyfeast/llama-joycaption-beta-one-hf-llava", 8.48, 6.98, "Llama 3.1", "long descriptions of images"
    ),
}


def repository_of(name: str) -> str | None:
    """The repository of a name, in any case, `1.5` or `v1.5`; None for a text that is no name."""
    found = CATALOG.get(name.lower().replace("-v1.", "-1."))
    return None if found is None else found.repository


def did_you_mean(text: str) -> str:
    """The names that a misspelt one resembles, as part of an error; empty where it resembles none."""
    known = [EMBEDDED, *CATALOG]
    last = text.rsplit("/", 1)[-1].lower().removesuffix("-hf").replace("-v1.", "-1.").replace("_", "-")
    near = difflib.get_close_matches(last, known, n=2, cutoff=0.6)
    return f"; did you mean {' or '.join(map(repr, near))}?" if near else ""
