"""The recipe of the embedded model: the generator's facts, what is held out, the tokenizer, the scorer.

Facts are checked against the pixels and against a reading of the question that shares no code with the generator. Nothing
here needs CIFAR-10 or any typeface: photographs are blank and letters are in Pillow's own face.
"""

from __future__ import annotations

import math
import random
import re
from collections import Counter
from dataclasses import replace
from itertools import combinations, count
from pathlib import Path

import boxes
import charts
import draw_images
import finish
import fonts
import lettering
import noise
import numpy as np
import pairs
import palette
import pytest
import raster
import scenes
import shapes
import talk
import tokenizer as tiny_tokenizer
import wordings
from finish import Finish
from photos import blank_photos
from PIL import Image
from samples import DRAW, Source, draw_sample, side_of

from llava.conversation import conv_templates
from llava.text.tokenization import load_tokenizer

ROOT = Path(__file__).resolve().parents[3]

TRAIN = Source(None, blank_photos())
HELD = Source(None, blank_photos(), held=True)
PLAIN = Source(None, blank_photos(), plain=True)
NUMBERS = ("no", "one", "two", "three", "four", "five", "six")


def plain(question: str) -> str:
    return question.replace("color", "colour").replace("center", "centre").lower().rstrip("?.! ")


# --- images ---------------------------------------------------------------------------------------------------------


def blobs(image: Image.Image, *, least: int = 40) -> list[tuple[str, float, float]]:
    """Patches of one colour, as (colour, x, y), by flooding; the background is the corner's colour.

    Pixels with a neighbour of another colour are left out: mixed ones along an edge would be patches of their own.
    """
    pixels = np.asarray(image.convert("RGB")).astype(int)
    free = np.abs(pixels - pixels[1, 1]).max(-1) > 3
    for shift, axis in ((1, 0), (-1, 0), (1, 1), (-1, 1)):
        free &= np.abs(pixels - np.roll(pixels, shift, axis)).max(-1) <= 3
    found = []
    height, width = free.shape
    for row, column in np.argwhere(free):
        if not free[row, column]:
            continue
        colour = pixels[row, column]
        stack, patch = [(row, column)], []
        free[row, column] = False
        while stack:
            y, x = stack.pop()
            patch.append((y, x))
            for ny, nx in ((y + 1, x), (y - 1, x), (y, x + 1), (y, x - 1)):
                inside = 0 <= ny < height and 0 <= nx < width
                if inside and free[ny, nx] and np.abs(pixels[ny, nx] - colour).max() <= 3:
                    free[ny, nx] = False
                    stack.append((ny, nx))
        if len(patch) >= least:
            y, x = np.mean(patch, axis=0)
            found.append((colour_name(tuple(colour)), x / width, y / height))
    return found


def colour_name(rgb: tuple[int, ...]) -> str:
    """The name by hue, saturation and brightness, with rules of its own."""
    import colorsys

    hue, saturation, value = colorsys.rgb_to_hsv(*(int(c) / 255 for c in rgb))
    hue *= 360
    if value < 0.2:
        return "black"
    if saturation < 0.1:
        return "white" if value > 0.85 else "grey"
    if hue > 310 and value > 0.94 and (saturation < 0.7 or hue < 340):
        return "pink"
    if 12 < hue < 42 or (hue < 12 and value < 0.7):
        return "brown" if value < 0.7 else "orange"
    bounds = ((15, "red"), (80, "yellow"), (180, "green"), (250, "blue"), (305, "purple"), (361, "red"))
    return next(name for bound, name in bounds if hue < bound)


def drawn_plainly(scene: scenes.Scene) -> Image.Image:
    bare = tuple(replace(t, border=None, fill="solid") for t in scene.things)
    return scenes.render_scene(replace(scene, texture="plain", things=bare, finish=Finish()), 224)


def apart(scene: scenes.Scene) -> bool:
    return all(math.hypot(a.x - b.x, a.y - b.y) > a.radius + b.radius for a, b in combinations(scene.things, 2))


@pytest.mark.parametrize("source", [TRAIN, HELD], ids=["train", "held"])
@pytest.mark.parametrize("seed", range(10))
def test_things_are_where_and_what_the_scene_says(source: Source, seed: int) -> None:
    scene = next(s for n in count(1000 * seed) if apart(s := draw_sample("scene", n, source).scene))
    found = blobs(drawn_plainly(scene))
    # The inside of a ring is background, which the flood leaves out, so that each thing is one patch.
    assert sorted(name for name, _, _ in found) == sorted(thing.colour for thing in scene.things)
    for thing in scene.things:
        reach = thing.radius * (0.85 if thing.shape == "crescent" else 0.35)
        assert any(
            name == thing.colour and abs(x - thing.x) < reach and abs(y - thing.y) < reach for name, x, y in found
        )


def test_counts_of_a_colour_are_those_of_the_pixels() -> None:
    checked = 0
    for seed in range(100, 140):
        sample = draw_sample("scene", seed, PLAIN)
        if not apart(sample.scene):
            continue
        seen = Counter(name for name, _, _ in blobs(drawn_plainly(sample.scene)))
        for qa in sample.questions:
            if qa.category == "count" and (found := re.search(r"(\w+) objects", qa.question)):
                number = seen.total() if found[1] in ("many", "the") else seen[found[1]]
                assert qa.short == str(number), (seed, qa.question)
                assert NUMBERS[number] in qa.answer.lower().split()
                checked += 1
    assert checked > 30


def test_every_colour_keeps_its_name_and_its_distance() -> None:
    for name in palette.NAMES:
        shades = [palette.draw_colour(random.Random(i), name)[1] for i in range(100)]
        assert {colour_name(shade) for shade in shades} == {name}


def test_texts_fit_their_images() -> None:
    for seed in range(40):
        text = lettering.draw_lettering(random.Random(seed), None, held=False)
        bare = replace(text, texture="plain", plate_rgb=None, shadow_rgb=None, finish=Finish())
        image = np.asarray(lettering.render_lettering(bare, 112)).astype(int)
        ink = np.abs(image - np.asarray(text.background_rgb)).sum(-1) > 60
        assert ink.any()
        border = np.concatenate([ink[0], ink[-1], ink[:, 0], ink[:, -1]])
        assert not border.any(), text.text


# --- questions --------------------------------------------------------------------------------------------------------


def fitting(scene: scenes.Scene, words: str) -> list[scenes.Thing]:
    """The things that "red star", "star", "red object" or "object" could mean."""
    *colours, shape = words.split()
    return [
        thing
        for thing in scene.things
        if shape in (thing.shape, "object", "shape") and (not colours or colours[0] == thing.colour)
    ]


def the_one(scene: scenes.Scene, words: str) -> scenes.Thing:
    found = fitting(scene, words)
    assert len(found) == 1, f"{words!r} could mean {len(found)} things"
    return found[0]


NAME = r"the ((?:\w+ )?\w+)"
PLACE = r"(?: in the image)?"


def check_fact(scene: scenes.Scene, question: str, short: str) -> bool:
    """Work a question out from the things alone; False where it is of a form that this does not read."""
    patterns = {
        rf"(?:what|which) colour is {NAME}|what is the colour of {NAME}": lambda t: t.colour,
        rf"(?:what|which) shape is {NAME}|what is the shape of {NAME}": lambda t: t.shape,
        rf"is {NAME} small or large|how big is {NAME}|what size is {NAME}": lambda t: t.size,
        rf"where{PLACE} is {NAME}": lambda t: t.place,
    }
    for pattern, value in patterns.items():
        if (found := re.fullmatch(pattern, question)) and " at the " not in question:
            words = next(group for group in found.groups() if group)
            if words.split()[-1] not in (*scenes.SHAPES, "object"):
                return False
            assert value(the_one(scene, words)) == short.lower()
            return True
    if found := re.fullmatch(rf"is {NAME} (to the left of|to the right of|above|below) {NAME}", question):
        a, b = the_one(scene, found[1]), the_one(scene, found[3])
        true = {"to the left of": a.x < b.x, "to the right of": a.x > b.x, "above": a.y < b.y, "below": a.y > b.y}
        assert short == ("Yes" if true[found[2]] else "No")
        return True
    if found := re.fullmatch(rf"which is (larger|smaller), {NAME} or {NAME}", question):
        a, b = the_one(scene, found[2]), the_one(scene, found[3])
        right = found[2] if (a.radius > b.radius) == (found[1] == "larger") else found[3]
        assert short.lower() == f"the {right}"
        return True
    if found := re.fullmatch(
        r"(?:is there|do you see|can you see) an? ((?:\w+ )?\w+)(?: in the (?:image|image))?", question
    ):
        assert short == ("Yes" if fitting(scene, found[1]) else "No")
        return True
    return False


def test_answers_follow_from_the_scene() -> None:
    read = 0
    for seed in range(250):
        sample = draw_sample("scene", seed, PLAIN)
        for qa in sample.questions:
            if qa.short is not None and qa.category not in ("unknown", "absent"):
                read += check_fact(sample.scene, plain(qa.question), qa.short)
    assert read > 3000


@pytest.mark.parametrize("kind", DRAW)
def test_a_question_has_one_right_answer(kind: str) -> None:
    for seed in range(150):
        answers: dict[str, set[str | None]] = {}
        for qa in draw_sample(kind, seed, PLAIN).questions:
            if qa.category not in ("unknown", "describe"):
                answers.setdefault(plain(qa.question), set()).add(qa.short or qa.answer)
        twice = {question: found for question, found in answers.items() if len(found) > 1}
        assert not twice, (seed, twice)


@pytest.mark.parametrize(
    ("kind", "category"),
    [
        ("scene", "yesno_colour"), ("scene", "yesno_size"), ("scene", "yesno_position"), ("scene", "yesno_count"),
        ("scene", "yesno_relation"), ("scene", "yesno_exists"), ("text", "yesno_read"), ("photo", "yesno_photo"),
    ],
)  # fmt: skip
def test_yes_and_no_are_equally_often_right(kind: str, category: str) -> None:
    said: Counter[str | None] = Counter()
    for seed in range(500):
        said.update(qa.short for qa in draw_sample(kind, seed, TRAIN).questions if qa.category == category)
    assert set(said) == {"Yes", "No"}
    assert 0.44 < said["Yes"] / said.total() < 0.56, said


@pytest.mark.parametrize("kind", DRAW)
def test_equal_seeds_give_equal_samples(kind: str) -> None:
    first, again, other = (draw_sample(kind, seed, TRAIN) for seed in (7, 7, 8))
    assert (first.caption, first.questions, first.truth) == (again.caption, again.questions, again.truth)
    assert first.questions != other.questions
    if kind != "talk":
        images = [[image.tobytes() for image in sample.images] for sample in (first, again)]
        assert images[0] == images[1]


# --- what is held out -------------------------------------------------------------------------------------------------


def test_held_out_texts_are_never_drawn_for_training() -> None:
    rng = random.Random(0)
    train = {lettering.draw_text(rng, held=False).lower() for _ in range(6000)}
    held = {lettering.draw_text(rng, held=True).lower() for _ in range(6000)}
    assert not {text for text in train & held if len(text) > 2}
    assert min(len(train), len(held)) > 500


def test_held_out_typefaces_and_wordings() -> None:
    faces = fonts.read_faces()
    train, held = ({face.stem.split("-")[0] for face in faces if face.split == split} for split in ("train", "held"))
    assert train
    assert held
    assert not train & held


def plain_words(wording: str) -> str:
    """A wording without its case, marks and slots: the test's own measure, stricter than `wordings.normal`."""
    return " ".join(re.findall(r"[a-z{}]+", wording.lower().replace("color", "colour")))


def all_wordings(split: str) -> dict[str, set[str]]:
    names = [*wordings.GRAMMARS, *([wordings.BY_HAND] if split == "hand" else [])]
    kinds = [kind for name in names for kind in wordings.read_sections(name)]
    return {kind: {w for line in wordings.wordings(kind, split) for w in line} for kind in kinds}


def test_no_wording_of_the_suite_is_trained() -> None:
    train = {plain_words(w) for found in all_wordings("train").values() for w in found}
    for split in ("grammar", "hand"):
        held = {w for found in all_wordings(split).values() for w in found if w not in wordings.PUBLISHED}
        assert len(held) > 300
        assert not {plain_words(w) for w in held} & train


def test_questions_come_in_hundreds_of_wordings_and_each_kind_has_some_by_hand() -> None:
    train, hand = all_wordings("train"), all_wordings("hand")
    assert sum(map(len, train.values())) > 10_000
    for kind in ("colour", "where", "exists", "count", "read", "any_text", "photo", "describe", "who made it"):
        assert len(train[kind]) > 150, kind
    only_trained = {"aside", *wordings.read_sections(wordings.GRAMMARS[1])}  # the suite has its own unanswerable topics
    assert not [kind for kind, found in train.items() if found and not hand[kind] and kind not in only_trained]
    unknown = {w for kind in wordings.read_sections(wordings.GRAMMARS[1]) for w in train[kind]}
    assert len(unknown) > 2000


def test_noise_leaves_slots_and_meaning_and_never_says_a_held_out_wording() -> None:
    """Of 3,000 changed questions each still has its slots and its weighty words, and is one that training may say."""
    ask = wordings.Asker(random.Random(5), "train")
    kinds = [kind for name in wordings.GRAMMARS for kind in wordings.read_sections(name)]
    changed = 0
    for number in range(3000):
        rng = random.Random(number)
        wording = rng.choice(rng.choice(wordings.wordings(rng.choice(kinds), "train")))
        noisy = noise.change(rng, wording)
        assert wordings.fields(noisy) == wordings.fields(wording)
        weighty = [w for w in wording.split(" ") if w.strip(".,:;?!").lower() not in noise.LIGHT]
        left = iter(noisy.split(" "))
        assert all(word in left for word in weighty), (wording, noisy)  # in their order
        changed += noisy != wording
    assert changed > 2900
    ask.pick = lambda *_: "name the tint of {name}"  # type: ignore[method-assign]
    said = {ask("colour", name="X").replace("X", "{name}") for _ in range(2000)}
    assert len(said) > 400
    assert not {plain_words(w) for w in said} & {
        plain_words(w) for found in all_wordings("hand").values() for w in found
    }
    assert not noise.HEAVY & {*noise.common_words(), *noise.shown_words()}


def test_every_wording_can_be_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each slot is one that somebody fills: a wording with another would never be drawn."""
    filled: set[tuple[str, str]] = set()
    ask = wordings.Asker.__call__

    def record(self: wordings.Asker, kind: str, **slots: str) -> str:
        filled.update((kind, name) for name in slots)
        return ask(self, kind, **slots)

    monkeypatch.setattr(wordings.Asker, "__call__", record)
    for number, kind in enumerate([kind for kind in DRAW if kind != "talk"] * 50):
        sample = draw_sample(kind, number, TRAIN)
        talk.converse(TRAIN.asker(random.Random(number)), sample.questions, 5)
    for split in ("train", "grammar", "hand"):
        for kind, found in all_wordings(split).items():
            for wording in found:
                missing = wordings.fields(wording) - {name for k, name in filled if k == kind} - {"bare"}
                assert not missing, (kind, wording, missing)


def test_the_suite_draws_by_another_hand() -> None:
    train, held = set(raster.RENDERERS["train"]), set(raster.RENDERERS["held"])
    assert not train & held
    assert set(palette.TEXTURES) & set(palette.HELD_TEXTURES) == {"plain"}
    assert set(finish.FINISHES["train"]) & set(finish.FINISHES["held"]) == {"plain"}
    for source, own in ((TRAIN, train), (HELD, held)):
        drawn = [draw_sample("scene", seed, source).scene for seed in range(60)]
        assert {scene.renderer for scene in drawn} == own
        assert {scene.hand for scene in drawn} == {"held" if source.held else "train"}
        split = "held" if source.held else "train"
        assert {scene.finish.name for scene in drawn} <= set(finish.FINISHES[split])
    for shape in shapes.SHAPES:
        ours = {np.concatenate(shapes.outline(shape, v / 16, "train")).tobytes() for v in range(17)}
        other = {np.concatenate(shapes.outline(shape, v / 16, "held")).tobytes() for v in range(17)}
        if shape != "hexagon":  # of which there is only one
            assert not ours & other, shape


@pytest.mark.parametrize("name", ["pillow", "distance", "scanline"])
def test_rasterizers_cover_what_the_outline_says(name: str) -> None:
    """The covered area is that of the polygon (its cross product sum), wherever it lies between the pixels."""
    cover = next(found[name] for found in raster.RENDERERS.values() if name in found)
    for number, shape in enumerate(shapes.SHAPES):
        parts = shapes.place(
            shapes.outline(shape, 0.3, "train"), x=0.5 + number / 97, y=0.48, radius=0.3, angle=7.0, stretch=1.0, keystone=0.0
        )  # fmt: skip
        parts = [points * 100 for points in parts]
        areas = [abs(np.sum(p[:, 0] * np.roll(p[:, 1], -1) - p[:, 1] * np.roll(p[:, 0], -1))) / 2 for p in parts]
        true = areas[0] - sum(areas[1:])
        assert cover(parts, 100).values.sum() == pytest.approx(true, rel=0.06 if name == "pillow" else 0.03), shape


def test_boxes_are_those_of_the_pixels() -> None:
    checked = 0
    for seed in range(60):
        sample = draw_sample("scene", seed, HELD if seed % 2 else TRAIN)
        scene = sample.scene
        for thing in scene.things:
            alone = drawn_plainly(replace(scene, things=(thing,), sign=None))
            inside = np.abs(np.asarray(alone).astype(int) - np.asarray(scene.background_rgb)).max(-1) > 24
            rows, columns = np.flatnonzero(inside.any(1)), np.flatnonzero(inside.any(0))
            seen = (columns[0] / 224, rows[0] / 224, (columns[-1] + 1) / 224, (rows[-1] + 1) / 224)
            assert boxes.overlap(seen, scene.box(thing)) > 0.85, (seed, thing)
            checked += 1
    assert checked > 100


def test_boxes_are_written_and_read() -> None:
    assert boxes.spell_box((0.1, 0.2, 0.345, 1.0)) == "[0.10, 0.20, 0.34, 1.00]"
    assert boxes.read_box("It is at [0.10, 0.20, 0.34, 1.00].") == (0.1, 0.2, 0.34, 1.0)
    assert boxes.read_box("[0.1, 0.2, 0.3]") is None
    assert boxes.read_box("[0.1.2, 0.2, 0.3, 0.4]") is None
    assert boxes.overlap((0, 0, 1, 1), (0.5, 0, 1.5, 1)) == pytest.approx(1 / 3)
    assert boxes.overlap((0, 0, 1, 1), (1, 0, 2, 1)) == 0.0
    assert boxes.overlap((0, 0, 1, 1), None) == 0.0


def test_chart_answers_follow_from_the_pixels() -> None:
    """The tallest and the shortest bar, found as the columns of one colour that reach highest and lowest."""
    for seed in range(300):
        chart = charts.draw_chart(random.Random(seed), held=seed % 2 == 0)
        if chart.kind != "bar":
            continue
        pixels = np.asarray(charts.render_chart(replace(chart, finish=Finish(), axes=None, grid=False), 224)).astype(
            int
        )
        heights = [(np.abs(pixels - rgb).max(-1) < 3).any(1).sum() for rgb in chart.rgbs]
        ask = wordings.Asker(random.Random(seed), "plain")
        said = {qa.question: qa.short for qa in charts.chart_questions(chart, ask) if qa.category == "chart_most"}
        assert said["Which bar is the tallest?"] == wordings.capital(chart.colours[int(np.argmax(heights))])
        assert said["Which bar is the shortest?"] == wordings.capital(chart.colours[int(np.argmin(heights))])


def test_two_images_are_told_apart() -> None:
    for seed in range(60):
        rng = random.Random(seed)
        first, second = (draw_sample("scene", 2 * seed + k, PLAIN) for k in (0, 1))
        ask = wordings.Asker(rng, "plain")
        for qa in pairs.pair_questions(side_of(first), side_of(second), ask):
            if qa.category == "pair_more":
                assert qa.short == ("First" if len(first.scene.things) > len(second.scene.things) else "Second")
            if found := re.fullmatch(r"In the (first|second) picture, (.*)", qa.question):
                own = first if found[1] == "first" else second
                asked = {wordings.capital(q.question)[1:]: q.short for q in own.questions}
                assert asked[found[2][1:]] == qa.short


# --- tokenizer --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    tiny_tokenizer.build_tokenizer(folder, TRAIN, num_samples=60)
    return folder


def test_tokenizer_ids_and_round_trip(tokenizer_folder: Path) -> None:
    tokenizer = load_tokenizer(tokenizer_folder)
    assert [tokenizer.convert_ids_to_tokens(i) for i in (0, 1, 2, 3, 258)] == [
        "<unk>",
        "<s>",
        "</s>",
        "<0x00>",
        "<0xFF>",
    ]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 0)
    texts = [qa.answer for kind in DRAW for qa in draw_sample(kind, 3, HELD).questions]
    for text in (*texts, "Zürich, 3 €, 図", 'It says "xYz 09".', "a  b"):
        ids = tokenizer(text).input_ids
        assert ids[0] == 1
        assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_what_is_read_is_spelt_and_the_prompt_is_short(tokenizer_folder: Path) -> None:
    tokenizer = load_tokenizer(tokenizer_folder)
    for word in (*noise.common_words()[::50], "quantity", "whereabouts", "bounding"):  # one piece each
        assert len(tokenizer(f"the {word}", add_special_tokens=False).input_ids) == 2, word
    ids = tokenizer('It says "donkey".', add_special_tokens=False).input_ids
    assert {tokenizer.convert_ids_to_tokens(i) for i in ids} >= set("donkey")
    conversation = conv_templates["v1"].copy()
    conversation.append_message(conversation.roles[0], f"What colour is the star?{talk.SHORT_SUFFIX}")
    conversation.append_message(conversation.roles[1], None)
    assert conversation.system == tiny_tokenizer.SYSTEM
    assert len(tokenizer(conversation.get_prompt()).input_ids) < 20


# --- sample images --------------------------------------------------------------------------------------------------


def test_sample_images_show_what_they_should() -> None:
    found = blobs(Image.open(ROOT / "images" / "counting.png"))
    assert [name for name, _, _ in found] == ["red"] * 5
    demo = Image.open(ROOT / "images" / "demo.jpg").convert("RGB")
    assert demo.size == (draw_images.SIDE, draw_images.SIDE)
    for thing in draw_images.DEMO:
        assert colour_name(demo.getpixel((round(thing.x * 448), round(thing.y * 448)))) == thing.colour
    assert [thing.place for thing in draw_images.DEMO] == ["top", "left", "right"]
    wide = Image.open(ROOT / "images" / "wide.png")
    assert wide.width > wide.height
    assert sorted(name for name, _, _ in blobs(wide)) == sorted(thing.colour for thing in draw_images.WIDE)
    assert lettering.is_held_out(draw_images.WORD)


def test_sample_images_come_from_the_script(tmp_path: Path) -> None:
    draw_images.main(["--out", str(tmp_path)])
    for path in tmp_path.iterdir():
        committed = np.asarray(Image.open(ROOT / "images" / path.name).convert("RGB")).astype(float)
        drawn = np.asarray(Image.open(path).convert("RGB")).astype(float)
        assert committed.shape == drawn.shape
        assert np.abs(committed - drawn).mean() < 2  # Pillow's versions draw edges a little differently
    assert sum(path.stat().st_size for path in (ROOT / "images").iterdir()) < 200_000
