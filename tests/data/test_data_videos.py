"""Videos in training data: found, sampled, counted and collated; the model sees as many features as were counted."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from data_forms import turn
from golden_data import golden
from PIL import Image

from llava.__main__ import main
from llava.constants import IMAGE_TOKEN_INDEX
from llava.conversation import conv_templates
from llava.errors import InputError
from llava.model.builder import load_pretrained_model
from llava.train.data import DataCollatorForSupervisedDataset, LazySupervisedDataset
from llava.train.packing import item_length


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two videos as folders of frames, of 12 and of 3, and an image."""
    folder = tmp_path_factory.mktemp("videos")
    for name, count in (("long", 12), ("short", 3)):
        (folder / name).mkdir()
        for number in range(count):
            Image.new("RGB", (40, 30), (20 * number, 0, 0)).save(folder / name / f"{number}.png")
    (folder / "card.png").write_bytes(golden("images/gray_50x50.png").read_bytes())
    samples = [
        {"id": "one", "video": "long", "conversations": [turn("human", "<image>\nWhat happens?"), turn("gpt", "It gets red.")]},
        {"id": "both", "image": "card.png", "video": "short",
         "conversations": [turn("human", "<image>\n<video>\nWhich is red?"), turn("gpt", "The second.")]},
        {"id": "frames", "messages": [
            {"role": "user", "content": [
                {"type": "video", "video": [f"short/{n}.png" for n in range(3)]}, {"type": "text", "text": "And?"}]},
            {"role": "assistant", "content": "Red."}]},
        {"id": "image", "image": "card.png", "conversations": [turn("human", "<image>\nWhat?"), turn("gpt", "A card.")]},
        {"id": "text", "conversations": [turn("human", "Hi"), turn("gpt", "Hello.")]},
    ]  # fmt: skip
    (folder / "data.json").write_text(json.dumps(samples))
    return folder


@pytest.fixture(scope="module", params=["flat", "spatial_unpad"])
def loaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    changes = tiny.ANYRES if request.param == "spatial_unpad" else {}
    path = tiny.build(tmp_path_factory.mktemp("model"), **changes)
    tokenizer, model, processor, _ = load_pretrained_model(
        str(path), None, "llava", device="cpu", torch_dtype=torch.float32
    )
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.unk_token
    return tokenizer, model, processor


def dataset(folder: Path, loaded: Any, **changes: Any) -> LazySupervisedDataset:
    tokenizer, model, processor = loaded
    tokenizer.model_max_length = 2048
    config = model.config
    values = {
        "image_folder": str(folder), "image_processor": processor, "image_aspect_ratio": config.image_aspect_ratio,
        "image_grid_pinpoints": getattr(config, "image_grid_pinpoints", None), "is_multimodal": True,
        "mm_use_im_start_end": False, "image_policy": model.image_policy(), "video_policy": model.video_policy(),
        "ends_with_newline": model.image_policy().merge == "spatial_unpad",
    }  # fmt: skip
    return LazySupervisedDataset(
        str(folder / "data.json"), tokenizer, Namespace(**{**values, **changes}), conv=conv_templates["v1"]
    )


def test_the_model_makes_as_many_features_as_were_counted(folder: Path, loaded: Any) -> None:
    tokenizer, model, _ = loaded
    made = dataset(folder, loaded)
    items = [made[index] for index in range(len(made))]
    assert [item.get("modality") for item in items] == [["video"], ["image", "video"], ["video"], None, None]
    frames = items[0]["image"]
    assert isinstance(frames, torch.Tensor)
    assert frames.shape[0] == 10  # of 12
    assert items[1]["image"][1].shape[0] == 3
    torch.testing.assert_close(items[2]["image"], items[1]["image"][1])
    assert [int((item["input_ids"] == IMAGE_TOKEN_INDEX).sum()) for item in items] == [1, 2, 1, 1, 0]
    lengths = [item_length(item, model.image_policy(), model.video_policy()) for item in items]
    for item, length in zip(items, lengths, strict=True):
        batch = DataCollatorForSupervisedDataset(tokenizer)([item])
        output = model(**batch)
        assert output.logits.shape[1] == length
        assert torch.isfinite(output.loss)
    # Videos, images and text in one batch: each row as alone.
    batch = DataCollatorForSupervisedDataset(tokenizer)(items)
    assert batch["modalities"] == ["video", "image", "video", "video", "image", "image"]
    together = model(**batch).logits
    assert together.shape[1] == max(lengths)
    alone = model(**DataCollatorForSupervisedDataset(tokenizer)([items[1]])).logits
    torch.testing.assert_close(together[1, : lengths[1]], alone[0], rtol=1e-4, atol=1e-4)


def test_the_arguments_choose_the_frames(folder: Path, loaded: Any) -> None:
    assert dataset(folder, loaded, frames_upbound=4)[0]["image"].shape[0] == 4
    assert dataset(folder, loaded, frames_upbound=4)[2]["image"].shape[0] == 3
    assert dataset(folder, loaded, frames_upbound=4, force_sample=True)[2]["image"].shape[0] == 4


def test_a_video_that_does_not_fit_is_left_out_whole(folder: Path, loaded: Any) -> None:
    made = dataset(folder, loaded)
    made.tokenizer.model_max_length = 20
    with pytest.raises(InputError, match=r"sample 0 \(id 'one'\): its answers begin behind the limit of 20 tokens"):
        made[0]


def test_videos_are_checked(folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["data", "check", str(folder / "data.json"), "--image-folder", str(folder)]) == 0
    lost = [
        {"id": "lost", "video": "gone.mp4", "conversations": [turn("human", "<video>\nWhat?"), turn("gpt", "Nothing.")]}
    ]
    (tmp_path / "lost.json").write_text(json.dumps(lost))
    assert main(["data", "check", str(tmp_path / "lost.json"), "--image-folder", str(folder)]) == 1
    assert "missing-image: 1" in capsys.readouterr().out
