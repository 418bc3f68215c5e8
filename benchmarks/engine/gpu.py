"""Latency and throughput of the engine with LLaVA-1.5-7B on one GPU, stock transformers, and the limits of the GPU.

    python -m benchmarks.engine.gpu > results.jsonl        every row; the table (results/engine.md) comes last, on stderr
    python -m benchmarks.engine.gpu --only decode,mixed    some rows;  --tiny: small shapes, also on a CPU, as a check

Random weights of the published shapes, bfloat16. A request is a 336-pixel PIL image with fresh random pixels and 58 text
tokens; decode rate = 128 x sequences / (time for 136 new tokens - time for 8); "mixed" is 512 requests at once with 32 to
256 text tokens and 16 to 512 new ones; all greedy, the end token ignored. Limits are measured in the same run. A row that
fails prints its error, and the others go on; `--seconds` ends the run early, with the table of what there is.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers

from benchmarks.engine.stock import measure_stock
from benchmarks.engine.workload import Workload, allocated
from benchmarks.measure import free_memory, gpu_bandwidth, gpu_matmul_rate, graph_seconds, print_figures
from benchmarks.plots import Panel, draw_panels
from benchmarks.shapes import FULL, TINY
from llava.engine.config import EngineConfig
from llava.engine.engine import Engine
from llava.engine.request import Request, SamplingParams, ScoreRequest

# By row: unit, transformers 5.17, vLLM 0.22.0 (both measured before), what is required, and the limit of the GPU.
REQUIRED: dict[str, tuple[str, float | None, float | None, float, str]] = {
    "first token": ("ms", 31.6, 48.1, 22, "14.5 + preprocessing"),
    "decode 1": ("tok/s", 38.7, 215, 260, "340"),
    "decode 8": ("tok/s", 426, 1451, 1700, "2,240"),
    "decode 64": ("tok/s", 2301, 5996, 6400, "7,400"),
    "mixed 512": ("s", None, 34.0, 27, "24"),
    "int8 decode 1": ("tok/s", None, None, 400, "680"),
    "follow-up first token": ("ms", None, None, 8, "-"),
    "anyres first token": ("ms", None, None, 80, "67"),
    "ready": ("s", None, 72, 15, "-"),
}


class EngineBench:
    def __init__(self, workload: Workload, *, tiny: bool, out: Path | None) -> None:
        self.workload, self.tiny, self.out = workload, tiny, out
        self.figures: dict[str, Any] = {}
        self.max_running = 8 if tiny else 512
        self._engine: Engine | None = None

    def record(self, what: str, value: float | None = None, **more: Any) -> None:
        """Print a figure as a line of JSON, and keep it for the table."""
        if value is not None:
            self.figures[what] = value
        print_figures(what=what, **({} if value is None else {"v": value}), **more)

    @property
    def engine(self) -> Engine:
        """The engine of all rows that need no other configuration."""
        if self._engine is None:
            started = time.perf_counter()
            self._engine = self.fresh(EngineConfig(max_running=self.max_running, feature_cache_bytes=2**28))
            self._engine.generate(self.workload.request(2))
            stats = self._engine.stats()
            first = "ready" not in self.figures  # later ones find the kernels compiled
            what = "ready" if first else "ready again"
            self.record(what, time.perf_counter() - started, blocks=stats.num_blocks, block=stats.block_size)
        return self._engine

    def fresh(self, config: EngineConfig) -> Engine:
        return Engine(self.workload.model, self.workload.processor, config)

    @contextmanager
    def another(self, config: EngineConfig) -> Iterator[Engine]:
        """Close the usual engine, and open one of another configuration."""
        self.close()
        engine = self.fresh(config)
        try:
            yield engine
        finally:
            engine.close()
            del engine
            free_memory()

    def close(self) -> None:
        if self._engine is not None:
            self._engine.close()
            self._engine = None
            free_memory()

    def seconds(self, requests: Sequence[Request], engine: Engine | None = None) -> float:
        engine = engine or self.engine
        started = time.perf_counter()
        engine.generate(requests)
        return time.perf_counter() - started

    def decode_rate(self, num: int, engine: Engine | None = None, *, runs: int = 3, new: int = 128) -> float:
        new = 8 if self.tiny else new

        def median(num_new: int) -> float:
            workload = self.workload
            return statistics.median(
                self.seconds([workload.request(num_new) for _ in range(num)], engine) for _ in range(runs)
            )

        return num * new / (median(8 + new) - median(8))


# Rows


def limits(bench: EngineBench) -> None:
    """The GPU's bandwidth and matmul rate, and the linear layers alone of a decoding step and of a prompt."""
    if bench.workload.device.type == "cuda":
        bench.record("reading and writing, TB/s", gpu_bandwidth() / 1e12)
        bench.record("matmul TFLOP/s", gpu_matmul_rate() / 1e12)
        for rows in (1, 8, 64, 640, 2928):
            bench.record(f"linears {rows} rows, ms", 1e3 * linear_seconds(bench.workload.model, rows))
        free_memory()


def linear_seconds(model: Any, rows: int) -> float:
    """Time all linear layers of the language model by cuBLAS; of a prompt, the output layer for the last token alone."""
    layers = [module for module in model.get_model().layers.modules() if isinstance(module, torch.nn.Linear)]
    widths = {module.in_features for module in layers}
    inputs = {width: torch.randn(rows, width, device="cuda", dtype=torch.bfloat16) for width in widths}

    def step() -> None:
        for module in layers:
            module(inputs[module.in_features])
        last = inputs[model.lm_head.in_features]
        model.lm_head(last if rows <= 64 else last[-1:])

    return graph_seconds(step)


def correct(bench: EngineBench) -> None:
    """The engine's greedy tokens and log probabilities beside those of model.generate, with graphs and without."""
    workload, model = bench.workload, bench.workload.model
    requests = [
        workload.request(24),
        replace(workload.request(24), prompt=[1, *workload.words(40)], images=[]),
        workload.request(24, 20),
    ]
    expected = []
    for request in requests:
        ids, inputs = torch.tensor([request.prompt], device=model.device), pixels_of(workload, request)
        tokens = model.generate(ids, **inputs, do_sample=False, max_new_tokens=24, min_new_tokens=24)[0].tolist()
        with torch.inference_mode():
            whole = torch.cat([ids, torch.tensor([tokens], device=model.device)], dim=1)
            logits = model(whole, **inputs).logits[0, -25:-1].float()
        expected.append((tokens, logits))
    for graphs in (True, False):
        with bench.another(EngineConfig(max_running=4, graphs=graphs)) as engine:
            results = engine.generate(requests)
            scores = engine.score(
                [ScoreRequest(r.prompt, tokens, r.images) for r, (tokens, _) in zip(requests, expected, strict=True)]
            )
            for number, (result, score, (tokens, logits)) in enumerate(zip(results, scores, expected, strict=True)):
                got = result.completions[0].token_ids
                first = next((place for place in range(24) if got[place] != tokens[place]), None)
                gap = None if first is None else float(logits[first].topk(2).values.diff().abs())
                logprobs = (
                    logits.log_softmax(dim=-1)
                    .gather(1, torch.tensor(tokens, device=logits.device)[:, None])[:, 0]
                    .tolist()
                )
                worst = max(abs(a - b) for a, b in zip(score.logprobs, logprobs, strict=True))
                bench.record(
                    f"correct, graphs {'on' if graphs else 'off'}, request {number}", first_divergence=first,
                    gap_of_top_two_there=gap, worst_logprob_difference=worst, std_of_logits=float(logits.std()),
                )  # fmt: skip


def pixels_of(workload: Workload, request: Request) -> dict[str, Any]:
    if not request.images:
        return {}
    inputs: Any = workload.processor("<image>", request.images)
    return {"images": inputs.images.to(workload.model.dtype), "image_sizes": inputs.image_sizes}


def stock(bench: EngineBench) -> None:
    bench.close()
    for what, value in measure_stock(bench.workload).items():
        bench.record(f"stock {what}", value)


def first_token(bench: EngineBench) -> None:
    """From a PIL image to its first token."""
    engine, workload = bench.engine, bench.workload
    requests = [workload.request(1) for _ in range(13)]
    times = [1e3 * bench.seconds([request], engine) for request in requests][3:]
    started = time.perf_counter()
    prompts = [engine._build_prompt(request) for request in requests]
    prepared = 1e3 * (time.perf_counter() - started) / len(prompts)
    bench.record("first token", statistics.median(times), best=min(times), worst=max(times), preprocessing_ms=prepared)


def follow_up(bench: EngineBench) -> None:
    """A second question about the same image, 30 tokens long, after an answer of 32."""
    engine, workload, times, cached = bench.engine, bench.workload, [], []
    for _ in range(13):
        request = workload.request(32)
        first = engine.generate(request)
        prompt: Any = request.prompt
        following = [*prompt, *first.completions[0].token_ids, *workload.words(30)]
        started = time.perf_counter()
        result = engine.generate(Request(following, request.images, SamplingParams(max_new_tokens=1, ignore_eos=True)))
        times.append(1e3 * (time.perf_counter() - started))
        cached.append(result.usage.num_prompt_tokens - result.usage.num_cached_tokens)
    bench.record(
        "follow-up first token",
        statistics.median(times[3:]),
        best=min(times),
        worst=max(times[3:]),
        tokens_computed=cached[-1],
    )


def decode(bench: EngineBench) -> None:
    for num in (1, 8, 64):
        if num <= bench.max_running:
            bench.record(f"decode {num}", bench.decode_rate(num))


def mixed(bench: EngineBench) -> None:
    rng, workload, engine = random.Random(0), bench.workload, bench.engine
    num = 512 if not bench.tiny else 16
    requests = []
    for _ in range(num):
        num_text = rng.randint(32, 256) if not bench.tiny else rng.randint(4, 16)
        requests.append(workload.request(rng.randint(16, 512) if not bench.tiny else 9, num_text))
    before = engine.stats()
    took = bench.seconds(requests, engine)
    after = engine.stats()
    new = sum(request.sampling.max_new_tokens for request in requests)
    bench.record(
        "mixed 512", took, new_tok_s=new / took, steps=after.num_steps - before.num_steps,
        preemptions=after.num_preemptions - before.num_preemptions,
    )  # fmt: skip


def scale(bench: EngineBench) -> None:
    """Throughput against the number of running requests, and what one costs in memory."""
    for num in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512):
        if num <= bench.max_running:
            bench.record(f"scale {num}", bench.decode_rate(num, runs=1, new=64 if num < 256 else 32))
    decoder = bench.engine._worker.runner.decoder
    bench.record("memory per request, MB", 700 * decoder.bytes_per_token / 1e6, bytes_per_token=decoder.bytes_per_token)


def many(bench: EngineBench) -> None:
    """10,000 short requests: the last thousand as fast as the first, and no more memory."""
    engine, workload = bench.engine, bench.workload
    rounds, per_round = 10, 1000 if not bench.tiny else 200
    rates, memory = [], []
    for _ in range(rounds):
        requests = [short_request(workload, with_image=number % 50 == 0) for number in range(per_round)]
        rates.append(per_round / bench.seconds(requests, engine))
        memory.append(allocated(workload.device))
    bench.record("many: second tenth, requests/s", rates[1])
    bench.record("many: last tenth, requests/s", rates[-1], memory_grew_MB=(memory[-1] - memory[1]) / 1e6,
               blocks_in_use=engine.stats().num_blocks_used)  # fmt: skip


def short_request(workload: Workload, *, with_image: bool) -> Request:
    if with_image:
        return workload.request(8, 24)
    return Request([1, *workload.words(24)], sampling=SamplingParams(max_new_tokens=8, ignore_eos=True))


def anyres(bench: EngineBench) -> None:
    """An image of four tiles and an overview, 2,928 features."""
    bench.close()
    workload = bench.workload
    workload.set_tiling(True)
    try:
        with bench.another(EngineConfig(max_running=4)) as engine:
            requests = [workload.request(1, image=workload.image(2 * workload.side)) for _ in range(9)]
            times = [1e3 * bench.seconds([request], engine) for request in requests][2:]
            tokens = engine.generate(requests[0]).usage.num_image_tokens
            bench.record("anyres first token", statistics.median(times), best=min(times), image_tokens=tokens)
    finally:
        workload.set_tiling(False)


def speculation(bench: EngineBench) -> None:
    """Speculation by n-grams on answers that repeat themselves, as those of random weights do."""
    for num_draft in (0, 6):
        with bench.another(EngineConfig(max_running=4, speculation=num_draft)) as engine:
            before = engine.stats()
            rate = bench.decode_rate(1, engine, runs=1)
            after = engine.stats()
            per_step = (after.num_new_tokens - before.num_new_tokens) / (after.num_steps - before.num_steps)
            bench.record(f"speculation {num_draft} decode 1", rate, tokens_per_step=per_step)


def profile(bench: EngineBench) -> None:
    """Where the time of a step goes, kernel by kernel: 20 decoding steps of 1 and of 64 sequences, and 4 prompts."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as record

    engine, workload = bench.engine, bench.workload
    for name, num, new in (("decode 1", 1, 24), ("decode 64", 64, 24), ("first token", 1, 1)):
        requests = [workload.request(new) for _ in range(num)]
        engine.generate(requests)
        with record(
            activities=[ProfilerActivity.CUDA] if workload.device.type == "cuda" else [ProfilerActivity.CPU]
        ) as recorded:
            engine.generate([workload.request(new) for _ in range(num)])
        table = recorded.key_averages().table(sort_by="self_cuda_time_total", row_limit=25, max_name_column_width=70)
        bench.record(f"profile {name}", written=bool(bench.out))
        if bench.out:
            (bench.out / f"profile_{name.replace(' ', '_')}.txt").write_text(table)


def rounded(bench: EngineBench) -> None:
    """Weights in 8 and 4 bits. The engine drops the full weights, so that they are kept here and put back."""
    linears = [m for m in bench.workload.model.modules() if isinstance(m, torch.nn.Linear)]
    weights = [module.weight for module in linears]
    for kind in ("int8", "fp8", "int4") if not bench.tiny else ("int8",):
        try:
            with bench.another(EngineConfig(max_running=8, weights=kind)) as engine:
                bench.record(f"{kind} decode 1", bench.decode_rate(1, engine, runs=2))
                bench.record(f"{kind} decode 8", bench.decode_rate(8, engine, runs=1))
        finally:
            for module, weight in zip(linears, weights, strict=True):
                module.weight = weight


def ready(bench: EngineBench) -> None:
    """From weights in memory to the first answer, compilation included."""
    assert bench.engine.stats().num_finished == 1


ROWS: dict[str, Callable[[EngineBench], None]] = {
    "ready": ready,
    "correct": correct,
    "first": first_token,
    "followup": follow_up,
    "decode": decode,
    "mixed": mixed,
    "limits": limits,
    "stock": stock,
    "anyres": anyres,
    "rounded": rounded,
    "many": many,
    "profile": profile,
    "speculation": speculation,
    "scale": scale,
}


def report(figures: Mapping[str, Any], out: Path | None) -> None:
    print(table(figures), file=sys.stderr)
    if out:
        (out / "engine.md").write_text(table(figures) + "\n")
        if any(what.startswith("scale ") for what in figures):
            (out / "engine_scale.svg").write_text(plot(figures))


def table(figures: Mapping[str, Any]) -> str:
    """Return a Markdown table of the required figures, then one of everything else that was measured."""
    lines = [
        "| what | unit | transformers, then | here | vLLM 0.22.0, then | required | engine | limit |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for what, (unit, transformers_then, vllm, required, limit) in REQUIRED.items():
        now = figures.get(f"stock {what}")
        cells = [transformers_then, now, vllm, required, figures.get(what)]
        lines.append(
            f"| {what} | {unit} | " + " | ".join("-" if c is None else f"{c:,.4g}" for c in cells) + f" | {limit} |"
        )
    lines += ["", "| also | |", "|---|---:|"]
    lines += [f"| {what} | {value:,.5g} |" for what, value in figures.items() if what not in REQUIRED]
    return "\n".join(lines)


def plot(figures: Mapping[str, Any]) -> str:
    """New tokens per second against running requests."""
    rates = {what.split()[1]: value for what, value in figures.items() if what.startswith("scale ")}
    panel = Panel("new tokens per second", "running requests", list(rates), {"engine": list(rates.values())})
    return draw_panels([panel], "throughput against the number of running requests")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help=f"rows, separated by commas: {', '.join(ROWS)}")
    parser.add_argument("--tiny", action="store_true", help="small shapes, also without a GPU")
    parser.add_argument("--seconds", type=float, default=1e9, help="begin no row after so long")
    parser.add_argument("--out", type=Path, help="folder for profiles, the table and a plot")
    parser.add_argument("--of", type=Path, metavar="FILE", help="measure nothing: table and plot of results.jsonl")
    args = parser.parse_args(argv)
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
    if args.of:
        lines = [json.loads(line) for line in args.of.read_text().splitlines()]
        report({line["what"]: line["v"] for line in lines if "v" in line}, args.out)
        return
    started = time.perf_counter()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    print_figures(
        gpu=name, torch=torch.__version__, transformers=transformers.__version__, python=sys.version.split()[0]
    )
    workload = Workload(TINY if args.tiny else FULL, device)
    bench = EngineBench(workload, tiny=args.tiny, out=args.out)
    print_figures(what="built", s=time.perf_counter() - started)
    for row in args.only.split(",") if args.only else ROWS:
        begun = time.perf_counter()
        if begun - started > args.seconds:
            print_figures(what=row, skipped="out of time")
            continue
        try:
            ROWS[row](bench)
        except Exception as error:
            print_figures(what=row, error=repr(error)[:300])
            traceback.print_exc()
        print_figures(what=f"row {row}", s=time.perf_counter() - begun)
    bench.close()
    report(bench.figures, args.out)


if __name__ == "__main__":
    main()
