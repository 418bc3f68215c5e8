"""LLaVA-NeXT's mixtures: the samples that its own reader took of the same files, as recorded, and what is refused instead."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llava.data.samples import data_files, open_samples
from llava.errors import InputError

SIZES = {"a.json": 10, "b.jsonl": 7, "c.json": 13, "d.json": 1}
# By the entries of a mixture and the seed of its choice, the ids that LLaVA-NeXT took (random.seed before reading).
RECORDED: list[tuple[list[tuple[str, str]], int, str]] = [
    ([("a.json", "all"), ("b.jsonl", "all")], 0, "a0 a1 a2 a3 a4 a5 a6 a7 a8 a9 b0 b1 b2 b3 b4 b5 b6"),
    ([("a.json", "first:3"), ("b.jsonl", "first:100")], 0, "a0 a1 a2 b0 b1 b2 b3 b4 b5 b6"),
    ([("a.json", "first: 3")], 0, "a0 a1 a2"),
    ([("a.json", "end:3"), ("b.jsonl", "end:100")], 0, "a7 a8 a9 b0 b1 b2 b3 b4 b5 b6"),
    ([("a.json", "random:4"), ("c.json", "random:5")], 0, "a7 a8 a1 a5 c6 c12 c10 c11 c7"),
    ([("a.json", "random:4"), ("c.json", "random:5")], 42, "a7 a3 a2 a8 c11 c7 c2 c12 c5"),
    ([("a.json", "first:33%"), ("b.jsonl", "first:50%"), ("c.json", "first:1%")], 0, "a0 a1 a2 a3 b0 b1 b2 b3 c0"),
    ([("a.json", "end:33%"), ("b.jsonl", "end:50%")], 0, "a6 a7 a8 a9 b3 b4 b5 b6"),
    ([("a.json", "random:25%"), ("b.jsonl", "random:99%"), ("c.json", "random:10%")], 0,
     "a7 a8 a1 b6 b0 b3 b5 b1 b4 b2 c3 c10"),
    ([("a.json", "random:25%"), ("b.jsonl", "random:99%"), ("c.json", "random:10%")], 42,
     "a7 a3 a2 b1 b2 b5 b6 b0 b3 b4 c2 c1"),
    ([("a.json", "first:2"), ("a.json", "end:2")], 0, "a0 a1 a8 a9"),
]  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, size in SIZES.items():
        turns = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]
        rows = [{"id": f"{name[0]}{number}", "conversations": turns} for number in range(size)]
        text = "\n".join(map(json.dumps, rows)) if name.endswith("l") else json.dumps(rows)
        (tmp_path / name).write_text(text, encoding="utf-8")
    return tmp_path


def mixture(folder: Path, entries: list[tuple[str, str]], seed: int = 0) -> Path:
    datasets = [{"json_path": name, "sampling_strategy": strategy} for name, strategy in entries]
    (folder / "mixture.yaml").write_text(json.dumps({"datasets": datasets, "seed": seed}))
    return folder / "mixture.yaml"


def ids(path: Any) -> list[Any]:
    samples = open_samples(path)
    return [samples.id(index) for index in range(len(samples))]


@pytest.mark.parametrize(("entries", "seed", "expected"), RECORDED)
def test_recorded_choices(entries: list[tuple[str, str]], seed: int, expected: str, folder: Path) -> None:
    assert ids(mixture(folder, entries, seed)) == expected.split()


def test_none_of_a_data_set_is_none(folder: Path) -> None:
    entries = [
        ("a.json", "first:0"),
        ("b.jsonl", "end:0"),
        ("c.json", "random:0%"),
        ("a.json", "end:0%"),
        ("d.json", "all"),
    ]
    assert ids(mixture(folder, entries)) == ["d0"]


@pytest.mark.parametrize(
    "strategy",
    [
        "first",
        "random",
        "middle:3",
        "all:3",
        "first:x",
        "first:-2",
        "end:-2",
        "first:0.5",
        "random:150%",
        "first:3 5",
        "",
    ],
)
def test_what_is_no_strategy_is_refused(strategy: str, folder: Path) -> None:
    with pytest.raises(InputError, match="has the sampling_strategy"):
        open_samples(mixture(folder, [("a.json", strategy)]))


def test_paths_may_be_relative_to_the_working_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "deep").mkdir()
    monkeypatch.chdir(folder)
    path = mixture(folder / "deep", [("a.json", "first:12.5%"), ("{c,d}.json", "end:3")])
    assert ids(path) == ["a0", "a1", "c11", "c12", "d0"]
    assert [file.name for file in data_files(path)] == ["mixture.yaml", "a.json", "c.json", "d.json"]
    assert ids("{a, c}.json") == [f"{name}{number}" for name, size in (("a", 10), ("c", 13)) for number in range(size)]
    with pytest.raises(InputError, match=r"zz\.json"):
        open_samples(mixture(folder, [("zz.json", "all")]))
    (folder / "a.txt").write_text("[]")
    with pytest.raises(InputError, match=r"the ending \.txt"):
        open_samples(mixture(folder, [("a.txt", "all")]))


def test_a_strategy_and_a_share_are_not_mixed(folder: Path) -> None:
    (folder / "m.yaml").write_text("datasets: [{path: a.json, sampling_strategy: 'first:2', repeat: 2}]")
    with pytest.raises(InputError, match="both a repeat and a sampling_strategy"):
        open_samples(folder / "m.yaml")
    with pytest.raises(InputError, match="use one of the two"):
        open_samples(mixture(folder, [("a.json", "first:2")]), weights="1")
