"""The recipe of the embedded model: the generator's facts, what is held out, the tokenizer, the commands, the scorer.

Facts are checked against the pixels and against a reading of the question that shares no code with the generator. Nothing
here needs CIFAR-10 or any typeface: photographs are blank and letters are in Pillow's own face.
"""

from __future__ import annotations

import fcntl
import json
import os
import random
import re
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from llava.assets import embedded_model_path
from llava.conversation import conv_templates
from llava.geometry import ImagePolicy
from llava.tokenization import load_tokenizer
from llava.train.arguments import parse_train_args
from llava.train.data import LazySupervisedDataset
from llava.train.packing import measured_lengths

ROOT = Path(__file__).parents[1]
RECIPE = ROOT / "scripts" / "tiny"
sys.path.append(str(RECIPE))  # the recipe's modules import each other by name

import build  # noqa: E402
import dataset  # noqa: E402
import draw_images  # noqa: E402
import fonts  # noqa: E402
import lettering  # noqa: E402
import palette  # noqa: E402
import photos  # noqa: E402
import presets  # noqa: E402
import scenes  # noqa: E402
import talk  # noqa: E402
import tokenizer as tiny_tokenizer  # noqa: E402
from photos import blank_photos  # noqa: E402
from samples import DRAW, Sample, Source, draw_sample  # noqa: E402

TRAIN = Source(None, blank_photos())
HELD = Source(None, blank_photos(), held=True)
NUMBERS = ("no", "one", "two", "three", "four", "five", "six")


def plain(question: str) -> str:
    return question.replace("color", "colour").replace("center", "centre").lower().rstrip("?.! ")


def scene_in(sample: Sample) -> scenes.Scene:
    assert isinstance(sample.paint, partial)
    return sample.paint.args[0]


# --- pictures ---------------------------------------------------------------------------------------------------------


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
    if hue > 310 and saturation < 0.7:
        return "pink"
    if 12 < hue < 42:
        return "brown" if value < 0.7 else "orange"
    bounds = ((15, "red"), (80, "yellow"), (180, "green"), (250, "blue"), (300, "purple"), (361, "red"))
    return next(name for bound, name in bounds if hue < bound)


def drawn_plainly(scene: scenes.Scene) -> Image.Image:
    bare = replace(scene, texture="plain", things=tuple(replace(t, outline=None) for t in scene.things))
    return scenes.render_scene(bare, 224)


@pytest.mark.parametrize("seed", range(12))
def test_things_are_where_and_what_the_scene_says(seed: int) -> None:
    scene = scene_in(draw_sample("scene", seed, TRAIN))
    found = blobs(drawn_plainly(scene))
    # The inside of a ring is background, which the flood leaves out, so that each thing is one patch.
    assert sorted(name for name, _, _ in found) == sorted(thing.colour for thing in scene.things)
    for thing in scene.things:
        reach = thing.radius * (0.75 if thing.shape == "crescent" else 0.3)
        assert any(
            name == thing.colour and abs(x - thing.x) < reach and abs(y - thing.y) < reach for name, x, y in found
        )


def test_counts_of_a_colour_are_those_of_the_pixels() -> None:
    checked = 0
    for seed in range(100, 130):
        sample = draw_sample("scene", seed, TRAIN)
        seen = Counter(name for name, _, _ in blobs(drawn_plainly(scene_in(sample))))
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


def test_texts_fit_their_pictures() -> None:
    for seed in range(40):
        text = lettering.draw_lettering(random.Random(seed), None, held=False)
        image = np.asarray(lettering.render_lettering(replace(text, texture="plain", plate_rgb=None), 112)).astype(int)
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
PLACE = r"(?: in the picture)?"


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
        r"(?:is there|do you see|can you see) an? ((?:\w+ )?\w+)(?: in the (?:picture|image))?", question
    ):
        assert short == ("Yes" if fitting(scene, found[1]) else "No")
        return True
    return False


def test_answers_follow_from_the_scene() -> None:
    read = 0
    for seed in range(250):
        sample = draw_sample("scene", seed, HELD)
        for qa in sample.questions:
            if qa.short is not None and qa.category not in ("unknown", "absent"):
                read += check_fact(scene_in(sample), plain(qa.question), qa.short)
    assert read > 3000


@pytest.mark.parametrize("kind", DRAW)
def test_a_question_has_one_right_answer(kind: str) -> None:
    for seed in range(150):
        answers: dict[str, set[str | None]] = {}
        for qa in draw_sample(kind, seed, TRAIN).questions:
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
        pictures = [sample.image for sample in (first, again)]
        assert pictures[0].tobytes() == pictures[1].tobytes()


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
    for kind in DRAW:
        asked = {qa.question for seed in range(80) for qa in draw_sample(kind, seed, TRAIN).questions}
        assert not asked & talk.HELD_UNKNOWN


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
    ids = tokenizer('It says "donkey".', add_special_tokens=False).input_ids
    assert {tokenizer.convert_ids_to_tokens(i) for i in ids} >= set("donkey")
    conversation = conv_templates["v1"].copy()
    conversation.append_message(conversation.roles[0], f"What colour is the star?{talk.SHORT_SUFFIX}")
    conversation.append_message(conversation.roles[1], None)
    assert conversation.system == tiny_tokenizer.SYSTEM
    assert len(tokenizer(conversation.get_prompt()).input_ids) < 20


# --- commands ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", presets.PRESETS)
def test_every_command_of_the_recipe_parses(name: str) -> None:
    stages = build.plan_stages(presets.PRESETS[name], Path("/work"), Path("/fonts"), Path("/cifar"), 4)
    places = {stage.name: place for place, stage in enumerate(stages)}
    for stage in stages:
        assert all(places[need] < places[stage.name] for need in stage.needs)
        _, *words = stage.command
        if words[:2] == ["-m", "llava.train.train"]:
            on_cpu = words[2:]
            for flag in ("--bf16", "--tf32"):  # refused where there is no GPU for them
                if flag in on_cpu:
                    on_cpu[on_cpu.index(flag) + 1] = "False"
            model, data, training = parse_train_args(on_cpu)
            assert data.image_aspect_ratio == "pad"
            assert model.mm_vision_select_layer == -2
            assert training.packing
            assert model.tune_mm_mlp_adapter == (stage.name == "stage1")
        else:
            known = set(re.findall(r'"(--[a-z0-9-]+)"', Path(words[0]).read_text()))
            assert {word for word in words if word.startswith("--")} <= known, stage.name


@pytest.fixture(scope="module")
def stage_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few samples of each training stage, of the kinds and in the shares of the preset "full"."""
    folder = tmp_path_factory.mktemp("stages")
    for number, name in enumerate(photos.FOLDERS):
        (folder / "train" / name).mkdir(parents=True)
        Image.new("RGB", (photos.SIDE, photos.SIDE)).save(folder / "train" / name / f"{number}.png")
    words = (*presets.PRESETS["full"].dataset, *presets.PRESETS["full"].second)
    counts = {}
    for stage in ("pretrain", "finetune", "second"):
        full = dataset.parse_counts(words[words.index(f"--{stage}") + 1])
        counts[stage] = {kind: -(-number * 100 // sum(full.values())) for kind, number in full.items()}
    dataset.write_data(folder, counts, dataset.Options(None, folder, None, ".bmp"), workers=2)
    return folder


@pytest.mark.parametrize(("stage", "data"), [("stage1", "pretrain"), ("stage2", "finetune"), ("stage3", "second")])
def test_a_packed_batch_holds_as_many_samples_as_the_learning_rates_were_chosen_for(
    stage: str, data: str, stage_data: Path
) -> None:
    tokenizer = load_tokenizer(embedded_model_path(), model_max_length=1024)
    tokenizer.pad_token = tokenizer.unk_token
    settings = SimpleNamespace(image_folder=str(stage_data / "images"), is_multimodal=True, mm_use_im_start_end=False)
    conv = conv_templates["plain" if stage == "stage1" else "v1"]
    samples = LazySupervisedDataset(str(stage_data / f"{data}.json"), tokenizer, settings, conv=conv)
    lengths = measured_lengths(samples, ImagePolicy("pad", tile_size=112, patch_size=14), stage_data / stage)
    per_row = 0.97 * 1024 / (sum(lengths) / len(lengths))  # so full are rows of a large set
    for name, wanted, within in (("full", 256, 0.1), ("trial", 256, 0.1), ("check", 64, 0.2)):
        words = getattr(presets.PRESETS[name], stage)
        rows = int(words[words.index("--per_device_train_batch_size") + 1])
        assert rows * per_row == pytest.approx(wanted, rel=within)


def test_stages_run_as_soon_as_they_can_and_a_broken_run_goes_on(tmp_path: Path) -> None:
    """Two of them each wait until the other has begun; a third needs both and fails once."""

    def stage(name: str, program: str, *needs: str, side: bool = False) -> build.Stage:
        finish = f"(here / '{name}').write_text('done')"
        begin = "import pathlib, sys, time; here = pathlib.Path(sys.argv[1])"
        return build.Stage(
            name, [sys.executable, "-c", f"{begin}\n{program}\n{finish}", str(tmp_path)], tmp_path / name, needs, side
        )

    meet = "(here / '{}.begun').touch()\nwhile not (here / '{}.begun').exists(): time.sleep(0.01)"
    print_one = 'print(\'{"stage": "last"}\')'
    stages = [
        stage("first", "", side=True),
        stage("beside", meet.format("beside", "main"), "first", side=True),
        stage("main", meet.format("main", "beside")),
        stage("last", "assert (here / 'main').exists() and (here / 'beside').exists()\nsys.exit(3)", "main", "beside"),
        stage("never", "", "last"),
    ]
    log = tmp_path / "log.jsonl"
    assert build.run(stages, log, ("0",)) == 3
    assert not (tmp_path / "never").exists()
    for name in ("first", "beside", "main"):  # which would fail if they ran again
        stages[[each.name for each in stages].index(name)] = stage(name, "sys.exit(1)")
    stages[3] = stage("last", print_one, "main", "beside")
    assert build.run(stages, log, ("0",)) == 0
    assert (tmp_path / "never").exists()
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert {"stage": "last"} in lines
    assert [line["stage"] for line in lines if "seconds" in line][-2:] == ["last", "never"]


def test_stages_share_the_gpus_and_training_takes_all_of_them(tmp_path: Path) -> None:
    """Two wait until the other has begun, and a third, for which there is no GPU, finds the results of both."""
    gpus = "import os; gpus = os.environ['CUDA_VISIBLE_DEVICES']"
    wait = f"""
import pathlib, sys, time; here, own, other = pathlib.Path(sys.argv[1]), *sys.argv[2:]; {gpus}
(here / ("begun" + own)).write_text("")
until = time.time() + 60
while not (here / ("begun" + other)).exists() and time.time() < until: time.sleep(0.01)
(here / own).write_text(gpus)
"""
    last = f"import sys; {gpus}; open(sys.argv[1] + '/last', 'w').write(gpus)"

    def stage(name: str, program: str, *words: str, needs: tuple[str, ...] = (), spread: bool = False) -> build.Stage:
        return build.Stage(
            name, [sys.executable, "-c", program, str(tmp_path), *words], tmp_path / name, needs, spread=spread
        )

    stages = [
        stage("one", wait, "one", "two"), stage("two", wait, "two", "one"), stage("last", last, needs=("one",), spread=True)
    ]  # fmt: skip
    assert build.run(stages, tmp_path / "log.jsonl", ("2", "5")) == 0
    assert [(tmp_path / name).read_text() for name in ("one", "two", "last")] == ["2", "5", "2,5"]


def test_a_run_that_is_ended_takes_its_stages_along(tmp_path: Path) -> None:
    held, log = tmp_path / "held", tmp_path / "one.log"
    hold = "import fcntl, sys, time; file = open(sys.argv[1], 'w'); fcntl.flock(file, fcntl.LOCK_EX); print('held', flush=True)"
    program = f"""
import sys, build
from pathlib import Path
command = [sys.executable, "-c", {hold + "; time.sleep(120)"!r}, {str(held)!r}]
build.plan_stages = lambda *_: [build.Stage("one", command, Path("never"))]
build.main(["--work", {str(tmp_path)!r}, "--cifar", "."])
"""
    environment = os.environ | {"PYTHONPATH": str(Path(build.__file__).parent)}
    run = subprocess.Popen([sys.executable, "-c", program], env=environment, stderr=subprocess.PIPE, text=True)
    until = time.monotonic() + 60
    while not (log.exists() and log.read_text()) and time.monotonic() < until:
        time.sleep(0.02)
    assert log.read_text() == "held\n"
    run.terminate()
    assert run.communicate(timeout=60)[1] == "ended by a signal; the same command goes on from here\n"
    assert run.returncode == 1
    with held.open() as file:
        while time.monotonic() < until:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                time.sleep(0.02)
            else:
                return
    raise AssertionError("the stage goes on")


def test_a_batch_s_rows_are_divided_among_gpus(capsys: pytest.CaptureFixture) -> None:
    def rows(num_gpus: int) -> list[str]:
        stages = build.plan_stages(presets.PRESETS["full"], *map(Path, ("/work", "/fonts", "/cifar")), 4, num_gpus)
        commands = [stage.command for stage in stages if stage.spread]
        assert all(str(num_gpus) in command for command in commands)
        return [command[command.index("--per_device_train_batch_size") + 1] for command in commands]

    assert [rows(num_gpus) for num_gpus in (2, 4)] == [["12", "18", "14"], ["6", "9", "7"]]
    with pytest.raises(SystemExit, match="a batch of 24 rows cannot be divided among 5 GPUs"):
        rows(5)


def test_a_stage_that_leaves_no_result_is_a_failure(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    stage = build.Stage("empty", [sys.executable, "-c", ""], tmp_path / "nothing")
    assert build.run([stage], tmp_path / "log.jsonl", ("0",)) == 1
    assert "[empty] left no" in capsys.readouterr().out


# --- sample pictures --------------------------------------------------------------------------------------------------


def test_sample_pictures_show_what_they_should() -> None:
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


def test_sample_pictures_come_from_the_script(tmp_path: Path) -> None:
    draw_images.main(["--out", str(tmp_path)])
    for path in tmp_path.iterdir():
        committed = np.asarray(Image.open(ROOT / "images" / path.name).convert("RGB")).astype(float)
        drawn = np.asarray(Image.open(path).convert("RGB")).astype(float)
        assert committed.shape == drawn.shape
        assert np.abs(committed - drawn).mean() < 2  # Pillow's versions draw edges a little differently
    assert sum(path.stat().st_size for path in (ROOT / "images").iterdir()) < 200_000
