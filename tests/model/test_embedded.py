"""The model that comes with the package: its size, and its answers about the sample images."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

import llava
from llava.assets import embedded_model_path

IMAGES = Path(__file__).parents[2] / "images"
ONE_WORD = "\nAnswer the question using a single word or phrase."

# Facts of the images as they are drawn (recipes/tiny/draw_images.py).
FACTS = [
    ("demo.jpg", "What colour is the star?", "The star is yellow."),
    ("demo.jpg", "What shape is the blue object?" + ONE_WORD, "Square"),
    ("demo.jpg", "How many objects are there?", "There are three objects."),
    ("demo.jpg", "Is the circle to the left of the square?" + ONE_WORD, "Yes"),
    ("demo.jpg", "Is the star red?" + ONE_WORD, "No"),
    ("demo.jpg", "Is there a green heart?", "No, there is no green heart."),
    ("demo.jpg", "Is there a blue square in the picture? Answer yes or no.", "Yes"),
    ("demo.jpg", "Is there a dog in the image?" + ONE_WORD, "No"),
    ("demo.jpg", "how many things are there", "There are three objects."),
    ("counting.png", "How many hearts are there?" + ONE_WORD, "5"),
    ("reading.png", "What does the text say?" + ONE_WORD, "Swan"),
    ("wide.png", "What colour is the hexagon?" + ONE_WORD, "Orange"),
]


@pytest.fixture(scope="module")
def loaded():
    return llava.load(embedded_model_path(), device="cpu")


def test_it_is_a_checkpoint_in_the_original_layout_of_at_most_40_mb():
    folder = embedded_model_path()
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["LlavaLlamaForCausalLM"]
    assert (folder / config["mm_vision_tower"] / "config.json").is_file()
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) <= 40_000_000


@pytest.mark.parametrize(("image", "question", "answer"), FACTS)
def test_it_is_right_about_the_sample_images(loaded, image, question, answer):
    assert llava.Session(loaded).answer(question, IMAGES / image) == answer


def test_a_session_keeps_history_and_takes_images_in_memory(loaded):
    session = llava.Session(loaded)
    with Image.open(IMAGES / "demo.jpg") as image:
        assert session.answer("What colour is the square?", image) == "The square is blue."
    assert session.answer("Where is it?") == "It is on the right."
    assert "cannot" in session.answer("Who drew this?")
    assert [exchange.question for exchange in session.exchanges] == [
        "What colour is the square?",
        "Where is it?",
        "Who drew this?",
    ]


def test_it_gives_boxes_in_the_0_to_1_form(loaded):
    """The circle as it is drawn: at (0.22, 0.56), 0.18 in radius."""
    said = llava.Session(loaded).answer("Where is the red circle? Give its box.", IMAGES / "demo.jpg")
    assert json.loads(said) == pytest.approx([0.04, 0.38, 0.40, 0.74], abs=0.03)


def test_it_tells_two_images_apart(loaded):
    session = llava.Session(loaded)
    question = "Which picture shows a blue square?" + ONE_WORD
    assert session.answer(question, IMAGES / "counting.png", IMAGES / "demo.jpg") == "Second"
    session.reset()
    assert session.answer(question, IMAGES / "demo.jpg", IMAGES / "counting.png") == "First"


def test_the_card_says_what_was_measured_and_which_targets_are_missed():
    """It is written from the report that is kept beside the recipe."""
    card = (embedded_model_path() / "README.md").read_text()
    report = json.loads((IMAGES.parent / "recipes/tiny/results/evaluation.json").read_text())
    for name, groups, target in (
        ("Colours, shapes, positions", ("colour", "shape", "position"), 0.98),
        ("Counts, one to six", ("count",), 0.95),
        ("Reading, exact", ("read_seen_words", "read_unseen_words", "read_numbers"), 0.95),
        ("Photographs", ("photo",), 0.85),
        ("Two images in one question", ("pair", "yesno_pair"), 0.9),
        ("Unanswerable, and says so", ("unknown",), 0.97),
    ):
        found = [report["groups"][group] for group in groups]
        total = sum(group["n"] for group in found)
        right = sum(group["n"] * group["right"] for group in found) / total
        (line,) = [line for line in card.splitlines() if line.startswith(f"| {name} |")]
        assert line.startswith(f"| {name} | {total:,} | {right:.1%} |")
        assert line.endswith(f"| {target:.0%} |" if right >= target else f"| {target:.0%}, missed |")
    assert f"by {report['mean_overlap']['share']:.2f} on average" in " ".join(card.split())
