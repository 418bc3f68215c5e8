"""The same samples in every form give the same ids, labels and pixels; hostile and broken files are refused in a sentence."""

from __future__ import annotations

import gzip
import json
import multiprocessing
import os
import random
import re
import subprocess
import sys
import tarfile
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cli_kit import environment
from data_forms import (
    FORMS,
    IMAGES,
    NAMES,
    SAMPLES,
    lines,
    text_file,
    turn,
    write_list,
    write_shards,
    write_table,
    write_tar,
)
from golden_data import golden
from hub_kit import fake_hub
from repository import ROOT

from llava.__main__ import main
from llava.conversation import conv_templates
from llava.data import plain_files, tables
from llava.data.formats import is_lost, media_sources, read_record, to_sample
from llava.data.index import DataFile
from llava.data.media_files import locate_image
from llava.data.samples import open_samples
from llava.data.sources import find_sources
from llava.data.truncation import check_trained, fit
from llava.errors import InputError
from llava.images.image_processor import ClipImageProcessor
from llava.text.tokenization import load_tokenizer
from llava.train.data import LazySupervisedDataset

CLIP_28 = ClipImageProcessor.from_pretrained(golden("checkpoints/vision/clip-tiny-28"))


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    cache = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    return cache / "llava"


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    tokenizer = load_tokenizer(golden("tokenizers/llama-mini1k-legacy"), model_max_length=2048)
    tokenizer.pad_token = tokenizer.unk_token
    return tokenizer


def dataset(path: Path | str, tokenizer: Any, **changes: Any) -> LazySupervisedDataset:
    values = {
        "image_folder": str(golden("images")), "image_processor": CLIP_28, "image_aspect_ratio": "square",
        "is_multimodal": True, "mm_use_im_start_end": False, "on_bad_sample": "stop", "image_policy": None,
    }  # fmt: skip
    return LazySupervisedDataset(str(path), tokenizer, Namespace(**{**values, **changes}), conv=conv_templates["v1"])


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> list[Any]:
    made = dataset(write_list(tmp_path_factory.mktemp("plain"), SAMPLES), tokenizer)
    return [made[index] for index in range(len(SAMPLES))]


@pytest.mark.parametrize("name", FORMS)
def test_every_form_gives_the_same_ids_labels_and_pixels(
    name: str, tmp_path: Path, tokenizer: Any, expected: list[Any]
) -> None:
    form = FORMS[name]
    samples = [SAMPLES[index] for index in form.holds]
    if form.holds == (3,):  # forms without a system text
        samples = [{**SAMPLES[3], "conversations": SAMPLES[3]["conversations"][1:]}]
        plain = dataset(write_list(tmp_path, samples), tokenizer)
        expected = [None, None, None, plain[0]]
        (tmp_path / "form").mkdir()
    made = dataset(form.write(tmp_path / "form" if form.holds == (3,) else tmp_path, samples), tokenizer)
    assert len(made) == len(samples)
    order = list(range(len(samples)))
    random.Random(5).shuffle(order)  # any order gives the same samples
    for position in order:
        torch.testing.assert_close(made[position], expected[form.holds[position]], rtol=0, atol=0)
    assert not made.list_data_dict.notes()
    columns = [(len(samples[position].get("image") or []) > 0) for position in range(len(samples))]
    assert (made.list_data_dict.column("images") > 0).tolist() == columns


def test_the_examples_of_the_docs_are_read() -> None:
    rows = re.findall(r"^\| [^|]+ \| (`\{.*`) \|$", (ROOT / "docs/data.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert len(rows) == 12
    for row in rows:
        text = "".join(re.findall(r"`([^`]+)`", row)).replace("...", '"AA=="')
        sample, notes = read_record(json.loads(text))
        assert sample["conversations"][-1]["from"] == "gpt", text
        assert [is_lost(note) for note in notes] == ([True] if "rejected" in text else []), text


# Records


def spoken(record: dict[str, Any]) -> list[tuple[str, str]]:
    return [(entry["from"], entry["value"]) for entry in to_sample(record)["conversations"]]


def test_tools_and_thoughts_are_written_as_servers_write_them() -> None:
    share_gpt = {
        "conversations": [
            turn("human", "Rain?"),
            turn("function_call", "{}"),
            turn("observation", "no"),
            turn("gpt", "No."),
        ]
    }
    assert spoken(share_gpt) == [
        ("human", "Rain?"), ("gpt", "<tool_call>\n{}\n</tool_call>"),
        ("human", "<tool_response>\nno\n</tool_response>"), ("gpt", "No."),
    ]  # fmt: skip
    call = {"type": "function", "function": {"name": "rain", "arguments": '{"where": "Bern"}'}}
    messages = [
        {"role": "user", "content": "Rain?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "no"},
        {"role": "assistant", "reasoning_content": "it said no", "content": "No."},
    ]
    assert spoken({"messages": messages})[1:] == [
        ("gpt", '<tool_call>\n{"name": "rain", "arguments": {"where": "Bern"}}\n</tool_call>'),
        ("human", "<tool_response>\nno\n</tool_response>"),
        ("gpt", "<think>\nit said no\n</think>\n\nNo."),
    ]


@pytest.mark.parametrize("version", ["v1", "llava_llama_2", "mpt", "v0", "qwen_1_5", "llava_llama_3"])
@pytest.mark.parametrize("mark", [{"loss": False}, {"weight": 0}, {"train": False}])
def test_an_answer_that_is_not_to_be_trained(
    version: str, mark: dict[str, Any], tokenizer: Any, tmp_path: Path
) -> None:
    turns = [turn("human", "1?"), turn("gpt", "wrong"), turn("human", "2?"), turn("gpt", "right")]
    marked = [turns[0], {**turns[1], **mark}, *turns[2:]]
    made = dataset(write_list(tmp_path, [{"conversations": marked}, {"conversations": turns}]), tokenizer)
    made.conv = conv_templates[version]
    item, whole = made[0], made[1]
    assert item["input_ids"].tolist() == whole["input_ids"].tolist()
    trained, before = (tokenizer.decode(entry["labels"][entry["labels"] >= 0]) for entry in (item, whole))
    assert "wrong" in before
    assert "wrong" not in trained
    assert "right" in trained


@pytest.mark.parametrize("key", ["loss", "weight", "rejected_response", "tools", "reward"])
def test_what_a_sample_says_about_its_training_is_a_fault_where_it_is_not_read(key: str) -> None:
    _, notes = read_record({**SAMPLES[2], key: 0})
    assert [is_lost(note) for note in notes] == [True]
    _, notes = read_record({**SAMPLES[2], "origin": "web", key: None})
    assert [is_lost(note) for note in notes] == [False]


def test_weights_between_are_refused() -> None:
    with pytest.raises(InputError, match=r"turn 1 has the weight 0\.5"):
        to_sample({"conversations": [turn("human", "1?"), {**turn("gpt", "so so"), "weight": 0.5}]})


def test_what_is_not_read_is_said_once_per_data_set(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        {"id": f"r{n}", "source": "web", "conversations": [turn("human", "Hi"), turn("gpt", "Ho")]} for n in range(9)
    ]
    rows[0].pop("source")
    rows[3]["rejected"] = "Ha"
    rows[4]["conversations"] = [turn("human", "Hi"), turn("human", "there"), {**turn("gpt", "Ho"), "mood": "good"}]
    path = text_file(tmp_path / "data.jsonl", lines(rows))
    assert open_samples(path).notes() == [
        f"{str(path)!r}: the key 'source' is not read (8 of 9 samples, first sample 1 (id 'r1'))",
        f"{str(path)!r}: the key 'rejected' is not read (1 of 9 samples, first sample 3 (id 'r3'))",
        f"{str(path)!r}: questions that follow each other are joined (1 of 9 samples, first sample 4 (id 'r4'))",
        f"{str(path)!r}: the key 'mood' of turns is not read (1 of 9 samples, first sample 4 (id 'r4'))",
    ]
    assert main(["data", "check", str(path)]) == 1
    output = capsys.readouterr().out
    assert "note: " in output
    assert "unread-key: 1" in output
    assert "sample 3 (id 'r3'): the key 'rejected' is not read; " in output


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (["Hi"], "not an object"),
        ({"a": 1}, "it has the keys 'a'; known are 'conversations'"),
        ({"conversations": "[[[["}, "not a list of turns"),
        ({"conversations": "[" * 100_000}, "nested too deep"),
        ({"conversations": [["a", "b", "c"]]}, "turn 0 is not an object"),
        ({"conversations": [{"from": "human", "value": 3}]}, "neither a text nor a list of parts"),
        ({"audio": "a.wav", "messages": [{"role": "user", "content": "Who?"}]}, "a sound"),
        (
            {"image": "a.png", "video": "b.mp4", "conversations": [turn("human", "<image>"), turn("gpt", "b")]},
            "one <video> for",
        ),
        ({"system": "a", "messages": [{"role": "system", "content": "b"}]}, "a system text both"),
        ({"question": "a", "answer": {"b": 1}}, "its answer is"),
        ({"question": "a", "answers": [3.5, {"b": 1}]}, "its answer is None"),
        ({"image": "a.png", "caption": [3]}, "its caption is"),
        ({"image": "a.png", "caption": "[]"}, "its caption is"),
        ({"image": 3, "caption": "a"}, "'image' is neither"),
    ],
)
def test_records_that_cannot_be_read(record: Any, message: str) -> None:
    with pytest.raises(InputError) as error:
        read_record(record)
    assert message in str(error.value)


def test_images_and_videos_keep_the_order_of_their_placeholders() -> None:
    record = {"image": ["a.png", "b.png"], "video": "c.mp4",
              "conversations": [turn("human", "<image> <video>\n<image>"), turn("gpt", "x")]}  # fmt: skip
    sample = to_sample(record)
    assert [getattr(entry, "source", entry) for entry in sample["image"]] == ["a.png", "c.mp4", "b.png"]
    assert sample["conversations"][0]["value"] == "<image> <image>\n<image>"


# Files


def test_a_row_of_a_table_costs_about_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own_cache: Path) -> None:
    rows = [{"id": str(n), "image": {"bytes": os.urandom(20_000), "path": None}, "conversations": SAMPLES[2]["conversations"]}
            for n in range(100)]  # fmt: skip
    file = DataFile(write_table(tmp_path, rows))
    decoded: list[int] = []
    whole = tables._parquet

    class Counted:
        def __init__(self, path: Path) -> None:
            self.file = whole(path)
            self.metadata = self.file.metadata

        def read_row_group(self, group: int, **options: Any) -> Any:
            decoded.append(group)
            return self.file.read_row_group(group, **options)

    monkeypatch.setattr(tables, "_parquet", Counted)
    monkeypatch.setattr(tables, "SMALL_GROUP", 1000)
    for n in random.Random(0).sample(range(100), 100):
        assert file[n]["image"] == [rows[n]["image"]["bytes"]]
    assert sorted(decoded) == sorted(set(decoded))  # each group once
    assert len(list(own_cache.rglob("*.arrow"))) == len(decoded)
    # Another process, and a disk without room.
    monkeypatch.setattr(tables, "SPARE", 1 << 60)
    assert file[7]["image"] == [rows[7]["image"]["bytes"]]
    for copy in own_cache.rglob("*.arrow"):
        copy.unlink()
    tables._mapped.cache_clear()
    assert file[7]["image"] == [rows[7]["image"]["bytes"]]
    assert not list(own_cache.rglob("*.arrow"))


def test_a_changed_table_is_not_read_from_old_copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "SMALL_GROUP", 0)
    for answer in ("Ho", "Hu"):
        path = write_table(tmp_path, [{"conversations": [turn("human", "Hi"), turn("gpt", answer)]}])
        assert DataFile(path)[0]["conversations"][1]["value"] == answer


def test_a_bomb_is_refused_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own_cache: Path) -> None:
    import pyarrow as pa

    monkeypatch.setattr(plain_files, "ALWAYS_ALLOWED", 2**20)
    for name, kind in (("a.json.zst", "zstd"), ("a.json.gz", "gzip")):
        with pa.CompressedOutputStream(str(tmp_path / name), kind) as file:
            for _ in range(64):
                file.write(b" " * 2**20)
        with pytest.raises(InputError, match="over 200 times its size"):
            open_samples(tmp_path / name)
    monkeypatch.setattr(plain_files, "SPARE", 1 << 60)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines(SAMPLES).encode()))
    with pytest.raises(InputError, match="make room"):
        open_samples(tmp_path / "b.jsonl.gz")
    assert not [path for path in own_cache.rglob("*") if path.is_file()]


@pytest.mark.parametrize(
    "name", ["a.jsonl.gz", "a.jsonl.zst", "a.jsonl.xz", "a.jsonl.bz2", "a.tar", "a.tgz", "a.arrow", "a.parquet"]
)
def test_broken_files_are_named(name: str, tmp_path: Path) -> None:
    for content in (b"", b"no such file", gzip.compress(lines(SAMPLES).encode())[:-20], b"\x28\xb5\x2f\xfd\0\0"):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match=name):
            open_samples(tmp_path / name)


def test_names_in_a_tar_lead_nowhere(tmp_path: Path) -> None:
    turns = json.dumps({"conversations": SAMPLES[0]["conversations"], "image": "/etc/passwd"}).encode()
    path = write_tar(
        tmp_path / "a.tar", {"../../up.png": IMAGES[NAMES[0]], "../../up.json": turns, "/root.json": turns}
    )
    with tarfile.open(path, "a") as archive:
        link = tarfile.TarInfo("x.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    samples = open_samples(path)
    assert samples.id(0) == "../../up"
    assert samples[0]["image"] == [IMAGES[NAMES[0]]]
    assert len(samples) == 2
    with pytest.raises(InputError, match="outside the image folder"):
        locate_image(samples[1]["image"], str(tmp_path))
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["a.tar"]


def test_a_tar_with_broken_samples(tmp_path: Path) -> None:
    good = json.dumps(SAMPLES[2]).encode()
    members = {
        "a.json": b"{",
        "b.json": b"[" * 100_000,
        "c.png": IMAGES[NAMES[0]],
        "d.json": good,
        "._d.json": b"\0",
        "e.txt": b"\xff",
    }
    samples = open_samples(write_tar(tmp_path / "a.tar", members))
    assert list(samples.malformed()) == [0, 1, 2, 4]
    assert samples[3]["conversations"] == SAMPLES[2]["conversations"]
    for index, message in enumerate(("not valid JSON", "nested too deep", "have no text")):
        with pytest.raises(InputError, match=message):
            samples[index]


@pytest.mark.parametrize("content", ["[" * 100_000, '{"a":' * 100_000, "[{}, " + "[" * 100_000, '{"a": 1}\n' + "[" * 100_000,
                                     "[" + "9" * 10_000 + "]", '{"data": ' + "[" * 100_000])  # fmt: skip
def test_nested_json_is_refused(content: str, tmp_path: Path) -> None:
    path = text_file(tmp_path / "data.json", content)
    try:
        samples = open_samples(path)
    except InputError:
        return
    assert len(list(samples.malformed())) == len(samples)


def test_coco_captions(tmp_path: Path, tokenizer: Any) -> None:
    document = {"images": [{"id": n, "file_name": name} for n, name in enumerate(NAMES)],
                "annotations": [{"id": 10 + n, "image_id": n % 2, "caption": f"Card {n}."} for n in range(3)]}  # fmt: skip
    samples = open_samples(text_file(tmp_path / "captions.json", json.dumps(document)))
    assert [samples.id(n) for n in range(3)] == [10, 11, 12]
    assert samples[2] == {
        "id": 12,
        "image": [NAMES[0]],
        "conversations": [turn("human", "<image>"), turn("gpt", "Card 2.")],
    }
    document["annotations"][1]["image_id"] = 99
    with pytest.raises(InputError, match="about the image 99"):
        open_samples(text_file(tmp_path / "captions.json", json.dumps(document)))


def test_vqa_without_its_answers_says_where_they_belong(tmp_path: Path) -> None:
    path = text_file(
        tmp_path / "v2_OpenEnded_x_questions.json", json.dumps({"questions": [{"question_id": 1, "question": "a"}]})
    )
    with pytest.raises(InputError, match=r"'v2_x_annotations\.json'"):
        open_samples(path)


def test_folders_and_patterns(tmp_path: Path) -> None:
    for name in ("b/1.jsonl", "b/2.jsonl", "b/validation.jsonl", "b/train.jsonl", "b/.hidden/3.jsonl"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        text_file(tmp_path / name, lines(SAMPLES))
    names = [source.path.name for source in find_sources(tmp_path / "b")]
    assert names == ["1.jsonl", "2.jsonl", "train.jsonl"]
    assert [source.path.name for source in find_sources(f"{tmp_path}/b/[12].jsonl")] == ["1.jsonl", "2.jsonl"]
    with pytest.raises(InputError, match="no file matches"):
        find_sources(f"{tmp_path}/b/*.parquet")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="holds no data files"):
        find_sources(tmp_path / "empty")


def test_an_image_with_another_ending_is_found(tmp_path: Path) -> None:
    for name in ("1.gif", "2.png", "2.jpg", "4.PNG"):
        (tmp_path / name).write_bytes(b"x")
    assert locate_image("1.jpg", str(tmp_path)) == str(tmp_path / "1.gif")
    assert locate_image("4", str(tmp_path)) == str(tmp_path / "4.PNG")
    assert locate_image("3.jpg", str(tmp_path)) == str(tmp_path / "3.jpg")  # which opening it says
    with pytest.raises(InputError, match=r"'2\.jpg' and '2\.png'"):
        locate_image("2.webp", str(tmp_path))
    assert locate_image("2.png", str(tmp_path)) == str(tmp_path / "2.png")


def test_addresses_are_refused_unless_allowed() -> None:
    with pytest.raises(InputError, match="allow addresses with --image_urls"):
        locate_image("https://example.org/a.png", "x")
    assert locate_image("https://example.org/a.png", "x", allow_urls=True) == "https://example.org/a.png"
    with pytest.raises(InputError, match="is an address"):
        locate_image("file-host://example.org/a.png", "x", allow_urls=True)


def test_a_data_set_of_the_hub(tmp_path: Path) -> None:
    write_shards(tmp_path, SAMPLES)
    (tmp_path / "shards" / "weights.bin").write_bytes(b"not wanted")
    with fake_hub({"someone/cards": tmp_path / "shards"}) as hub:
        values = environment() | {
            "HF_HOME": str(tmp_path / "home"),
            "HF_ENDPOINT": hub.url,
            "HF_HUB_DISABLE_TELEMETRY": "1",
        }
        del values["HF_HUB_OFFLINE"]

        def check(name: str) -> subprocess.CompletedProcess[str]:
            command = [sys.executable, "-m", "llava", "data", "check", name]
            return subprocess.run(command, env=values, capture_output=True, text=True, timeout=120)

        done = check("someone/cards/data")
        assert done.returncode == 0, done.stderr
        assert "4 samples in " in done.stdout
        assert not [path for _, path, _ in hub.requests if "weights.bin" in path]
        absent = check("someone/else")
        assert absent.returncode == 2
        assert "there is no training data 'someone/else' on this disk" in absent.stderr


def _read_all(path: str, order: list[int]) -> None:
    samples = open_samples(path)
    for index in order:
        samples[index]


@pytest.mark.parametrize(
    "name", ["a folder of parquet shards", "WebDataset, compressed", "zstd", "datasets.save_to_disk"]
)
def test_a_run_that_is_killed_reads_the_same_samples_again(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own_cache: Path
) -> None:
    """Killed at any moment, while copies are made or read: what is there afterwards gives the same samples at each place."""
    monkeypatch.setattr(tables, "SMALL_GROUP", 0)
    many = [{**SAMPLES[index % 4], "id": f"s{index}"} for index in range(60)]
    path = str(FORMS[name].write(tmp_path, many))
    order = random.Random(1).sample(range(60), 60)
    context = multiprocessing.get_context("fork")
    for delay in (0.0, 0.01, 0.03, 0.1):
        reader = context.Process(target=_read_all, args=(path, order))
        reader.start()
        time.sleep(delay)
        reader.kill()
        reader.join()
    samples = open_samples(path)
    plain = open_samples(write_list(tmp_path, many))
    for index in order:
        found, wanted = samples[index], plain[index]
        assert found["conversations"] == wanted["conversations"]
        sources = wanted.get("image", [])
        names = [sources] if isinstance(sources, str) else sources
        assert media_sources(found) == (names if name == "zstd" else [IMAGES[entry] for entry in names])
    temporary = [path for path in own_cache.rglob("*") if path.is_file() and path.suffix == ""]
    assert len(temporary) <= 4  # what a killed process was writing


# Lengths


def test_a_cut_never_goes_through_an_image() -> None:
    rng = random.Random(0)
    for _ in range(300):
        ids = [rng.choice([5, 5, 5, -200]) for _ in range(rng.randint(1, 30))]
        features = [rng.randint(1, 9) for _ in range(ids.count(-200))]
        limit = rng.randint(1, 60)
        sizes = iter(features)
        spans = np.cumsum([next(sizes) if token == -200 else 1 for token in ids])
        fitted = fit(ids, features, limit)
        assert fitted.full_length == spans[-1]
        assert fitted.num_ids == int((spans <= limit).sum())
        assert fitted.length == (spans[fitted.num_ids - 1] if fitted.num_ids else 0) <= limit
        assert fitted.num_images == ids[: fitted.num_ids].count(-200)
        assert fitted.is_cut == (fitted.full_length > limit)
    with pytest.raises(InputError, match="begin behind the limit of 2 tokens"):
        check_trained([-100, -100, 4], fit([1, 2, 4], [], 2), 2)
    with pytest.raises(InputError, match="no answer to train on"):
        check_trained([-100, -100], fit([1, 2], [], 1), 1)
