"""`llava data check` finds each kind of fault, training agrees with it, and `llava data show` highlights what is trained."""

from __future__ import annotations

import io
import json
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
from golden_data import golden
from PIL import Image
from torch.utils.data import DataLoader

from llava.__main__ import main
from llava.assets import embedded_model_path
from llava.constants import IGNORE_INDEX
from llava.data import check
from llava.data.reader import read_model
from llava.data.samples import open_samples
from llava.data.show import highlight_trained
from llava.data.validate import FAULT_KINDS
from llava.errors import InputError
from llava.images.image_processor import ClipImageProcessor
from llava.train.data import LazySupervisedDataset

MODEL = str(embedded_model_path())


def sample(name: str, *texts: str, speakers: tuple[str, ...] = ("human", "gpt"), **fields: Any) -> dict[str, Any]:
    turns = [{"from": speakers[number % len(speakers)], "value": text} for number, text in enumerate(texts)]
    return {"id": name, "conversations": turns, **fields}


# Every sample but the good ones has the one fault that its id names.
SAMPLES: list[Any] = [
    sample("good", "<image>\nWhat is it?", "A card.", image="ok.png"),
    sample("good text", "Hi", "Hello."),
    sample("good twice", "<image> or <image>?", "The first.", image="ok.png"),
    {"id": "good messages", "messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]},
    {"id": "malformed", "conversations": [{"from": "human"}]},
    sample("missing-image", "<image>\nWhat?", "A card.", image="absent.png"),
    sample("missing-image", "<image>\nWhat?", "A card.", image="../ok.png"),
    sample("missing-image", "<image>\nWhat?", "A card.", image="https://example.org/a.png"),
    sample("broken-image", "<image>\nWhat?", "A card.", image="cut.png"),
    sample("broken-image", "<image>\nWhat?", "A card.", image="text.png"),
    sample("placeholders", "<image>\nWhat?", "A card."),
    sample("placeholders", "What?", "A card.", image="ok.png"),
    sample("placeholders", "<image>", "A", "<image>", "B", image="ok.png"),
    sample("turn-order", "Hi", "Hello.", "Hello?", speakers=("human", "gpt", "gpt")),
    sample("turn-order", "Hi", "Hello.", speakers=("gpt", "human", "gpt")[:2]) | {"note": "and nothing to train"},
    sample("turn-order", "Hi", "Hello.", speakers=("bird", "gpt")),
    sample("turn-order", "Hi", "Hello.", "Bye"),
    sample("empty-answer", "Hi", " ", "Well?", "Well."),
    sample("nothing-to-train", "Hi"),
    sample("too-long", "Hi", "word " * 1200),
    sample("unread-key", "Hi", "Hello.", rejected="Go away."),
    sample("good", "Hi", "Hello."),  # a duplicate
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    images = tmp_path / "images"
    images.mkdir()
    image = io.BytesIO()
    Image.effect_noise((60, 40), 50).convert("RGB").save(image, "PNG")
    (images / "ok.png").write_bytes(image.getvalue())
    (images / "cut.png").write_bytes(image.getvalue()[:2000])
    (images / "text.png").write_text("no image")
    (tmp_path / "ok.png").write_bytes(image.getvalue())
    (tmp_path / "data.json").write_text(json.dumps(SAMPLES), encoding="utf-8")
    return tmp_path


def found(output: str) -> dict[tuple[str, int], set[str]]:
    faults: dict[tuple[str, int], set[str]] = {}
    for fault in json.loads(output)["faults"]:
        faults.setdefault((fault["id"], fault["index"]), set()).add(fault["kind"])
    return faults


@pytest.mark.parametrize("workers", [1, 2])
def test_each_fault_is_found_by_id(
    workers: int, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(check, "_CHUNK", 2)  # so that two processes are used
    words = ["data", "check", str(folder / "data.json"), "--image-folder", str(folder / "images"), "--json"]
    assert main([*words, "--model-path", MODEL, "--workers", str(workers)]) == 1
    output = capsys.readouterr().out
    faults = found(output)
    for position, entry in enumerate(SAMPLES):
        kinds = faults.pop((entry["id"], position), set())
        if position == len(SAMPLES) - 1:
            assert kinds == {"duplicate-id"}
        elif entry["id"].startswith("good"):
            assert kinds == set()
        elif "note" in entry:
            assert kinds - {"duplicate-id"} == {"turn-order", "nothing-to-train"}
        else:
            assert entry["id"] in kinds
            assert kinds <= {entry["id"], "duplicate-id"}
    assert not faults
    report = json.loads(output)
    assert set(report["counts"]) == set(FAULT_KINDS)
    assert report["modalities"] == {"text only": 13, "one image": 9}
    assert report["lengths"]["unit"] == "tokens"
    assert (
        sum(row["samples"] for row in report["lengths"]["histogram"]) == len(SAMPLES) - 8
    )  # which cannot be read to the end


def test_training_agrees(folder: Path) -> None:
    """What the check lets pass can be drawn; what training refuses the check had found."""
    reader = read_model(MODEL)
    samples = open_samples(folder / "data.json")
    report = check.collect(check.SampleChecker(samples, str(folder / "images"), reader))
    bad = {index for index, fault in report.faults if fault.kind not in ("duplicate-id", "too-long")}
    dataset = dataset_for(folder, on_bad_sample="skip")
    refused = {index for index in range(len(samples)) if dataset.fault(index)}
    assert refused <= bad
    # These are trained on all the same, though rarely as was meant.
    assert {SAMPLES[index]["id"] for index in bad - refused} == {"turn-order", "empty-answer", "unread-key"}


def test_the_report_for_people(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "good.jsonl").write_text("\n".join(json.dumps(entry) for entry in SAMPLES[:4]))
    images = ["--image-folder", str(folder / "images")]
    assert main(["data", "check", str(folder / "good.jsonl"), *images]) == 0
    assert "no faults" in capsys.readouterr().out
    assert main(["data", "check", str(folder / "data.json"), *images, "--show", "2"]) == 1
    output = capsys.readouterr().out
    assert "sample 5 (id 'missing-image'): there is no image file" in output
    assert "and 1 more" in output
    assert " of 22 samples have faults" in output
    assert main(["data", "check", str(folder / "data.json"), "--max-length", "9"]) == 2
    assert main(["data", "check", str(folder / "absent.json")]) == 2
    assert main(["data", "chek"]) == 2
    assert main(["data"]) == 0


def test_show_marks_exactly_what_is_trained(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = ["--image-folder", str(folder / "images")]
    assert main(["data", "show", str(folder / "data.json"), *images]) == 0
    output = capsys.readouterr().out
    assert "image ok.png: 60x40 pixels, 64 tokens" in output
    assert "<image: 64 tokens>\nWhat is it? ASSISTANT:[ A card.</s>]" in output
    assert main(["data", "show", str(folder / "data.json"), "--id", "good text"]) == 0
    assert "USER: Hi ASSISTANT:[ Hello.</s>]" in capsys.readouterr().out
    assert main(["data", "show", str(folder / "data.json"), "--id", "good txt"]) == 2
    assert "did you mean 'good text'" in capsys.readouterr().err
    assert main(["data", "show", str(folder / "data.json"), "--index", "99"]) == 2
    assert main(["data", "show", str(folder / "data.json"), "--index", "5", *images]) == 2
    assert "sample 5 (id 'missing-image')" in capsys.readouterr().err


def test_colours_are_for_terminals(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from llava.cli.colors import wants_colors

    terminal = Namespace(isatty=lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert wants_colors(terminal)  # type: ignore[arg-type]
    monkeypatch.setenv("NO_COLOR", "1")
    assert not wants_colors(terminal)  # type: ignore[arg-type]
    assert not wants_colors(io.StringIO())
    reading = read_model(MODEL).read(SAMPLES[1])
    assert highlight_trained(reading, [], use_colors=True).endswith("ASSISTANT:\033[1;32m Hello.</s>\033[0m")


@pytest.mark.parametrize("conv_mode", ["v1", "llava_llama_2", "plain", "v0"])
def test_readings_are_those_of_training(conv_mode: str) -> None:
    reader = read_model(MODEL, conv_mode=conv_mode)
    name = "pretrain.json" if conv_mode == "plain" else "finetune.json"
    path = golden(f"train_data/{name}")
    reader.tokenizer.pad_token = reader.tokenizer.unk_token
    dataset = LazySupervisedDataset(str(path), reader.tokenizer, arguments(golden("images")), conv=reader.conv)
    for index, entry in enumerate(dataset.list_data_dict):
        reading, item = reader.read(entry), dataset[index]
        assert reading.ids == item["input_ids"].tolist()
        assert reading.labels == item["labels"].tolist()
        assert reading.ends == sorted(reading.ends)
        unmarked = highlight_trained(reading, [0], use_colors=False).replace("<image: 0 tokens>", "<image>")
        if not {"[", "]"} & set(reading.text):
            assert unmarked.replace("[", "").replace("]", "") == reading.text


def arguments(images: Path, **changes: Any) -> Namespace:
    values = {
        "image_folder": str(images),
        "image_processor": ClipImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}),
        "image_aspect_ratio": "pad",
        "is_multimodal": True,
        "mm_use_im_start_end": False,
    }
    return Namespace(**{**values, **changes})


def dataset_for(folder: Path, **changes: Any) -> LazySupervisedDataset:
    reader = read_model(MODEL)
    reader.tokenizer.pad_token = reader.tokenizer.unk_token
    args = arguments(folder / "images", **changes)
    return LazySupervisedDataset(str(folder / "data.json"), reader.tokenizer, args, conv=reader.conv)


def test_bad_samples_stop_a_run_or_are_replaced_and_listed(folder: Path) -> None:
    with pytest.raises(InputError, match=r"data\.json.*sample 4 \(id 'malformed'\): turn 0"):
        dataset_for(folder)
    dataset = dataset_for(folder, on_bad_sample="skip")
    assert len(dataset) == len(SAMPLES)
    drawn = {}
    for workers in (0, 2):
        dataset = dataset_for(folder, on_bad_sample="skip")
        loader = DataLoader(dataset, batch_size=None, num_workers=workers)
        drawn[workers] = list(loader)
        assert len(drawn[workers]) == len(SAMPLES)
        (report,) = dataset.reports()
        assert report.startswith("13 bad samples were skipped")
        assert "sample 5 (id 'missing-image'): there is no image file" in report
        assert "sample 4 (id 'malformed'): turn 0" in report
    for alone, shared in zip(drawn[0], drawn[2], strict=True):
        torch.testing.assert_close(alone, shared)
    # An image stands in for an image, a text for a text.
    assert drawn[0][5]["image"].any()
    assert drawn[0][5]["input_ids"].tolist() == drawn[0][0]["input_ids"].tolist()
    assert not drawn[0][10]["image"].any()
    assert all((item["labels"] != IGNORE_INDEX).any() for item in drawn[0])


def test_nothing_but_bad_samples_stops_even_a_run_that_skips(tmp_path: Path) -> None:
    bad = [sample(f"b{number}", "<image>", "A", image="absent.png") for number in range(120)]
    (tmp_path / "data.json").write_text(json.dumps(bad))
    with pytest.raises(InputError, match=r"100 samples in a row are bad, the last one: sample 99 \(id 'b99'\)"):
        dataset_for(tmp_path, on_bad_sample="skip")[0]
    (tmp_path / "data.json").write_text(json.dumps(bad[:3]))
    with pytest.raises(InputError, match="every sample is bad, as sample 1"):
        dataset_for(tmp_path, on_bad_sample="skip")[1]


def test_mixtures_have_image_folders_of_their_own(folder: Path) -> None:
    other = folder / "other"
    other.mkdir()
    Image.new("RGB", (9, 9), "red").save(other / "ok.png")
    (folder / "one.json").write_text(json.dumps(SAMPLES[:1]))
    mix = folder / "mix.yaml"
    mix.write_text("datasets:\n  - path: one.json\n  - {path: one.json, image_folder: other}\n")
    reader = read_model(MODEL)
    reader.tokenizer.pad_token = reader.tokenizer.unk_token
    dataset = LazySupervisedDataset(str(mix), reader.tokenizer, arguments(folder / "images"), conv=reader.conv)
    red = dataset[1]["image"]
    assert torch.equal(red[0], red[0][:1, :1].expand(28, 28))
    assert not torch.equal(dataset[0]["image"], red)
