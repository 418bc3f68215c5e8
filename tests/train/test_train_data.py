"""Samples and batches: equal to recorded ones, and clear words for what cannot be used."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from golden_data import golden, require_golden
from train_kit import recording

from llava.constants import IGNORE_INDEX
from llava.conversation import conv_templates
from llava.errors import InputError
from llava.images.image_processor import ClipImageProcessor
from llava.text.tokenization import load_tokenizer
from llava.train.data import DataCollatorForSupervisedDataset, LazySupervisedDataset, make_supervised_data_module

RECORDED = recording("dataset_collator.json")
CLIP_28 = ClipImageProcessor.from_pretrained(golden("checkpoints/vision/clip-tiny-28"))


def tokenizer_for(folder: Path, max_length: int = 2048) -> Any:
    tokenizer = load_tokenizer(folder, model_max_length=max_length)
    tokenizer.pad_token = tokenizer.unk_token
    return tokenizer


def data_args(**changes: Any) -> Namespace:
    values = {
        "image_folder": str(golden("images")),
        "image_processor": CLIP_28,
        "image_aspect_ratio": "square",
        "image_grid_pinpoints": None,
        "is_multimodal": True,
        "mm_use_im_start_end": False,
    }
    return Namespace(**{**values, **changes})


@pytest.fixture
def tokenizer() -> Any:
    return tokenizer_for(golden("tokenizers/llama-mini1k-legacy"))


@pytest.fixture
def write(tmp_path: Path) -> Any:
    def write_samples(*samples: Any) -> str:
        path = tmp_path / "data.json"
        path.write_text(json.dumps(list(samples)), encoding="utf-8")
        return str(path)

    return write_samples


def sample(text: str = "<image>\nWhat?", answer: str = "A card.", **fields: Any) -> dict[str, Any]:
    turns = [{"from": "human", "value": text}, {"from": "gpt", "value": answer}]
    return {"id": "s1", "conversations": turns, **fields}


@pytest.mark.parametrize("run", RECORDED["runs"], ids=lambda run: f"{run['run']}-{run['version']}")
def test_recorded_items_and_batches(run: dict[str, Any]) -> None:
    folder = require_golden(f"tokenizers/{run['tokenizer']}")
    tokenizer = tokenizer_for(folder, run["model_max_length"])
    args = data_args(image_aspect_ratio=run["image_aspect_ratio"])
    conv = conv_templates[run["version"]]
    dataset = LazySupervisedDataset(str(golden(run["data"])), tokenizer, args, conv=conv)
    assert dataset.lengths == run["lengths"]
    assert dataset.modality_lengths == run["modality_lengths"]
    # The recording software masked whole samples where its own count of tokens went wrong, and said so.
    dropped = "mismatch" in run["stdout"]
    for item, recorded in zip((dataset[index] for index in range(len(dataset))), run["items"], strict=True):
        ids, labels = item["input_ids"].tolist(), item["labels"].tolist()
        assert ids[: len(recorded["input_ids"])] == recorded["input_ids"]
        if dropped:
            assert set(recorded["labels"]) == {IGNORE_INDEX}
            assert set(labels) != {IGNORE_INDEX}
        else:
            assert labels == recorded["labels"]
        assert list(item["image"].shape) == recorded["image_shape"]
        assert item["image"].double().sum().item() == pytest.approx(recorded["image_sum"], abs=1e-3)
        assert bool((item["image"] == 0).all()) == recorded["image_all_zero"]

    collate = DataCollatorForSupervisedDataset(tokenizer)
    for key, recorded in run["batches"].items():
        numbers = range(len(dataset)) if key == "all" else map(int, key.split("_"))
        batch = collate([dataset[number] for number in numbers])
        assert set(batch) == {"input_ids", "labels", "attention_mask", "images"}
        assert batch["input_ids"].tolist() == recorded["input_ids"]
        assert dropped or batch["labels"].tolist() == recorded["labels"]
        assert batch["attention_mask"].int().tolist() == recorded["attention_mask"]
        assert str(batch["attention_mask"].dtype) == recorded["attention_mask_dtype"]
        assert list(batch["images"].shape) == recorded["images_shape"]


@pytest.mark.parametrize(("run", "aspect_ratio"), [(0, "square"), (1, "pad")])
def test_recorded_pixels_and_lengths(run: int, aspect_ratio: str, tokenizer: Any) -> None:
    pixels = np.load(golden("dataset_images.npz"))
    dataset = LazySupervisedDataset(
        str(golden("train_data/finetune.json")), tokenizer, data_args(image_aspect_ratio=aspect_ratio)
    )
    recorded = RECORDED["runs"][run]
    assert dataset.lengths == recorded["lengths"]
    assert dataset.modality_lengths == recorded["modality_lengths"]
    compared = 0
    for index in range(len(dataset)):
        if f"run{run}/image{index}" in pixels:
            np.testing.assert_array_equal(dataset[index]["image"].numpy(), pixels[f"run{run}/image{index}"])
            compared += 1
    assert compared >= 5


def test_padding_ids_inside_a_sequence_and_unequal_images(tokenizer: Any) -> None:
    recorded = RECORDED["edge"]["unk_or_pad_id_inside_sequence"]
    assert tokenizer.pad_token_id == 0
    items = [
        {
            "input_ids": torch.tensor([1, 5, 0, 7]),
            "labels": torch.tensor([-100, 5, 0, 7]),
            "image": torch.zeros(3, 4, 4),
        },
        {"input_ids": torch.tensor([1, 5]), "labels": torch.tensor([-100, 5]), "image": torch.zeros(2, 3, 4, 4)},
    ]
    batch = DataCollatorForSupervisedDataset(tokenizer)(items)
    for key in ("input_ids", "labels", "attention_mask"):
        assert batch[key].int().tolist() == recorded[key]
    assert [list(image.shape) for image in batch["images"]] == recorded["image_shapes"]
    without = [{key: item[key] for key in ("input_ids", "labels")} for item in items]
    assert sorted(DataCollatorForSupervisedDataset(tokenizer)(without)) == RECORDED["edge"]["no_image_keys"]


def test_an_end_mark_is_attended_to_where_it_is_also_the_padding() -> None:
    batch = DataCollatorForSupervisedDataset(Namespace(pad_token_id=2, eos_token_id=2, model_max_length=9))(
        [
            {"input_ids": torch.tensor([1, 2, 5, 2]), "labels": torch.tensor([-100, 2, -100, 2])},
            {"input_ids": torch.tensor([1, 2]), "labels": torch.tensor([-100, 2])},
        ]
    )
    assert batch["attention_mask"].int().tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]


def test_text_only_runs_have_no_images(tokenizer: Any, write: Any) -> None:
    module = make_supervised_data_module(
        tokenizer,
        data_args(is_multimodal=False, data_path=write(sample("What?"))),
        conv_templates["v1"],
    )
    item = module["train_dataset"][0]
    assert sorted(item) == RECORDED["edge"]["text_item_when_not_multimodal_keys"]
    assert module["eval_dataset"] is None
    assert "images" not in module["data_collator"]([item])


def test_several_images_stay_in_the_order_of_their_marks(tokenizer: Any, write: Any) -> None:
    names = ["text_200x80.png", "gray_50x50.png"]
    text = "Compare <image> with <image>."
    dataset = LazySupervisedDataset(
        write(sample(text, image=names), sample("Hi"), sample(image="gray_50x50.png")), tokenizer, data_args()
    )
    items = [dataset[0], dataset[1], dataset[2]]
    alone = [LazySupervisedDataset(write(sample(image=name)), tokenizer, data_args())[0]["image"] for name in names]
    batch = DataCollatorForSupervisedDataset(tokenizer)(items)
    assert (items[0]["input_ids"] == -200).sum() == 2
    assert batch["images"].shape == (4, 3, 28, 28)
    for position, expected in enumerate([alone[0], alone[1], torch.zeros(3, 28, 28), alone[1]]):
        torch.testing.assert_close(batch["images"][position], expected)


def test_anyres_samples_bring_their_sizes(tokenizer: Any, write: Any) -> None:
    args = data_args(image_aspect_ratio="anyres", image_grid_pinpoints=[[28, 56], [56, 28], [56, 56]])
    dataset = LazySupervisedDataset(write(sample(image="text_200x80.png"), sample("Hi")), tokenizer, args)
    batch = DataCollatorForSupervisedDataset(tokenizer)([dataset[0], dataset[1]])
    assert batch["image_sizes"] == [(200, 80), (28, 28)]
    assert [tuple(image.shape) for image in batch["images"]] == [(3, 3, 28, 28), (3, 28, 28)]


def test_cut_samples_are_counted_and_the_first_is_named(write: Any) -> None:
    tokenizer = tokenizer_for(golden("tokenizers/llama-mini1k-legacy"), 60)
    long_answer = sample("What?", "word " * 200, id="long")
    long_question = sample("word " * 200, id="question")
    dataset = LazySupervisedDataset(
        write(sample("What?", "no"), long_answer, long_question),
        tokenizer,
        data_args(is_multimodal=False, on_bad_sample="skip"),
        conv=conv_templates["v1"],
    )
    tokenizer.model_max_length = 160
    loader = torch.utils.data.DataLoader(dataset, batch_size=None, num_workers=2)
    for item in loader:
        assert len(item["input_ids"]) <= 160
    truncated, skipped = dataset.reports()
    assert "1 samples drawn were truncated to --model_max_length 160" in truncated
    assert "sample 1 (id 'long')" in truncated
    assert "sample 2 (id 'question'): its answers begin behind the limit of 160 tokens" in skipped
    assert LazySupervisedDataset(write(sample("Hi")), tokenizer, data_args()).truncated.report([], 160) is None


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (sample(image="absent.png"), "absent.png"),
        (sample(image="../train_data/finetune.json"), "outside the image folder"),
        (sample(image="/etc/hostname"), "outside the image folder"),
        (sample("What?", image="gray_50x50.png"), "0 <image> placeholders for 1 image"),
        (sample("<image><image>", image=["gray_50x50.png"] * 3), "2 <image> placeholders for 3 images"),
        (sample("<image>\nWhat?"), "1 <image> placeholder for 0 images"),
        (sample(image="expected.json"), "not an image"),
        ({"id": "s1", "conversations": [{"from": "human", "value": "Hi"}]}, "no answer"),
    ],
)
def test_a_bad_sample_is_named(bad: dict[str, Any], message: str, tokenizer: Any, write: Any) -> None:
    dataset = LazySupervisedDataset(write(sample("Hi"), bad), tokenizer, data_args(), conv=conv_templates["v1"])
    dataset[0]
    with pytest.raises(InputError) as error:
        dataset[1]
    assert message in str(error.value)
    assert "sample 1 (id 's1')" in str(error.value)


def test_absolute_paths_inside_the_folder_are_fine(tokenizer: Any, write: Any) -> None:
    inside = str(golden("images/gray_50x50.png").resolve())
    args = data_args(image_folder=str(golden("images").resolve()))
    assert LazySupervisedDataset(write(sample(image=inside)), tokenizer, args)[0]["image"].shape == (3, 28, 28)


def test_an_image_without_a_tower_or_a_folder(tokenizer: Any, write: Any) -> None:
    path = write(sample(image="gray_50x50.png"))
    with pytest.raises(InputError, match="--vision_tower"):
        LazySupervisedDataset(path, tokenizer, data_args(is_multimodal=False))[0]
    with pytest.raises(InputError, match="--image_folder"):
        LazySupervisedDataset(path, tokenizer, data_args(image_folder=None))[0]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[{"id": 1,\n  "conversations": [}]', "line 2, column 21"),
        ("[]", "no samples"),
        ('{"a": 1}', "must be a JSON list of samples"),
        ("[3]", "sample 0"),
        ('[{"id": "x"}]', "id 'x'"),
        ('[{"id": "x", "conversations": []}]', "no turns"),
        ('[{"id": "x", "conversations": [{"from": "human"}]}]', "turn 0"),
        ('[{"id": "x", "image": 3, "conversations": [{"from": "human", "value": ""}]}]', "'image'"),
    ],
)
def test_a_bad_file_is_named(content: str, message: str, tmp_path: Path, tokenizer: Any) -> None:
    path = tmp_path / "broken.json"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(InputError) as error:
        LazySupervisedDataset(str(path), tokenizer, data_args())
    assert message in str(error.value)
    assert "broken.json" in str(error.value)


def test_no_such_file(tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"absent\.json"):
        LazySupervisedDataset(str(tmp_path / "absent.json"), tokenizer, data_args())
    with pytest.raises(InputError, match="--data_path"):
        LazySupervisedDataset(None, tokenizer, data_args())


def test_a_batch_without_anything_to_learn(tokenizer: Any) -> None:
    item = {"input_ids": torch.tensor([1, 5]), "labels": torch.tensor([-100, -100])}
    with pytest.raises(InputError, match="nothing to train on"):
        DataCollatorForSupervisedDataset(tokenizer)([item, item])
