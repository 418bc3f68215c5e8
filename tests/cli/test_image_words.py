"""Images among words: wherever they stand, however they are quoted, and ordinary questions left as they are."""

from __future__ import annotations

import io
import sys
import types
from pathlib import Path

import pytest
from PIL import Image

from llava.cli.image_words import ReadWords, read_line, read_words, split_sources, starts_with_path
from llava.errors import InputError
from llava.images.formats import FORMATS, looks_like_image
from llava.images.io import load_image
from llava.session import LoadedImage

WHAT = "What is this?"


@pytest.fixture(autouse=True)
def in_a_folder_of_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with images of many names, a text and a folder; it is the home too."""
    for name in (
        "photo.jpg",
        "a.png",
        "b.png",
        "my photo.png",
        "it's.png",
        "plain",
        "pics/c.png",
        "pics/d e.png",
        "x,y.png",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (8, 6)).save(tmp_path / name, "JPEG" if name == "photo.jpg" else "PNG")
    (tmp_path / "notes.txt").write_text("These are words.\n")
    (tmp_path / "test").mkdir()
    (tmp_path / "train").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize(
    ("words", "sources", "question"),
    [
        (["photo.jpg", WHAT], ["photo.jpg"], WHAT),
        ([WHAT, "photo.jpg"], ["photo.jpg"], WHAT),
        (["a.png", WHAT, "b.png"], ["a.png", "b.png"], WHAT),
        (["a.png", "b.png"], ["a.png", "b.png"], None),
        ([], [], None),
        (["my photo.png", WHAT], ["my photo.png"], WHAT),
        (["plain", WHAT], ["plain"], WHAT),
        ([WHAT, "plain"], ["plain"], WHAT),
        (["~/photo.jpg", WHAT], ["{home}/photo.jpg"], WHAT),
        (["file://{home}/my%20photo.png", WHAT], ["{home}/my photo.png"], WHAT),
        (["my\\ photo.png", WHAT], ["my photo.png"], WHAT),
        (["https://x.org/b", WHAT], ["https://x.org/b"], WHAT),
        ([WHAT, "https://x.org/b"], ["https://x.org/b"], WHAT),
        (["photo.jpg", "What", "is", "this?"], ["photo.jpg"], WHAT),
        (["What", "is", "photo.jpg"], ["photo.jpg"], "What is the image"),
        (["What", "is", "this?", "photo.jpg"], ["photo.jpg"], WHAT),
        (["Compare a.png", "b.png"], ["a.png", "b.png"], "Compare the image"),
        (["photo.jpg", "describe", "test"], ["photo.jpg"], "describe test"),
        # meant as images: opening them gives the error
        (["x.HEIC", WHAT], ["x.HEIC"], WHAT),
        ([WHAT, "x.HEIC"], ["x.HEIC"], WHAT),
        (["photo.xyz", WHAT], ["photo.xyz"], WHAT),
        ([WHAT, "photo.xyz"], ["photo.xyz"], WHAT),
        (["pics", WHAT], ["pics"], WHAT),
        ([WHAT, "pics/"], ["pics/"], WHAT),
        ([".", WHAT], ["."], WHAT),
        (["no/such", WHAT], ["no/such"], WHAT),
        (["~/none", WHAT], ["{home}/none"], WHAT),
        (["notes.txt", WHAT], ["notes.txt"], WHAT),
        (["/dev/fd/63", WHAT], ["/dev/fd/63"], WHAT),
    ],
    ids=str,
)
def test_words_of_a_command_line(
    words: list[str], sources: list[str], question: str | None, in_a_folder_of_images: Path
) -> None:
    home = str(in_a_folder_of_images)
    read = read_words([word.format(home=home) for word in words])
    assert read.sources == tuple(source.format(home=home) for source in sources)
    assert read.question == question


ORDINARY = [
    "Is it red and/or blue?",
    "Is the shop open 24/7?",
    "What animals are there, e.g. dogs or cats?",
    "Is this 1/2 or 3/4?",
    "Is he/she happy?",
    "What does 'STOP' mean?",
    'It says "exit", doesn\'t it?',
    "Is it a .jpg or a .png?",
    "jpg/png?",
    "What is Node.js?",
    "See https://example.com/page for what I mean.",
    "Is it 3.5 km/h?",
    "What time is it, 12:30?",
    "w/o text",
    "'Tis a dog, isn't it?",
    "Version v1.5-7b?",
    "What is the train/test split?",
    "The date is 12/05/2024.",
    "What are notes.txt?",
    "Is it a test",
    "plain English please",
    "U.S.A. or U.K.?",
    "Is the ratio 16:9?",
    "Who wrote /s here?",
    "either / or",
    "What's John's dog's name?",
    "a) red b) blue",
    "<image>\nWhat is it?",
    "C# or C++?",
    "What...is this...",
    "Mr. Smith vs. Mrs. Smith",
    "\\frac{1}{2} is what?",
    "50% off?",
    "Is @home.com an address?",
    "这是什么？",
    "红色/蓝色？",
    "me@example.com",
    "~5 people?",
    "#1?",
]


@pytest.mark.parametrize("question", ORDINARY)
@pytest.mark.parametrize("given", [(), ("photo.jpg",)], ids=["alone", "with an image"])
def test_ordinary_questions_stay_as_they_are(question: str, given: tuple[str, ...]) -> None:
    assert read_line(question, given) == ReadWords((), question, ())
    assert read_words([*given, question] if " " in question else [*given, "so", question]).sources == given


@pytest.mark.parametrize(
    ("line", "sources", "question"),
    [
        # beside the sentence
        ("photo.jpg", ["photo.jpg"], None),
        ("photo.jpg What is this?", ["photo.jpg"], WHAT),
        ("photo.jpg: What is this?", ["photo.jpg"], WHAT),
        ("What is this? photo.jpg", ["photo.jpg"], WHAT),
        ("What is this? ./photo.jpg", ["./photo.jpg"], WHAT),
        ("What is this? a.png b.png", ["a.png", "b.png"], WHAT),
        ("'my photo.png'", ["my photo.png"], None),
        ("'my photo.png' ", ["my photo.png"], None),
        ("my\\ photo.png", ["my photo.png"], None),
        ('"my photo.png" What is this?', ["my photo.png"], WHAT),
        ("my photo.png What is this?", ["my photo.png"], WHAT),
        ("What is this? '{home}/it'\\''s.png'", ["{home}/it's.png"], WHAT),
        ("{home}/it\\'s.png What is this?", ["{home}/it's.png"], WHAT),
        ("{home}/pics/d\\ e.png What is this?", ["{home}/pics/d e.png"], WHAT),
        ("file://{home}/my%20photo.png What is this?", ["{home}/my photo.png"], WHAT),
        ("~/photo.jpg What is this?", ["{home}/photo.jpg"], WHAT),
        ("https://x.org/cat.jpg?size=1 What is this?", ["https://x.org/cat.jpg?size=1"], WHAT),
        ("https://x.org/cat", ["https://x.org/cat"], None),
        ("x,y.png What is this?", ["x,y.png"], WHAT),
        # within it
        ("What is in photo.jpg?", ["photo.jpg"], "What is in the image?"),
        ('What is in "photo.jpg"?', ["photo.jpg"], "What is in the image?"),
        ("Describe ./photo.jpg", ["./photo.jpg"], "Describe the image"),
        ("Describe the image photo.jpg.", ["photo.jpg"], "Describe the image."),
        ("Is my photo.jpg good?", ["photo.jpg"], "Is my image good?"),
        ("Compare a.png and b.png.", ["a.png", "b.png"], "Compare the first image and the second image."),
        ("a.png and b.png: what changed?", ["a.png", "b.png"], "The first image and the second image: what changed?"),
        ("What is photo.jpg's colour?", ["photo.jpg"], "What is the image's colour?"),
        ("Compare (a.png) with it.", ["a.png"], "Compare (the image) with it."),
        ("Is a.png like a.png?", ["a.png"], "Is the image like the image?"),
        ("photo.jpg里有什么？", ["photo.jpg"], "图片里有什么？"),
        ("看看photo.jpg", ["photo.jpg"], "看看图片"),
        # no such file, or no image: opening it gives the error
        ("What is in foto.jpg?", ["foto.jpg"], "What is in the image?"),
        ("What is in pics/foto.jpg?", ["pics/foto.jpg"], "What is in the image?"),
        ("{home}/x.HEIC", ["{home}/x.HEIC"], None),
        ("{home}/My Photo.HEIC what is it?", ["{home}/My Photo.HEIC"], "what is it?"),
        ("'{home}/My Photo.HEIC'", ["{home}/My Photo.HEIC"], None),
        ("What is in {home}/pics?", ["{home}/pics"], "What is in the image?"),
        ("What is in {home}/none?", ["{home}/none"], "What is in the image?"),
        ("What is in ~/none?", ["{home}/none"], "What is in the image?"),
        ("What is in file://{home}/none?", ["{home}/none"], "What is in the image?"),
        ("/etc/passwd", ["/etc/passwd"], None),
        ("/etc", ["/etc"], None),
        ("C:\\Users\\me\\x.jpg what?", ["C:\\Users\\me\\x.jpg"], "what?"),
    ],
    ids=str,
)  # fmt: skip
def test_typed_and_dragged_lines(
    line: str, sources: list[str], question: str | None, in_a_folder_of_images: Path
) -> None:
    home = str(in_a_folder_of_images)
    expected = tuple(source.format(home=home) for source in sources)
    assert read_line(line.format(home=home)) == ReadWords(expected, question, expected)


def test_an_image_of_the_conversation_is_not_attached_again() -> None:
    assert read_line("What is in photo.jpg?", ["photo.jpg"]) == ReadWords((), "What is in the image?", ())
    read = read_line("Is a.png like ./photo.jpg?", ["photo.jpg"])
    assert (read.sources, read.question) == (("a.png",), "Is the second image like the first image?")
    assert read_line('What does "foto.jpg" mean here?', ["photo.jpg"]).sources == ()  # a word to ask about
    with pytest.raises(InputError, match=r"no image file 'foto\.jpg'.*\"foto\.jpg\" in double quotes"):
        read_line("What does foto.jpg mean here?", ["photo.jpg"])
    for line in ("foto.jpg", "foto.jpg what is it?", "What is it? foto.jpg"):
        assert read_line(line, ["photo.jpg"]).sources == ("foto.jpg",)
    assert read_words(["photo.jpg", "What is in photo.jpg?"]).sources == ("photo.jpg",)


def test_lines_that_begin_with_a_slash() -> None:
    for line in ("/home/me/a.jpg What is it?", "/a.jpg", "/a.HEIC hi"):
        assert starts_with_path(line), line
    for line in ("/imgae a.png", "/nope", "/quit now"):
        assert not starts_with_path(line), line


def test_sources_of_the_image_command() -> None:
    assert split_sources("my photo.png") == ["my photo.png"]
    assert split_sources("'my photo.png' a.png") == ["my photo.png", "a.png"]
    assert split_sources("my\\ photo.png ~/a.png") == ["my photo.png", str(Path.home() / "a.png")]
    assert split_sources("it's.png") == ["it's.png"]
    assert split_sources("no it's.png") == ["no", "it's.png"]
    assert split_sources("") == []


class Stdin:
    """Bytes as the stdin of a program."""

    def __init__(self, content: bytes) -> None:
        self.buffer = io.BytesIO(content)


@pytest.mark.parametrize("name", ["-", "/dev/stdin"])
def test_stdin_is_an_image_or_a_question_by_its_bytes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    image = Path("photo.jpg").read_bytes()
    monkeypatch.setattr(sys, "stdin", Stdin(image))
    assert read_words([name, WHAT]) == ReadWords((image,), WHAT, ())
    monkeypatch.setattr(sys, "stdin", Stdin(image))
    assert read_words(["a.png", WHAT, name]).sources == ("a.png", image)
    monkeypatch.setattr(sys, "stdin", Stdin(image))
    with pytest.raises(InputError, match="add one"):
        read_words([name])
    for question in (WHAT, "BMW or Audi?", "P1 or F1?", "II*", "RIFF"):
        monkeypatch.setattr(sys, "stdin", Stdin(f"\ufeff{question}\n".encode()))
        assert read_words(["a.png", name]) == ReadWords(("a.png",), question, ())
    for content, told in ((b"", "empty"), (b" \n", "empty"), (b"\x7fELF\0\0", "neither"), (b"\xff\xfe\xfd", "neither")):
        monkeypatch.setattr(sys, "stdin", Stdin(content))
        with pytest.raises(InputError, match=told):
            read_words(["a.png", name])


# Formats


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "BMP", "PPM", "WEBP", "TIFF", "JPEG2000", "ICO", "QOI", "AVIF"])
def test_bytes_of_images_are_known(kind: str) -> None:
    content = io.BytesIO()
    Image.init()
    if kind not in Image.SAVE:
        pytest.skip(f"Pillow writes no {kind} here")
    Image.new("RGB", (16, 16), "red").save(content, kind)
    assert looks_like_image(content.getvalue())
    Path("x.jfif").write_bytes(content.getvalue())
    if kind in ("PPM", "JPEG2000", "ICO", "QOI"):
        with pytest.raises(InputError, match=r"'x\.jfif' is an? .*, which is not decoded here; save it as PNG or JPEG"):
            LoadedImage.open("x.jfif")
    else:
        assert LoadedImage.open("x.jfif").image.size == (16, 16)


@pytest.mark.parametrize("brand", [b"heic", b"heix", b"hevc", b"mif1", b"msf1"])
def test_a_format_without_a_decoder_names_the_remedy(brand: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    content = b"\0\0\0\x18ftyp" + brand + b"\0\0\0\0mif1heic" + bytes(64)
    assert looks_like_image(content)
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    monkeypatch.delitem(Image.OPEN, "HEIF", raising=False)
    Path("x.HEIC").write_bytes(content)
    with pytest.raises(InputError, match=r"'x\.HEIC' is a HEIC photograph.*pip install pillow-heif.*JPEG or PNG"):
        load_image("x.HEIC")
    assert {item.name for item in FORMATS if item.start.match(content)} == {"HEIF"}
    avif = b"\0\0\0\x1cftypmif1\0\0\0\0mif1avif"
    assert next(item for item in FORMATS if item.start.match(avif)).name == "AVIF"


def test_a_decoder_is_used_where_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    from PIL import ImageFile

    class HeifFile(ImageFile.ImageFile):
        format = "HEIF"

        def _open(self) -> None:
            self._mode, self._size, self.tile = "RGB", (4, 2), []

        def load(self) -> None:
            self.im = Image.new("RGB", (4, 2), "red").im

    plugin = types.ModuleType("pillow_heif")
    plugin.register_heif_opener = lambda: Image.register_open("HEIF", HeifFile, lambda start: start[4:8] == b"ftyp")  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "pillow_heif", plugin)
    monkeypatch.setattr(Image, "OPEN", {key: value for key, value in Image.OPEN.items() if key != "HEIF"})
    monkeypatch.setattr(Image, "ID", list(Image.ID))
    assert load_image(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic").size == (4, 2)
