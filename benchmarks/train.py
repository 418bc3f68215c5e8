"""How fast LLaVA-1.5-7B trains here and with stock transformers, on one GPU: `python benchmarks/train.py`.

Random weights of the published shapes, bfloat16, AdamW, both in one process, one JSON line per figure. `--only full,packed`
picks measurements, `--tiny` runs all of them on small shapes (also on a CPU) to see that they run, `--estimate` only says how
much memory `llava train` would foresee for ours, on any machine. A measurement that fails prints its error and the rest
goes on. Model FLOPs are counted as in the peer's published figure: six per weight and token
(four where the language model is frozen), attention at half of the square, the tower's forward pass; what is computed a
second time does not count. The share is of the rate at which this GPU multiplies two square matrices of 8192.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import transformers
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from llava.model.attention import use_varlen
from llava.model.language_model.registry import llava_classes
from llava.train.memory import GIB, estimate
from llava.train.packing import plan_rows
from llava.train.speed import compile_layers

FIRST_WORD = 5  # ids below are special
LORA: dict[str, Any] = {"r": 128, "lora_alpha": 256, "lora_dropout": 0.05}


@dataclass(frozen=True)
class Shapes:
    """A model, and the batches it is trained on."""

    text: dict[str, int]
    vision: dict[str, int]
    batch: int  # rows of the full and LoRA batches
    text_tokens: int
    captions: int  # rows of the projector batch
    caption_tokens: int
    samples: int  # of the run on realistic lengths
    longest_text: int
    row: int  # tokens of a packed row
    probe: int

    @property
    def image_tokens(self) -> int:
        return (self.vision["image_size"] // self.vision["patch_size"]) ** 2

    @property
    def image_id(self) -> int:
        return self.text["vocab_size"] - 64


FULL = Shapes(
    text={
        "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 32, "vocab_size": 32064, "max_position_embeddings": 4096,
    },
    vision={
        "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
        "image_size": 336, "patch_size": 14, "projection_dim": 768,
    },
    batch=16, text_tokens=256, captions=32, caption_tokens=64, samples=96, longest_text=2048, row=13312, probe=8192,
)  # fmt: skip
TINY = Shapes(
    text={
        "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 4, "vocab_size": 320, "max_position_embeddings": 512,
    },
    vision={
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
        "image_size": 28, "patch_size": 14, "projection_dim": 32,
    },
    batch=2, text_tokens=16, captions=2, caption_tokens=8, samples=8, longest_text=64, row=128, probe=64,
)  # fmt: skip


def say(**figures: Any) -> None:
    print(json.dumps({k: round(v, 4) if isinstance(v, float) else v for k, v in figures.items()}), flush=True)


# Samples: number of text tokens, and whether there is an image.


@dataclass(frozen=True)
class Sample:
    text: int
    image: bool


def realistic(shapes: Shapes) -> list[Sample]:
    """Lengths as in the LLaVA-1.5 mix: mostly an image and some turns, 6 % text only and long; 20 to 2,048 text tokens."""
    draw = torch.Generator().manual_seed(0)
    num_text = max(1, round(0.06 * shapes.samples))
    medians = [900.0] * num_text + [180.0] * (shapes.samples - num_text)
    scale = shapes.longest_text / 2048
    lengths = [m * scale * float(torch.randn((), generator=draw).mul(0.8).exp()) for m in medians]
    shortest = max(4, int(20 * scale))
    samples = [
        Sample(int(min(max(length, shortest), shapes.longest_text)), image=number >= num_text)
        for number, length in enumerate(lengths)
    ]
    return [samples[i] for i in torch.randperm(len(samples), generator=draw).tolist()]


def token_squares(samples: Sequence[Sample], shapes: Shapes) -> tuple[int, int]:
    lengths = [sample.text + sample.image * shapes.image_tokens for sample in samples]
    return sum(lengths), sum(length**2 for length in lengths)


# The two sides. Each builds a model, and batches for it.


class Stock:
    """transformers' own LLaVA as its Trainer drives it: padded batches, gradient checkpointing, sdpa."""

    name = "stock"

    def __init__(self, shapes: Shapes, device: torch.device) -> None:
        from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

        self.shapes, self.device = shapes, device
        config = LlavaConfig(
            vision_config=CLIPVisionConfig(**shapes.vision),
            text_config=LlamaConfig(**shapes.text),
            image_token_index=shapes.image_id,
            vision_feature_layer=-2,
            vision_feature_select_strategy="default",
        )
        self.model: Any = built(lambda: LlavaForConditionalGeneration(config), device)
        self.model.config.use_cache = False
        self.projector, self.tower = self.model.model.multi_modal_projector, self.model.model.vision_tower
        self.inner, self.head = self.model.model.language_model, self.model.lm_head

    def prepare(self, *, frozen: bool, dynamic: bool) -> None:
        self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        if frozen:
            self.model.enable_input_require_grads()

    def batch(self, samples: Sequence[Sample]) -> dict[str, Any]:
        shapes, width = self.shapes, max(s.text + s.image * self.shapes.image_tokens for s in samples)
        ids = torch.randint(FIRST_WORD, shapes.image_id, (len(samples), width))
        mask = torch.zeros_like(ids)
        for row, sample in enumerate(samples):
            mask[row, : sample.text + sample.image * shapes.image_tokens] = 1
            if sample.image:
                ids[row, 1 : 1 + shapes.image_tokens] = shapes.image_id
        labels = ids.masked_fill((ids == shapes.image_id) | (mask == 0), -100)
        batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
        if images := sum(s.image for s in samples):
            batch["pixel_values"] = torch.randn(images, 3, *[shapes.vision["image_size"]] * 2).to(torch.bfloat16)
        return {name: value.to(self.device) for name, value in batch.items()}


class Ours:
    """This package as `llava train --compile_layers True --keep_activations K` drives it, packed where lengths differ."""

    name = "ours"

    def __init__(self, shapes: Shapes, device: torch.device) -> None:
        self.shapes, self.device = shapes, device
        config_class, model_class = llava_classes("llama")
        with tempfile.TemporaryDirectory() as folder:
            side = shapes.vision["image_size"]
            Path(folder, "config.json").write_text(json.dumps({"model_type": "clip_vision_model", **shapes.vision}))
            Path(folder, "preprocessor_config.json").write_text(
                json.dumps({"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}})
            )
            config = config_class(
                **shapes.text,
                mm_vision_tower=folder,
                unfreeze_mm_vision_tower=True,  # the tower's weights are the model's, random too
                mm_hidden_size=shapes.vision["hidden_size"],
                mm_projector_type="mlp2x_gelu",
                mm_vision_select_layer=-2,
                image_aspect_ratio="pad",
            )
            config.use_cache = False
            self.model: Any = built(lambda: model_class(config), device)
        self.varlen = use_varlen(self.model.config, device, torch.bfloat16)
        inner = self.model.get_model()
        self.projector, self.tower, self.inner, self.head = (
            inner.mm_projector, inner.get_vision_tower(), inner.layers, self.model.lm_head,
        )  # fmt: skip
        self.keep, self.keep_frozen = 0.5, 1.0  # frozen weights leave room, so that nothing need be computed twice
        self.kept = self.keep
        self.backend: str | None = "inductor" if device.type == "cuda" else "eager"

    def prepare(self, *, frozen: bool, dynamic: bool) -> None:
        if self.backend is None:
            self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            return
        torch._dynamo.reset()
        self.kept = self.keep_frozen if frozen else self.keep
        compile_layers(self.model, keep=self.kept, dynamic=dynamic or None, backend=self.backend)

    def estimated(self, batches: list[list[Sample]]) -> float:
        """Bytes at the peak, as `llava train` foresees them."""
        lengths = [[s.text + s.image * self.shapes.image_tokens for s in batch] for batch in batches]
        rows_alike = len(batches) == 1
        arguments = SimpleNamespace(
            optim="adamw_torch_fused", deepspeed=None, fsdp="", fused_loss=True, compute_dtype=torch.bfloat16,
            packing=False, pack_length=None, lora_enable="lora_" in repr(self.model), lora_dropout=LORA["lora_dropout"],
            per_device_train_batch_size=len(lengths[0]) if rows_alike else 1,
            model_max_length=max(lengths[0]) if rows_alike else max(map(sum, lengths)),
            gradient_checkpointing=self.backend is None, compile_layers=self.backend is not None,
            keep_activations=self.kept,
        )  # fmt: skip
        return estimate(self.model, arguments).peak

    def batch(self, samples: Sequence[Sample]) -> dict[str, Any]:
        shapes, width = self.shapes, max(s.text + s.image for s in samples)
        ids = torch.randint(FIRST_WORD, shapes.image_id, (len(samples), width))
        mask = torch.zeros_like(ids, dtype=torch.bool)
        for row, sample in enumerate(samples):
            mask[row, : sample.text + sample.image] = True
            if sample.image:
                ids[row, 1] = -200
        labels = ids.masked_fill((ids < 0) | ~mask, -100)
        # As the data set gives it: a text-only sample has a black image, which no mark asks for.
        pixels = torch.randn(len(samples), 3, *[shapes.vision["image_size"]] * 2).to(torch.bfloat16)
        batch = {"input_ids": ids, "attention_mask": mask, "labels": labels, "images": pixels}
        even = len(samples) > 1 and len({(s.text, s.image) for s in samples}) == 1
        packed = self.varlen or not even  # a square mask for rows that need no padding would be a waste
        return {**{name: value.to(self.device) for name, value in batch.items()}, "packed": packed, "loss_only": True}


def built(make: Callable[[], nn.Module], device: torch.device) -> nn.Module:
    """A model with random weights, made where it stays."""
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            model = make()
    finally:
        torch.set_default_dtype(torch.float32)
    for parameter in model.parameters():
        nn.init.normal_(parameter.data, std=0.02)
    return model.train()


# Measuring


class Bench:
    def __init__(
        self, shapes: Shapes, device: torch.device, keeps: Sequence[float], steps: int, profiles: Path | None = None
    ) -> None:
        self.shapes, self.device, self.keeps, self.steps, self.profiles = shapes, device, keeps, steps, profiles
        self.rate = 0.0 if device.type == "meta" else self._matmul_rate()
        self.peaks: dict[str, float] = {}

    def _matmul_rate(self) -> float:
        size = self.shapes.probe
        left, right = (torch.randn(size, size, device=self.device, dtype=torch.bfloat16) for _ in range(2))
        rate = 2 * size**3 / median_seconds(lambda: left @ right, 10, warm=3, device=self.device)
        say(what=f"matmul{size}", TFLOPs=rate / 1e12)
        return rate

    def flops(self, side: Any, samples: Sequence[Sample], *, per_weight: int) -> float:
        tokens, squares = token_squares(samples, self.shapes)
        language = sum(p.numel() for p in self._language_weights(side))
        layers, width = self.shapes.text["num_hidden_layers"], self.shapes.text["hidden_size"]
        tower = sum(p.numel() for p in side.tower.parameters())
        images = sum(s.image for s in samples)
        return (
            per_weight * language * tokens
            + 6 * layers * width * squares
            + 2 * tower * images * (self.shapes.image_tokens + 1)
        )

    @staticmethod
    def _language_weights(side: Any) -> list[Tensor]:
        tower = {id(p) for part in (side.tower, side.projector) for p in part.parameters()}
        return [p for name, p in side.model.named_parameters() if id(p) not in tower and "lora_" not in name]

    def train(self, what: str, side: Any, batches: list[list[Sample]], *, per_weight: int = 6, **about: Any) -> None:
        """Time whole passes over `batches`, an optimizer step each."""
        if isinstance(side, Ours):
            about["estimated_GiB"] = side.estimated(batches) / GIB
        if self.device.type == "meta":
            say(what=f"train_{what}", side=side.name, **about)
            return
        weights = [p for p in side.model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(weights, lr=1e-5, fused=True)
        inputs = [side.batch(samples) for samples in batches]

        def one_pass() -> None:
            for batch in inputs:
                side.model(**batch).loss.backward()
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)

        began = time.perf_counter()
        for _ in range(2 if len(batches) == 1 else 1):
            one_pass()
        synchronize(self.device)
        starting = time.perf_counter() - began
        reset_peak(self.device)
        seconds = median_seconds(one_pass, self.steps if len(batches) == 1 else 1, warm=0, device=self.device)
        samples = [sample for batch in batches for sample in batch]
        flops = self.flops(side, samples, per_weight=per_weight)
        peak = peak_gib(self.device)
        self.peaks[f"{side.name}_{what}"] = peak
        say(
            what=f"train_{what}", side=side.name, samples_s=len(samples) / seconds,
            tok_s=token_squares(samples, self.shapes)[0] / seconds, seconds=seconds, model_TFLOPs=flops / seconds / 1e12,
            mfu=flops / seconds / self.rate, peak_GiB=peak, starting_s=starting, **about,
        )  # fmt: skip
        if self.profiles is not None:
            self._profile(f"{what}-{side.name}{about.get('keep', '')}", one_pass)

    def _profile(self, name: str, one_pass: Callable[[], None]) -> None:
        """What one pass spends its time on, kernel by kernel, into a file."""
        from torch.profiler import ProfilerActivity, profile

        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
            one_pass()
            synchronize(self.device)
        table = found.key_averages().table(sort_by="self_cuda_time_total", row_limit=40, max_name_column_width=90)
        assert self.profiles is not None
        (self.profiles / f"profile-{name}.txt").write_text(table)

    # What is trained

    def full(self, side: Any) -> None:
        trains(side, "all")
        batch = [[Sample(self.shapes.text_tokens, image=True)] * self.shapes.batch]
        if isinstance(side, Stock):
            side.prepare(frozen=False, dynamic=False)
            self.train("full", side, batch)
            return
        for keep in self.keeps:
            side.keep = keep
            self.guarded(f"full, keep {keep}", lambda: self._full_keeping(side, batch))
        side.keep = self.keeps[0]

    def _full_keeping(self, side: Ours, batch: list[list[Sample]]) -> None:
        side.prepare(frozen=False, dynamic=False)
        self.train("full", side, batch, keep=side.keep)

    def packed(self, side: Any) -> None:
        trains(side, "all")
        side.prepare(frozen=False, dynamic=True)
        samples, shapes = realistic(self.shapes), self.shapes
        if isinstance(side, Stock):
            batches = [samples[start : start + shapes.batch] for start in range(0, len(samples), shapes.batch)]
            widths = [max(s.text + s.image * shapes.image_tokens for s in batch) * len(batch) for batch in batches]
            self.train("mixed", side, batches, filled=token_squares(samples, shapes)[0] / sum(widths))
            return
        lengths = [s.text + s.image * shapes.image_tokens for s in samples]
        rows = plan_rows(lengths, shapes.row, seed=0)
        filled = sum(lengths) / (len(rows) * shapes.row)
        self.train("mixed", side, [[samples[i] for i in row] for row in rows], filled=filled, varlen=side.varlen)

    def projector(self, side: Any) -> None:
        trains(side, "projector")
        side.prepare(frozen=True, dynamic=False)
        captions = [Sample(self.shapes.caption_tokens, image=True)] * self.shapes.captions
        self.train("projector", side, [captions], per_weight=4)

    def lora(self, side: Any) -> None:
        """Rank 128 on all linear layers of the language model, and the projector, as the published recipe."""
        from peft import LoraConfig, get_peft_model

        trains(side, "projector")
        names = [
            name
            for name, module in side.model.named_modules()
            if isinstance(module, nn.Linear)
            and module is not side.head
            and not part_of(module, side.tower, side.projector)
        ]
        config = LoraConfig(target_modules=names, task_type="CAUSAL_LM", **LORA)
        whole = side.model
        adapted = get_peft_model(whole, config, autocast_adapter_dtype=False)
        side.projector.requires_grad_(True)
        try:
            side.prepare(frozen=True, dynamic=False)
            side.model = adapted
            batch = [[Sample(self.shapes.text_tokens, image=True)] * self.shapes.batch]
            self.train("lora", side, batch, per_weight=4)
        finally:
            side.model = whole

    def guarded(self, what: str, work: Callable[[], None]) -> None:
        try:
            work()
        except Exception as error:  # one figure that cannot be had is no reason to go without the others
            say(what=what, error=f"{type(error).__name__}: {error}"[:600])
        free(self.device)


def trains(side: Any, what: str) -> None:
    side.model.requires_grad_(what == "all")
    side.tower.requires_grad_(False)
    side.projector.requires_grad_(True)


def part_of(module: nn.Module, *wholes: nn.Module) -> bool:
    return any(module is part for whole in wholes for part in whole.modules())


def median_seconds(work: Callable[[], Any], runs: int, *, warm: int, device: torch.device) -> float:
    for _ in range(warm):
        work()
    times = []
    for _ in range(runs):
        synchronize(device)
        began = time.perf_counter()
        work()
        synchronize(device)
        times.append(time.perf_counter() - began)
    return sorted(times)[len(times) // 2]


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()


def peak_gib(device: torch.device) -> float:
    return torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else 0.0


def free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


MEASUREMENTS = ("full", "packed", "projector", "lora")  # LoRA last: its adapters stay in the model
SIDES = {"stock": Stock, "ours": Ours}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(MEASUREMENTS), help="measurements, joined by commas")
    parser.add_argument("--sides", default="stock,ours")
    parser.add_argument("--eager", action="store_true", help="ours with gradient checkpointing in place of compiling")
    parser.add_argument("--keep", default="0.3", help="values of --keep_activations for full fine-tuning")
    parser.add_argument("--steps", type=int, default=3, help="timed steps, of which the median counts")
    parser.add_argument("--profiles", type=Path, help="write what each pass spends its time on into this folder")
    parser.add_argument("--keep-frozen", type=float, default=1.0, help="the same where the language model is frozen")
    parser.add_argument("--estimate", action="store_true", help="estimates of memory only, on any machine")
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args(argv)
    device = torch.device("meta" if args.estimate else "cuda" if torch.cuda.is_available() else "cpu")
    gpu = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    say(torch=torch.__version__, transformers=transformers.__version__, gpu=gpu)
    torch.manual_seed(0)
    keeps = [float(keep) for keep in args.keep.split(",")]
    bench = Bench(TINY if args.tiny else FULL, device, keeps, args.steps, args.profiles)
    for name in ["ours"] if args.estimate else args.sides.split(","):
        try:
            side = SIDES[name](bench.shapes, device)
            if isinstance(side, Ours):
                side.keep_frozen = args.keep_frozen
                side.backend = None if args.eager else side.backend
        except Exception as error:
            say(what=f"build {name}", error=f"{type(error).__name__}: {error}"[:600])
            continue
        for what in args.only.split(","):
            bench.guarded(f"{name} {what}", lambda what=what, side=side: getattr(bench, what)(side))  # type: ignore[misc]
        del side
        free(device)


if __name__ == "__main__":
    main()
