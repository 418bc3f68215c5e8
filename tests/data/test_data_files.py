"""Data files of every form give the same samples; indexes survive, notice changes and are never half written."""

from __future__ import annotations

import json
import os
import pickle
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from golden_data import golden

from llava.data import index, scan
from llava.data.formats import media_sources, to_sample
from llava.data.index import DataFile
from llava.data.samples import open_samples
from llava.errors import InputError

FINETUNE = json.loads(golden("train_data/finetune.json").read_text(encoding="utf-8"))


def turns(*texts: str) -> list[dict[str, str]]:
    return [{"from": ("human", "gpt")[number % 2], "value": text} for number, text in enumerate(texts)]


def made_up(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Samples with every kind of character and of JSON value around them."""
    rng = random.Random(seed)
    alphabet = ["word", "Ünï", "图片", "😀", '"quoted"', "{[", "]}", "\\", "\n", "\u00a0", "\u0085", "1e5", ","]
    return [
        {
            "id": rng.choice([f"s{number}", number, f"é{number}"]),
            **({"image": f"{number}.jpg"} if rng.random() < 0.5 else {}),
            "extra": [1.5, None, {"deep": [True]}],
            "conversations": turns(*(" ".join(rng.choices(alphabet, k=rng.randint(1, 30))) for _ in range(2))),
        }
        for number in range(count)
    ]


def write(path: Path, samples: list[Any], form: str) -> Path:
    if form == "list":
        path.write_text(json.dumps(samples, ensure_ascii=False), encoding="utf-8")
    elif form == "pretty":
        path.write_text("\ufeff" + json.dumps(samples, indent=2, ensure_ascii=False) + "\n\n", encoding="utf-8")
    elif form == "escaped":
        path.write_text(json.dumps(samples), encoding="utf-8")
    elif form == "lines":
        path.write_text("\n\n".join(json.dumps(sample, ensure_ascii=False) for sample in samples), encoding="utf-8")
    return path


@pytest.mark.parametrize("chunk", [1, 7, 100, 1 << 20])
@pytest.mark.parametrize("form", ["list", "pretty", "escaped", "lines"])
def test_every_form_gives_what_json_gives(
    form: str, chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scan, "CHUNK", chunk)
    samples = made_up(40)
    file = DataFile(write(tmp_path / "data.json", samples, form))
    assert [file[row] for row in range(len(file))] == samples
    assert [file.id(row) for row in range(len(file))] == [sample["id"] for sample in samples]
    words = [sum(len(turn["value"].split()) for turn in sample["conversations"]) for sample in samples]
    assert file.columns.words.tolist() == words
    assert file.columns.images.tolist() == [int("image" in sample) for sample in samples]


def test_a_kept_index_is_used_and_one_of_another_state_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index, "WORTH_KEEPING", 0)
    cache, samples = tmp_path / "cache", made_up(30)
    path = write(tmp_path / "data.json", samples, "list")
    first = DataFile(path, cache=cache)
    (kept,) = cache.iterdir()

    monkeypatch.setattr(index, "_collect", lambda found: pytest.fail("the file was read again"))
    second = DataFile(path, cache=cache)
    assert isinstance(second.columns.start.base, np.memmap)
    copied = pickle.loads(pickle.dumps(second))
    for column in ("start", "size", "words", "images", "malformed", "id_end", "ids"):
        np.testing.assert_array_equal(getattr(first.columns, column), getattr(second.columns, column))
        np.testing.assert_array_equal(getattr(first.columns, column), getattr(copied.columns, column))
    assert copied[29] == samples[29]
    monkeypatch.undo()
    monkeypatch.setattr(index, "WORTH_KEEPING", 0)

    # Cut off, as a full disk or a copy in progress leaves it; of another state; not an index at all.
    whole = kept.read_bytes()
    for damaged in (whole[:-1], whole[:100], b"", b"[]\n", b"\xff\xfe\n"):
        kept.unlink()  # not in place: `second` still maps the file
        kept.write_bytes(damaged)
        assert DataFile(path, cache=cache)[3] == samples[3]
        assert kept.read_bytes() == whole

    write(path, samples[:20], "list")
    assert len(DataFile(path, cache=cache)) == 20
    with pytest.raises(InputError, match="was changed since"):
        second[0]
    assert [entry.name for entry in cache.iterdir()] == [kept.name]  # nothing half written is left


def test_an_index_that_cannot_be_kept_is_made_each_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(index, "WORTH_KEEPING", 0)
    path = write(tmp_path / "data.json", FINETUNE, "list")
    (tmp_path / "cache").write_text("a file where a folder should be")
    assert DataFile(path, cache=tmp_path / "cache")[0] == FINETUNE[0]
    assert "cannot be kept" in caplog.text


def test_samples_are_a_sequence_of_dicts(tmp_path: Path) -> None:
    samples = open_samples(write(tmp_path / "data.json", FINETUNE, "list"))
    assert list(samples) == FINETUNE
    assert samples[-1] == FINETUNE[-1]
    assert samples[1:3] == FINETUNE[1:3]
    assert FINETUNE[2] in samples
    with pytest.raises(IndexError):
        samples[len(FINETUNE)]


def test_openai_messages() -> None:
    parts = [
        {"type": "text", "text": "What is"},
        {"type": "image_url", "image_url": {"url": "a.png"}},
        {"type": "image_url", "image_url": "data:image/png;base64,AA=="},
    ]
    sample = to_sample(
        {
            "id": 7,
            "messages": [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": parts},
                {"role": "assistant", "content": "A card."},
            ],
        }
    )
    assert sample == {
        "id": 7,
        "image": ["a.png", "data:image/png;base64,AA=="],
        "conversations": [
            {"from": "system", "value": "Be brief."},
            {"from": "human", "value": "What is\n<image>\n<image>"},
            {"from": "gpt", "value": "A card."},
        ],
    }
    beside = {"messages": [{"role": "user", "content": [{"type": "image"}]}], "images": [{"bytes": b"x", "path": None}]}
    assert media_sources(to_sample(beside)) == [b"x"]
    assert to_sample(beside)["conversations"] == [{"from": "human", "value": "<image>"}]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"messages": []}, "no turns"),
        ({"messages": [{"content": "Hi"}]}, "turn 0 does not say who speaks"),
        ({"messages": [{"role": "user", "content": None}]}, "turn 0 has no text"),
        ({"messages": [{"role": "user", "content": [{"type": "audio"}]}]}, "'audio'"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "image": "a"}]}], "images": ["b"]}, "both"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": 3}}]}]}, "image_url"),
        ({"conversations": turns("Hi"), "images": [4]}, "'images'"),
    ],
)
def test_malformed_messages(record: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        to_sample(record)


def test_parquet_with_embedded_images(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    arrow = pytest.importorskip("pyarrow")
    image = golden("images/gray_50x50.png").read_bytes()
    rows = [
        {"id": f"r{number}", "image": {"bytes": image, "path": None} if number % 2 else None}
        | {"conversations": turns("<image>\nWhat is it?" if number % 2 else "Hi", f"Answer {number}.")}
        for number in range(7)
    ]
    path = tmp_path / "data.parquet"
    parquet.write_table(arrow.Table.from_pylist(rows), path, row_group_size=3)
    file = DataFile(path)
    assert file.columns.images.tolist() == [0, 1, 0, 1, 0, 1, 0]
    assert file.id(5) == "r5"
    assert media_sources(file[5]) == [image]
    assert media_sources(file[6]) == []
    assert file[4]["conversations"] == rows[4]["conversations"]
    lists = [{"images": [{"bytes": image, "path": "x.png"}], "messages": [{"role": "user", "content": "<image>"}]}]
    parquet.write_table(arrow.Table.from_pylist(lists), path)
    assert media_sources(DataFile(path)[0]) == [image]
    path.write_bytes(b"PAR1 nothing")
    with pytest.raises(InputError, match=r"data\.parquet"):
        DataFile(path)


# Several files


@pytest.fixture
def two(tmp_path: Path) -> Path:
    (tmp_path / "sub").mkdir()
    write(tmp_path / "a.json", [{"id": f"a{n}", "conversations": turns("Hi", "Ho")} for n in range(10)], "list")
    write(tmp_path / "sub/b.jsonl", [{"id": f"b{n}", "conversations": turns("Hi", "Ho")} for n in range(4)], "lines")
    return tmp_path


def ids(samples: Any) -> list[str]:
    return [samples.id(position) for position in range(len(samples))]


def mixture(folder: Path, text: str) -> str:
    path = folder / "mix.yaml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_files_joined_by_commas(two: Path) -> None:
    samples = open_samples(f"{two}/a.json, {two}/sub/b.jsonl")
    assert ids(samples) == [f"a{n}" for n in range(10)] + [f"b{n}" for n in range(4)]
    assert samples.describe(11) == f"sample 1 of {str(two / 'sub/b.jsonl')!r} (id 'b1')"
    weighted = ids(open_samples(f"{two}/a.json,{two}/sub/b.jsonl", weights="1,1"))
    assert len(weighted) == 14
    assert len({name for name in weighted if name[0] == "a"}) == 7
    assert sorted(name for name in weighted if name[0] == "b")[:2] == ["b0", "b0"]


def test_a_mixture_repeats_files_and_knows_their_folders(two: Path) -> None:
    text = "datasets:\n  - {path: a.json, repeat: 0.5}\n  - {path: sub/b.jsonl, repeat: 2.25, image_folder: images}\n"
    samples = open_samples(mixture(two, text))
    drawn = ids(samples)
    assert len(drawn) == 5 + 9
    assert len(set(drawn[:5])) == 5
    assert drawn[5:13] == [f"b{n}" for n in range(4)] * 2
    assert [part.image_folder for part in samples.parts] == [None, str(two / "images")]
    assert samples.column("words").tolist() == [2] * 14
    assert ids(open_samples(mixture(two, text))) == drawn
    assert ids(open_samples(mixture(two, text + "seed: 5\n"))) != drawn
    assert ids(samples.distinct()) == [f"a{n}" for n in range(10)] + [f"b{n}" for n in range(4)]


def test_weights_are_shares_of_the_epoch(two: Path) -> None:
    text = "datasets: [{path: a.json, weight: 3}, {path: sub/b.jsonl, weight: 1}]\nepoch_size: 40\n"
    drawn = ids(open_samples(mixture(two, text)))
    assert sum(name.startswith("a") for name in drawn) == 30
    assert sum(name.startswith("b") for name in drawn) == 10
    as_json = two / "mix.json"
    as_json.write_text('{"datasets": [{"path": "a.json", "weight": 3}, {"path": "sub/b.jsonl", "weight": 1}]}')
    assert len(open_samples(as_json)) == 14  # as many as there are


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("datasets: []", "needs a list 'datasets'"),
        ("datasets: [{paht: a.json}]", "'path'"),
        ("datasets: [{path: a.json, wieght: 2}]", "did you mean 'weight'"),
        ("datasets: [{path: a.json, weight: 0}]", "above 0"),
        ("datasets: [{path: a.json, weight: 1, repeat: 1}]", "both a weight and a repeat"),
        ("datasets: [{path: a.json, weight: 1}, sub/b.jsonl]", "weights for some"),
        ("datasets: [a.json]\nepoch_size: 5", "no weights"),
        ("datasets: [absent.json]", "absent.json"),
        ("datasets: [{path: a.json, repeat: 0.01}]", "has no samples"),
        ("datasets: [", "not valid YAML"),
    ],
)
def test_a_mixture_that_cannot_be(text: str, message: str, two: Path) -> None:
    with pytest.raises(InputError) as error:
        open_samples(mixture(two, text))
    assert message in str(error.value)


@pytest.mark.parametrize(("weights", "message"), [("1", "1 numbers for 2"), ("1,x", "numbers"), ("1,-1", "above 0")])
def test_weights_that_cannot_be(weights: str, message: str, two: Path) -> None:
    with pytest.raises(InputError, match=message):
        open_samples(f"{two}/a.json,{two}/sub/b.jsonl", weights=weights)


def test_an_unreadable_file(tmp_path: Path) -> None:
    path = tmp_path / "data.json"
    path.write_bytes(b'[{"id": "\xff\xfe"}]')
    with pytest.raises(InputError, match="utf-8"):
        DataFile(path)
    path.write_text('[{"id": 1}, \n {"id": 2} {"id": 3}]')
    with pytest.raises(InputError, match="Expecting ',' delimiter at line 2, column 12"):
        DataFile(path)
    path.write_text("[{}] []")
    with pytest.raises(InputError, match="Extra data at line 1, column 6"):
        DataFile(path)
    path.write_text('[{"id": 1}, {"id": "cut')
    with pytest.raises(InputError, match="Unterminated string"):
        DataFile(path)
    if os.name == "posix":
        with pytest.raises(InputError, match="cannot read"):
            DataFile(tmp_path)
