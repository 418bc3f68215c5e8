"""Packed sequences and the fused loss: the same numbers as padded batches and plain logits give."""

from __future__ import annotations

import importlib
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from batches import batch_of
from golden_data import HERE
from torch import nn
from train_kit import argv, trainer_for

from llava.errors import InputError
from llava.model import attention, loss
from llava.model.builder import load
from llava.model.config import PLAIN_DECODERS
from llava.model.language_model.registry import llava_classes
from llava.train.arguments import parse_train_args
from llava.train.packing import PackedDataset, measured_lengths, plan_sequences
from llava.train.performance import compile_layers
from llava.train.train import train


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Tiny models by language model and image policy; Mistral with a window shorter than its samples."""
    made: dict[tuple[str, bool], Any] = {}

    def model_for(kind: str, *, anyres: bool = False, **changes: Any) -> Any:
        key = (kind, anyres)
        if key not in made:
            changes = {**(tiny.ANYRES if anyres else {}), **changes}
            if kind == "mistral":
                changes["sliding_window"] = 6
            folder = tiny.build(tmp_path_factory.mktemp(kind), kind, **changes)
            made[key] = load(folder, device="cpu", dtype=torch.float32).model
        made[key].config._attn_implementation = "sdpa"
        return made[key].requires_grad_(True).train()

    return model_for


BATCHES = {
    "images": batch_of((9, 1), (15, 1), (4, 1)),
    "images-and-text": batch_of((9, 1), (20, 0), (3, 0), (12, 1), seed=1),
    "text": batch_of((9, 0), (2, 0), (30, 0), seed=2),
    "several-images": batch_of((9, 3), (12, 0), (11, 2), seed=3),
    "alone": batch_of((14, 1), seed=4),
}


def loss_and_gradients(
    model: nn.Module, batch: dict[str, Any], **options: Any
) -> tuple[float, dict[str, torch.Tensor]]:
    model.zero_grad()
    value = model(**batch, **options)["loss"]
    value.backward()
    return value.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(model: nn.Module, batch: dict[str, Any], **options: Any) -> None:
    expected, gradients = loss_and_gradients(model, batch)
    value, others = loss_and_gradients(model, batch, **options)
    assert abs(value - expected) < 1e-5
    assert set(others) == set(gradients)
    for name, gradient in gradients.items():
        torch.testing.assert_close(others[name], gradient, atol=1e-5, rtol=1e-4, msg=name)


@pytest.mark.parametrize("fused", [False, True], ids=["logits", "fused"])
@pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES)
@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2"])
def test_a_packed_row_has_the_loss_and_gradients_of_its_padded_batch(
    kind: str, batch: Any, fused: bool, models: Any
) -> None:
    assert_same(models(kind), batch, packed=True, loss_only=fused)


def test_packing_with_tiles(models: Any) -> None:
    batch = batch_of((9, 1), (20, 0), (7, 2), seed=5, tiles=3)
    assert_same(models("llama", anyres=True), batch, packed=True, loss_only=True)


def test_the_other_plain_decoders_pack(models: Any) -> None:
    for kind in set(PLAIN_DECODERS) - {"llama", "mistral", "qwen2"}:
        assert_same(models(kind), BATCHES["images-and-text"], packed=True, loss_only=True)


@pytest.mark.parametrize("kernel", ["eager", "flex_attention"])
def test_other_kernels_keep_samples_apart(kernel: str, models: Any) -> None:
    model = models("llama")
    for batch in BATCHES.values():
        # Uncompiled, so that no C++ compiler is needed; on a CPU, flex attention has no backward.
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            expected = model(**batch)["loss"]
            model.config._attn_implementation = kernel
            value = model(**batch, packed=True)["loss"]
            model.config._attn_implementation = "sdpa"
        torch.testing.assert_close(value, expected, atol=1e-5, rtol=0)


def test_no_sample_sees_another(models: Any) -> None:
    """Other text in one sample leaves the logits of the others as they are."""
    model = models("llama").eval()
    batch = BATCHES["images-and-text"]
    other = {**batch, "input_ids": batch["input_ids"].clone()}
    other["input_ids"][1, :20] = 17
    with torch.no_grad():
        logits, changed = (model(**b, packed=True).logits[0] for b in (batch, other))
    lengths = [9 + 4, 20, 3, 12 + 4]
    same = [torch.allclose(a, b, atol=1e-6) for a, b in zip(logits.split(lengths), changed.split(lengths), strict=True)]
    assert same == [True, False, True, True]


def test_rows_over_the_limit_keep_their_beginning(models: Any) -> None:
    model = models("llama")
    limit = model.config.tokenizer_model_max_length
    model.config.tokenizer_model_max_length = 10
    try:
        assert_same(model, BATCHES["images-and-text"], packed=True, loss_only=True)
    finally:
        model.config.tokenizer_model_max_length = limit


def test_a_language_model_that_would_look_across_samples_is_refused(models: Any) -> None:
    config_class, model_class = llava_classes("mpt")
    model = model_class(config_class(d_model=32, n_heads=4, n_layers=1, vocab_size=320, max_seq_len=64))
    with pytest.raises(InputError, match=r"'mpt'.*--packing False"):
        model(input_ids=torch.tensor([[1, 2, 3]]), packed=True)


# The variable-length kernel itself needs a GPU; what it is called with does not.


def plain_varlen(
    query: Any, key: Any, value: Any, bounds: Any, bounds_k: Any, longest: int, longest_k: int, *,
    scale: float | None = None, window_size: tuple[int, int] = (-1, -1), enable_gqa: bool = False,
) -> torch.Tensor:  # fmt: skip
    """What the kernel computes, sample by sample: (T, heads, width)."""
    assert longest == longest_k == max(bounds.diff())
    assert window_size[1] == 0
    if enable_gqa:
        key, value = (states.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for states in (key, value))
    outputs = []
    for start, end in zip(bounds[:-1].tolist(), bounds_k[1:].tolist(), strict=True):
        scores = torch.einsum("thd,shd->hts", query[start:end], key[start:end]) * scale
        distance = torch.arange(end - start)[:, None] - torch.arange(end - start)
        hidden = (distance < 0) | (distance > (window_size[0] if window_size[0] >= 0 else end))
        weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
        outputs.append(torch.einsum("hts,shd->thd", weights, value[start:end]))
    return torch.cat(outputs)


def older_varlen(
    query: Any, key: Any, value: Any, bounds: Any, bounds_k: Any, longest: int, longest_k: int, *,
    is_causal: bool = False, scale: float | None = None,
) -> torch.Tensor:  # fmt: skip
    assert is_causal
    assert query.shape[1] == key.shape[1]
    return plain_varlen(query, key, value, bounds, bounds_k, longest, longest_k, scale=scale, window_size=(-1, 0))


@pytest.fixture
def varlen(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Any:
    module = importlib.import_module("torch.nn.attention.varlen")
    monkeypatch.setattr(module, "varlen_attn", request.param)
    kernel = attention.varlen_kernel()
    assert kernel is not None
    attention.register_varlen(kernel)
    return request.param


@pytest.mark.parametrize("varlen", [plain_varlen, older_varlen], indirect=True)
@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_the_variable_length_kernel_is_called_rightly(varlen: Any, kind: str, models: Any) -> None:
    model = models(kind)
    batch = BATCHES["images-and-text"]
    expected, gradients = loss_and_gradients(model, batch)
    model.config._attn_implementation = attention.VARLEN
    unpacked, _ = loss_and_gradients(model, batch)
    assert abs(unpacked - expected) < 1e-6
    if kind == "mistral" and varlen is older_varlen:
        with pytest.raises(InputError, match="sliding window"):
            model(**batch, packed=True)
        return
    value, others = loss_and_gradients(model, batch, packed=True)
    assert abs(value - expected) < 1e-5
    for name, gradient in gradients.items():
        torch.testing.assert_close(others[name], gradient, atol=1e-5, rtol=1e-4, msg=name)


def test_varlen_is_not_chosen_on_a_cpu(models: Any) -> None:
    config = models("llama").config
    assert not attention.use_varlen(config, torch.device("cpu"), torch.bfloat16)
    assert config._attn_implementation == "sdpa"


# The fused loss


def plain_loss(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, bias: Any = None) -> torch.Tensor:
    logits = nn.functional.linear(hidden, weight, bias)
    return nn.functional.cross_entropy(logits.float(), targets, reduction="sum")


@pytest.mark.parametrize("with_bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("chunk", [1, 7 * 50, 10**6], ids=["rows-of-1", "rows-of-7", "at-once"])
def test_the_fused_loss_is_the_plain_one(chunk: int, with_bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss, "CHUNK_VALUES", chunk)
    torch.manual_seed(0)
    inputs = [torch.randn(23, 8), torch.randn(50, 8), torch.randn(50) if with_bias else None]
    targets = torch.randint(0, 50, (23,))

    def run(function: Any) -> list[torch.Tensor]:
        hidden, weight, bias = (None if t is None else t.clone().requires_grad_() for t in inputs)
        value = function(hidden, weight, targets, bias)
        (value * 0.5).backward()
        return [value, *(t.grad for t in (hidden, weight, bias) if t is not None)]

    for fused, plain in zip(run(loss.linear_cross_entropy), run(plain_loss), strict=True):
        torch.testing.assert_close(fused, plain, atol=1e-5, rtol=1e-5)


def test_the_fused_loss_has_the_right_derivative() -> None:
    torch.manual_seed(0)
    hidden, weight = (torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((5, 3), (7, 3)))
    targets = torch.randint(0, 7, (5,))
    assert torch.autograd.gradcheck(lambda h, w: loss.linear_cross_entropy(h, w, targets), (hidden, weight))


@pytest.mark.parametrize("autocast", [False, True], ids=["bf16", "autocast"])
def test_in_bf16_the_fused_loss_is_as_near_to_float64_as_the_plain_one(autocast: bool) -> None:
    torch.manual_seed(0)
    dtype = torch.float32 if autocast else torch.bfloat16
    hidden, weight = torch.randn(64, 32).to(dtype), torch.randn(200, 32).to(dtype)
    targets = torch.randint(0, 200, (64,))

    def run(function: Any, precision: torch.dtype) -> list[torch.Tensor]:
        h, w = (t.to(precision).requires_grad_() for t in (hidden, weight))
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast and precision is dtype):
            value = function(h, w, targets)
        value.backward()
        assert h.grad.dtype == w.grad.dtype == precision
        return [t.double() for t in (value.detach(), h.grad, w.grad)]

    exact = run(lambda h, w, t: nn.functional.cross_entropy(h @ w.T, t, reduction="sum"), torch.float64)
    for fused, plain, right in zip(run(loss.linear_cross_entropy, dtype), run(plain_loss, dtype), exact, strict=True):
        assert (fused - right).norm() <= 1.1 * (plain - right).norm() + 1e-4 * right.norm()


def test_frozen_parts_get_no_gradient_and_cost_none() -> None:
    hidden, weight = torch.randn(4, 3, requires_grad=True), torch.randn(5, 3)
    loss.linear_cross_entropy(hidden, weight, torch.zeros(4, dtype=torch.long)).backward()
    assert hidden.grad is not None
    assert weight.grad is None


@pytest.mark.parametrize("kind", ["llama", "tied"])
def test_a_model_s_loss_without_logits_is_its_loss(kind: str, models: Any, tmp_path: Path) -> None:
    model = models("llama")
    if kind == "tied":
        folder = tiny.build(tmp_path / "tied", tie_word_embeddings=True)
        model = load(folder, device="cpu", dtype=torch.float32).model.requires_grad_(True).train()
        assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    for batch in BATCHES.values():
        assert_same(model, batch, loss_only=True)
    assert model(**BATCHES["text"], loss_only=True).logits is None
    assert model(**BATCHES["text"]).logits is not None
    assert "forward" not in vars(model.get_output_embeddings())


def test_without_labels_there_are_logits(models: Any) -> None:
    batch = {key: value for key, value in BATCHES["images"].items() if key != "labels"}
    assert models("llama")(**batch, loss_only=True).logits is not None


def test_a_language_model_with_its_own_logits_computes_its_own_loss(tmp_path: Path) -> None:
    """Gemma 2 bends its logits before the loss."""
    folder = tiny.build(tmp_path, "gemma2", head_dim=16, final_logit_softcapping=0.1)
    model = load(folder, device="cpu", dtype=torch.float32).model.requires_grad_(True).train()
    assert_same(model, BATCHES["images-and-text"], loss_only=True)


# Which samples share a row


def test_rows_hold_every_sample_once_and_never_too_much() -> None:
    draw = torch.Generator().manual_seed(0)
    lengths = torch.randint(20, 2049, (5000,), generator=draw).tolist()
    rows = plan_sequences(lengths, 4096, seed=1)
    assert sorted(index for row in rows for index in row) == list(range(5000))
    filled = [sum(lengths[index] for index in row) for row in rows]
    assert max(filled) <= 4096
    assert sum(filled) > 0.97 * 4096 * len(rows)
    assert plan_sequences(lengths, 4096, seed=1) == rows
    assert plan_sequences(lengths, 4096, seed=2) != rows


def test_a_sample_longer_than_a_row_is_an_error() -> None:
    with pytest.raises(InputError, match="sample 1 has 9 tokens; a packed sequence of 8"):
        plan_sequences([3, 9], 8, seed=0)


def packed_run(folder: Path, **flags: Any) -> list[str]:
    return argv(folder, **{"packing": True, "per_device_train_batch_size": 1, "model_max_length": 512, **flags})


@pytest.mark.parametrize("mode", ["pad", "anyres"])
def test_measured_lengths_are_those_of_the_model(
    mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(HERE)
    flags: dict[str, Any] = {"pack_length": 700}
    if mode == "anyres":
        flags |= {"image_aspect_ratio": "anyres", "image_grid_pinpoints": "[(56, 112), (112, 56)]"}
        flags |= {"mm_patch_merge_type": "spatial_unpad"}
    trainer = trainer_for(packed_run(tmp_path, **flags))
    dataset, model = trainer.train_dataset, trainer.model
    lengths: list[int] = []

    def note(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        lengths.extend(kwargs["cu_seq_lens_q"].diff().tolist())
        assert kwargs["inputs_embeds"].shape[1] <= 700

    model.get_model().register_forward_pre_hook(note, with_kwargs=True)
    for row in range(len(dataset)):
        with torch.no_grad():
            model(**trainer.data_collator([dataset[row]]))
    remembered = measured_lengths(dataset.samples, dataset.policy, tmp_path)
    assert lengths == [remembered[index] for row in dataset.sequences for index in row]
    assert len(dataset) < len(dataset.samples)
    assert len(list(tmp_path.glob("pack_lengths-*.npy"))) == 1


def test_a_packed_run_goes_on_after_a_stop_as_if_there_was_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(HERE)
    flags = {"max_steps": 4, "save_strategy": "steps", "save_steps": 3, "gradient_accumulation_steps": 2}
    whole = train(argv=packed_run(tmp_path / "whole", **flags))
    shutil.copytree(tmp_path / "whole" / "checkpoint-3", tmp_path / "resumed" / "checkpoint-3")
    resumed = train(argv=packed_run(tmp_path / "resumed", **flags))
    assert resumed.state.global_step == 4
    for (name, tensor), (_, other) in zip(
        whole.model.named_parameters(), resumed.model.named_parameters(), strict=True
    ):
        assert torch.equal(tensor, other), name


def test_packed_and_padded_training_take_the_same_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All samples in one row, against all of them in one padded batch with plain logits."""
    monkeypatch.chdir(HERE)
    flags = {"max_steps": 1, "learning_rate": "1e-2", "optim": "sgd", "max_grad_norm": 0}
    packed = train(argv=packed_run(tmp_path / "packed", pack_length=20_000, **flags))
    assert len(packed.train_dataset) == 1
    everything = len(packed.train_dataset.samples)
    padded = train(
        argv=argv(
            tmp_path / "padded", per_device_train_batch_size=everything, fused_loss=False, model_max_length=512, **flags
        )
    )
    assert packed.state.log_history[0]["loss"] == pytest.approx(padded.state.log_history[0]["loss"], abs=1e-5)
    for (name, tensor), (_, other) in zip(
        packed.model.named_parameters(), padded.model.named_parameters(), strict=True
    ):
        torch.testing.assert_close(tensor, other, atol=1e-5, rtol=0, msg=name)


def test_a_row_shorter_than_the_longest_sample_allowed_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(HERE)
    with pytest.raises(InputError, match="--pack_length 100 is shorter than --model_max_length 512"):
        trainer_for(packed_run(tmp_path, pack_length=100))


def test_data_that_changed_since_it_was_measured_are_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(HERE)
    dataset = trainer_for(packed_run(tmp_path)).train_dataset
    wrong = PackedDataset(dataset.samples, [1] * len(dataset.samples), 512, dataset.policy, seed=0)
    with pytest.raises(InputError, match="longer than it was"):
        wrong[0]


def test_validation_samples_are_not_packed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(HERE)
    trainer = trainer_for(packed_run(tmp_path))
    samples = trainer.train_dataset.samples
    batch = trainer.data_collator([samples[0], samples[1]])
    assert "packed" not in batch
    assert batch["input_ids"].shape[0] == 2


# Compiled layers


def test_compiled_layers_give_the_same_loss_and_gradients(tmp_path: Path) -> None:
    """Traced, with lengths left open; no code is generated, as that needs a C++ compiler or a GPU."""
    model = load(tiny.build(tmp_path), device="cpu", dtype=torch.float32).model.requires_grad_(True).train()
    batches = [BATCHES["images-and-text"], BATCHES["several-images"]]
    plain = [loss_and_gradients(model, batch) for batch in batches]
    traced: list[int] = []

    def backend(graph: Any, inputs: Any) -> Any:
        traced.append(len(inputs))
        return graph

    budget = torch._functorch.config.activation_memory_budget
    try:
        compile_layers(model, keep=0.5, dynamic=True, backend=backend)
        assert torch._functorch.config.activation_memory_budget == 0.5
        programs = []
        for batch, (expected, gradients) in zip(batches, plain, strict=True):
            value, others = loss_and_gradients(model, batch, packed=True, loss_only=True)
            programs.append(len(traced))
            assert abs(value - expected) < 1e-5
            for name, gradient in gradients.items():
                torch.testing.assert_close(others[name], gradient, atol=1e-5, rtol=1e-4, msg=name)
    finally:
        torch._functorch.config.activation_memory_budget = budget
        torch._dynamo.reset()
    assert programs == [
        2,
        2,
    ]  # one of decoder layers, one of a tower's, for rows of all lengths and any number of images


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"keep_activations": 0.5}, "needs --compile_layers True"),
        ({"keep_activations": 2, "compile_layers": True}, "between 0 and 1"),
        (
            {"keep_activations": 0.5, "compile_layers": True, "gradient_checkpointing": True},
            "gradient_checkpointing False",
        ),
    ],
)
def test_contradictory_ways_to_save_memory_are_refused(flags: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        parse_train_args(argv(tmp_path, **flags))
