"""The engine with LLaVA-OneVision-7B's shapes on one GPU, beside stock transformers in the same run.

    python -m benchmarks.engine.onevision > results.jsonl      every figure; the table comes last, on stderr
    python -m benchmarks.engine.onevision --tiny               small shapes, also on a CPU, as a check

Random weights, made on the device, bfloat16. "image" is a PIL image of 1152 x 1152 pixels, cut into ten tiles: 7,290 features
of tiles and a newline for each of 81 rows. "video" is 32 frames of 384 x 384, 196 features each. Both have fresh random pixels
and 58 text tokens. First token: ours from the PIL image or frames, theirs from pixels that are made. "decode 1" follows the
image, "decode 64" follows 64 images of one tile and an overview (1,485 features); the rate is new tokens x sequences / (time
for 8 + new tokens - time for 8). "mixed" is 96 requests at once: half with a small image, a quarter with the image, a quarter
with 8 frames, 32 to 256 text tokens, 16 to 256 new ones; theirs are the first 6 of them, one after the other. All greedy, the
end token ignored. A row that fails prints its error, and the others go on; no row begins after `--seconds`.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image

from benchmarks.engine.workload import NUM_TEXT, word_tokenizer
from benchmarks.measure import free_memory, median_seconds, print_figures, synchronize
from benchmarks.shapes import random_weights
from llava.engine.config import EngineConfig
from llava.engine.engine import Engine
from llava.engine.request import Request, SamplingParams
from llava.images.frames import Video
from llava.processor import Processor

Figures = dict[str, float]
TEXT = {
    "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
    "num_key_value_heads": 4, "vocab_size": 152064, "max_position_embeddings": 32768, "rope_theta": 1e6,
}  # fmt: skip
TOWER = {
    "hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 26, "num_attention_heads": 16, "image_size": 384,
    "patch_size": 14,
}  # fmt: skip
TINY_TEXT = TEXT | {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "vocab_size": 512, "max_position_embeddings": 1024,
}  # fmt: skip
TINY_TOWER = TOWER | {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 28,
}  # fmt: skip
MAX_TILES = 9
UNITS = {"first token": "ms", "decode": "tok/s", "mixed": "new tok/s"}


class OneVision:
    """The shapes of a model, requests for it, and the numbers of rounds."""

    def __init__(self, device: torch.device, *, tiny: bool) -> None:
        self.device, self.tiny = device, tiny
        self.text, self.tower = (TINY_TEXT, TINY_TOWER) if tiny else (TEXT, TOWER)
        self.side: int = self.tower["image_size"]
        self.image_id: int = int(self.text["vocab_size"]) - 64  # ids from here on are no words
        self.num_frames, self.num_new = (4, 24) if tiny else (32, 128)
        self.num_together = 8 if tiny else 64
        self.rounds = 1 if tiny else 5
        self.rng = np.random.default_rng(0)
        self.pinpoints = [[across * self.side, down * self.side] for across in range(1, 7) for down in range(1, 7)]

    def build(self) -> tuple[Any, Processor]:
        """Make our model, and its processor."""
        from llava.model.language_model.registry import llava_classes

        config_class, model_class = llava_classes("qwen2")
        side = {"height": self.side, "width": self.side}
        with tempfile.TemporaryDirectory() as folder:
            Path(folder, "config.json").write_text(json.dumps({"model_type": "siglip_vision_model", **self.tower}))
            Path(folder, "preprocessor_config.json").write_text(
                json.dumps({"image_processor_type": "SiglipImageProcessor", "size": side, "resample": 3})
            )
            config = config_class(
                **self.text,
                tie_word_embeddings=False,
                mm_vision_tower=folder,
                unfreeze_mm_vision_tower=True,  # the tower's weights are the model's, random too
                mm_hidden_size=self.tower["hidden_size"],
                mm_projector_type="mlp2x_gelu",
                mm_vision_select_layer=-1,
                mm_vision_select_feature="patch",
                mm_patch_merge_type="spatial_unpad",
                mm_spatial_pool_mode="bilinear",
                image_aspect_ratio=f"anyres_max_{MAX_TILES}",
                image_grid_pinpoints=self.pinpoints,
                tokenizer_model_max_length=self.text["max_position_embeddings"],
            )
            model: Any = random_weights(lambda: model_class(config), self.device).eval()
        for name, parameter in model.named_parameters():
            if "norm" in name and parameter.dim() == 1 and name.endswith("weight"):
                parameter.data.fill_(1.0)
        processor = Processor(
            word_tokenizer(self.image_id),
            model.get_vision_tower().image_processor,
            model.image_policy(),
            video_policy=model.video_policy(),
        )
        return model, processor

    def image(self, tiles_across: int) -> Image.Image:
        side = tiles_across * self.side
        return Image.fromarray(self.rng.integers(0, 255, (side, side, 3), dtype=np.uint8))

    def video(self, num_frames: int | None = None) -> Video:
        return Video(tuple(self.image(1) for _ in range(num_frames or self.num_frames)))

    def request(self, shown: Image.Image | Video, num_new: int, num_text: int = NUM_TEXT) -> Request:
        words = self.rng.integers(300, self.image_id, num_text).tolist()
        half = num_text // 2
        ids = [*words[:half], -200, *words[half:]]
        return Request(ids, [shown], SamplingParams(max_new_tokens=num_new, ignore_eos=True))

    def mixed(self) -> list[Request]:
        chosen, requests = random.Random(0), []
        for number in range(8 if self.tiny else 96):
            kind = number % 4
            shown = self.image(3) if kind == 1 else self.video(2 if self.tiny else 8) if kind == 3 else self.image(1)
            num_text, num_new = chosen.randint(32, 256), chosen.randint(16, 256)
            requests.append(self.request(shown, 3 if self.tiny else num_new, 12 if self.tiny else num_text))
        return requests


# Ours


def measure_engine(shapes: OneVision, record: Callable[..., None]) -> None:
    model, processor = shapes.build()
    checked = [shapes.request(shapes.image(3), 8), shapes.request(shapes.video(), 8)]
    expected = [generated(model, processor, request) for request in checked]
    started = time.perf_counter()
    config = EngineConfig(max_running=shapes.num_together, feature_cache_bytes=2**28)
    with Engine(model, processor, config) as engine:
        engine.generate(shapes.request(shapes.image(1), 2))
        record("ready, s", time.perf_counter() - started)
        for name, request, tokens in zip(("image", "video"), checked, expected, strict=True):
            result = engine.generate(request)
            got = result.completions[0].token_ids
            agreeing = next((at for at, (a, b) in enumerate(zip(got, tokens, strict=True)) if a != b), len(tokens))
            record(f"{name}: tokens as model.generate, of 8", agreeing, features=result.usage.num_image_tokens)
        rows: dict[str, Callable[[], float]] = {
            "image first token": lambda: first_ms(engine, shapes, lambda: shapes.image(3)),
            "video first token": lambda: first_ms(engine, shapes, shapes.video),
            "image preparation, ms": lambda: prepared_ms(engine, shapes, lambda: shapes.image(3)),
            "video preparation, ms": lambda: prepared_ms(engine, shapes, shapes.video),
            "decode 1": lambda: decode_rate(engine, shapes, 1, 3),
            f"decode {shapes.num_together}": lambda: decode_rate(engine, shapes, shapes.num_together, 1),
            "mixed": lambda: mixed_rate(engine, shapes),
        }
        for what, row in rows.items():
            record(what, row)


@torch.inference_mode()
def generated(model: Any, processor: Processor, request: Request) -> list[int]:
    """The tokens of `model.generate`."""
    ids: Any = request.prompt
    inputs = processor.inputs(ids, request.images)
    images = [pixels.to(model.device, model.dtype) for pixels in inputs.pixels]
    output = model.generate(
        inputs.input_ids[None].to(model.device),
        images=images,
        image_sizes=inputs.image_sizes,
        modalities=inputs.modalities,
        do_sample=False,
        max_new_tokens=8,
        min_new_tokens=8,
        pad_token_id=0,
    )
    return output[0].tolist()[-8:]


def seconds(engine: Engine, requests: Sequence[Request]) -> float:
    started = time.perf_counter()
    engine.generate(requests)
    return time.perf_counter() - started


def first_ms(engine: Engine, shapes: OneVision, show: Callable[[], Image.Image | Video]) -> float:
    """From PIL images to the first token, in ms."""
    requests = [shapes.request(show(), 1) for _ in range(2 + shapes.rounds)]
    return 1e3 * statistics.median([seconds(engine, [request]) for request in requests][2:])


def prepared_ms(engine: Engine, shapes: OneVision, show: Callable[[], Image.Image | Video]) -> float:
    """The part of that which is done on the host, before the engine's first step."""
    requests = [shapes.request(show(), 1) for _ in range(shapes.rounds)]
    started = time.perf_counter()
    for request in requests:
        engine._build_prompt(request)
    return 1e3 * (time.perf_counter() - started) / len(requests)


def decode_rate(engine: Engine, shapes: OneVision, num: int, tiles_across: int) -> float:
    def run(num_new: int) -> float:
        return seconds(engine, [shapes.request(shapes.image(tiles_across), num_new) for _ in range(num)])

    run(8)
    long, short = (statistics.median(run(new) for _ in range(2)) for new in (8 + shapes.num_new, 8))
    return num * shapes.num_new / (long - short)


def mixed_rate(engine: Engine, shapes: OneVision) -> float:
    requests = shapes.mixed()
    took = seconds(engine, requests)
    return sum(request.sampling.max_new_tokens for request in requests) / took


# Theirs


def measure_stock(shapes: OneVision, record: Callable[..., None]) -> None:
    from transformers import (
        LlavaOnevisionConfig,
        LlavaOnevisionForConditionalGeneration,
        Qwen2Config,
        SiglipVisionConfig,
    )

    config = LlavaOnevisionConfig(
        vision_config=SiglipVisionConfig(**shapes.tower, vision_use_head=False),
        text_config=Qwen2Config(**shapes.text),
        image_token_index=shapes.image_id,
        video_token_index=shapes.image_id + 1,
        image_grid_pinpoints=shapes.pinpoints,
        vision_aspect_ratio=f"anyres_max_{MAX_TILES}",
        attn_implementation="sdpa",
    )
    model: Any = random_weights(lambda: LlavaOnevisionForConditionalGeneration(config), shapes.device).eval()
    image, video = partial(stock_image, shapes, 3), partial(stock_video, shapes)
    rows: dict[str, Callable[[], float]] = {
        "image first token": lambda: stock_first_ms(model, shapes, image(1)),
        "video first token": lambda: stock_first_ms(model, shapes, video(shapes.num_frames)),
        "decode 1": lambda: stock_decode_rate(model, shapes, image(1), 1),
        f"decode {shapes.num_together}": lambda: stock_decode_rate(
            model, shapes, stock_image(shapes, 1, shapes.num_together), shapes.num_together
        ),
        "mixed": lambda: stock_mixed_rate(model, shapes),
    }
    with torch.inference_mode():
        for what, row in rows.items():
            record(f"stock {what}", row)


def stock_image(shapes: OneVision, tiles_across: int, num: int, num_text: int = NUM_TEXT) -> dict[str, torch.Tensor]:
    """Inputs of `num` prompts with a square image each, of so many tiles in both directions."""
    per_side = shapes.side // shapes.tower["patch_size"]
    rows = tiles_across * per_side
    num_features = per_side**2 + rows * (rows + 1)
    tiles = 1 + tiles_across**2
    size = tiles_across * shapes.side
    pixels = torch.randn(num, tiles, 3, shapes.side, shapes.side, device=shapes.device, dtype=torch.bfloat16)
    return {
        **stock_ids(shapes, num, num_features, shapes.image_id, num_text),
        "pixel_values": pixels,
        "image_sizes": torch.tensor([[size, size]] * num, device=shapes.device),
    }


def stock_video(shapes: OneVision, num_frames: int, num_text: int = NUM_TEXT) -> dict[str, torch.Tensor]:
    per_side = -(-(shapes.side // shapes.tower["patch_size"]) // 2)
    pixels = torch.randn(1, num_frames, 3, shapes.side, shapes.side, device=shapes.device, dtype=torch.bfloat16)
    ids = stock_ids(shapes, 1, num_frames * per_side**2 + 1, shapes.image_id + 1, num_text)
    return {**ids, "pixel_values_videos": pixels}


def stock_ids(shapes: OneVision, num: int, num_features: int, token: int, num_text: int) -> dict[str, torch.Tensor]:
    ids = torch.randint(5, shapes.image_id, (num, num_text + num_features), device=shapes.device)
    ids[:, num_text // 2 : num_text // 2 + num_features] = token
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def stock_first_ms(model: Any, shapes: OneVision, inputs: dict[str, torch.Tensor]) -> float:
    def first() -> int:
        return int(model(**inputs, logits_to_keep=1).logits[0, -1].argmax())

    return 1e3 * median_seconds(first, shapes.rounds, device=shapes.device)


def stock_generate(model: Any, inputs: dict[str, torch.Tensor], num_new: int) -> int:
    return int(model.generate(**inputs, do_sample=False, min_new_tokens=num_new, max_new_tokens=num_new)[0, -1])


def stock_decode_rate(model: Any, shapes: OneVision, inputs: dict[str, torch.Tensor], num: int) -> float:
    new = min(32, shapes.num_new)
    short = median_seconds(partial(stock_generate, model, inputs, 8), 1, device=shapes.device)
    long = median_seconds(partial(stock_generate, model, inputs, 8 + new), 1, warm=0, device=shapes.device)
    return num * new / (long - short)


def stock_mixed_rate(model: Any, shapes: OneVision) -> float:
    """The first requests of the same list, one after the other."""
    requests = shapes.mixed()[: 2 if shapes.tiny else 6]
    inputs = []
    for number, request in enumerate(requests):
        ids: Any = request.prompt
        num_text = len(ids) - 1
        if number % 4 == 3:
            inputs.append(stock_video(shapes, 8, num_text))
        else:
            inputs.append(stock_image(shapes, 3 if number % 4 == 1 else 1, 1, num_text))
    synchronize(shapes.device)
    started = time.perf_counter()
    for request, given in zip(requests, inputs, strict=True):
        stock_generate(model, given, request.sampling.max_new_tokens)
    synchronize(shapes.device)
    return sum(request.sampling.max_new_tokens for request in requests) / (time.perf_counter() - started)


# Both


def table(figures: Mapping[str, float]) -> str:
    """Return a Markdown table of what both have, then one of everything else."""
    both = [what for what in figures if f"stock {what}" in figures]
    lines = ["| what | unit | engine | stock transformers |", "|---|---|---:|---:|"]
    for what in both:
        unit = next(unit for name, unit in UNITS.items() if name in what)
        lines.append(f"| {what} | {unit} | {figures[what]:,.4g} | {figures[f'stock {what}']:,.4g} |")
    rest = [what for what in figures if what not in both and what.removeprefix("stock ") not in both]
    return "\n".join([*lines, "", "| also | |", "|---|---:|", *(f"| {what} | {figures[what]:,.5g} |" for what in rest)])


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="small shapes, also without a GPU")
    parser.add_argument("--seconds", type=float, default=270.0, help="begin no row after so long (default: 270)")
    args = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not args.tiny:
        parser.error("there is no GPU; --tiny runs small shapes on a CPU")
    torch.manual_seed(0)
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    print_figures(
        gpu=name, torch=torch.__version__, transformers=transformers.__version__, python=sys.version.split()[0]
    )
    started, figures = time.perf_counter(), Figures()

    def record(what: str, value: float | Callable[[], float], **more: Any) -> None:
        """Print a figure as a line of JSON, and keep it for the table; a function is called for it, which may fail."""
        begun = time.perf_counter()
        if callable(value):
            if begun - started > args.seconds:
                print_figures(what=what, skipped="out of time")
                return
            try:
                value = value()
            except Exception as error:
                print_figures(what=what, error=repr(error)[:300])
                traceback.print_exc()
                free_memory()
                return
        figures[what] = value
        print_figures(what=what, v=value, **more, row_s=round(time.perf_counter() - begun, 3))

    shapes = OneVision(device, tiny=args.tiny)
    for measure in (measure_engine, measure_stock):
        try:
            measure(shapes, record)
        except Exception as error:
            print_figures(what=measure.__name__, error=repr(error)[:300])
            traceback.print_exc()
        free_memory()
    record("whole run, s", time.perf_counter() - started)
    print(table(figures), file=sys.stderr)


if __name__ == "__main__":
    main()
