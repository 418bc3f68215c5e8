"""CIFAR-10 photographs: reading every usual layout of the data set, varying them, and questions about them.

In: a zip or a folder of CLASS/NUMBER files, the python pickle batches, or the binary version. Out: Photos (pixels and
labels as arrays), varied copies as images, QA (talk.py).
"""

from __future__ import annotations

import io
import pickle
import random
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import palette
from PIL import Image, ImageEnhance
from shapes import SHAPES
from talk import QA, unknown_questions, with_article, yes_no
from wording import DIGITS, plural
from wordings import Asker, capital

# The data set's own order; the words are those that answers use.
FOLDERS = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
KINDS = ("airplane", "car", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
ANIMALS = {"bird": 2, "cat": 4, "deer": 4, "dog": 4, "frog": 4, "horse": 4}
FLIES, WHEELS = {"airplane", "bird"}, {"airplane", "car", "truck"}
NEVER_SHOWN = (
    "pizza",
    "banana",
    "elephant",
    "clock",
    "cake",
    "book",
    "sandwich",
    "key",
    "lamp",
    "cup",
    "bottle",
    "umbrella",
)
SIDE = 32


@dataclass(frozen=True)
class Photos:
    """pixels (N, 32, 32, 3) uint8, labels (N,) indices into KINDS."""

    pixels: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)


def load_photos(source: Path, split: str, *, limit: int | None = None) -> Photos:
    """Read one split ("train" or "test") from whatever layout `source` has. `limit` takes an even share of each kind."""
    layouts = (
        (source / f"{split}.zip", read_zip),
        (source / split, read_folders),
        (source / "data_batch_1", lambda p: read_pickles(p.parent, split)),
        (source / "cifar-10-batches-py" / "data_batch_1", lambda p: read_pickles(p.parent, split)),
        (source / "data_batch_1.bin", lambda p: read_binary(p.parent, split)),
        (source / "cifar-10-batches-bin" / "data_batch_1.bin", lambda p: read_binary(p.parent, split)),
    )
    for path, read in layouts:
        if path.exists():
            photos = read(path)
            return photos if limit is None else take(photos, limit)
    tried = ", ".join(str(path) for path, _ in layouts)
    raise ValueError(f"no CIFAR-10 photographs for {split!r} in {source}; looked for {tried}")


def blank_photos() -> Photos:
    """One empty photograph of each kind: enough where only the words matter."""
    return Photos(np.zeros((len(KINDS), SIDE, SIDE, 3), dtype=np.uint8), np.arange(len(KINDS)))


def take(photos: Photos, limit: int) -> Photos:
    share = max(1, limit // len(KINDS))
    index = np.concatenate([np.flatnonzero(photos.labels == k)[:share] for k in range(len(KINDS))])
    return Photos(photos.pixels[index], photos.labels[index])


def decode(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB").resize((SIDE, SIDE)))


def gather(named: list[tuple[str, bytes]]) -> Photos:
    """From (folder name, file content) pairs."""
    with ThreadPoolExecutor() as pool:
        pixels = list(pool.map(decode, (data for _, data in named)))
    labels = [FOLDERS.index(name) if name in FOLDERS else KINDS.index(name) for name, _ in named]
    return Photos(np.stack(pixels), np.asarray(labels, dtype=np.int64))


def read_zip(path: Path) -> Photos:
    with zipfile.ZipFile(path) as archive:
        names = sorted(n for n in archive.namelist() if n.lower().endswith((".jpg", ".jpeg", ".png")))
        return gather([(Path(name).parent.name, archive.read(name)) for name in names])


def read_folders(path: Path) -> Photos:
    files = sorted(p for p in path.rglob("*") if p.suffix.lower() in (".jpg", ".jpeg", ".png"))
    return gather([(p.parent.name, p.read_bytes()) for p in files])


def read_pickles(folder: Path, split: str) -> Photos:
    """The python version. A pickle can run code: only open files from the data set's own archive."""
    files = [folder / "test_batch"] if split == "test" else sorted(folder.glob("data_batch_[0-9]"))
    batches = [pickle.loads(p.read_bytes(), encoding="bytes") for p in files]
    rows = np.concatenate([batch[b"data"] for batch in batches])
    labels = np.concatenate([np.asarray(batch[b"labels"]) for batch in batches])
    return Photos(planes_to_pixels(rows), labels.astype(np.int64))


def read_binary(folder: Path, split: str) -> Photos:
    files = [folder / "test_batch.bin"] if split == "test" else sorted(folder.glob("data_batch_[0-9].bin"))
    rows = np.concatenate([np.fromfile(p, dtype=np.uint8).reshape(-1, 1 + 3 * SIDE * SIDE) for p in files])
    return Photos(planes_to_pixels(rows[:, 1:]), rows[:, 0].astype(np.int64))


def planes_to_pixels(rows: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(rows.reshape(-1, 3, SIDE, SIDE).transpose(0, 2, 3, 1))


def vary(pixels: np.ndarray, rng: random.Random) -> Image.Image:
    """A changed copy for training: shifted, mirrored, turned, brighter or paler; sometimes shown larger, as users do."""
    padded = np.pad(pixels, ((4, 4), (4, 4), (0, 0)), mode="reflect")
    image = Image.fromarray(padded)
    if rng.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if rng.random() < 0.5:
        half = SIDE / 2 * rng.uniform(0.75, 1.1)
        cx, cy = (20 + rng.uniform(-3, 3) for _ in range(2))
        image = image.rotate(rng.uniform(-12, 12), Image.Resampling.BICUBIC, center=(cx, cy))
        image = image.transform(
            (SIDE, SIDE), Image.Transform.EXTENT, (cx - half, cy - half, cx + half, cy + half), Image.Resampling.BICUBIC
        )
    else:
        left, top = rng.randint(0, 8), rng.randint(0, 8)
        image = image.crop((left, top, left + SIDE, top + SIDE))
    if rng.random() < 0.6:
        for enhance in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
            image = enhance(image).enhance(rng.uniform(0.65, 1.35))
    if rng.random() < 0.35:  # a hole of one colour
        side, left, top = rng.randint(6, 13), rng.randint(-3, 26), rng.randint(-3, 26)
        image.paste(tuple(rng.randrange(256) for _ in range(3)), (left, top, left + side, top + side))
    return shown(image, rng)


def shown(image: Image.Image, rng: random.Random) -> Image.Image:
    """Half as they are, half enlarged to the size of the model's input or beyond it."""
    side = rng.choice((SIDE, SIDE, 64, 112, 112, 160))
    return image if side == SIDE else image.resize((side, side), Image.Resampling.BICUBIC)


def photo_caption(label: int, rng: random.Random) -> str:
    return rng.choice(("A photograph of {}.", "A photo of {}.", "The photograph shows {}.")).format(
        with_article(KINDS[label])
    )


def photo_questions(label: int, ask: Asker) -> list[QA]:
    """What it is, yes/no for the right and a wrong kind, and simple facts about the kind."""
    kind, group = KINDS[label], "animal" if KINDS[label] in ANIMALS else "vehicle"
    a, name, rng = with_article(kind), f"the {kind}", ask.rng
    other_group = "vehicle" if group == "animal" else "animal"
    found = [
        QA(ask("photo"), f"The photograph shows {a}.", capital(kind), "photo", name, (ask("photo_it"), f"It is {a}.")),
        QA(ask("photo_group_kind", group=group), f"It is {a}.", capital(kind), "photo", name),
        QA(ask("animal_or_vehicle"), f"It is {with_article(group)}.", capital(group), "photo_group", name),
        QA(ask("describe"), f"The picture is a photograph of {a}.", None, "describe", name),
        QA(ask("kind"), "This is a photograph.", "Photograph", "kind"),
    ]
    near = [k for k in KINDS if k != kind and (k in ANIMALS) == (kind in ANIMALS)]
    rng.shuffle(near)
    far = [k for k in KINDS if k != kind]
    for guess in (kind, kind, rng.choice(near), rng.choice(far)):
        noun = "plane" if guess == "airplane" and rng.random() < 0.2 else guess
        asked = ask("is_photo", a=with_article(noun), many=plural(noun))
        found.append(yes_no(asked, guess == kind, f"it is {a}", f"it is {a}", "yesno_photo", name))
    for guess in (group, other_group):
        asked = ask("is_photo", a=with_article(guess))
        found.append(yes_no(asked, guess == group, f"it is {a}", f"it is {a}", "yesno_group", name))
    found += facts(kind, name, ask)
    what = rng.choice((f"{rng.choice(palette.NAMES)} {rng.choice(SHAPES)}", rng.choice(NEVER_SHOWN)))
    asked = ask("exists", a=with_article(what), bare=what, many=plural(what))
    found.append(yes_no(asked, False, "", f"there is no {what}", "yesno_exists"))
    found.append(QA(ask("count", many=plural(kind)), f"There is one {kind}.", "1", "photo_count", name))
    found.append(QA(ask("count", many=plural(near[0])), f"There are no {plural(near[0])}.", "0", "photo_count"))
    found.append(QA(ask("read"), "There is no text in the picture.", "There is no text", "absent"))
    found.append(yes_no(ask("any_text"), False, "", "there is no text", "yesno_any_text"))
    return found + unknown_questions(ask, 2, things=[(name, "grey")] if rng.random() < 0.5 else [])


def facts(kind: str, name: str, ask: Asker) -> list[QA]:
    legs = ANIMALS.get(kind, 0)
    article = with_article(kind)
    has_legs = f"{capital(article)} has {DIGITS[legs]} legs." if legs else f"{capital(article)} has no legs."
    table = (
        ("can_fly", kind in FLIES, "can fly", "cannot fly"),
        ("has_wheels", kind in WHEELS, "has wheels", "has no wheels"),
        ("has_wings", kind in FLIES, "has wings", "has no wings"),
        ("is_alive", kind in ANIMALS, "is alive", "is not alive"),
    )
    found = [QA(ask("legs"), has_legs, str(legs), "photo_fact", name)]
    for fact, right, yes, no in table:
        found.append(yes_no(ask(fact), right, f"{article} {yes}", f"{article} {no}", "photo_fact", name))
    return found
