"""Training speed and memory of LLaVA-1.5-7B on one GPU, here and with stock transformers.

    python -m benchmarks.train.single_gpu          tables: results/train.md

Random weights of the published shapes, bfloat16, AdamW, both in one process, one line of JSON per figure. `--only full,packed`
picks measurements, `--tiny` runs all of them on small shapes (also on a CPU) as a check, `--estimate` prints only the
memory that `llava train` estimates for ours, on any machine. A measurement that fails prints its error, and the rest go
on. Model FLOPs: six per weight and token (four where the language model is frozen), attention at half of the square, the
tower's forward pass; recomputation does not count. MFU is a share of the rate of a product of two squares of 8192 on the
same GPU.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from benchmarks.measure import free_memory, median_seconds, print_figures, synchronize
from benchmarks.shapes import FULL, TINY, Shapes
from benchmarks.train.sides import LORA, Ours, Sample, Stock, realistic, token_squares
from llava.train.memory import GIB
from llava.train.packing import plan_sequences

# Measuring


class TrainBench:
    def __init__(
        self,
        shapes: Shapes,
        device: torch.device,
        keeps: Sequence[float],
        keeps_frozen: Sequence[float],
        steps: int,
        profiles: Path | None = None,
    ) -> None:
        self.shapes, self.device, self.steps, self.profiles = shapes, device, steps, profiles
        self.keeps, self.keeps_frozen = keeps, keeps_frozen
        self.rate = 0.0 if device.type == "meta" else self._matmul_rate()
        self.peaks: dict[str, float] = {}

    def _matmul_rate(self) -> float:
        size = self.shapes.probe
        left, right = (torch.randn(size, size, device=self.device, dtype=torch.bfloat16) for _ in range(2))
        rate = 2 * size**3 / median_seconds(lambda: left @ right, 10, warm=3, device=self.device)
        print_figures(what=f"matmul{size}", TFLOPs=rate / 1e12)
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
            print_figures(what=f"train_{what}", side=side.name, **about)
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
        print_figures(
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
        self.alike("full", side, Sample(self.shapes.text_tokens, image=True), self.shapes.batch, frozen=False)

    def alike(self, what: str, side: Any, sample: Sample, number: int, *, frozen: bool, per_weight: int = 6) -> None:
        """A batch of samples of one length: stock once, ours once for each share of the activations to keep."""
        batches = [[sample] * number]
        if isinstance(side, Stock):
            side.prepare(frozen=frozen)
            self.train(what, side, batches, per_weight=per_weight)
            return

        def ours(keep: float) -> None:
            side.prepare(keep, dynamic=False)
            self.train(what, side, batches, per_weight=per_weight, keep=keep)

        for keep in self.keeps_frozen if frozen else self.keeps:
            self.guarded(f"{what}, keep {keep}", partial(ours, keep))

    def packed(self, side: Any) -> None:
        trains(side, "all")
        samples, shapes = realistic(self.shapes), self.shapes
        if isinstance(side, Stock):
            side.prepare(frozen=False)
            batches = [samples[start : start + shapes.batch] for start in range(0, len(samples), shapes.batch)]
            widths = [max(s.text + s.image * shapes.image_tokens for s in batch) * len(batch) for batch in batches]
            self.train("mixed", side, batches, filled=token_squares(samples, shapes)[0] / sum(widths))
            return
        side.prepare(self.keeps[0], dynamic=True)
        lengths = [s.text + s.image * shapes.image_tokens for s in samples]
        rows = plan_sequences(lengths, shapes.row, seed=0)
        filled = sum(lengths) / (len(rows) * shapes.row)
        self.train("mixed", side, [[samples[i] for i in row] for row in rows], filled=filled, varlen=side.varlen)

    def projector(self, side: Any) -> None:
        trains(side, "projector")
        caption = Sample(self.shapes.caption_tokens, image=True)
        self.alike("projector", side, caption, self.shapes.captions, frozen=True, per_weight=4)

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
            side.model = adapted
            sample = Sample(self.shapes.text_tokens, image=True)
            self.alike("lora", side, sample, self.shapes.batch, frozen=True, per_weight=4)
        finally:
            side.model = whole

    def guarded(self, what: str, work: Callable[[], None]) -> None:
        try:
            work()
        except Exception as error:  # a measurement that fails does not stop the others
            print_figures(what=what, error=f"{type(error).__name__}: {error}"[:600])
        free_memory()


def trains(side: Any, what: str) -> None:
    side.model.requires_grad_(what == "all")
    side.tower.requires_grad_(False)
    side.projector.requires_grad_(True)


def part_of(module: nn.Module, *wholes: nn.Module) -> bool:
    return any(module is part for whole in wholes for part in whole.modules())


def reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()


def peak_gib(device: torch.device) -> float:
    return torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else 0.0


MEASUREMENTS = ("full", "packed", "projector", "lora")  # LoRA last: its adapters stay in the model
SIDES = {"stock": Stock, "ours": Ours}


def shares(text: str) -> list[float]:
    return [float(word) for word in text.split(",")]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(MEASUREMENTS), help="measurements, joined by commas")
    parser.add_argument("--sides", default="stock,ours")
    parser.add_argument("--eager", action="store_true", help="ours with gradient checkpointing in place of compiling")
    parser.add_argument("--keep", type=shares, default=[0.3], help="values of --keep_activations, joined by commas")
    parser.add_argument("--steps", type=int, default=3, help="timed steps, of which the median counts")
    parser.add_argument("--profiles", type=Path, help="write what each pass spends its time on into this folder")
    # Frozen weights leave room, so that nothing need be computed twice.
    parser.add_argument("--keep-frozen", type=shares, default=[1.0], help="the same where the language model is frozen")
    parser.add_argument("--estimate", action="store_true", help="estimates of memory only, on any machine")
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args(argv)
    device = torch.device("meta" if args.estimate else "cuda" if torch.cuda.is_available() else "cpu")
    gpu = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    print_figures(torch=torch.__version__, transformers=transformers.__version__, gpu=gpu)
    torch.manual_seed(0)
    bench = TrainBench(TINY if args.tiny else FULL, device, args.keep, args.keep_frozen, args.steps, args.profiles)
    for name in ["ours"] if args.estimate else args.sides.split(","):
        try:
            side = SIDES[name](bench.shapes, device)
            if isinstance(side, Ours):
                side.backend = None if args.eager else side.backend
        except Exception as error:
            print_figures(what=f"build {name}", error=f"{type(error).__name__}: {error}"[:600])
            continue
        for what in args.only.split(","):
            bench.guarded(f"{name} {what}", lambda what=what, side=side: getattr(bench, what)(side))  # type: ignore[misc]
        del side
        free_memory()


if __name__ == "__main__":
    main()
