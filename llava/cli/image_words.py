"""Find the images and videos among words: those of a command line, or of a line that was typed or dragged into a conversation.

In: words or a line, and the sources that were given before. Out: sources to open, in their order, and the question that is
left. A word that looks like a path, but names no image, is a source too, so that opening it gives the error: no image is left
out of a question without a message. Images are opened by images/io.py.
"""

from __future__ import annotations

import os
import re
import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote

from llava.errors import InputError
from llava.images.formats import looks_like_image
from llava.images.video import FIRST_BYTES, VIDEO_ENDINGS, looks_like_video

STDIN = ("-", "/dev/stdin", "/dev/fd/0", "/proc/self/fd/0")
URL = re.compile(r"(https?://|data:(?:image|video)/)\S+", re.IGNORECASE)
# Endings of images, and of files that are taken for images: those that cannot be opened give an error that names them.
_ENDINGS = (
    "jpe?g|jpe|jfif|a?png|gif|bmp|dib|webp|tiff?|p[bgpn]m|avifs?|hei[cf]s?|hif|jxl|jp2|j2k|ico|qoi|svgz?|psd|eps|pdf|tga|exr|"
    f"hdr|xcf|raw|cr[23w]|nef|arw|dng|orf|rw2|raf|{VIDEO_ENDINGS}"
)
VIDEO = re.compile(rf"data:video/|.*[^\s/\\]\.(?:{VIDEO_ENDINGS})(?:[?#]|$)", re.IGNORECASE | re.DOTALL)
ENDING = re.compile(rf"[^\s/\\]\.(?:{_ENDINGS})$", re.IGNORECASE)
ENDING_INSIDE = re.compile(rf"[^\s/\\]\.(?:{_ENDINGS})(?![A-Za-z0-9_/\\]|\.\w)", re.IGNORECASE)
ANY_ENDING = re.compile(r"\w\.[A-Za-z][A-Za-z0-9]{1,4}$")
# From the root with at least two parts, from the home, from the working folder, or with a drive.
PATH = re.compile(
    r"file://|/[^/\s]+/[^/\s]|/[^/\s]+/$|~[\w.-]*[/\\]|\.{1,2}[/\\]\S|[A-Za-z]:[/\\]|\\\\\w", re.IGNORECASE
)
NUMBERS = re.compile(r"\d+(?:[./:-]\d+)+$")  # 24/7, a date
OPENING, CLOSING = "([{<'\"“‘«（「", ".,;:?!)]}>'\"”’»…。，；：？！）」"
SHELL_WORD = re.compile(r"""(?:'[^']*'|"[^"]*"|\\.|[^\s'"\\])+""")
PLAIN_WORD = re.compile(r"(?:\\.|\S)+")
MAX_SPACES = 8  # in a path that is neither quoted nor escaped
ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth")
DETERMINERS = {"the", "this", "that", "my", "our", "your", "his", "her", "their", "a", "an"}
NOUNS = {"image", "picture", "photo", "photograph", "file", "screenshot", "video", "clip", "movie", "film"}
SUBJECT = re.compile(r"(?:and|or|vs|versus|is|has|shows)\b", re.IGNORECASE)  # after a name that begins a sentence


@dataclass(frozen=True)
class ReadWords:
    """Images and the question about them. `inside` are those of the sources that stood within the question's text."""

    sources: tuple[str | bytes, ...] = ()
    question: str | None = None
    inside: tuple[str, ...] = ()


class _Found(NamedTuple):
    """An image within a text: `text[start:end]` names the source."""

    start: int
    end: int
    source: str


def read_words(words: Sequence[str]) -> ReadWords:
    """Split the words of a command line into images, wherever they stand, and the question.

    Words before the question, and all where the question is one quoted word, are images where they look like a path at all:
    a separator or any ending. Within the words of a question only what is surely a path or an existing image is one.

    Raises:
        InputError: stdin was to be read, and holds neither text nor an image.
    """
    read, text = ReadWords(), list[str]()
    quoted = any(" " in word.strip() and not _is_source(word, strict=True) for word in words)

    def take_text() -> None:
        nonlocal read
        if text:
            added = read_line(" ".join(text), read.sources)
            question = " ".join(filter(None, (read.question, added.question))) or None
            read = ReadWords(read.sources + added.sources, question, read.inside + added.inside)
            text.clear()

    for word in words:
        source: str | bytes | None = None
        if word in STDIN:
            content = read_stdin(word)
            source = content if isinstance(content, bytes) else None
            word = word if isinstance(content, bytes) else content
        elif _is_source(word, strict=quoted or not (text or read.question)):
            source = as_source(word)
        if source is None:
            text.append(word.strip())
        else:
            take_text()
            read = replace(read, sources=(*read.sources, source))
    take_text()
    if read.question is None and any(isinstance(source, bytes) for source in read.sources):
        raise InputError('the image was read from stdin, so no question can be; add one: llava chat - "What is it?"')
    return read


def read_line(line: str, given: Sequence[str | bytes] = ()) -> ReadWords:
    """Find the images in a typed line; the question is what is left, None where that is nothing.

    A path beside the sentence is taken out. Within it, "the image" takes its place ("the second image" where there are
    more), since a path says nothing to a model. `given` are the sources of the conversation; none of them is found again.
    """
    # Images and videos are counted apart.
    counts = {False: 0, True: 0}
    places: dict[str | bytes, int] = {}

    def take(source: str | bytes) -> bool:
        """Give a source its number among those of its kind; False where it has one."""
        if _identity(source) in places:
            return False
        places[_identity(source)] = counts[_is_video(source)]
        counts[_is_video(source)] += 1
        return True

    for source in given:
        take(source)
    sources: list[str] = []
    found = list(_find(line, bool(given)))
    for image in found:
        if take(image.source):
            sources.append(image.source)
    text, position = "", 0
    for image in found:
        text = _join(text, line[position : image.start])
        is_video = _is_video(image.source)
        number = places[_identity(image.source)] if counts[is_video] > 1 else None
        is_chinese = bool(re.search(r"[\u4e00-\u9fff]", line))
        text += _mention(text, line[image.end :], number, is_video=is_video, is_chinese=is_chinese)
        position = image.end
    text = _join(text, line[position:]).strip() if found else line.strip()
    return ReadWords(tuple(sources), text if re.search(r"\w", text) else None, tuple(sources))


def as_source(word: str) -> str:
    """Return a word as a source to open: without a shell's quotes and escapes, `file://` and the tilde."""
    return _existing(word) or (word if URL.match(word) else next(_spellings(word)))


def split_sources(text: str) -> list[str]:
    """Split a line of nothing but images; spaces are part of a name where a file has it."""
    if _existing(text):
        return [as_source(text)]
    try:
        return [as_source(word) for word in (shlex.split(text) if os.name != "nt" else text.split())]
    except ValueError:  # an apostrophe in a name
        return [as_source(word) for word in text.split()]


def starts_with_path(line: str) -> bool:
    """Whether a line begins with a path, which may look like a command."""
    word = line.split(maxsplit=1)[0]
    return bool(PATH.match(word) or ENDING.search(word.rstrip(CLOSING)) or _existing(word))


def read_stdin(name: str) -> str | bytes:
    """Read stdin: an image's bytes, or a question."""
    content = getattr(sys.stdin, "buffer", sys.stdin).read()
    content = content.encode() if isinstance(content, str) else content
    if looks_like_image(content) or looks_like_video(content):
        return bytes(content)
    try:
        text = content.decode("utf-8-sig").strip()
    except UnicodeDecodeError:
        text = "\0"
    if "\0" in text:
        raise InputError(f"stdin ({name}) holds neither text nor an image in a known format")
    if not text:
        raise InputError(f"an image or a question was to be read from stdin ({name}), which is empty")
    return text


def _is_source(word: str, *, strict: bool) -> bool:
    """Whether a whole word of the command line is an image, or was meant as one."""
    if URL.fullmatch(word) or (word.lower().startswith("file://") and " " not in word):
        return True
    path = _existing(word)
    if path is not None:
        return strict or (not re.search(r"[./\\~]", word) and _is_image_file(path))  # others are found in the text
    if not strict or len(word.split()) != 1 or word[-1] in CLOSING or NUMBERS.match(word):
        return False
    return bool(PATH.match(word) or re.search(r".[/\\]|[/\\].", word) or ENDING.search(word) or ANY_ENDING.search(word))


def _find(text: str, has_images: bool) -> Iterator[_Found]:
    """Find the images within a text."""
    position = 0
    while position < len(text):
        found = None
        if not text[position].isspace():
            may_be_word = has_images and not _ends_sentence(text[:position])
            found = _quoted_at(text, position, may_be_word) or _plain_at(text, position, may_be_word)
        if found is not None:
            yield found
            has_images, position = True, found.end
        elif text[position] in OPENING or text[position].isspace():
            position += 1
        else:
            word = PLAIN_WORD.match(text, position)
            position = word.end() if word else position + 1


def _ends_sentence(text: str) -> bool:
    return not text.strip() or text.rstrip()[-1] in ".?!:;。？！：" or text.endswith("\n")


def _quoted_at(text: str, start: int, may_be_word: bool) -> _Found | None:
    """Return the image whose name is quoted as a shell does it, which terminals do when a file is dragged into them."""
    word = SHELL_WORD.match(text, start) if text[start] in "'\"" else None
    if word is None:
        return None
    end = start + len(word[0].rstrip(CLOSING.replace("'", "").replace('"', "")))
    try:
        name = shlex.split(text[start:end])[0] if os.name != "nt" else text[start:end].strip("'\"")
    except (ValueError, IndexError):
        return None
    is_name = len(name.split()) == 1 and _names_image(name, may_be_word)
    if name and (is_name or _exists_as_image(name) or (PATH.match(name) and ENDING.search(name))):
        return _Found(start, end, as_source(name))
    return None


def _plain_at(text: str, start: int, may_be_word: bool) -> _Found | None:
    """Return the image that is named from `start` on, without quotes: the longest name that exists, else one word."""
    words = []
    for word in PLAIN_WORD.finditer(text, start):
        words.append(word)
        if len(words) > MAX_SPACES:
            break
    url = URL.match(words[0][0])
    if url:
        address = words[0][0].rstrip(CLOSING)
        is_image = ENDING.search(re.split(r"[?#]", address)[0]) or address.lower().startswith("data:")
        return _Found(start, start + len(address), address) if is_image or address == text.strip() else None
    if re.search(r"[./\\~]", text) and _existing(text.strip()):
        return _Found(start, len(text), as_source(text.strip()))
    for last in reversed(words[1:]):
        name = text[start : last.start()] + last[0].rstrip(CLOSING)
        if (ENDING.search(name) or PATH.match(name)) and _exists_as_image(name):
            return _Found(start, start + len(name), as_source(name))
    first = words[0][0]
    for name in _cuts(first):
        if _exists_as_image(name):
            place = start + first.index(name)
            return _Found(place, place + len(name), as_source(name))
    name = next(reversed(list(_cuts(first))))
    if first[0] in OPENING or not _names_image(name, may_be_word=False):
        return None
    if may_be_word and not re.search(r"[/\\]", name):
        if start and text[start - 1] in OPENING:
            return None
        raise InputError(
            f'there is no image file {name!r}; name one that exists, or write "{name}" in double quotes to ask about the word'
        )
    place = start + first.index(name)
    if PATH.match(name):  # the error names a path with spaces as a whole
        longer = ENDING_INSIDE.search(text, place)
        if longer and not re.search(r"[?!]|\s[/~.]|://", text[place + 7 : longer.end()]):
            name = text[place : longer.end()]
    return _Found(place, place + len(name), as_source(name))


def _cuts(word: str) -> Iterator[str]:
    """Yield the names that a word may hold: itself, and without what the sentence adds to it."""
    yield word
    bare = word.rstrip(CLOSING)
    if bare and bare != word:
        yield bare
    inside = ENDING_INSIDE.search(word)
    if inside and word[: inside.end()] != bare:  # photo.jpg's, or a language without spaces
        bare = word[: inside.end()]
        yield bare
    ascii_name = re.search(r"[\x21-\x7e]+$", bare)
    if ascii_name and ascii_name[0] != bare and ENDING.search(ascii_name[0]):
        yield ascii_name[0]


def _names_image(name: str, may_be_word: bool) -> bool:
    """Whether a name that may not exist was surely meant as an image.

    A bare name with an image's ending `may_be_word` to speak about: within a sentence, where there is an image already.
    """
    return bool(PATH.match(name) or (ENDING.search(name) and (not may_be_word or re.search(r"[/\\]", name))))


def _exists_as_image(name: str) -> bool:
    """Whether a name is a path or has an image's ending, and exists; any other name must be a file with an image's content."""
    if not re.search(r"[./\\~]", name):
        return False
    path = _existing(name)
    return path is not None and bool(PATH.match(name) or ENDING.search(name) or _is_image_file(path))


def _existing(word: str) -> str | None:
    """Return the path that a word names, if there is such a file or folder."""
    for name in _spellings(word):
        try:
            if Path(name).exists():
                return name
        except (OSError, ValueError):  # a question that cannot be a file name
            return None
    return None


def _spellings(word: str) -> Iterator[str]:
    """Yield the paths that a word may stand for, the most likely first."""
    if word.lower().startswith("file://"):
        path = unquote(re.sub(r"^file://(?:localhost)?", "", word, flags=re.IGNORECASE))
        yield path.lstrip("/") if re.match(r"/[A-Za-z]:", path) else path
        return
    for name in (word, re.sub(r"\\(.)", r"\1", word)) if os.name != "nt" else (word,):
        yield os.path.expanduser(name)


def _is_image_file(path: str) -> bool:
    try:
        with open(path, "rb") as file:
            start = file.read(FIRST_BYTES)
            return looks_like_image(start) or looks_like_video(start)
    except OSError:
        return False


def _is_video(source: str | bytes) -> bool:
    return looks_like_video(source) if isinstance(source, bytes) else bool(VIDEO.match(source))


def _identity(source: str | bytes) -> str | bytes:
    return source if isinstance(source, bytes) or URL.match(source) else os.path.realpath(source)


def _join(left: str, right: str) -> str:
    """Join two pieces of a text, between which an image may have been taken out."""
    if not left or left[-1].isspace():
        right = right.lstrip() if left else right.lstrip(" \t,:;-")
    return left.rstrip() + right if right[:1] in (".", ",", ";", ":", "?", "!") else left + right


def _mention(left: str, right: str, number: int | None, *, is_video: bool, is_chinese: bool) -> str:
    """Return the words that take the place of a path between two pieces of a text: none where it stands beside the sentence."""
    ends_sentence = _ends_sentence(left)
    is_joined = right[:1] not in ("", "'", '"') and not right[:1].isspace() and right[:1] not in CLOSING
    if ends_sentence and not is_joined and not right.startswith("'s") and not SUBJECT.match(right.lstrip()):
        return ""
    if is_chinese:
        noun, measure = ("视频", "个") if is_video else ("图片", "张")
        return noun if number is None else f"第{number + 1}{measure}{noun}"
    before = left.split()[-1].strip(OPENING).lower() if left.split() else ""
    if before in NOUNS:
        return ""
    ordinal = "" if number is None else f"{ORDINALS[number]} " if number < len(ORDINALS) else f"{number + 1}th "
    noun = "video" if is_video else "image"
    words = f"{ordinal}{noun}" if before in DETERMINERS else f"the {ordinal}{noun}"
    return words[0].upper() + words[1:] if ends_sentence else words
