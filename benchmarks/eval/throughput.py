"""Questions per second of `llava eval`, and of the original's loop through transformers' own LLaVA class.

The loop asks one question at a time; four threads prepare images ahead, as its data loader does. In: the embedded model on a
CPU (its answers end by themselves), or random weights of LLaVA-1.5-7B's shapes on a GPU (two tokens an answer). Questions are
like POPE's, three about each image, asked for one word. Out: a table.

    python -m benchmarks.eval.throughput --questions 300 --output benchmarks/results/eval.md
    python -m benchmarks.eval.throughput --shapes 7b --questions 3000 --stock-questions 300 --runs 2
"""

from __future__ import annotations

import argparse
import os
import platform
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from benchmarks import ROOT
from benchmarks.measure import add_output, table
from benchmarks.random_checkpoint import in_memory
from llava.assets import embedded_model_path
from llava.conversation import get_template
from llava.engine.request import SamplingParams
from llava.eval.harness.answer_log import AnswerLog
from llava.eval.harness.client import EvalClient, Failure, question_conversation
from llava.eval.tasks.task import WORD_SUFFIX
from llava.eval.types import Question
from llava.mm_utils import process_images, tokenizer_image_token
from llava.model.builder import LoadedModel, load
from llava.model.checkpoints.hf_layout import published_name

IMAGES = ROOT / "playground" / "data" / "eval" / "tiny" / "images"
PER_IMAGE = 3
COLOURS, SHAPES = ("red", "blue", "green", "yellow", "purple"), ("circle", "square", "star", "heart", "triangle")
NUM_LOADERS = 4
IMAGE_TOKEN = 0  # <unk>, which no prompt has: stands for a feature in transformers' layout


@dataclass(frozen=True)
class EvalSetting:
    """A model, and how long its answers may be."""

    name: str
    loaded: LoadedModel
    max_new_tokens: int
    fixed_length: bool  # random weights never end an answer


def embedded() -> EvalSetting:
    return EvalSetting("the embedded model", load(embedded_model_path(), device="cpu"), 128, False)


def random_weights(size: str) -> EvalSetting:
    """Published shapes with random weights; what they say is of equal length, and means nothing."""
    return EvalSetting(f"random weights of LLaVA-1.5-{size}'s shapes", in_memory(size), 2, True)


def make_items(count: int, folder: Path, *, drawn: bool) -> list[Question]:
    """Questions, three about each image: the suite's drawings, or noise of a photograph's size."""
    rng = random.Random(0)
    drawings = sorted(IMAGES.glob("*.png"))
    items = []
    for number in range(count):
        image_number = number // PER_IMAGE
        file = folder / f"{image_number}.{'png' if drawn else 'jpg'}"
        if not file.exists():
            if drawn:
                image = Image.open(drawings[image_number % len(drawings)]).convert("RGB")
                image.putpixel((0, 0), (image_number % 256, image_number // 256, 0))  # no two are equal
            else:
                image = Image.frombytes("RGB", (64, 48), rng.randbytes(64 * 48 * 3)).resize((640, 480))
            image.save(file)
        question = f"Is there a {rng.choice(COLOURS)} {rng.choice(SHAPES)} in the image?\n{WORD_SUFFIX}"
        items.append(Question(number, question, (file,)))
    return items


@dataclass(frozen=True)
class Timing:
    """Of one run: questions per second, and seconds of processor time for each."""

    rate: float
    cpu_s: float

    @classmethod
    def since(cls, started: tuple[float, float], count: int) -> Timing:
        wall, cpu = started
        return cls(count / (time.perf_counter() - wall), (time.process_time() - cpu) / count)


def now() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()


def run_ours(setting: EvalSetting, items: Sequence[Question], folder: Path) -> tuple[Timing, list[str]]:
    """The runner's way: the engine, and every answer on disk."""
    sampling = SamplingParams()
    texts = [""] * len(items)
    with EvalClient(setting.loaded, sampling, conv_mode="v1") as client:
        client.answer(list(enumerate(items))[:PER_IMAGE], lambda number, text: None, max_new_tokens=2)
        started = now()
        with AnswerLog(folder, items, "model").part("0") as writer:

            def done(number: int, text: str | Failure) -> None:
                if isinstance(text, Failure):
                    raise SystemExit(f"question {number} could not be asked: {text.reason}")
                texts[number] = text
                writer.write_answer(number, text)

            client.answer(list(enumerate(items)), done, max_new_tokens=setting.max_new_tokens)
        return Timing.since(started, len(items)), texts


def stock_model(loaded: LoadedModel) -> Any:
    """transformers' own class with the same weights."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    model = loaded.model
    tower: Any = model.get_vision_tower()
    vision = tower.vision_tower.config.to_dict()
    text = {key: value for key, value in model.config.to_dict().items() if not key.startswith("mm_")}
    text.pop("model_type", None)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**vision),
        text_config=LlamaConfig(**text),
        image_token_index=IMAGE_TOKEN,
        vision_feature_layer=model.config.mm_vision_select_layer,
        vision_feature_select_strategy="default",
    )
    torch.set_default_dtype(model.dtype)
    with torch.device(model.device):
        stock = LlavaForConditionalGeneration(config).eval().to(model.dtype)
    torch.set_default_dtype(torch.float32)
    weights = model.state_dict()
    stock.load_state_dict({name: weights[published_name(name)] for name in stock.state_dict()})
    return stock


def run_stock(setting: EvalSetting, items: Sequence[Question]) -> tuple[Timing, list[str]]:
    """The original's loop: for each question its own prefill of image and text, then a token at a time."""
    loaded = setting.loaded
    stock = stock_model(loaded)
    tokenizer, device, dtype = loaded.tokenizer, loaded.model.device, loaded.model.dtype
    tower, image_processor = loaded.model.get_vision_tower(), loaded.image_processor
    assert tower is not None
    assert image_processor is not None

    def prepare(item: Question) -> tuple[list[int], Any]:
        ids = tokenizer_image_token(question_conversation("v1", item.prompt, 1, "<image>").get_prompt(), tokenizer)
        ids_with_features = [
            token for one in ids for token in ([IMAGE_TOKEN] * tower.num_patches if one == -200 else [one])
        ]
        image = Image.open(item.images[0]).convert("RGB")
        return ids_with_features, process_images([image], image_processor, loaded.model.config)

    def answer(ids: list[int], pixels: Any) -> str:
        row = torch.tensor([ids], device=device)
        lengths = {"min_new_tokens": setting.max_new_tokens} if setting.fixed_length else {}
        with torch.inference_mode():
            out = stock.generate(
                input_ids=row,
                attention_mask=torch.ones_like(row),
                pixel_values=pixels.to(device, dtype),
                do_sample=False,
                max_new_tokens=setting.max_new_tokens,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.eos_token_id,
                **lengths,
            )
        return tokenizer.decode(out[0, len(ids) :], skip_special_tokens=True).strip()

    answer(*prepare(items[0]))
    started = now()
    with ThreadPoolExecutor(NUM_LOADERS) as pool:
        texts = [answer(*made) for made in pool.map(prepare, items)]
    return Timing.since(started, len(items)), texts


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--shapes", choices=("embedded", "tiny", "7b", "13b"), default="embedded",
        help="the embedded model, or random weights in these shapes (default: embedded)",
    )  # fmt: skip
    parser.add_argument("--questions", type=int, default=300)
    parser.add_argument("--stock-questions", type=int, help="how many of them the loop is timed on (default: all)")
    parser.add_argument("--runs", type=int, default=3, help="the best of so many counts, alternating (default: 3)")
    add_output(parser)
    args = parser.parse_args(argv)
    get_template("v1")
    setting = embedded() if args.shapes == "embedded" else random_weights(args.shapes)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        items = make_items(args.questions, folder, drawn=args.shapes == "embedded")
        part = items[: args.stock_questions]
        ours, theirs = [], []
        for run in range(args.runs):
            timing, texts = run_ours(setting, items, folder / f"answers-{run}")
            ours.append(timing)
            timing, stock_texts = run_stock(setting, part)
            theirs.append(timing)
    same = sum(a == b for a, b in zip(texts, stock_texts, strict=False))
    where = (
        torch.cuda.get_device_name()
        if setting.loaded.model.device.type == "cuda"
        else f"{os.cpu_count()}-core CPU, {torch.get_num_threads()} thread(s)"
    )
    best, base = max(timing.rate for timing in ours), max(timing.rate for timing in theirs)
    cpu, base_cpu = (1000 * min(timing.cpu_s for timing in timings) for timings in (ours, theirs))
    rows = [
        ("one by one through transformers", f"{base:.1f}", "1.0", f"{base_cpu:.1f}", "1.0"),
        ("`llava eval`", f"{best:.1f}", f"{best / base:.1f}", f"{cpu:.1f}", f"{base_cpu / cpu:.1f}"),
    ]
    lines = [
        f"{where}, {platform.machine()}, Python {platform.python_version()}, torch {version('torch')}, transformers "
        f"{version('transformers')}; {setting.name}, {str(setting.loaded.model.dtype).removeprefix('torch.')}; "
        f"{len(items)} questions, {PER_IMAGE} about each image; best of {args.runs} runs each, in turns",
        "",
        table(("way", "questions/s", "times", "processor time per question, ms", "times"), rows),
        "",
        f"The same answers to {same} of {len(part)} questions.",
    ]
    print("\n".join(lines))
    if args.output is not None:
        args.output.write_text("\n".join(["# Evaluation, questions per second", "", *lines]) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
