"""A batch without images on one rank neither stops the others nor changes a result: two processes, one step, equal weights."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import distributed_kit
import pytest

from llava.train.performance import set_leaf_modules

HERE = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("distributed")
    distributed_kit.prepare(folder)
    return folder


@pytest.mark.parametrize(
    "strategies",
    [
        pytest.param(["ddp", "fsdp2"], id="torch"),
        pytest.param(["fsdp2, compiled"], id="torch, compiled", marks=pytest.mark.slow),
        pytest.param(["zero2", "zero3"], id="deepspeed", marks=pytest.mark.slow),
        pytest.param(["zero3, compiled", "zero3, partitioned"], id="deepspeed, compiled", marks=pytest.mark.slow),
    ],
)
def test_ranks_with_and_without_images_take_the_same_step(strategies: list[str], prepared: Path) -> None:
    if any("zero" in name for name in strategies) and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("deepspeed is not installed (DS_BUILD_OPS=0 pip install deepspeed)")
    search_path = os.pathsep.join([str(HERE.parent), str(HERE), os.environ.get("PYTHONPATH", "")])
    ranks = [
        subprocess.Popen(
            [sys.executable, str(HERE / "distributed_kit.py"), ";".join(strategies), str(prepared), str(rank)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "PYTHONPATH": search_path},
        )
        for rank in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=600)[0] for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    for process, output in zip(ranks, outputs, strict=True):
        assert process.returncode == 0, output
        assert output.count(": equal") == sum(len(distributed_kit.cases_of(s)) for s in strategies), output


@pytest.mark.parametrize("trained", ["projector", "tower"])
def test_layers_that_are_fetched_whole(trained: str, prepared: Path) -> None:
    """Those of a trained tower that are run, two of three here. A frozen tower is one whole, with nothing to fetch."""
    pytest.importorskip("deepspeed")
    from deepspeed.utils import get_z3_leaf_modules

    model = distributed_kit.model_for(prepared / "model", trained)
    tower = model.get_vision_tower()
    set_leaf_modules(model)
    of_tower = tower.vision_tower.vision_model.encoder.layers[:2] if trained == "tower" else [tower]
    assert set(get_z3_leaf_modules(model)) == {*model.get_model().layers, *of_tower}
