"""The engine's arithmetic: against transformers' own modules, and Triton's kernels against PyTorch's in its interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from llava.engine.kernels import pick_kernels
from llava.engine.kernels.base import AttentionParams, AttentionPlan, Kernels, KVCache, SamplingTensors
from llava.engine.kernels.cpu import build as native_build
from llava.engine.kernels.cpu.kernels import CpuKernels, packs
from llava.engine.kernels.cpu.native import NativeKernels
from llava.engine.kernels.philox import uniform
from llava.engine.kernels.quantized import quantize
from llava.engine.kernels.reference import ReferenceKernels, without_gaps
from llava.errors import InputError

BLOCK = 16
STEPS = {  # (new tokens, tokens in the cache) of each sequence
    "one": [(1, 40)],
    "decoding": [(1, 1), (1, 37), (1, 0), (1, 16)],
    "prompt": [(23, 23)],
    "chunk": [(9, 50)],
    "mixed": [(1, 33), (12, 12), (1, 0), (5, 21), (2, 2)],
}
each_step = pytest.mark.parametrize("lengths", STEPS.values(), ids=STEPS)


def compiled() -> Kernels:
    functions = native_build.load()
    if functions is None:
        pytest.skip("no C++ compiler")
    return NativeKernels(functions)


@pytest.fixture(params=[ReferenceKernels, CpuKernels, compiled])
def kernels(request: pytest.FixtureRequest) -> Kernels:
    torch.manual_seed(0)
    return request.param()


def a_plan(lengths: Sequence[tuple[int, int]], *, padding: int = 0) -> AttentionPlan:
    """Sequences whose blocks lie anywhere in the pool, and tokens at the end that nobody has."""
    most = -(-max(context for _, context in lengths) // BLOCK)
    tables = torch.randperm(len(lengths) * most).view(len(lengths), most)
    places = [(row, at) for row, (new, context) in enumerate(lengths) for at in range(context - new, context)]
    slots = [int(tables[row, at // BLOCK]) * BLOCK + at % BLOCK if at >= 0 else -1 for row, at in places]
    return AttentionPlan(
        query_starts=torch.tensor([0, *accumulate(new for new, _ in lengths)], dtype=torch.int32),
        context_lens=torch.tensor([context for _, context in lengths], dtype=torch.int32),
        block_tables=tables.int(),
        slots=torch.tensor(slots + [-1] * padding),
        positions=torch.tensor([max(at, 0) for _, at in places] + [0] * padding),
        max_query=max(new for new, _ in lengths),
        max_context=max(context for _, context in lengths),
    )


def a_cache(plan: AttentionPlan, num_kv_heads: int, width: int) -> KVCache:
    shape = (plan.block_tables.numel(), BLOCK, num_kv_heads, width)
    return KVCache(torch.randn(shape), torch.randn(shape))


def contiguous(cache: Tensor, plan: AttentionPlan, row: int) -> Tensor:
    """The tokens of a sequence in order, as (1, K, tokens, d)."""
    tokens = cache[plan.block_tables[row].long()].flatten(0, 1)
    return tokens[: int(plan.context_lens[row])].transpose(0, 1)[None]


def exactly(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=0, atol=0)


# Norms and rotation


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rms_norm_is_llama_s(kernels: Kernels, dtype: torch.dtype) -> None:
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    norm = LlamaRMSNorm(64, eps=1e-5).to(dtype)
    torch.nn.init.normal_(norm.weight)
    x, residual = torch.randn(7, 64).to(dtype), torch.randn(7, 64).to(dtype)
    same = exactly if not isinstance(kernels, NativeKernels) else torch.testing.assert_close
    same(kernels.rms_norm(x, norm.weight, 1e-5), norm(x))
    total, before = residual.clone(), x.clone()
    same(kernels.add_rms_norm_(x, total, norm.weight, 1e-5), norm(residual + x))
    assert torch.equal(total, residual + x)
    assert torch.equal(x, before)


def test_layer_norm_adds_in_place(kernels: Kernels) -> None:
    norm = torch.nn.LayerNorm(48)
    x, residual = torch.randn(5, 48), torch.randn(5, 48)
    total = residual.clone()
    assert torch.equal(kernels.add_layer_norm_(x, total, norm.weight, None, norm.eps), norm(residual + x))
    assert torch.equal(total, residual + x)


@pytest.mark.parametrize("slots", [[3, -1, 5, -1], [-1, -1, 0, 7], [-1, -1, -1], [6, 2]])
def test_what_a_gpu_stores_without_counting(slots: list[int]) -> None:
    """Of a padded step, and of one in which nothing is stored, as where a graph is recorded."""
    cache, new, at = torch.randn(8, 2, 4), torch.randn(len(slots), 2, 4), torch.tensor(slots)
    wanted = cache.clone()
    for slot, row in zip(slots, new, strict=True):
        if slot >= 0:
            wanted[slot] = row
    filled, written = without_gaps(cache, new, at)
    cache.index_copy_(0, filled, written)
    assert torch.equal(cache, wanted)


@pytest.mark.parametrize("full_tables", [False, True])
def test_rotation_is_llama_s_and_keys_land_in_their_slots(kernels: Kernels, full_tables: bool) -> None:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

    heads, kv_heads, width = 4, 2, 16
    config = LlamaConfig(hidden_size=heads * width, num_attention_heads=heads, max_position_embeddings=64)
    plan = a_plan(STEPS["mixed"], padding=2)
    num_tokens = len(plan.slots)
    qkv = torch.randn(num_tokens, (heads + 2 * kv_heads) * width)
    cos, sin = LlamaRotaryEmbedding(config)(qkv, torch.arange(64)[None])
    q, k, v = qkv.view(num_tokens, -1, width).split([heads, kv_heads, kv_heads], dim=1)
    want_q, want_k = apply_rotary_pos_emb(
        q.transpose(0, 1)[None], k.transpose(0, 1)[None], cos[:, plan.positions], sin[:, plan.positions]
    )
    cache = a_cache(plan, kv_heads, width)
    before = cache.k.clone()
    tables = (cos[0], sin[0]) if full_tables else (cos[0, :, : width // 2], sin[0, :, : width // 2])
    got = kernels.rope_store_(qkv, cache, AttentionParams(heads, kv_heads, 1.0, *tables), plan)
    torch.testing.assert_close(got, want_q[0].transpose(0, 1))
    stored = plan.slots >= 0
    slots = plan.slots[stored]
    torch.testing.assert_close(cache.k.flatten(0, 1)[slots], want_k[0].transpose(0, 1)[stored])
    assert torch.equal(cache.v.flatten(0, 1)[slots], v[stored])
    others = torch.ones(cache.k.shape[0] * BLOCK, dtype=torch.bool)
    others[slots] = False
    assert torch.equal(cache.k.flatten(0, 1)[others], before.flatten(0, 1)[others])


def test_query_and_key_norms_are_qwen3_s(kernels: Kernels) -> None:
    from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

    heads, kv_heads, width = 4, 2, 16
    plan = a_plan(STEPS["chunk"])
    norms = [Qwen3RMSNorm(width, eps=1e-6) for _ in range(2)]
    for norm in norms:
        torch.nn.init.normal_(norm.weight)
    qkv = torch.randn(len(plan.slots), (heads + 2 * kv_heads) * width)
    cache = a_cache(plan, kv_heads, width)
    params = AttentionParams(heads, kv_heads, 1.0, q_norm=norms[0].weight, k_norm=norms[1].weight, norm_eps=1e-6)
    q = kernels.rope_store_(qkv, cache, params, plan)
    parts = qkv.view(len(qkv), -1, width)
    torch.testing.assert_close(q, norms[0](parts[:, :heads]))
    torch.testing.assert_close(cache.k.flatten(0, 1)[plan.slots], norms[1](parts[:, heads : heads + kv_heads]))


# Attention


@each_step
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2)])
def test_attention_is_sdpa_over_contiguous_keys(
    kernels: Kernels, lengths: list[tuple[int, int]], heads: int, kv_heads: int
) -> None:
    plan, width = a_plan(lengths), 16
    cache = a_cache(plan, kv_heads, width)
    q = torch.randn(len(plan.slots), heads, width)
    got = kernels.attend(q, cache, AttentionParams(heads, kv_heads, 0.3), plan)
    for row, (new, context) in enumerate(lengths):
        start = int(plan.query_starts[row])
        if not context:
            assert not got[start : start + new].any()
            continue
        mask = torch.ones(new, context, dtype=torch.bool).tril(context - new)
        k, v = (contiguous(part, plan, row) for part in cache)
        mine = q[start : start + new].transpose(0, 1)[None]
        want = F.scaled_dot_product_attention(mine, k, v, attn_mask=mask, scale=0.3, enable_gqa=True)
        torch.testing.assert_close(got[start : start + new], want[0].transpose(0, 1).flatten(1))


@each_step
def test_window_is_mistral_s(kernels: Kernels, lengths: list[tuple[int, int]]) -> None:
    from transformers.masking_utils import sliding_window_causal_mask_function

    plan, window = a_plan(lengths), 10
    cache = a_cache(plan, 2, 16)
    q = torch.randn(len(plan.slots), 4, 16)
    got = kernels.attend(q, cache, AttentionParams(4, 2, 0.25, window=window), plan)
    sees = sliding_window_causal_mask_function(window)
    for row, (new, context) in enumerate(lengths):
        start = int(plan.query_starts[row])
        at = torch.arange(context - new, context)[:, None], torch.arange(context)[None]
        mask = torch.as_tensor(sees(0, 0, *at)) & (at[1] <= at[0])
        if context:
            k, v = (contiguous(part, plan, row) for part in cache)
            mine = q[start : start + new].transpose(0, 1)[None]
            want = F.scaled_dot_product_attention(mine, k, v, attn_mask=mask, scale=0.25, enable_gqa=True)
            torch.testing.assert_close(got[start : start + new], want[0].transpose(0, 1).flatten(1))


@pytest.mark.parametrize("new", [21, 6, 1])
def test_alibi_is_mpt_s(kernels: Kernels, new: int) -> None:
    """The whole attention layer of MPT over a prompt, of which we compute the last tokens from a cache."""
    from transformers import MptConfig
    from transformers.models.mpt.modeling_mpt import MptAttention, build_mpt_alibi_tensor

    config = MptConfig(d_model=64, n_heads=4, max_seq_len=64)
    layer, context = MptAttention(config, 0).eval(), 21
    hidden = torch.randn(1, context, 64)
    bias = build_mpt_alibi_tensor(4, context)
    mask = torch.ones(context, context, dtype=torch.bool).triu(1)[None, None]
    with torch.no_grad():
        want = layer(hidden, bias, attention_mask=mask)[0][0, -new:]
    slopes = -build_mpt_alibi_tensor(4, 2)[:, 0, 0]
    prompt, last = a_plan([(context, context)]), a_plan([(new, context)])
    last = replace(last, block_tables=prompt.block_tables)
    cache, params = a_cache(prompt, 4, 16), AttentionParams(4, 4, 16**-0.5, alibi=slopes)
    q = kernels.rope_store_(layer.Wqkv(hidden[0]), cache, params, prompt)
    got = layer.out_proj(kernels.attend(q[-new:], cache, params, last))
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("window", [None, 12])
@pytest.mark.parametrize("biased", [False, True])
def test_many_at_once_give_what_each_gives_alone(kernels: Kernels, window: int | None, biased: bool) -> None:
    lengths = STEPS["decoding"]
    plan = a_plan(lengths)
    cache = a_cache(plan, 2, 16)
    q = torch.randn(len(lengths), 4, 16)
    params = AttentionParams(4, 2, 0.25, window=window, alibi=torch.rand(4) if biased else None)
    together = kernels.attend(q, cache, params, plan)
    for row, (_, context) in enumerate(lengths):
        alone = AttentionPlan(
            torch.tensor([0, 1]).int(), plan.context_lens[row : row + 1], plan.block_tables[row : row + 1],
            plan.slots[row : row + 1], plan.positions[row : row + 1], 1, context,
        )  # fmt: skip
        got = kernels.attend(q[row : row + 1], cache, params, alone)
        torch.testing.assert_close(got, together[row : row + 1])


# Linear layers


@pytest.mark.parametrize("kind", ["int8", "fp8", "int4"])
@pytest.mark.parametrize(("dtype", "rows"), [(torch.float32, 3), (torch.bfloat16, 1), (torch.bfloat16, 20)])
def test_a_quantized_layer_multiplies_what_its_numbers_stand_for(
    kernels: Kernels, kind: Any, dtype: torch.dtype, rows: int
) -> None:
    weight, bias, x = torch.randn(96, 256), torch.randn(96).to(dtype), torch.randn(rows, 256).to(dtype)
    held = quantize(weight, kind)
    want = F.linear(x.double(), held.dequantize(torch.float64), bias.double())
    for form in (held, kernels.pack(held)):
        error = (kernels.linear(x, form, bias).double() - want).norm() / want.norm()
        assert error < (1e-6 if dtype == torch.float32 else 8e-3)
    assert held.shape == (96, 256)
    assert held.nbytes < weight.nbytes / (7 if kind == "int4" else 3.8)


def test_rounding_errors_are_those_of_the_format() -> None:
    weight = torch.randn(40, 512) * torch.logspace(-3, 2, 40)[:, None]
    weight[7] = 0
    int8 = quantize(weight, "int8")
    assert ((int8.dequantize(torch.float64) - weight).abs() <= int8.scales[:, None] * 0.5001).all()
    fp8 = quantize(weight, "fp8")
    error = (fp8.dequantize(torch.float64) - weight).abs()
    smallest = fp8.scales[:, None] * 2**-10  # half of the smallest number
    assert (error <= torch.maximum(weight.abs() / 16 * 1.001, smallest)).all()  # three bits after the first
    int4 = quantize(weight, "int4")
    scales = int4.scales.float().abs().repeat_interleave(128, dim=1)
    error = (int4.dequantize(torch.float64) - weight).abs()
    assert (error <= scales * 1.02).all()  # the end opposite to the farthest number is cut by up to one step
    assert (error <= scales * 0.51).double().mean() > 0.98
    assert not int4.dequantize(torch.float32)[7].any()


def test_kinds_of_weights_are_named() -> None:
    with pytest.raises(InputError, match=r"'int2'; known: int8, fp8, int4"):
        quantize(torch.randn(4, 128), "int2")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="this layer's is 100; use int8"):
        quantize(torch.randn(4, 100), "int4")


def test_the_gate_of_the_mlp(kernels: Kernels) -> None:
    x, weight = torch.randn(3, 32), torch.randn(80, 32)
    gate, up = weight.split(40)
    torch.testing.assert_close(kernels.gated_linear(x, weight), F.silu(x @ gate.T) * (x @ up.T))


# Sampling


def rows_of(count: int, **changes: Any) -> SamplingTensors:
    """Rows of temperature 1 without limits, seeded 0, 1, 2, ..."""
    values: dict[str, Any] = {
        "temperature": torch.ones(count),
        "top_k": torch.zeros(count, dtype=torch.int32),
        "top_p": torch.ones(count),
        "min_p": torch.zeros(count),
        "seeds": torch.arange(count),
        "positions": torch.zeros(count, dtype=torch.int64),
    }
    return SamplingTensors(**values | changes)


def test_random_numbers_are_philox_s() -> None:
    """The first word of the published known answer for a counter and a key of zeros."""
    number = uniform(torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64))
    assert float(number) == (0x6627E8D5 >> 8) / 2**24


def test_random_numbers_are_uniform_and_tensors_give_those_of_numbers() -> None:
    from llava.engine.kernels.philox import _first_word

    seeds, positions = torch.randint(-(2**63), 2**63 - 1, (2, 4000))
    numbers = uniform(seeds, positions)
    assert torch.equal((_first_word(seeds, positions) >> 8).float() / 2**24, numbers)
    counts = torch.histc(numbers, bins=20, min=0, max=1)
    assert ((counts - 200).square() / 200).sum() < 45  # chi square with 19 degrees of freedom: p < 0.001


def test_tokens_come_as_often_as_their_probability_says(kernels: Kernels) -> None:
    logits, count = torch.tensor([0.0, 1.5, -1.0, 2.0, 0.3]), 20_000
    rows = rows_of(count, temperature=torch.full((count,), 0.8))
    tokens, logprobs = kernels.sample(logits.expand(count, -1), rows)
    wanted = (logits / 0.8).softmax(dim=0) * count
    seen = torch.bincount(tokens, minlength=5)
    assert ((seen - wanted).square() / wanted).sum() < 18.5  # four degrees of freedom: p < 0.001
    torch.testing.assert_close(logprobs, logits.log_softmax(dim=0)[tokens])


@pytest.mark.parametrize(
    ("name", "value", "warper"),
    [
        ("top_k", 7, "TopKLogitsWarper"),
        ("top_p", 0.8, "TopPLogitsWarper"),
        ("top_p", 1e-6, "TopPLogitsWarper"),
        ("min_p", 0.1, "MinPLogitsWarper"),
    ],
)
def test_limits_keep_what_transformers_keeps(kernels: Kernels, name: str, value: float, warper: str) -> None:
    import transformers

    logits, count = torch.randn(60) * 2, 4000
    kept = getattr(transformers, warper)(value)(None, logits[None])[0].softmax(dim=0)
    column = torch.full((count,), value, dtype=torch.int32 if name == "top_k" else torch.float32)
    tokens, _ = kernels.sample(logits.expand(count, -1), rows_of(count, **{name: column}))
    seen = torch.bincount(tokens, minlength=60) / count
    assert not seen[kept == 0].any()
    assert (seen[kept > 0.01] > 0).all()
    assert (seen - kept).abs().max() < 0.03


def test_a_row_s_token_does_not_depend_on_its_neighbours(kernels: Kernels) -> None:
    logits = torch.randn(12, 300) * 3
    rows = rows_of(
        12,
        temperature=torch.tensor([0.0, 0.7, 1.0, 1.3] * 3),
        top_k=torch.tensor([0, 5, 0] * 4, dtype=torch.int32),
        top_p=torch.tensor([1.0, 0.9] * 6),
        positions=torch.arange(12) * 1000,
    )
    tokens, logprobs = kernels.sample(logits, rows)
    assert torch.equal(tokens[::4], logits[::4].argmax(dim=1))
    order = torch.randperm(12)[:5]
    some = SamplingTensors(*(getattr(rows, name)[order] for name in list(vars(rows))[:6]))
    again, logprobs_again = kernels.sample(logits[order], some)
    assert torch.equal(again, tokens[order])
    torch.testing.assert_close(logprobs_again, logprobs[order])
    later, _ = kernels.sample(logits, replace(rows, positions=rows.positions + 1))
    assert not torch.equal(later, tokens)


def test_forbidden_tokens_never_come(kernels: Kernels) -> None:
    logits = torch.full((500, 50), -torch.inf)
    logits[:, [3, 40]] = torch.tensor([0.0, -8.0])
    tokens, _ = kernels.sample(logits, rows_of(500, top_k=torch.full((500,), 10, dtype=torch.int32)))
    assert set(tokens.tolist()) <= {3, 40}


# Triton


def test_a_cpu_gets_its_own_kernels_and_full_precision_the_plain_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(pick_kernels(torch.device("cpu"), torch.bfloat16), CpuKernels)
    monkeypatch.setattr(native_build, "load", lambda: None)
    assert type(pick_kernels(torch.device("cpu"), torch.bfloat16)) is CpuKernels
    assert type(pick_kernels(torch.device("cuda"), torch.float32)) is ReferenceKernels


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 3, 40, 70])
def test_a_packed_weight_multiplies_as_it_did(kernels: Kernels, rows: int, dtype: torch.dtype) -> None:
    weight, bias, x = torch.randn(43, 200).to(dtype), torch.randn(43).to(dtype), torch.randn(rows, 200).to(dtype)
    packed = kernels.pack(weight)
    for given in (None, bias):
        want = F.linear(x.double(), weight.double(), None if given is None else given.double())
        error = (kernels.linear(x, packed, given).double() - want).norm() / want.norm()
        assert error < (1e-6 if dtype == torch.float32 else 8e-3)
    repacked = {ReferenceKernels: False, CpuKernels: packs(dtype), NativeKernels: True}
    assert (packed is not weight) == repacked[type(kernels)]


def test_a_sequence_s_keys_are_read_where_they_lie_or_gathered() -> None:
    """One sequence whose blocks follow one another, and the same with its blocks exchanged."""
    kernels, cache = CpuKernels(), KVCache(*torch.randn(2, 9, 4, 2, 8))
    q, params = torch.randn(1, 2, 8), AttentionParams(2, 2, 0.3)
    one = torch.tensor([0, 1], dtype=torch.int32)
    results = []
    for blocks in ([3, 4, 5], [3, 7, 5]):
        table = torch.tensor([blocks], dtype=torch.int32)
        context = torch.tensor([11], dtype=torch.int32)
        plan = AttentionPlan(one, context, table, torch.tensor([0]), torch.tensor([10]), 1, 11)
        results.append(kernels.attend(q, cache, params, plan))
        torch.testing.assert_close(results[-1], ReferenceKernels().attend(q, cache, params, plan))
    assert not torch.equal(*results)


def test_triton_s_kernels_agree_in_its_interpreter() -> None:
    """Indexing, masks and splits without a GPU; a process of its own, since Triton reads the variable at import."""
    if find_spec("triton") is None:
        pytest.skip("triton is not installed")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONWARNINGS": "ignore"}
    folder = Path(__file__).resolve().parents[1]
    done = subprocess.run(
        [sys.executable, folder / "interpret_kernels.py"], env=environment, capture_output=True, text=True, timeout=300
    )
    if "only 0-dimensional arrays can be converted" in done.stderr:
        pytest.skip("this triton's interpreter needs an older numpy")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("agrees") > 60
