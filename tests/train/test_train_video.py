"""Training on videos: frames chosen, told, counted and packed as the model takes them."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from golden_data import golden
from PIL import Image
from train_kit import argv, trainer_for

import llava
from llava.constants import IGNORE_INDEX
from llava.errors import InputError
from llava.train.arguments import parse_train_args
from llava.train.llava_trainer import LLaVATrainer
from llava.train.run import run


def noise(size: tuple[int, int], seed: int) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(values)


TOWER = "next/checkpoints/vision/siglip-28-p4"


@pytest.fixture(scope="module")
def onevision(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("onevision") / "llava-onevision-tiny"
    shutil.copytree(golden("next/checkpoints/onevision-siglip28-qwen"), folder)
    config = json.loads((folder / "config.json").read_text()) | {"mm_vision_tower": str(golden(TOWER))}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def media(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images, a folder of six frames and a file of a video, with samples that name them."""
    folder = tmp_path_factory.mktemp("media")
    (folder / "frames").mkdir()
    for number in range(6):
        noise((64, 48), seed=number).save(folder / "frames" / f"frame{number}.png")
    for number, size in enumerate(((60, 40), (30, 90))):
        noise(size, seed=10 + number).save(folder / f"{number}.png")
    shutil.copy(golden("next_video/clip.mp4"), folder / "clip.mp4")
    ask = lambda text: [{"from": "human", "value": text}, {"from": "gpt", "value": "A star moves."}]  # noqa: E731
    rows: list[dict[str, Any]] = [
        {"id": "frames", "video": "frames", "conversations": ask("<image>\nWhat happens?")},
        {"id": "image", "image": "0.png", "conversations": ask("<image>\nWhat is it?")},
        {"id": "two", "image": ["0.png", "1.png"], "conversations": ask("<image> or <image>?")},
        {"id": "text", "conversations": ask("Hello.")},
    ]
    if importlib.util.find_spec("av") is not None:  # the extra `video`
        rows.append({"id": "file", "video": "clip.mp4", "conversations": ask("<video>\nWhat happens here?")})
    (folder / "data.json").write_text(json.dumps(rows))
    return folder


def words_of(onevision: Path, media: Path, out: Path, **flags: Any) -> list[str]:
    given = {"version": "auto", "data_path": media / "data.json", "image_folder": media, "frames_upbound": 4} | flags
    words = argv(out, model=str(onevision), vision_tower=str(golden(TOWER)), **given)
    own = {"--image_aspect_ratio", "--mm_vision_select_layer", "--mm_projector_type"}  # the checkpoint's
    return [word for at, word in enumerate(words) if not {word, words[at - 1]} & own]


def built(onevision: Path, media: Path, out: Path, **flags: Any) -> LLaVATrainer:
    return trainer_for(words_of(onevision, media, out, **flags))


def test_frames_become_entries_of_the_batch(onevision: Path, media: Path, tmp_path: Path) -> None:
    trainer = built(onevision, media, tmp_path)
    items = [trainer.train_dataset[index] for index in range(4)]
    assert [item.get("modality") for item in items] == [["video"], None, None, None]
    frames, *_ = items
    assert frames["image"].shape == (4, 3, 28, 28)
    expected = trainer.data_collator([items[0]])["images"]
    assert expected.shape == (1, 4, 3, 28, 28)
    # Frames 0, 1, 3 and 5 of six: equal distances, rounded down.
    processor = trainer.model.get_vision_tower().image_processor
    chosen = [Image.open(media / "frames" / f"frame{number}.png").convert("RGB") for number in (0, 1, 3, 5)]
    assert torch.equal(frames["image"], processor.preprocess(chosen, return_tensors="pt")["pixel_values"])
    batch = trainer.data_collator(items)
    assert batch["modalities"] == ["video", "image", "image", "image", "image"]
    assert len(batch["images"]) == len(batch["image_sizes"]) == 5


def test_packed_lengths_are_the_models_and_packed_losses_the_padded_ones(
    onevision: Path, media: Path, tmp_path: Path
) -> None:
    trainer = built(onevision, media, tmp_path, packing=True, model_max_length=512, pack_length=1024)
    dataset, model = trainer.train_dataset, trainer.model.eval()
    samples = dataset.samples
    items = [samples[index] for index in range(len(samples))]
    lengths = _measured(trainer)
    batch = trainer.data_collator([items])
    assert batch["packed"]
    with torch.no_grad():
        total = num = 0.0
        for item, length in zip(items, lengths, strict=True):
            alone = trainer.data_collator([item])
            out = model.prepare_inputs_labels_for_multimodal(
                alone["input_ids"], None, alone["attention_mask"], None, alone["labels"], alone["images"],
                modalities=alone.get("modalities"), image_sizes=alone["image_sizes"],
            )  # fmt: skip
            assert out[4].shape[1] == length
            count = int((alone["labels"] != IGNORE_INDEX).sum())
            total, num = total + float(model(**alone).loss) * count, num + count
        assert float(model(**batch).loss) == pytest.approx(total / num, abs=1e-5)


def _measured(trainer: LLaVATrainer) -> list[int]:
    (file,) = Path(trainer.args.output_dir).glob("pack_lengths-*.npy")
    return np.load(file).tolist()


def test_times_are_told_before_the_question(onevision: Path, media: Path, tmp_path: Path) -> None:
    pytest.importorskip("av")
    trainer = built(onevision, media, tmp_path, add_time_instruction=True)
    assert trainer.train_dataset[4]["image"].shape[0] <= 4
    tokenizer = trainer.processing_class

    def text_of(index: int) -> str:
        return tokenizer.decode([token for token in trainer.train_dataset[index]["input_ids"].tolist() if token >= 0])

    told = text_of(4)
    assert "The video lasts for" in told
    assert told.index("located at 0.00s") < told.index("What happens here?")
    assert "lasts" not in text_of(0)  # a folder of frames does not say when they are
    assert trainer.model.config.add_time_instruction is True
    assert "lasts" not in tokenizer.decode(built(onevision, media, tmp_path).train_dataset[4]["input_ids"].clamp(min=0))


def test_a_run_on_videos_and_images_loads(onevision: Path, media: Path, tmp_path: Path) -> None:
    flags = {"max_steps": 2, "mm_newline_position": "grid", "mm_spatial_pool_mode": "average", "packing": True}
    trainer = run(*parse_train_args(words_of(onevision, media, tmp_path / "run", model_max_length=512, **flags)))
    loaded = llava.load(tmp_path / "run", device="cpu").model
    assert (loaded.video_policy().newline, loaded.video_policy().pool) == ("grid", "average")
    batch = trainer.data_collator([trainer.train_dataset[0]])
    with torch.no_grad():
        assert torch.allclose(loaded(**batch).loss, trainer.model.eval()(**batch).loss, atol=2e-4)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"video": "none.mp4"}, r"none\.mp4"),
        ({"video": "0.png"}, "has one frame; give it as an image"),
        ({"video": "../clip.mp4"}, "lies outside the video folder"),
        ({"video": "http://127.0.0.1/clip.mp4"}, "is an address; download the videos"),
        ({"video": ["frames", "frames"]}, "1 <image> placeholder for 2 images"),
    ],
)
def test_what_is_wrong_with_a_video_is_said(
    row: dict[str, object], reason: str, onevision: Path, media: Path, tmp_path: Path
) -> None:
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A star."}]
    data = tmp_path / "data.json"
    data.write_text(json.dumps([{"id": "1", **row, "conversations": turns}]))
    trainer = built(onevision, media, tmp_path / "run", data_path=data)
    with pytest.raises(InputError, match=reason):
        trainer.train_dataset[0]
