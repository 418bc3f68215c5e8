"""The evaluation of the embedded model: its suite, its scorer, and the whole program on random weights.

No photographs and no typefaces are needed: letters are in Pillow's own face. The recipe itself is in test_tiny_recipe.py.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import evaluate
import lettering
import pack
import pytest
import scoring
import suite
import tiny
import tokenizer as tiny_tokenizer
from photos import blank_photos
from rows import FIRST_SEED, Row, Suite
from samples import Source


def test_suite_is_balanced_and_asks_what_was_never_trained() -> None:
    made = suite.make_suite(None, None, 24)
    assert [row.id for row in made.rows] == [row.id for row in suite.make_suite(None, None, 24).rows]
    assert len({row.id for row in made.rows}) == len(made.rows)
    groups: dict[str, list[Row]] = {}
    for row in made.rows:
        groups.setdefault(row.group, []).append(row)
    for name, rows in groups.items():
        if name.startswith(("yesno_", "pope_")):
            assert Counter(row.tag for row in rows)["Yes"] * 2 == len(rows)
    assert Counter(row.tag for row in groups["count"]) == {str(number): 4 for number in range(1, 7)}
    for row in groups["read_unseen_words"]:
        said = row.answer if row.form == "word" else scoring.quoted(row.answer)
        assert said is not None
        assert lettering.is_held_out(said)
    places = {row.id: place for place, row in enumerate(made.rows)}
    assert all(places[row.after] < places[row.id] for row in made.rows if row.after)
    assert FIRST_SEED > 20_000_000 + 10_000_000  # the training data's seeds end far below
    asked = Counter(
        row.wording for row in made.rows if row.group not in ("talk", "talk_new") and "pope" not in row.group
    )
    assert set(asked) == {"grammar", "hand"}
    assert min(asked.values()) > 0.35 * asked.total()
    assert {len(row.images) for row in groups["pair"]} == {2}


# --- scoring ----------------------------------------------------------------------------------------------------------


def verdict(category: str, form: str, answer: str, said: str) -> tuple[bool, bool]:
    found = scoring.judge(Row("x-0", "x", category, form, "?", answer), said)
    return found.right, found.exact


@pytest.mark.parametrize(
    ("category", "form", "answer", "said", "right", "exact"),
    [
        ("colour", "word", "Grey", "gray.", True, True),
        ("colour", "word", "Red", "Red star", False, False),
        ("colour", "sentence", "The star is red.", "The star is red.", True, True),
        ("colour", "sentence", "The star is red.", "It is red.", True, False),
        ("colour", "sentence", "The star is red.", "The red star is blue.", False, False),
        ("shape", "sentence", "The red object is a star.", "It is a star", True, False),
        ("count", "word", "3", "three", True, True),
        ("count", "sentence", "There are three stars.", "There are 3 stars.", True, False),
        ("count", "sentence", "There are no stars.", "There is one star.", False, False),
        ("position", "sentence", "The star is at the top left.", "The star is at the top.", False, False),
        ("position", "word", "Centre", "Center", True, True),
        ("relation", "sentence", "The star is above the ring.", "The ring is above the star.", False, False),
        ("read", "word", "Ab3", "Ab3", True, True),
        ("read", "word", "Ab3", "ab3", False, False),
        ("read", "sentence", 'It says "Ab".', 'The word is "Ab".', True, False),
        ("read", "sentence", 'It says "Ab".', 'It says "ab".', False, False),
        ("photo", "word", "Car", "Automobile", True, True),
        ("photo", "sentence", "The photograph shows a cat.", "It is a cat.", True, False),
        ("photo", "sentence", "The photograph shows a cat.", "It is a cat or a dog.", False, False),
        ("yesno_colour", "sentence", "No, the star is red.", "No, it is red.", True, False),
        ("yesno_colour", "word", "No", "No, the star is red.", False, False),
        ("unknown", "sentence", "I cannot tell who made it from the image.", "I do not know: who made it.", True, False),
        ("unknown", "sentence", "I cannot tell who made it from the image.", "It is red.", False, False),
        ("describe", "free", "A small red star on the left and a large blue ring.",
            "A large blue ring and a small red star on the left.", True, False),
        ("describe", "free", "A small red star on the left.", "A large red star on the left.", False, False),
        ("talk", "free", "Goodbye!", "Goodbye!", True, True),
        ("box", "free", "[0.10, 0.10, 0.50, 0.50]", "[0.12, 0.10, 0.50, 0.48]", True, False),
        ("box", "free", "[0.10, 0.10, 0.50, 0.50]", "[0.50, 0.50, 0.90, 0.90]", False, False),
        ("box", "free", "[0.10, 0.10, 0.50, 0.50]", "On the left.", False, False),
        ("two colour count", "word", "Red, 3", "Red, three", True, False),
        ("two colour count", "word", "Red, 3", "Red", False, False),
        ("two colour count", "sentence", "It is red. There are two stars.", "The star is red. There are 2 stars.", True, False),
        ("two colour count", "sentence", "It is red. There are two stars.", "It is red. There is one star.", False, False),
        ("region", "sentence", "It is a red star.", "It is a red circle.", False, False),
        ("list_shapes", "sentence", "I see a circle and a star.", "I see a star and a circle.", True, False),
        ("chart_most", "sentence", "The red bar is the tallest.", "It is the red one.", True, False),
        ("pair_which", "sentence", "The first picture shows a star.", "The second picture shows a star.", False, False),
    ],
)  # fmt: skip
def test_scorer(category: str, form: str, answer: str, said: str, right: bool, exact: bool) -> None:
    assert verdict(category, form, answer, said) == (right, exact)


def test_scorer_accepts_every_right_answer_of_the_suite() -> None:
    verdicts = [scoring.judge(row, row.answer) for row in suite.make_suite(None, None, 24).rows]
    assert [v.row.id for v in verdicts if not (v.right and v.exact)] == []
    report = scoring.summarise(verdicts)
    assert {name: group["right"] for name, group in report["groups"].items() if group["right"] != 1} == {}
    assert report["false_denials"]["share"] == 0
    assert report["false_refusals"]["share"] == 0
    assert {figures["f1"] for figures in report["yes_no"].values()} == {1.0}


def test_yes_no_figures_by_hand() -> None:
    said = [("Yes", "Yes"), ("Yes", "Yes"), ("Yes", "No"), ("No", "Yes"), ("No", "No"), ("No", "A star")]
    rows = [scoring.judge(Row("x", "yesno_x", "yesno_x", "word", "?", t), s) for t, s in said]
    figures = scoring.yes_no_figures(rows)
    assert figures["accuracy"] == pytest.approx(4 / 6 - 1 / 6, abs=1e-4)
    assert (figures["precision"], figures["recall"]) == pytest.approx((2 / 3, 2 / 3), abs=1e-4)
    assert figures["yes_rate"] == 0.5


def test_false_refusals_are_counted() -> None:
    row = Row("x", "colour", "colour", "sentence", "?", "The star is red.")
    said = ["I cannot tell what colour it is.", "There is no star in the image.", "The star is red.", "It is blue."]
    report = scoring.summarise([scoring.judge(row, text) for text in said])
    assert report["false_refusals"] == {"n": 4, "share": 0.25}
    assert report["false_denials"] == {"n": 4, "share": 0.25}
    assert report["groups"]["colour"]["right"] == 0.25


# --- the whole, on random weights -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packed")
    num_pieces = tiny_tokenizer.build_tokenizer(folder / "tokenizer", Source(None, blank_photos()), num_samples=60)
    trained = tiny.build(folder / "trained", vocab_size=num_pieces, conv_mode="v1")
    pack.pack(trained, trained / "tower", folder / "tokenizer", folder / "model", shard_bytes=400_000)
    return folder / "model"


def test_packed_model_is_the_trained_one(packed: Path) -> None:
    from safetensors.torch import load_file

    shards = sorted(packed.glob("model-*.safetensors"))
    assert len(shards) > 1
    whole = load_file(packed.parent / "trained" / "model.safetensors")
    found = {name: tensor for shard in shards for name, tensor in load_file(shard).items()}
    assert found.keys() == whole.keys()
    assert all((tensor == whole[name].half()).all() for name, tensor in found.items())
    assert json.loads((packed / "config.json").read_text())["mm_vision_tower"] == "vision_tower"


def test_evaluation_of_a_packed_model(packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluate, "MAX_NEW_TOKENS", {"word": 3, "sentence": 3, "free": 3})
    options = ["--model", str(packed), "--out", str(tmp_path), "--size", "8", "--workers", "1", "--device", "cpu"]
    assert (
        evaluate.main(
            [*options, "--only", "colour,follow_up,conversation,talk_new,yesno_size,side_wide,pair,box", "--card"]
        )
        == 0
    )
    report = json.loads((tmp_path / "evaluation.json").read_text())
    assert report["groups"]["colour"]["n"] == 8
    assert report["groups"]["follow_up"]["n"] == 8
    answers = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert len(answers) == report["questions"]
    card = (packed / "README.md").read_text()
    assert "| - colour | 8 |" in card
    assert str(tmp_path) not in card


def test_batches_answer_as_single_questions_do(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from llava.model.builder import load

    monkeypatch.setattr(evaluate, "MAX_NEW_TOKENS", {"word": 6, "sentence": 6, "free": 6})
    loaded = load(packed, device="cpu", dtype="float32")
    made = suite.make_suite(None, None, 8)
    kept = [
        row
        for row in made.rows
        if row.group in ("colour", "talk_new", "follow_up", "follow_up_first", "side_wide", "pair")
    ]
    chosen = Suite(kept, made.paints)
    images = chosen.paint()
    together = evaluate.answer_suite(loaded, chosen, images, batch=16)
    assert together == evaluate.answer_suite(loaded, chosen, images, batch=1)
    assert set(together) == {row.id for row in kept}
