"""Write the tokenizer of a GGUF file as the files that text/tokenization.py loads.

In: the header of a language model, with its vocabulary. Out: `tokenizer.model` for sentencepiece models, `tokenizer.json` for
byte-level ones, `tokenizer_config.json`, and `chat_template.jinja`. The opposite way is convert/gguf/tokenizer.py, which has
the pre-tokenizers' expressions from here.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava.chat_template import MAX_TEMPLATE_CHARS
from llava.errors import InputError
from llava.model.checkpoints.gguf.config import OWN_LEGACY, GgufKeys
from llava.model.checkpoints.gguf.file import GgufHeader

# What each token is, in GGUF as in sentencepiece files.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
UNIGRAM, BPE = 1, 2
MODEL_KINDS = {"llama": BPE, "t5": UNIGRAM}  # of sentencepiece models, by GGUF's name

# The expressions by which byte-level tokenizers split text, by llama.cpp's name of the pre-tokenizer.
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SHORT_FORMS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
PRE_TOKENIZERS = {
    "llama-bpe": rf"{_SHORT_FORMS}|{_WORDS}|\p{{N}}{{1,3}}|{_REST}",
    "qwen2": rf"{_SHORT_FORMS}|{_WORDS}|\p{{N}}|{_REST}",
    "gpt-2": r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
}
OTHER_SPELLINGS = {
    "llama3": "llama-bpe", "llama-v3": "llama-bpe", "smaug-bpe": "llama-bpe", "dbrx": "llama-bpe", "stablelm2": "qwen2",
    "deepseek-r1-qwen": "qwen2", "olmo": "gpt-2", "mpt": "gpt-2", "phi-2": "gpt-2",
}  # fmt: skip
# The pre-tokenizer of files from before GGUF named it, by architecture.
USUAL = {"qwen2": "qwen2", "qwen3": "qwen2", "llama": "llama-bpe"}
WHOLE_WORDS_FIRST = ("llama-bpe",)  # a word that is a token stays one, whatever the merges say
NORMALIZED = ("qwen2",)  # to Unicode NFC


@dataclass(frozen=True)
class Vocabulary:
    """The tokens of a file by id, without those that only pad the embedding table."""

    tokens: Sequence[str]
    scores: Sequence[float]
    kinds: Sequence[int]

    def added(self, first: int = 0) -> dict[int, dict[str, object]]:
        """The tokens that are split off a text before it is tokenized, as tokenizer files describe them."""
        return {
            index: {"content": text, "special": kind != USER_DEFINED, "lstrip": False, "rstrip": False,
                    "single_word": False, "normalized": False}
            for index, (text, kind) in enumerate(zip(self.tokens, self.kinds, strict=True))
            if kind in (CONTROL, UNKNOWN) or (kind == USER_DEFINED and index >= first)
        }  # fmt: skip


def write_tokenizer(header: GgufHeader, folder: Path) -> None:
    """Write the tokenizer and the chat template of a header that was read with all its arrays.

    Raises:
        InputError: The file has no tokenizer, or one of a kind that is not known.
    """
    keys = GgufKeys(header)
    kind = keys.text("tokenizer.ggml.model", "(none)")
    vocabulary = _vocabulary(header)
    settings: dict[str, Any] = {"clean_up_tokenization_spaces": False}
    for name in ("bos", "eos", "unk", "pad"):
        key = f"tokenizer.ggml.{'unknown' if name == 'unk' else 'padding' if name == 'pad' else name}_token_id"
        if key in header.keys:
            index = int(keys.number(key))
            if 0 <= index < len(vocabulary.tokens):
                settings[f"{name}_token"] = vocabulary.tokens[index]
    if kind in MODEL_KINDS:
        settings |= _write_sentencepiece(keys, vocabulary, MODEL_KINDS[kind], folder)
    elif kind == "gpt2":
        settings |= _write_byte_level(keys, vocabulary, settings, folder)
    else:
        raise InputError(f"{header.file} has a tokenizer of kind {kind!r}; known: {', '.join(MODEL_KINDS)} and gpt2")
    _write_json(folder / "tokenizer_config.json", settings)
    template = keys.text("tokenizer.chat_template")
    if template and len(template) <= MAX_TEMPLATE_CHARS:
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")


def _vocabulary(header: GgufHeader) -> Vocabulary:
    tokens = header.keys.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list) or not tokens or not all(isinstance(token, str) for token in tokens):
        raise InputError(f"{header.file} holds no vocabulary (tokenizer.ggml.tokens), so no text can be given to it")
    columns: dict[str, list[Any]] = {}
    for name, default in (("scores", 0.0), ("token_type", NORMAL)):
        column = header.keys.get(f"tokenizer.ggml.{name}", [default] * len(tokens))
        if not isinstance(column, list) or len(column) != len(tokens):
            raise InputError(f"{header.file} has {len(tokens)} tokens and another number of tokenizer.ggml.{name}")
        columns[name] = column
    used = next((n for n in range(len(tokens), 0, -1) if columns["token_type"][n - 1] != UNUSED), 0)
    return Vocabulary(tokens[:used], columns["scores"][:used], columns["token_type"][:used])


# --- sentencepiece ----------------------------------------------------------------------------------------------------


def _write_sentencepiece(keys: GgufKeys, vocabulary: Vocabulary, kind: int, folder: Path) -> dict[str, Any]:
    kinds = vocabulary.kinds
    plain = (NORMAL, BYTE)
    num_pieces = next((n for n in range(len(kinds), 0, -1) if kinds[n - 1] in plain), 0)  # others were added later
    named = [n for n in range(num_pieces, len(kinds)) if kinds[n] == UNKNOWN]
    if UNKNOWN not in kinds or named:
        raise InputError(f"{keys.header.file} has a vocabulary without a token for unknown text among its pieces")
    pieces = list(zip(vocabulary.tokens, vocabulary.scores, kinds, strict=True))[:num_pieces]
    charsmap = keys.header.keys.get("tokenizer.ggml.precompiled_charsmap")
    charsmap = (
        bytes(charsmap)
        if isinstance(charsmap, list) and all(type(n) is int and 0 <= n < 256 for n in charsmap)
        else b""
    )
    adds_space = keys.flag("tokenizer.ggml.add_space_prefix", True)
    model = sentencepiece_model(
        pieces if kind == BPE else with_bytes(pieces), kind, adds_space=adds_space, charsmap=charsmap
    )
    (folder / "tokenizer.model").write_bytes(model)
    return {
        "tokenizer_class": "LlamaTokenizer",
        # Without the key, as llama.cpp does: a space before every text, also behind a special token. A model without a
        # space before its texts has none anywhere.
        "legacy": keys.flag(OWN_LEGACY, True) or not adds_space,
        "add_bos_token": keys.flag("tokenizer.ggml.add_bos_token", True),
        "add_eos_token": keys.flag("tokenizer.ggml.add_eos_token"),
        "added_tokens_decoder": {str(index): token for index, token in vocabulary.added(num_pieces).items()},
    }


def with_bytes(pieces: list[tuple[str, float, int]]) -> list[tuple[str, float, int]]:
    """Put back the byte pieces of a unigram model that the writer made letters of, since llama.cpp has no bytes there."""
    known = next(((n, text) for n, (text, _, kind) in enumerate(pieces) if kind == BYTE), None)
    if known is None:
        return pieces
    first = known[0] - int(known[1][3:5], 16)
    found = list(pieces)
    for value in range(256):
        at = first + value
        if 0 <= at < len(pieces) and pieces[at][0] == chr(value) and pieces[at][2] == NORMAL and value < 128:
            found[at] = (f"<0x{value:02X}>", 0.0, BYTE)
    return found


def sentencepiece_model(
    pieces: Sequence[tuple[str, float, int]], kind: int, *, adds_space: bool, charsmap: bytes = b""
) -> bytes:
    """Write a sentencepiece model (protobuf) of pieces: text, score and what it is.

    Args:
        kind: `UNIGRAM` or `BPE`.
        adds_space: Whether a space is put before every text.
        charsmap: The table of a normalizer, in the library's own form; empty: text is kept as it is.
    """
    message = b"".join(
        _field(1, _field(1, text.encode()) + _field(2, score) + _field(3, piece_kind))
        for text, score, piece_kind in pieces
    )
    has_bytes = any(piece_kind == BYTE for _, _, piece_kind in pieces)
    ids = [next((n for n, (text, _, k) in enumerate(pieces) if test(text, k)), -1) for test in _NAMED]
    trainer = _field(3, kind) + _field(4, len(pieces)) + _field(35, has_bytes)
    for number, index in zip((40, 41, 42, 43), ids, strict=True):
        trainer += _field(number, index)
        if index >= 0:
            trainer += _field(number + 5, pieces[index][0].encode())
    normalizer = _field(1, b"nmt_nfkc" if charsmap else b"identity") + _field(2, charsmap)
    normalizer += _field(3, adds_space) + _field(4, False) + _field(5, True)
    return message + _field(2, trainer) + _field(3, normalizer)


# Which piece is the unknown one, the first and last of a text, and padding.
_NAMED = (
    lambda text, kind: kind == UNKNOWN,
    lambda text, kind: kind == CONTROL and text in ("<s>", "<bos>", "<|startoftext|>"),
    lambda text, kind: kind == CONTROL and text in ("</s>", "<eos>", "<|endoftext|>"),
    lambda text, kind: kind == CONTROL and text == "<pad>",
)


def _field(number: int, value: bytes | float | int) -> bytes:
    """One field of a protobuf message."""
    if isinstance(value, bytes):
        return _varint(number << 3 | 2) + _varint(len(value)) + value
    if isinstance(value, float):
        return _varint(number << 3 | 5) + struct.pack("<f", value)
    return _varint(number << 3) + _varint(value & (2**64 - 1))


def _varint(value: int) -> bytes:
    found = bytearray()
    while value > 127:
        found.append(value & 127 | 128)
        value >>= 7
    return bytes([*found, value])


# --- byte level -------------------------------------------------------------------------------------------------------


def pre_tokenizer_name(header: GgufHeader) -> str:
    """A key of `PRE_TOKENIZERS` for a byte-level tokenizer; one that is not known is an `InputError`."""
    name = GgufKeys(header).text("tokenizer.ggml.pre", "default")
    if name == "default":
        return USUAL.get(header.architecture, "gpt-2")
    found = OTHER_SPELLINGS.get(name, name)
    if found not in PRE_TOKENIZERS:
        known = ", ".join([*PRE_TOKENIZERS, *OTHER_SPELLINGS])
        raise InputError(f"{header.file} splits text by the pre-tokenizer {name!r}; known: {known}")
    return found


def _write_byte_level(keys: GgufKeys, vocabulary: Vocabulary, settings: dict[str, Any], folder: Path) -> dict[str, Any]:
    merges = keys.header.keys.get("tokenizer.ggml.merges", [])
    if not isinstance(merges, list):
        raise InputError(f"{keys.header.file} has tokenizer.ggml.merges of another type than a list")
    pairs = [merge.split(" ", 1) for merge in merges if isinstance(merge, str)]
    if len(pairs) != len(merges) or any(len(pair) != 2 for pair in pairs):
        raise InputError(f"{keys.header.file} has tokenizer.ggml.merges that are no pairs of tokens")
    name = pre_tokenizer_name(keys.header)
    adds_begin = keys.flag("tokenizer.ggml.add_bos_token", name == "llama-bpe") and "bos_token" in settings
    split = {"type": "Split", "pattern": {"Regex": PRE_TOKENIZERS[name]}, "behavior": "Isolated", "invert": False}
    bytes_ = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    ids = {token: index for index, token in enumerate(vocabulary.tokens)}
    _write_json(
        folder / "tokenizer.json",
        {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": [{"id": index, **token} for index, token in vocabulary.added().items()],
            "normalizer": {"type": "NFC"} if name in NORMALIZED else None,
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, bytes_]},
            "post_processor": _begin_with(settings["bos_token"], ids) if adds_begin else bytes_,
            "decoder": bytes_ | {"use_regex": True},
            "model": {
                "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False,
                "ignore_merges": name in WHOLE_WORDS_FIRST, "vocab": ids, "merges": pairs,
            },
        },
    )  # fmt: skip
    return {"tokenizer_class": "PreTrainedTokenizerFast"}


def _begin_with(token: str, ids: dict[str, int]) -> dict[str, Any]:
    """The post-processor that puts a token before every text."""

    def sequence(name: str, type_id: int) -> list[dict[str, Any]]:
        first = {"SpecialToken": {"id": token, "type_id": type_id}}
        return [first, {"Sequence": {"id": name, "type_id": type_id}}]

    return {
        "type": "TemplateProcessing",
        "single": sequence("A", 0),
        "pair": [*sequence("A", 0), *sequence("B", 1)],
        "special_tokens": {token: {"id": token, "ids": [ids[token]], "tokens": [token]}},
    }


def _write_json(file: Path, values: object) -> None:
    file.write_text(json.dumps(values, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
