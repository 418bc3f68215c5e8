"""One training step on two processes, for tests/train/test_distributed.py: `python distributed_kit.py STRATEGIES FOLDER RANK`.

Rank 0 has text only, rank 1 has images. Each process ends by comparing its weights with those of a single process that has
taken the same step over both batches; `expected` is that process's work.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import tiny
import torch
import torch._dynamo
import torch.distributed as dist
from batches import batch_of
from torch import nn

from llava.model.builder import load
from llava.train.arguments import disable_memory_efficient_linear
from llava.train.memory import estimate
from llava.train.model_setup import unfreeze_tower
from llava.train.performance import (
    FETCH_LIMIT_ATTRIBUTE,
    compile_layers,
    raise_fetch_limit,
    replicate_frozen_tower,
    set_leaf_modules,
)

RATE = 0.1
LINEAR = nn.functional.linear
# Per rank; a text-only row owns one (black) image, as the data set gives it.
BATCHES = (batch_of((20, 0), (5, 0), (9, 0), seed=1), batch_of((9, 1), (4, 2), seed=2))
# Images of several tiles, whose rows of features end in a learned newline; a black image is one plain tile.
TILED = (BATCHES[0], batch_of((9, 1), (4, 2), seed=2, tiles=3))
ANYRES = {
    "mm_patch_merge_type": "spatial_unpad", "image_aspect_ratio": "anyres", "image_grid_pinpoints": [[28, 56], [56, 28]]
}  # fmt: skip
# What is trained, and how the model is called.
CASES: dict[str, tuple[str, dict[str, bool]]] = {
    "full": ("all", {}),
    "full, fused loss": ("all", {"loss_only": True}),
    "full, packed": ("all", {"loss_only": True, "packed": True}),
    "with tower": ("tower", {"loss_only": True}),
    "projector": ("projector", {"loss_only": True, "packed": True}),
    "tiles": ("all", {"loss_only": True, "packed": True}),
}


def model_for(folder: Path, trained: str) -> Any:
    model = load(folder, device="cpu", dtype=torch.float32).model.train()
    model.config.use_cache = False
    model.requires_grad_(trained != "projector")
    model.get_model().mm_projector.requires_grad_(True)
    model.get_vision_tower().requires_grad_(False)
    if trained == "tower":
        unfreeze_tower(model.get_vision_tower())
    return model


def case_of(name: str, folder: Path) -> tuple[Any, tuple[dict[str, Any], ...]]:
    """The model, and each rank's batch."""
    place, batches = ("tiled", TILED) if name == "tiles" else ("model", BATCHES)
    return model_for(folder / place, CASES[name][0]), batches


def expected(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    """Weights after one step down the mean of both ranks' losses, by case."""
    results = {}
    for name in CASES:
        model, batches = case_of(name, folder)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=RATE)
        for batch in batches:
            (model(**batch)["loss"] / len(batches)).backward()
        optimizer.step()
        results[name] = {key: value.clone() for key, value in model.named_parameters()}
    return results


Step = Callable[[Any, dict[str, Any]], dict[str, torch.Tensor]]


def with_ddp(model: Any, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
    wrapped = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=RATE)
    wrapped(**batch)["loss"].backward()
    optimizer.step()
    return dict(model.named_parameters())


def with_compiled_fsdp2(model: Any, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
    compile_layers(model, backend="aot_eager")
    return with_fsdp2(model, batch)


def with_fsdp2(model: Any, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    inner = model.get_model()
    for module in (*inner.layers, inner.get_vision_tower(), inner.mm_projector, model.lm_head):
        fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=RATE)
    model(**batch)["loss"].backward()
    optimizer.step()
    return {name: p.full_tensor() for name, p in model.named_parameters()}  # type: ignore[operator]


def memory_of(model: Any, config: dict[str, Any]) -> Any:
    """The estimate of a run with these settings of DeepSpeed."""
    arguments = SimpleNamespace(
        optim="sgd", deepspeed=config, fsdp="", world_size=len(BATCHES), compute_dtype=torch.float32, fused_loss=True,
        trainable_dtype="auto",
        packing=False, pack_length=None, lora_enable=False, lora_dropout=0, per_device_train_batch_size=1,
        model_max_length=64, gradient_checkpointing=False, compile_layers=False, keep_activations=None,
    )  # fmt: skip
    return estimate(model, arguments)


def with_zero(stage: int, *, compiled: bool = False, partitioned: bool = False) -> Step:
    """`partitioned`: the weights are partitioned from the beginning, as transformers may read them."""

    def step(model: Any, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
        import deepspeed

        config: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": 1,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        }
        if partitioned:
            deepspeed.init_distributed("gloo")
            deepspeed.zero.Init(module=model, config_dict_or_path=config, dtype=torch.float32)
        if stage == 3:
            names = model.state_dict().keys()
            replicate_frozen_tower(model, torch.device("cpu"), torch.float32)
            assert model.state_dict().keys() == names, "a checkpoint would have other weights"
            set_leaf_modules(model)
        if compiled:
            torch._dynamo.reset()
            torch._dynamo.utils.counters.clear()
            disable_memory_efficient_linear(config)
            compile_layers(model, backend="aot_eager", within_hooks=True)
        needed = memory_of(model, config)
        trained = [p for p in model.parameters() if p.requires_grad]
        tower_learns = model.get_vision_tower().trainable
        engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=torch.optim.SGD(trained, lr=RATE),
            config=config,
        )
        if stage == 3:
            coordinator = engine.optimizer.parameter_offload.get_param_coordinator()
            before = getattr(coordinator, FETCH_LIMIT_ATTRIBUTE)
            raise_fetch_limit(engine)
            assert getattr(coordinator, FETCH_LIMIT_ATTRIBUTE) >= 9 * before, "a layer of LLaMA has nine weights"
        engine.backward(engine(**batch)["loss"])
        engine.step()
        assert memory_of(model, config) == needed, "partitioned weights count less"
        if compiled:
            # One of the decoder layers, and one of a tower's.
            wanted, found = 2 if tower_learns else 1, torch._dynamo.utils.counters["stats"]["unique_graphs"]
            assert found == wanted, f"{found} programs, not {wanted}: layers do not share them"
            assert nn.functional.linear is LINEAR, "DeepSpeed has put its own product in the place of torch's"
        weights = dict(model.named_buffers())
        for name, parameter in model.named_parameters():
            assert stage < 3 or parameter.ds_shape, "DeepSpeed does not shard this"
            with deepspeed.zero.GatheredParameters([parameter], enabled=stage == 3):
                weights[name] = parameter.detach().clone()
        return weights

    return step


STRATEGIES: dict[str, Step] = {
    "ddp": with_ddp,
    "fsdp2": with_fsdp2,
    "fsdp2, compiled": with_compiled_fsdp2,
    "zero2": with_zero(2),
    "zero3, compiled": with_zero(3, compiled=True),  # before DeepSpeed's own product is there, which stays
    "zero3, partitioned": with_zero(3, partitioned=True),
    "zero3": with_zero(3),
}


COMPILED = ("full, packed", "with tower")  # the cases of strategies with a comma, since compiling takes its time


def cases_of(strategy: str) -> list[str]:
    return [name for name in CASES if "," not in strategy or name in COMPILED]


def main(strategies: list[str], folder: Path, rank: int) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / f"meeting-{len(strategies)}-{strategies[0]}"), len(BATCHES))
    # An operation that a rank does not take part in fails after this time instead of waiting for ever.
    dist.init_process_group("gloo", store=store, rank=rank, world_size=len(BATCHES), timeout=timedelta(seconds=240))
    right = torch.load(folder / "expected.pt")
    for strategy in strategies:
        for name in cases_of(strategy):
            model, batches = case_of(name, folder)
            weights = STRATEGIES[strategy](model, {**batches[rank], **CASES[name][1]})
            for key, weight in right[name].items():
                torch.testing.assert_close(weights[key], weight, atol=1e-5, rtol=1e-4, msg=f"{strategy}, {name}: {key}")
            print(f"{strategy}, {name}: equal", flush=True)
    dist.destroy_process_group()


def prepare(folder: Path) -> None:
    tiny.build(folder / "model")
    tiny.build(folder / "tiled", **ANYRES)
    torch.save(expected(folder), folder / "expected.pt")


if __name__ == "__main__":
    # DeepSpeed reads these; it would otherwise look for a GPU, and for a launcher's addresses.
    os.environ.update(DS_ACCELERATOR="cpu", RANK=sys.argv[3], LOCAL_RANK=sys.argv[3], WORLD_SIZE=str(len(BATCHES)))
    main(sys.argv[1].split(";"), Path(sys.argv[2]), int(sys.argv[3]))
