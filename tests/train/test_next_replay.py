"""Four steps of LLaVA-NeXT's trainer over a OneVision checkpoint, repeated: images, ids, losses, weights.

Its labels are given, since ours mask more (docs/differences.md). Its tower ran in float16, so figures agree to 1e-3.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from golden_data import golden
from train_kit import BY_BATCH, argv, feed, trainer_for

RUNS = json.loads(golden("next/train_runs.json").read_text(encoding="utf-8"))
DATA = golden("next/dataset")


@pytest.mark.parametrize("name", RUNS)
def test_recorded_runs(name: str, tmp_path: Path) -> None:
    record = RUNS[name]
    folder = tmp_path / "llava-onevision-tiny"
    shutil.copytree(golden("next/checkpoints/onevision-siglip28-qwen-v384"), folder)
    tower = str(golden("next/checkpoints/vision/siglip-28-p4"))
    config = json.loads((folder / "config.json").read_text()) | {"mm_vision_tower": tower}
    (folder / "config.json").write_text(json.dumps(config))
    words = argv(
        tmp_path / "run", model=str(folder), version="qwen_1_5", data_path=DATA / "train.json",
        image_folder=DATA / "images", vision_tower=tower, image_aspect_ratio="anyres_max_9",
        image_grid_pinpoints="(1x1),...,(6x6)", mm_patch_merge_type="spatial_unpad", learning_rate="1e-3",
        mm_tunable_parts=record["parts"], max_steps=4, seed=7, warmup_ratio=0.25, **BY_BATCH,
    )  # fmt: skip
    trainer = trainer_for(words)
    items = [trainer.train_dataset[index] for index in range(6)]
    batches = []
    for step in record["steps"]:
        rows = [
            [token for token, seen in zip(ids, mask, strict=True) if seen]
            for ids, mask in zip(step["input_ids"], step["attention_mask"], strict=True)
        ]
        drawn = [next(item for item in items if item["input_ids"].tolist() == row) for row in rows]
        batch = trainer.data_collator(drawn)
        assert batch["input_ids"].tolist() == step["input_ids"]
        recorded = step["images"]
        assert len(batch["images"]) == len(recorded)
        for pixels, told in zip(batch["images"], recorded, strict=True):
            assert float(pixels.double().sum()) == pytest.approx(told["sum"], abs=1e-3)
            assert pixels.numel() == torch.Size(told["shape"]).numel()
        batches.append({**batch, "labels": torch.tensor(step["labels"])})
    losses = feed(trainer, batches)
    trainer.train()
    assert losses == pytest.approx([step["loss"] for step in record["steps"]], abs=1e-3)
    rates = [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]
    # transformers 4 logged the rate of the next step.
    assert rates[1:] == pytest.approx([entry["learning_rate"] for entry in record["log"]][:-1])
    state = {name: parameter.detach().double() for name, parameter in trainer.model.named_parameters()}
    for tensor, told in record["final"].items():
        assert float(state[tensor].sum()) == pytest.approx(told["sum"], abs=1e-2 * told["abs_sum"] ** 0.5), tensor
        assert float(state[tensor].square().sum()) == pytest.approx(told["sq_sum"], rel=1e-3), tensor
