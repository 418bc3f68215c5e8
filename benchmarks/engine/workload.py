"""What benchmarks/engine/gpu.py asks its questions of: LLaVA-1.5-7B with random numbers, and the clocks it is timed by."""

from __future__ import annotations

import gc
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.train.single_gpu import Shapes, built
from llava.engine.request import Request, SamplingParams
from llava.model.language_model.registry import llava_classes
from llava.processor import Processor

NUM_TEXT = 58
PINPOINTS = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))  # tiles across and down


class Subject:
    """A model with random weights, a tokenizer that spells any id, and requests for it."""

    def __init__(self, shapes: Shapes, device: torch.device) -> None:
        self.shapes, self.device = shapes, device
        self.side = shapes.vision["image_size"]
        self.draw = np.random.default_rng(0)
        config_class, model_class = llava_classes("llama")
        with tempfile.TemporaryDirectory() as folder:
            Path(folder, "config.json").write_text(json.dumps({"model_type": "clip_vision_model", **shapes.vision}))
            Path(folder, "preprocessor_config.json").write_text(
                json.dumps(
                    {"size": {"shortest_edge": self.side}, "crop_size": {"height": self.side, "width": self.side}}
                )
            )
            config = config_class(
                **shapes.text,
                mm_vision_tower=folder,
                unfreeze_mm_vision_tower=True,
                mm_hidden_size=shapes.vision["hidden_size"],
                mm_projector_type="mlp2x_gelu",
                mm_vision_select_layer=-2,
                image_aspect_ratio="anyres",
                mm_patch_merge_type="spatial_unpad",
                image_grid_pinpoints=[[x * self.side, y * self.side] for x, y in PINPOINTS],
                tokenizer_model_max_length=shapes.text["max_position_embeddings"],
            )
            self.model: Any = built(lambda: model_class(config), device).eval()
        for name, parameter in self.model.named_parameters():
            if "norm" in name and parameter.dim() == 1 and name.endswith("weight"):
                parameter.data.fill_(1.0)
        self.tokenizer = spelling_tokenizer(shapes.image_id)
        self.cut_images(False)

    def cut_images(self, anyres: bool) -> None:
        """As LLaVA-1.6 does, or as LLaVA-1.5."""
        self.model.config.image_aspect_ratio = "anyres" if anyres else "pad"
        self.model.config.mm_patch_merge_type = "spatial_unpad" if anyres else "flat"
        self.processor = Processor(
            self.tokenizer, self.model.get_vision_tower().image_processor, self.model.image_policy()
        )

    def image(self, side: int | None = None) -> Image.Image:
        side = side or self.side
        return Image.fromarray(self.draw.integers(0, 255, (side, side, 3), dtype=np.uint8))

    def words(self, count: int) -> list[int]:
        return self.draw.integers(100, self.shapes.image_id, count).tolist()

    def request(self, num_new: int, num_text: int = NUM_TEXT, image: Image.Image | None = None) -> Request:
        first = num_text // 2
        ids = [1, *self.words(first), -200, *self.words(num_text - first)]
        return Request(ids, [image or self.image()], SamplingParams(max_new_tokens=num_new, ignore_eos=True))


def spelling_tokenizer(num_tokens: int) -> Any:
    """Any token is a short word: decoding costs what it costs elsewhere."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = ["<unk>", "<s>", "</s>", *alphabet]
    words += [f"Ġw{number}" for number in range(num_tokens - len(words))]
    tokenizer = Tokenizer(models.BPE(vocab={word: place for place, word in enumerate(words)}, merges=[]))
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def graph_seconds(work: Callable[[], Any], runs: int = 10) -> float:
    """The median of a recorded graph's replays."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    graph = torch.cuda.CUDAGraph()
    with torch.inference_mode():
        with torch.cuda.stream(side):
            work()
        torch.cuda.current_stream().wait_stream(side)
        with torch.cuda.graph(graph):
            work()
    times = []
    for _ in range(runs):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return statistics.median(times)


def median_seconds(work: Callable[[], Any], runs: int) -> float:
    times = []
    for _ in range(runs + 1):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return statistics.median(times[1:])


def allocated(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.memory_allocated()
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def tidy() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
