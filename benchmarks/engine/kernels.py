"""The engine's Triton kernels on one GPU: a comparison with float64, and times beside PyTorch's operators.

    python -m benchmarks.engine.kernels > benchmarks/results/kernels.md

First every kernel of `TritonKernels` is compared with `ReferenceKernels` in float64 (kernel_checks.py); if one is off, the
exit status is 1. Then each is timed in CUDA graphs whose launches rotate among enough tensors that nothing comes from the
GPU's cache. Shapes are those of LLaVA-1.5-7B. Beside the times stand bytes or operations per second, to be compared with
the bandwidth and the matmul rate of the same GPU. `--only linear,step` picks tables, `--check` stops after the comparison.
"""

# ruff: noqa: B023 - graph_us calls what it gets before the loop goes on

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.engine.kernel_checks import (
    BF16,
    DEVICE,
    KINDS,
    Kind,
    print_checks,
    random,
    random_plan,
    sampling_tensors,
)
from benchmarks.measure import gpu_bandwidth, gpu_matmul_rate, graph_seconds
from llava.engine.kernels.base import AttentionParams, AttentionPlan, Kernels, KVCache, SamplingTensors, Weight
from llava.engine.kernels.quantized import QuantizedWeight
from llava.engine.kernels.reference import ReferenceKernels
from llava.engine.kernels.triton.kernels import TritonKernels

WIDTH, INNER, VOCABULARY, LAYERS, HEADS, HEAD = 4096, 11008, 32064, 32, 32, 128
SHAPES = {
    "qkv": (3 * WIDTH, WIDTH),
    "o": (WIDTH, WIDTH),
    "gate_up": (2 * INNER, WIDTH),
    "down": (WIDTH, INNER),
    "head": (VOCABULARY, WIDTH),
}
BLOCK = 64  # tokens of a cache block
CACHE = 600_000_000  # bytes that launches rotate among: ten times the GPU's cache


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="only compare")
    parser.add_argument("--only", help=f"tables, separated by commas: {', '.join(TABLES)}")
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    kernels = TritonKernels(DEVICE)
    print_heading()
    if not print_checks(kernels):
        return 1
    if not args.check:
        for name in args.only.split(",") if args.only else TABLES:
            TABLES[name](kernels)
            torch.cuda.empty_cache()
    return 0


def graph_us(work: Callable[[], object]) -> float:
    """Return the median microseconds of some launches, replayed as a CUDA graph."""
    return 1e6 * graph_seconds(work, 7)


def print_heading() -> None:
    import triton

    print(f"# The engine's kernels\n\nOne {torch.cuda.get_device_name()}, torch {torch.__version__}, ", end="")
    print(f"triton {triton.__version__}, `python -m benchmarks.engine.kernels`.")
    print(f"Negating 4 GB moves {gpu_bandwidth() / 1e12:.2f} TB/s (read and written), ", end="")
    print(f"a product of 8192 squares makes {gpu_matmul_rate() / 1e12:.0f} TFLOP/s.\n")


def random_weight(kind: Kind, shape: tuple[int, int]) -> Weight:
    rows, width = shape
    if kind == "bf16":
        return torch.randn(*shape, device=DEVICE, dtype=BF16) * 0.02
    if kind == "int4":
        data = torch.randint(0, 256, (rows, width // 2), device=DEVICE, dtype=torch.uint8)
        return QuantizedWeight(kind, data, torch.rand(rows, width // 128, device=DEVICE).to(BF16))
    if kind == "int8":
        data = torch.randint(-127, 128, shape, device=DEVICE, dtype=torch.int8)
    else:
        data = torch.randn(*shape, device=DEVICE, dtype=BF16).to(torch.float8_e4m3fn)
    return QuantizedWeight(kind, data, torch.rand(rows, device=DEVICE) * 1e-3)


@dataclass(frozen=True)
class RandomModel:
    """Weights of all layers, fused as the engine fuses them."""

    layers: list[dict[str, Weight]]
    head: Weight
    norm: Tensor

    @classmethod
    def random(cls, kind: Kind) -> RandomModel:
        names = [name for name in SHAPES if name != "head"]
        layers = [{name: random_weight(kind, SHAPES[name]) for name in names} for _ in range(LAYERS)]
        return cls(layers, random_weight(kind, SHAPES["head"]), random(WIDTH))

    @property
    def nbytes(self) -> int:
        return self.head.nbytes + sum(weight.nbytes for layer in self.layers for weight in layer.values())


def linear_table(kernels: Kernels) -> None:
    """All linear layers of a step, one after another."""
    print("## Linear layers of one decoding step\n\nMilliseconds for the 129 products, and TB/s of weights read.\n")
    counts = (1, 2, 4, 8, 16, 32, 64)
    print("| weights | by | " + " | ".join(f"{n} row{'s' * (n > 1)}" for n in counts) + " |")
    print("| --- | --- |" + " ---: |" * len(counts))
    for kind in KINDS:
        model = RandomModel.random(kind)
        for name, linear in [("ours", kernels.linear)] + [("library", F.linear)] * (kind == "bf16"):
            cells = []
            for count in counts:
                hidden, inner = random(count, WIDTH), random(count, INNER)

                def step() -> None:
                    for layer in model.layers:
                        for part, weight in layer.items():
                            linear(inner if part == "down" else hidden, weight)
                    linear(hidden, model.head)

                ms = graph_us(step) / 1e3
                cells.append(f"{ms:.2f} ({model.nbytes / ms / 1e9:.2f})")
            print(f"| {kind} | {name} | {' | '.join(cells)} |", flush=True)
        torch.cuda.empty_cache()
    print()
    print("Each layer alone, one row: microseconds (TB/s).\n")
    print("| weights | by | " + " | ".join(SHAPES) + " |\n| --- | --- |" + " ---: |" * len(SHAPES))
    for kind in KINDS:
        for name, linear in [("ours", kernels.linear)] + [("library", F.linear)] * (kind == "bf16"):
            cells = []
            for shape in SHAPES.values():
                weights = [random_weight(kind, shape)]
                weights += [random_weight(kind, shape) for _ in range(CACHE // weights[0].nbytes)]
                x = random(1, shape[1])
                us = graph_us(lambda: [linear(x, weight) for weight in weights]) / len(weights)
                cells.append(f"{us:.1f} ({weights[0].nbytes / us / 1e6:.2f})")
            print(f"| {kind} | {name} | {' | '.join(cells)} |", flush=True)
    print()
    prefill_linear_table(kernels)


def prefill_linear_table(kernels: Kernels) -> None:
    print("The four layers of one block for many rows: microseconds (TFLOP/s).\n")
    counts = (128, 640, 2928)
    print("| weights | " + " | ".join(f"{n} rows" for n in counts) + " |\n| --- |" + " ---: |" * len(counts))
    for kind in KINDS:
        layer = {name: random_weight(kind, shape) for name, shape in SHAPES.items() if name != "head"}
        cells = []
        for count in counts:
            inputs = {name: random(count, SHAPES[name][1]) for name in layer}
            us = graph_us(lambda: [kernels.linear(inputs[name], weight) for name, weight in layer.items()])
            work = sum(2 * count * rows * width for name, (rows, width) in SHAPES.items() if name != "head")
            cells.append(f"{us:.0f} ({work / us / 1e6:.0f})")
        print(f"| {kind} | {' | '.join(cells)} |", flush=True)
    print()


def tables() -> list[Tensor]:
    """Tables in place of cosines and sines: a kernel's time does not depend on their values."""
    return [torch.rand(4096, HEAD // 2, device=DEVICE)] * 2


@dataclass(frozen=True)
class Paged:
    """KV caches of some layers, and a step over them."""

    plan: AttentionPlan
    params: AttentionParams
    caches: list[KVCache]
    q: Tensor

    @classmethod
    def random(cls, lengths: Sequence[tuple[int, int]], kv_heads: int, layers: int | None = None) -> Paged:
        plan, num_blocks = random_plan(lengths, BLOCK)
        shape = (num_blocks, BLOCK, kv_heads, HEAD)
        if layers is None:
            layers = max(1, min(LAYERS, CACHE // (4 * num_blocks * BLOCK * kv_heads * HEAD)))
        caches = [KVCache(random(*shape), random(*shape)) for _ in range(layers)]
        return cls(
            plan, AttentionParams(HEADS, kv_heads, HEAD**-0.5, *tables()), caches, random(len(plan.slots), HEADS, HEAD)
        )

    def time(self, kernels: Kernels) -> float:
        """Microseconds of one layer."""

        def work() -> None:
            for cache in self.caches:
                kernels.attend(self.q, cache, self.params, self.plan)

        return graph_us(work) / len(self.caches)


def decode_table(kernels: Kernels) -> None:
    print("## Attention while decoding\n\nMicroseconds for one layer, and TB/s of keys and values read. ", end="")
    print("SDPA has its keys and values contiguous, which a paged cache does not.\n")
    print("| sequences | context | key heads | ours | SDPA, contiguous |\n| ---: | ---: | ---: | ---: | ---: |")
    for count, context, kv_heads in (
        (1, 704, 32), (1, 3000, 32), (8, 704, 32), (64, 704, 32), (64, 2048, 32), (1, 3000, 8), (64, 2048, 8),
    ):  # fmt: skip
        nbytes = 4 * count * context * kv_heads * HEAD
        ours = Paged.random([(1, context)] * count, kv_heads).time(kernels)
        copies = max(1, CACHE // nbytes)
        keys = [(random(count, kv_heads, context, HEAD), random(count, kv_heads, context, HEAD)) for _ in range(copies)]
        q = random(count, HEADS, 1, HEAD)
        theirs = graph_us(
            lambda: [F.scaled_dot_product_attention(q, k, v, enable_gqa=kv_heads < HEADS) for k, v in keys]
        )
        cells = [f"{us:.1f} ({nbytes / us / 1e6:.2f})" for us in (ours, theirs / copies)]
        print(f"| {count} | {context} | {kv_heads} | {cells[0]} | {cells[1]} |", flush=True)
    print()


def prefill_table(kernels: Kernels) -> None:
    print("## Attention over prompts\n\nMicroseconds for one layer of 32 heads (TFLOP/s of the causal half). ", end="")
    print("The first column reads the paged cache; the others have keys and values contiguous.\n")
    peers = prefill_peers()
    print("| sequences | new tokens | context | ours, paged | gathered, then SDPA | " + " | ".join(peers) + " |")
    print("| ---: | ---: | ---: | ---: | ---: |" + " ---: |" * len(peers))
    for count, new, context in ((1, 640, 640), (1, 2928, 2928), (8, 640, 640), (1, 512, 2560), (1, 8192, 8192)):
        work = 4 * count * HEADS * HEAD * (new * context - new * (new - 1) // 2)
        paged = Paged.random([(new, context)] * count, HEADS, layers=4)
        times = [paged.time(kernels), paged.time(Gathered()) if new == context else float("nan")]
        for peer in peers.values():
            try:
                times.append(peer(count, new, context))
            except (RuntimeError, TypeError, ValueError) as error:
                print(f"{type(error).__name__}: {str(error)[:200]}", file=sys.stderr)
                times.append(float("nan"))
        cells = [f"{us:.0f} ({work / us / 1e6:.0f})" if us == us else "-" for us in times]
        print(f"| {count} | {new} | {context} | {' | '.join(cells)} |", flush=True)
    print()


class Gathered(ReferenceKernels):
    """Keys and values copied out of the cache, then the library's attention; whole prompts of equal lengths only."""

    def attend(self, q: Tensor, cache: KVCache, params: AttentionParams, plan: AttentionPlan) -> Tensor:
        num, blocks = len(plan.context_lens), plan.block_tables.reshape(-1)
        k, v = (part.index_select(0, blocks).view(num, -1, *part.shape[2:])[:, : plan.max_context] for part in cache)
        q = q.view(num, -1, *q.shape[1:])
        q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=params.scale)


def prefill_peers() -> dict[str, Callable[[int, int, int], float]]:
    """The library's operators, each taking (sequences, new tokens, context) to microseconds."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def sdpa(backend: SDPBackend, count: int, new: int, context: int) -> float:
        if new != context:
            raise ValueError("a chunk after others needs a mask")
        q = random(count, HEADS, new, HEAD)
        with sdpa_kernel(backend):
            return graph_us(lambda: F.scaled_dot_product_attention(q, q, q, is_causal=True))

    def varlen(count: int, new: int, context: int) -> float:
        from torch.nn.attention.varlen import varlen_attn

        q, k = random(count * new, HEADS, HEAD), random(count * context, HEADS, HEAD)
        starts = [torch.arange(count + 1, device=DEVICE, dtype=torch.int32) * n for n in (new, context)]
        try:
            return graph_us(lambda: varlen_attn(q, k, k, *starts, new, context, is_causal=True))
        except TypeError:  # torch 2.13 has a window instead
            return graph_us(lambda: varlen_attn(q, k, k, *starts, new, context, window_size=(-1, 0)))

    def flex(count: int, new: int, context: int) -> float:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        if count > 1:
            raise ValueError("one sequence is enough to judge it")
        q, k = random(1, HEADS, new, HEAD), random(1, HEADS, context, HEAD)
        mask = create_block_mask(lambda b, h, i, j: i + context - new >= j, None, None, new, context, device="cuda")
        compiled = torch.compile(flex_attention, dynamic=False)
        return graph_us(lambda: compiled(q, k, k, block_mask=mask))

    return {
        "SDPA, flash": lambda *sizes: sdpa(SDPBackend.FLASH_ATTENTION, *sizes),
        "SDPA, cuDNN": lambda *sizes: sdpa(SDPBackend.CUDNN_ATTENTION, *sizes),
        "varlen_attn": varlen,
        "flex_attention": flex,
    }


def token_table(kernels: Kernels) -> None:
    print("## Rows and sampling\n\nMicroseconds of one launch among 32 in a graph, ours and PyTorch's operators.\n")
    print("| kernel | 1 row | | 64 rows | | 640 rows | |\n| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    plain = ReferenceKernels()
    times: dict[str, list[float]] = {}
    for count in (1, 64, 640):
        plan, num_blocks = random_plan([(1, 32)] * count, BLOCK)
        x, residual, weight = random(count, WIDTH), random(count, WIDTH), random(WIDTH)
        gate_up, qkv = random(count, 2 * INNER), random(count, 3 * WIDTH)
        cache = KVCache(*(random(num_blocks, BLOCK, HEADS, HEAD) for _ in range(2)))
        params = AttentionParams(HEADS, HEADS, HEAD**-0.5, *tables())
        logits, rows = random(count, VOCABULARY), sampling_tensors(count)
        greedy = replace(rows, all_greedy=True)
        unlimited = replace(rows, temperature=torch.ones_like(rows.temperature), unlimited=True)
        works: dict[str, Callable[[Kernels], object]] = {
            "add_rms_norm_": lambda k: k.add_rms_norm_(x, residual, weight, 1e-5),
            "rope_store_": lambda k: k.rope_store_(qkv, cache, params, plan),
            "silu_mul": lambda k: k.silu_mul(gate_up),
            "sample, greedy": lambda k: k.sample(logits, greedy),
            "sample, unlimited": lambda k: k.sample(logits, unlimited),
            "sample, limits of all kinds": lambda k: k.sample(logits, rows),
        }
        for name, work in works.items():
            for one in (kernels, plain):
                us = graph_us(lambda: [work(one) for _ in range(32)]) / 32
                times.setdefault(name, []).append(us)
    for name, cells in times.items():
        print(f"| `{name}` | {' | '.join(f'{us:.1f}' for us in cells)} |", flush=True)
    print()


def step_table(kernels: Kernels) -> None:
    """What the engine captures: all layers of the language model, the head, greedy tokens."""
    print("## A whole decoding step\n\n32 layers, head and greedy token in one graph; milliseconds, tokens/s.\n")
    print("| weights | sequences | context | launches that overlap | launches that do not |")
    print("| --- | ---: | ---: | ---: | ---: |")
    cases: dict[Kind, tuple[tuple[int, int], ...]] = {
        "bf16": ((1, 704), (8, 704), (64, 704)),
        "int8": ((1, 704), (8, 704)),
        "fp8": ((1, 704),),
        "int4": ((1, 704),),
    }
    for kind, sizes in cases.items():
        model = RandomModel.random(kind)
        for count, context in sizes:
            paged = Paged.random([(1, context)] * count, HEADS, layers=LAYERS)
            cells = []
            for one in (kernels, TritonKernels(DEVICE, overlap=False)):
                us = graph_us(lambda: decode_step(one, model, paged))
                cells.append(f"{us / 1e3:.2f} ms, {count / us * 1e6:,.0f} tokens/s")
            print(f"| {kind} | {count} | {context} | {cells[0]} | {cells[1]} |", flush=True)
        torch.cuda.empty_cache()
    print()


def decode_step(kernels: Kernels, model: RandomModel, paged: Paged) -> Tensor:
    count = len(paged.q)
    hidden, residual = random(count, WIDTH), random(count, WIDTH)
    for layer, cache in zip(model.layers, paged.caches, strict=True):
        normed = kernels.add_rms_norm_(hidden, residual, model.norm, 1e-5)
        qkv = kernels.linear(normed, layer["qkv"])
        q = kernels.rope_store_(qkv, cache, paged.params, paged.plan)
        attended = kernels.attend(q, cache, paged.params, paged.plan)
        hidden = kernels.linear(attended, layer["o"])
        normed = kernels.add_rms_norm_(hidden, residual, model.norm, 1e-5)
        hidden = kernels.linear(kernels.gated_linear(normed, layer["gate_up"]), layer["down"])
    logits = kernels.linear(kernels.add_rms_norm_(hidden, residual, model.norm, 1e-5), model.head)
    zeros, longs = torch.zeros(count, device=DEVICE), torch.zeros(count, dtype=torch.int64, device=DEVICE)
    return kernels.sample(logits, SamplingTensors(zeros, zeros.int(), zeros, zeros, longs, longs, all_greedy=True))[0]


TABLES: dict[str, Callable[[Kernels], None]] = {
    "step": step_table,
    "linear": linear_table,
    "decode": decode_table,
    "rows": token_table,
    "prefill": prefill_table,
}

if __name__ == "__main__":
    sys.exit(main())
