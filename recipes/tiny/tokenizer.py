"""Build the tokenizer: a sentencepiece unigram model whose pieces are whole words, single characters and bytes.

In: sentences that the recipe itself makes, and frequent words (common.txt). Out: FOLDER/tokenizer.model,
tokenizer_config.json, special_tokens_map.json.
Ids are laid out as LLaMA's: 0 <unk>, 1 <s>, 2 </s>, 3..258 bytes. Words that images show are left out on purpose, so that
what is read from an image is spelt letter by letter. The system prompt costs two pieces instead of forty.
The file is written directly (three protobuf messages): sentencepiece's trainer cannot be told which pieces to make.
"""

from __future__ import annotations

import json
import math
import re
import struct
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import noise
import wordings
from questions import ELSEWHERE
from samples import DRAW, Source, draw_sample
from talk import QA, SHORT_SUFFIX, SMALL_TALK, UNKNOWN_SHORT, UNKNOWN_TOPICS
from wording import plural

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
SPACE = "\u2581"
# Tokens of prompts made whole; the last two begin a line of their own, so no space goes before them.
PHRASES = (
    " A chat between a curious user and an artificial intelligence assistant.",
    " The assistant gives helpful, detailed, and polite answers to the user's questions.",
    " USER:",
    "USER:",
    " ASSISTANT:",
    SHORT_SUFFIX.strip(),
)
# First words of questions also stand right after the image's line break, where no space goes before them.
FIRST_WORDS = "What Which Where Who How When Why Is Are Does Do Can Count Read Describe Tell".split()  # noqa: SIM905
NORMAL, UNKNOWN, CONTROL, BYTE = 1, 2, 3, 6
SPELT = ("read", "read_part")  # kinds of question whose short answers are characters from the image


def build_tokenizer(folder: Path, source: Source, *, num_samples: int = 400, size: int = 3104) -> int:
    """Write the tokenizer's files; returns the number of pieces."""
    counts = count_words(sentences(source, num_samples))
    pieces = list_pieces(counts, size)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.model").write_bytes(encode_model(pieces))
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<unk>"}
    config = special | {
        "add_bos_token": True,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "legacy": True,
        "model_max_length": 1024,
        "padding_side": "right",
        "tokenizer_class": "LlamaTokenizer",
        "use_fast": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    (folder / "special_tokens_map.json").write_text(json.dumps(special, indent=2) + "\n")
    return len(pieces)


def sentences(source: Source, num_samples: int) -> Iterator[str]:
    """Everything the recipe may ask or say, with texts shown in images cut out (they stand in quotes).

    Samples are asked plainly: in other wordings stand words of images and invented ones (noise.py).
    """
    source = replace(source, plain=True)
    for kind in DRAW:
        if kind == "photo" and source.photos is None:
            continue
        for seed in range(num_samples):
            sample = draw_sample(kind, seed, source)
            yield sample.caption
            for qa in sample.questions:
                yield from said(qa)
    for grammar in wordings.GRAMMARS:
        for kind in wordings.read_sections(grammar):
            for wording in (wording for line in wordings.wordings(kind, "train") for wording in line):
                words = re.sub(r"{\w+}", " ", wording)
                yield from (words, wordings.capital(words))
    for questions, answer in SMALL_TALK:
        yield from (*questions, answer)
    yield from (*UNKNOWN_TOPICS, *ELSEWHERE, *map(plural, ELSEWHERE), *noise.common_words())
    yield from (UNKNOWN_SHORT, SYSTEM, "color Color colors center Center gray plane automobile")


def said(qa: QA) -> Iterator[str]:
    yield from (qa.question, qa.answer, *(qa.follow or ()))
    if qa.short and qa.category not in SPELT:
        yield qa.short


def count_words(texts: Iterable[str]) -> Counter[str]:
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(re.findall(r"[A-Za-z]{2,}", re.sub(r'"[^"]*"', " ", text)))
    return counts


def list_pieces(counts: Counter[str], size: int) -> list[tuple[str, float, int]]:
    """(piece, score, type) by id. A word always beats its letters: letters score far below any word."""
    pieces = [("<unk>", 0.0, UNKNOWN), ("<s>", 0.0, CONTROL), ("</s>", 0.0, CONTROL)]
    pieces += [(f"<0x{byte:02X}>", 0.0, BYTE) for byte in range(256)]
    letters = [SPACE, *(chr(c) for c in range(33, 127))]
    pieces += [(letter, -20.0 - i / 1000, NORMAL) for i, letter in enumerate(letters)]
    pieces += [(phrase.replace(" ", SPACE), -5.0, NORMAL) for phrase in PHRASES]
    pieces += [(word, -19.0, NORMAL) for word in FIRST_WORDS]
    # A space with one letter is a piece too: the first letter of a spelt word then costs no more than the others.
    pieces += [(SPACE + letter, -19.5 - i / 1000, NORMAL) for i, letter in enumerate(letters[1:])]
    total = sum(counts.values())
    words = [(SPACE + w, math.log(n / total), NORMAL) for w, n in sorted(counts.items(), key=lambda c: (-c[1], c[0]))]
    return pieces + words[: size - len(pieces)]


# --- the file format: protobuf's wire format, written by hand -------------------------------------------------------


def encode_model(pieces: list[tuple[str, float, int]]) -> bytes:
    """sentencepiece's ModelProto: pieces (1), trainer_spec (2), normalizer_spec (3)."""
    body = b"".join(
        block(1, block(1, text.encode()) + tag(2, 5) + struct.pack("<f", score) + number(3, kind))
        for text, score, kind in pieces
    )
    unigram = 1
    trainer = number(3, unigram) + number(4, len(pieces)) + number(35, 1)
    trainer += number(40, 0) + number(41, 1) + number(42, 2) + number(43, -1)
    trainer += block(45, b"<unk>") + block(46, b"<s>") + block(47, b"</s>")
    normalizer = block(1, b"identity") + number(3, 1) + number(4, 0) + number(5, 1)
    return body + block(2, trainer) + block(3, normalizer)


def varint(value: int) -> bytes:
    value &= 2**64 - 1
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def tag(field: int, wire: int) -> bytes:
    return varint(field << 3 | wire)


def number(field: int, value: int) -> bytes:
    return tag(field, 0) + varint(value)


def block(field: int, content: bytes) -> bytes:
    return tag(field, 2) + varint(len(content)) + content
