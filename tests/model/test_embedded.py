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
    ("counting.png", "How many hearts are there?" + ONE_WORD, "5"),
    ("reading.png", "What does the text say?" + ONE_WORD, "Swan"),
    ("wide.png", "What colour is the hexagon?" + ONE_WORD, "Orange"),
]


@pytest.fixture(scope="module")
def loaded():
    return llava.load(embedded_model_path(), device="cpu")


def test_it_is_a_checkpoint_in_the_original_layout_of_at_most_32_mb():
    folder = embedded_model_path()
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["LlavaLlamaForCausalLM"]
    assert (folder / config["mm_vision_tower"] / "config.json").is_file()
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) <= 32 * 2**20


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


def test_every_measured_target_is_in_the_card():
    """The card is written from the report that is kept beside the recipe; it says what is promised."""
    card = (embedded_model_path() / "README.md").read_text()
    report = json.loads((IMAGES.parent / "recipes/tiny/results/evaluation.json").read_text())["groups"]
    for name, groups, target in (
        ("Scene attributes", ("colour", "shape", "size", "position", "relation"), 0.97),
        ("Counts, one to six", ("count",), 0.95),
        ("Reading, exact", ("read_seen_words", "read_unseen_words", "read_numbers"), 0.95),
        ("Photographs", ("photo",), 0.80),
    ):
        total = sum(report[group]["n"] for group in groups)
        right = sum(report[group]["n"] * report[group]["right"] for group in groups) / total
        assert right >= target
        assert f"| {name} | {total:,} | {right:.1%} |" in card
