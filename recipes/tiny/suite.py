"""The held-out suite: rows of question and right answer, and the images they are about.

In: held-out typefaces, test photographs, how many questions a measure shall have. Out: Suite (rows, images; rows.py).
Nothing here was trained on: seeds, typefaces, texts (`lettering.is_held_out`), the hand and the rasterizer of
drawings (shapes.py, raster.py), what happens to images (finish.py) and the wordings of questions (wordings.py; half
of them written by hand) are held out, and photographs are the data set's test images. Answers are judged in
scoring.py and asked for in evaluate.py.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import count
from pathlib import Path

import lettering
import palette
import wordings
from lettering import Lettering
from photos import ANIMALS, KINDS, Photos, photo_questions
from PIL import Image
from reading import lettering_questions
from rows import FIRST_SEED, SEEDS_PER_PART, Maker, Row, Suite
from samples import SIDE, Paint, Sample
from shapes import SHAPES
from talk import QA, SMALL_TALK, Turn, converse, join_questions, joinable, unknown_questions, with_article
from wording import names_of
from wordings import Asker


def make_suite(fonts: Path | None, photos: Photos | None, size: int) -> Suite:
    """About `size` questions for each measure."""
    maker = Maker(fonts, photos)
    parts = (
        add_scenes, add_reading, add_any_text, add_pope, add_boxes, add_charts, add_pairs, add_two_questions,
        add_follow_ups, add_conversations, add_unknown, add_free, add_sizes,
    )  # fmt: skip
    for part in parts + ((add_photos,) if photos is not None else ()):
        part(maker, size)
    return Suite(maker.rows, maker.paints)


# --- drawn scenes ---------------------------------------------------------------------------------------------------

ATTRIBUTES = {name: name for name in ("colour", "shape", "size", "position", "relation")} | {
    "size_relation": "relation"
}
YES_NO = {f"yesno_{name}": f"yesno_{name}" for name in ("colour", "size", "position", "count", "relation", "photo")} | {
    "yesno_exists": "yesno_existence",
    "yesno_read": "yesno_reading",
}


def add_scenes(maker: Maker, size: int) -> None:
    """Attributes, counts (each number equally often) and yes/no questions (yes and no equally often)."""
    kinds = dict.fromkeys(ATTRIBUTES.values(), size)
    maker.fill(maker.draw(0, "scene"), kinds, lambda qa: ATTRIBUTES.get(qa.category))
    counts = {f"count/{number}": -(-size // 6) for number in range(1, 7)} | {"count_none/0": size // 6}
    maker.fill(maker.draw(1, "scene"), counts, count_label)
    drawn = [group for category, group in YES_NO.items() if category not in ("yesno_read", "yesno_photo")]
    maker.fill(maker.draw(2, "scene"), {f"{g}/{t}": size // 2 for g in drawn for t in ("Yes", "No")}, yes_no_label)
    rest = {"background": size // 4, "yesno_same/Yes": size // 8, "yesno_same/No": size // 8, "kind": size // 8}
    rest |= dict.fromkeys(("list_shapes", "list_colours"), size // 4)
    maker.fill(maker.draw(3, "scene"), rest, rest_label)


def count_label(qa: QA) -> str | None:
    return f"{'count_none' if qa.short == '0' else 'count'}/{qa.short}" if qa.category == "count" else None


def yes_no_label(qa: QA) -> str | None:
    return f"{YES_NO[qa.category]}/{qa.short}" if qa.category in YES_NO else None


def rest_label(qa: QA) -> str:
    return f"{qa.category}/{qa.short}" if qa.category == "yesno_same" else qa.category


def add_pope(maker: Maker, size: int) -> None:
    """Is there a ...? One yes and one no for each image; the no is of any colour and shape, or nearly right."""
    for part, wrong in enumerate(("random", "near")):
        group = f"pope_drawn_{wrong}"
        for sample, ask in maker.draw(10 + part, "scene"):
            if maker.number(group) >= size:
                break
            things = {(t.colour, t.shape) for t in sample.scene.things}
            right = ask.rng.choice(sorted(things))
            no = draw_absent(ask.rng, things, near=wrong == "near")
            images = maker.add_images(sample.paints)
            for (colour, shape), truth in ((right, "Yes"), (no, "No")):
                put_pope(maker, group, f"{colour} {shape}", truth, images)


def put_pope(maker: Maker, group: str, what: str, truth: str, images: tuple[int, ...]) -> None:
    """In the benchmark's own words, and as LLaVA is asked."""
    question = f"Is there {with_article(what)} in the image?\n{wordings.SHORT_SUFFIX}"
    maker.put(Row("", group, "yesno_exists", "word", question, truth, images, tag=truth))


def draw_absent(rng: random.Random, things: set[tuple[str, str]], *, near: bool) -> tuple[str, str]:
    colours, shapes = {c for c, _ in things}, {s for _, s in things}
    pairs = [(c, s) for c in palette.NAMES for s in SHAPES if (c, s) not in things]
    return rng.choice([(c, s) for c, s in pairs if (c in colours or s in shapes) == near])


# --- boxes, charts, two images, two questions -----------------------------------------------------------------------


def add_boxes(maker: Maker, size: int) -> None:
    quotas = {"box": size, "region": size // 2}
    maker.fill(maker.draw(12, "scene"), quotas, lambda qa: qa.category)


def add_charts(maker: Maker, size: int) -> None:
    quotas = {"chart/kind": size // 8, "chart/count": size // 4, "chart/most": size // 2}
    maker.fill(maker.draw(13, "chart"), quotas | {f"yesno_chart/{t}": size // 4 for t in ("Yes", "No")}, chart_label)


def chart_label(qa: QA) -> str:
    if qa.category.startswith("chart_"):
        return qa.category.replace("chart_", "chart/")
    return f"{qa.category}/{qa.short}"


def add_pairs(maker: Maker, size: int) -> None:
    """Half about one of two images, half about both."""
    quotas = {"pair/one of two": size // 2, "pair/which": size // 4, "pair/more": size // 4}
    maker.fill(maker.draw(14, "pair"), quotas | {f"yesno_pair/{t}": size // 4 for t in ("Yes", "No")}, pair_label)


def pair_label(qa: QA) -> str:
    if qa.category == "yesno_pair":
        return f"{qa.category}/{qa.short}"
    return {"pair_which": "pair/which", "pair_more": "pair/more"}.get(qa.category, "pair/one of two")


def add_two_questions(maker: Maker, size: int) -> None:
    """Two questions in one, both of which must be answered."""
    kinds = picture_kinds(maker, (("scene", 3), ("text", 1), ("photo", 1)))
    for sample, ask in mixed(maker, 15, kinds):
        if maker.number("two_questions") >= size // 2:
            return
        asked = [qa for qa in sample.questions if joinable(qa)]
        first = ask.rng.choice(asked)
        others = [qa for qa in asked if qa.category != first.category]
        joined = join_questions(ask, first, ask.rng.choice(others))
        maker.add("two_questions", joined, maker.add_images(sample.paints), ask)


# --- words and numbers ----------------------------------------------------------------------------------------------

TEXT_QUESTIONS = {"text_colour": 4, "text_kind": 8, "read_part": 4}  # a share of the size: one in so many


def draw_texts(maker: Maker, part: int, wanted: str, *, trained: bool) -> Iterator[tuple[Sample, Asker]]:
    """Texts in held-out typefaces; `trained` texts may have been read in training, in other typefaces."""
    for number in count():
        rng = random.Random(f"held-text-{FIRST_SEED + part * SEEDS_PER_PART + number}")
        text = lettering.draw_lettering(rng, maker.fonts, held=True, trained_text=trained)
        if wanted in kinds_of_text(text):
            ask = maker.source.asker(rng)
            paints = (partial(lettering.render_lettering, text, SIDE),)
            yield Sample("text", paints, "", lettering_questions(text, ask), text.text, ask.split), ask


def kinds_of_text(text: Lettering) -> tuple[str, ...]:
    """Which measures a text fits; invented words of the training split fit none, since few of them were ever drawn."""
    if text.is_number:
        return ("number",) if len(text.text) > 2 else ("short number",)
    if lettering.is_held_out(text.text):
        return ("unseen",)
    return ("seen",) if text.text.lower() in lettering.WORDS else ()


def add_reading(maker: Maker, size: int) -> None:
    texts = (
        ("read_seen_words", "seen", True),
        ("read_unseen_words", "unseen", False),
        ("read_numbers", "number", False),
    )
    for part, (group, wanted, trained) in enumerate(texts):
        quotas = {group: size} | {f"yesno_reading/{t}": -(-size // 6) for t in ("Yes", "No")}
        quotas |= {category: -(-size // 3 // share) for category, share in TEXT_QUESTIONS.items()}
        samples = draw_texts(maker, 20 + part, wanted, trained=trained)
        maker.fill(samples, quotas, partial(reading_label, group=group))
    short = draw_texts(maker, 23, "short number", trained=True)
    maker.fill(short, {"read_short_numbers": size // 4}, partial(reading_label, group="read_short_numbers"))
    maker.fill(maker.draw(24, "sign"), {"read_signs": size}, partial(reading_label, group="read_signs"))


def add_any_text(maker: Maker, size: int) -> None:
    """Is there any text? Half of the images have some, alone or beside things; the others are scenes and photographs."""
    with_text = mixed(maker, 25, ("text", "sign"))
    without = mixed(maker, 27, picture_kinds(maker, (("scene", 1), ("photo", 1))))
    for truth, samples in (("Yes", with_text), ("No", without)):
        for _ in range(size // 4):
            sample, ask = next(samples)
            yes = f'it says "{sample.truth}"' if sample.kind == "text" else "there is"
            answer = f"Yes, {yes}." if truth == "Yes" else "No, there is no text."
            qa = QA(ask("any_text"), answer, truth, "yesno_any_text")
            maker.add("yesno_any_text", qa, maker.add_images(sample.paints), ask, tag=truth)


def reading_label(qa: QA, *, group: str) -> str | None:
    return group if qa.category == "read" else yes_no_label(qa) or qa.category


# --- photographs ----------------------------------------------------------------------------------------------------

# For each kind the one that it is most easily taken for.
NEAR = {
    "airplane": "ship", "car": "truck", "bird": "airplane", "cat": "dog", "deer": "horse",
    "dog": "cat", "frog": "bird", "horse": "deer", "ship": "airplane", "truck": "car",
}  # fmt: skip


def add_photos(maker: Maker, size: int) -> None:
    """Each photograph twice: asked for one word and for a sentence; then yes/no and simple facts."""
    photos = maker.photos
    assert photos is not None
    order = list(range(len(photos)))
    random.Random("suite-photos").shuffle(order)
    samples = [photo_sample(maker, photos, index) for index in order]
    for sample, ask in samples[: 2 * size]:
        asked = [qa for qa in sample.questions if qa.category == "photo"]
        images = maker.add_images(sample.paints)
        for form in ("word", "sentence"):
            maker.add("photo", ask.rng.choice(asked), images, ask, form=form, tag=sample.truth)
    maker.fill(samples, {f"yesno_photo/{t}": size // 2 for t in ("Yes", "No")}, yes_no_label)
    rest = dict.fromkeys(("photo_group", "photo_fact", "describe_photo"), size // 4)
    rest |= dict.fromkeys(("kind", "absent"), size // 8)
    maker.fill(samples, rest, lambda qa: "describe_photo" if qa.category == "describe" else qa.category)
    for wrong in ("random", "near"):
        for sample, ask in samples[: size // 2]:
            kind = sample.truth
            far = [k for k in KINDS if (k in ANIMALS) != (kind in ANIMALS)]
            no = NEAR[kind] if wrong == "near" else ask.rng.choice(far)
            images = maker.add_images(sample.paints)
            for name, truth in ((kind, "Yes"), (no, "No")):
                put_pope(maker, f"pope_photo_{wrong}", name, truth, images)


def photo_sample(maker: Maker, photos: Photos, index: int) -> tuple[Sample, Asker]:
    """A test image as it is; `samples.draw_photo` would draw some twice and some never."""
    ask = maker.source.asker(random.Random(f"suite-photo-{index}"))
    label = int(photos.labels[index])
    paints = (partial(Image.fromarray, photos.pixels[index]),)
    return Sample("photo", paints, "", photo_questions(label, ask), KINDS[label], ask.split), ask


# --- conversations --------------------------------------------------------------------------------------------------


def add_follow_ups(maker: Maker, size: int) -> None:
    """A question about a thing and one about "it", after the model's own answer to the first."""
    kinds = picture_kinds(maker, (("scene", 3), ("text", 1), ("photo", 1)))
    for sample, ask in mixed(maker, 30, kinds):
        if maker.number("follow_up") >= size:
            return
        pairs = [(a, b) for a in sample.questions for b in sample.questions if fits(a, b)]
        if not pairs:
            continue
        first, second = ask.rng.choice(pairs)
        assert second.follow is not None
        form = ask.rng.choice(("word", "sentence"))
        before = maker.add("follow_up_first", first, maker.add_images(sample.paints), ask, form=form)
        asked = replace(second, question=second.follow[0], answer=second.follow[1])
        row = maker.add("follow_up", asked, before.images, ask, form=form, tag=second.category)
        maker.rows[-1] = replace(row, after=before.id)


def fits(first: QA, second: QA) -> bool:
    same = first.about is not None and first.about == second.about
    return same and second.follow is not None and first.category != second.category and first.short is not None


def picture_kinds(maker: Maker, shares: Sequence[tuple[str, int]]) -> list[str]:
    return [kind for kind, share in shares for _ in range(share) if kind != "photo" or maker.photos is not None]


def mixed(maker: Maker, part: int, kinds: Sequence[str]) -> Iterator[tuple[Sample, Asker]]:
    """Held-out samples of several kinds in turn."""
    streams = [maker.draw(part + place, kind) for place, kind in enumerate(kinds)]
    for number in count():
        yield next(streams[number % len(streams)])


def add_conversations(maker: Maker, size: int) -> None:
    """Five turns on one image, each after the model's own answers; every turn counts."""
    kinds = picture_kinds(maker, (("scene", 2), ("sign", 1), ("text", 1), ("photo", 1)))
    samples = mixed(maker, 40, kinds)
    for _ in range(-(-size // 5)):
        sample, ask = next(samples)
        images, after = maker.add_images(sample.paints), None
        for number, turn in enumerate(converse(ask, sample.questions, 5), start=1):
            row = maker.put(turn_row(turn, images, after, tag=f"turn {number}", wording=ask.split))
            after = row.id


def turn_row(turn: Turn, images: tuple[int, ...], after: str | None, *, tag: str, wording: str) -> Row:
    form = "word" if turn.short else "free" if turn.category in ("describe", "box") else "sentence"
    return Row("", "conversation", turn.category, form, turn.question, turn.answer, images, after, tag, wording=wording)


# --- what cannot be told, descriptions, talk ------------------------------------------------------------------------


def add_unknown(maker: Maker, size: int) -> None:
    """What no image tells, some of it about a thing in the image, and questions about what is not there."""
    kinds = picture_kinds(maker, (("scene", 2), ("text", 1), ("chart", 1), ("photo", 1)))
    samples = mixed(maker, 50, kinds)
    for _ in range(size):
        sample, ask = next(samples)
        things = [(name, thing.colour) for thing, name in names_of(sample.scene)] if sample.kind == "scene" else []
        (qa,) = unknown_questions(ask, 1, things=things)
        maker.add("unknown", qa, maker.add_images(sample.paints), ask)
    for part, kind in ((56, "scene"), (57, "text")):
        maker.fill(maker.draw(part, kind), {"absent": size // 4}, lambda qa: qa.category)


NEW_TALK = (
    ("Hello, who are you?", "I am a small vision assistant, trained on drawings, short words and photographs."),
    ("What is it that you can do?", SMALL_TALK[2][1]),
    ("Many thanks!", "You are welcome."),
    ("Thank you so much", "You are welcome."),
    ("Bye bye", "Goodbye!"),
    ("Hey there", "Hello! How can I help you with a picture?"),
    ("How many legs does a deer have?", "It has four legs."),
)


def add_free(maker: Maker, size: int) -> None:
    """Descriptions; all small talk that was trained, and a few wordings that were not."""
    for part, kind, share in ((60, "scene", 2), (61, "text", 4), (62, "sign", 4)):
        group = "describe_scene" if kind == "scene" else "describe_text"
        maker.fill(maker.draw(part, kind), {group: size // share}, partial(describe_label, group=group))
    for questions, answer in SMALL_TALK:
        for question in questions:
            maker.put(Row("", "talk", "talk", "free", question, answer))
    for question, answer in NEW_TALK:
        maker.put(Row("", "talk_new", "talk", "free", question, answer))


def describe_label(qa: QA, *, group: str) -> str | None:
    return group if qa.category == "describe" else None


# --- other sizes of image -----------------------------------------------------------------------------------------

SIZES = {"112": 112, "64": 64, "224": 224, "448": 448, "wide": 224, "high": 224}
ASKED_AT_SIZES = ("colour", "shape", "count", "read", "relation")  # not places: a wide sheet moves them


def add_sizes(maker: Maker, size: int) -> None:
    """The same scenes and words as square images of several sizes, and on a wide and a high sheet."""
    chosen: list[tuple[Sample, QA]] = []
    for sample, ask in mixed(maker, 70, ("scene", "scene", "text")):
        asked = [qa for qa in sample.questions if qa.category in ASKED_AT_SIZES]
        if len(chosen) >= size // 2:
            break
        if asked:
            chosen.append((sample, ask.rng.choice(asked)))
    for name, side in SIZES.items():
        for sample, qa in chosen:
            (drawn,) = sample.paints
            assert isinstance(drawn, partial)
            paint: Paint = partial(drawn.func, drawn.args[0], side)
            if name in ("wide", "high"):
                paint = partial(on_sheet, paint, high=name == "high")
            ask = Asker(random.Random(qa.question), sample.wording)
            maker.add(f"side_{name}", qa, maker.add_images([paint]), ask, tag=qa.category)


def on_sheet(paint: Paint, *, high: bool) -> Image.Image:
    """The image in the middle of a sheet 1.6 times as wide or as high, of the colour of its corner."""
    image = paint()
    width, height = image.size
    sheet_size = (width, round(1.6 * height)) if high else (round(1.6 * width), height)
    sheet = Image.new("RGB", sheet_size, image.getpixel((1, 1)))
    sheet.paste(image, ((sheet_size[0] - width) // 2, (sheet_size[1] - height) // 2))
    return sheet
