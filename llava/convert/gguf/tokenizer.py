"""The tokenizer's fields of a GGUF file.

In: a `Source`. Out: tokens, scores, types, merges, special ids and the chat template under the keys that llama.cpp reads.
Where llama.cpp splits text by other rules than the model was trained with, `tokenizer_notes` says so. The opposite way is
model/checkpoints/gguf/tokenizer.py.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava.conversation import image_placeholder
from llava.convert.chat_template import chat_template
from llava.convert.sentencepiece_file import ScoredPiece, SentencePieceFile, read_sentencepiece
from llava.convert.source import Source
from llava.errors import InputError
from llava.model.checkpoints.gguf.config import OWN_LEGACY
from llava.model.checkpoints.gguf.tokenizer import (
    BPE,
    BYTE,
    CONTROL,
    MODEL_KINDS,
    NORMAL,
    PRE_TOKENIZERS,
    UNIGRAM,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
)
from llava.text.sentencepiece_tokenizer import LlamaSentencePieceTokenizer

if TYPE_CHECKING:
    from gguf import GGUFWriter
    from transformers import PreTrainedTokenizerFast

MODELS = {kind: name for name, kind in MODEL_KINDS.items()}
UNKNOWN_PENALTY = 10.0  # what sentencepiece subtracts from the lowest score for a character without a piece
# The pre-tokenizer that is named for a language model whose tokenizer splits text by an expression that GGUF cannot name.
NEAREST = {"qwen2": "qwen2", "qwen3": "qwen2"}
SPACE = "▁"


def add_tokenizer(writer: GGUFWriter, source: Source) -> None:
    """Write the tokenizer and the chat template of a source; a tokenizer that GGUF cannot hold is an `InputError`."""
    tokenizer, num_rows = source.tokenizer, source.model.config.vocab_size
    if isinstance(tokenizer, LlamaSentencePieceTokenizer):
        _add_sentencepiece(writer, tokenizer, num_rows)
    elif getattr(tokenizer, "is_fast", False):
        parts = _parts_of(tokenizer)
        if parts["model"]["type"] != "BPE":
            raise _not_expressible(source, f"a tokenizer of kind {parts['model']['type']}")
        if any(step["type"] == "ByteLevel" for step in _steps(parts["pre_tokenizer"])):
            _add_byte_level(writer, tokenizer, parts, source)
        else:
            _add_merges_of_pieces(writer, tokenizer, parts, source)
    else:
        raise _not_expressible(source, f"a tokenizer of class {type(tokenizer).__name__} without a tokenizer.json")
    for name in ("bos", "eos", "unk", "pad"):
        if (index := getattr(tokenizer, f"{name}_token_id", None)) is not None:
            getattr(writer, f"add_{name}_token_id")(index)
    writer.add_chat_template(
        chat_template(source.conv_mode, image_placeholder(source.settings.tokens.use_im_start_end))
    )


def _not_expressible(source: Source, what: str) -> InputError:
    return InputError(f"the gguf layout cannot express {what}, which {source.folder} has")


def _add_sentencepiece(writer: GGUFWriter, tokenizer: LlamaSentencePieceTokenizer, num_rows: int) -> None:
    file = read_sentencepiece(Path(tokenizer.vocab_file))
    if file.kind not in MODELS:
        raise InputError(f"{tokenizer.vocab_file} is a sentencepiece model of kind {file.kind}; known: unigram and BPE")
    pieces = with_characters_for_bytes(file) if file.kind == UNIGRAM else list(file.pieces)
    for index, token in sorted(tokenizer.added_tokens_decoder.items()):
        if index >= len(file.pieces):
            pieces.append(ScoredPiece(str(token.content), -1000.0, CONTROL if token.special else USER_DEFINED))
    _add_pieces(writer, pieces, num_rows, kind=file.kind, adds_space=True, legacy=tokenizer.legacy)
    writer.add_add_bos_token(tokenizer.add_bos_token)
    writer.add_add_eos_token(tokenizer.add_eos_token)


def _add_pieces(
    writer: GGUFWriter, pieces: list[ScoredPiece], num_rows: int, *, kind: int, adds_space: bool, legacy: bool
) -> None:
    """Write a sentencepiece vocabulary, and where spaces are added to a text."""
    _add_tokens(writer, [piece.text for piece in pieces], [piece.kind for piece in pieces], num_rows)
    writer.add_token_scores([piece.score for piece in pieces] + [-10000.0] * (num_rows - len(pieces)))
    writer.add_tokenizer_model(MODELS[kind])
    writer.add_tokenizer_pre("default")
    writer.add_add_space_prefix(adds_space)
    writer.add_remove_extra_whitespaces(False)
    writer.add_bool(OWN_LEGACY, legacy)


def with_characters_for_bytes(file: SentencePieceFile) -> list[ScoredPiece]:
    """Replace the byte pieces of ASCII characters that no other piece stands for, such as the newline, by the character.

    llama.cpp's tokenizer for unigram models has no byte fallback. The replaced pieces get the score that sentencepiece
    gives to unknown characters.
    """
    letters = {piece.text for piece in file.pieces if piece.kind == NORMAL}
    lowest = min(piece.score for piece in file.pieces if piece.kind == NORMAL) - UNKNOWN_PENALTY
    found = []
    for piece in file.pieces:
        letter = chr(int(piece.text[3:5], 16)) if piece.kind == BYTE else ""
        is_free = letter.isascii() and letter not in ("", "\0", " ") and letter not in letters
        found.append(ScoredPiece(letter, lowest, NORMAL) if is_free else piece)
    return found


def _add_merges_of_pieces(
    writer: GGUFWriter, tokenizer: PreTrainedTokenizerFast, parts: dict[str, Any], source: Source
) -> None:
    """Write a tokenizer.json that was made of a sentencepiece model: a piece's score is the rank of the merge that makes it."""
    steps = [*_steps(parts["normalizer"]), *_steps(parts["pre_tokenizer"])]
    strange = next((step["type"] for step in steps if not _handles_spaces(step)), None)
    if strange is not None:
        raise _not_expressible(source, f"a tokenizer with the step {strange}")
    schemes = {step.get("prepend_scheme", "always") for step in steps if _adds_space(step)} - {"never"}
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(parts["model"]["merges"]):
        ranks.setdefault("".join(merge.split(" ", 1) if isinstance(merge, str) else merge), rank)
    tokens, kinds = _tokens_and_kinds(tokenizer)
    unknown = parts["model"]["unk_token"]
    pieces = []
    for token, kind in zip(tokens, kinds, strict=True):
        if token == unknown:
            kind = UNKNOWN
        elif kind == NORMAL and parts["model"]["byte_fallback"] and re.fullmatch(r"<0x[0-9A-F]{2}>", token):
            kind = BYTE
        pieces.append(ScoredPiece(token, -float(ranks.get(token, len(ranks))), kind))
    legacy = schemes == {"always"} and not any("Regex" in step.get("pattern", {}) for step in steps)
    _add_pieces(writer, pieces, source.model.config.vocab_size, kind=BPE, adds_space=bool(schemes), legacy=legacy)
    writer.add_add_bos_token(_adds_begin(tokenizer, parts))
    writer.add_add_eos_token(False)


def _handles_spaces(step: dict[str, Any]) -> bool:
    """Whether a step of a tokenizer.json only writes spaces as sentencepiece does, or separates words at them."""
    if step["type"] in ("Metaspace", "Prepend"):
        return bool(step.get("replacement", step.get("prepend")) == SPACE)
    if step["type"] == "Replace":
        return bool(step["content"] == SPACE)
    return step["type"] == "Split" and step["pattern"] in ({"String": " "}, {"String": SPACE})


def _adds_space(step: dict[str, Any]) -> bool:
    """Whether a step puts a space before a text; a replacement of an expression is how this package's conversion does it."""
    return step["type"] in ("Metaspace", "Prepend") or (step["type"] == "Replace" and "Regex" in step["pattern"])


def _add_byte_level(
    writer: GGUFWriter, tokenizer: PreTrainedTokenizerFast, parts: dict[str, Any], source: Source
) -> None:
    name = pre_tokenizer_of(parts) or NEAREST.get(source.info.language_model)
    if name is None:
        found = [step["pattern"] for step in _steps(parts["pre_tokenizer"]) if "pattern" in step]
        raise _not_expressible(source, f"a tokenizer that splits text by {found or 'other rules than known ones'}")
    tokens, kinds = _tokens_and_kinds(tokenizer)
    _add_tokens(writer, tokens, kinds, source.model.config.vocab_size)
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in parts["model"]["merges"]]
    if merges:
        writer.add_token_merges(merges)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(name)
    writer.add_add_bos_token(_adds_begin(tokenizer, parts))


def pre_tokenizer_of(parts: dict[str, Any]) -> str | None:
    """GGUF's name of the rules by which a byte-level tokenizer splits text; None where it has none."""
    steps = list(_steps(parts["pre_tokenizer"]))
    if any(step["type"] == "ByteLevel" and step.get("add_prefix_space") for step in steps):
        return None
    patterns = [step["pattern"].get("Regex") for step in steps if step["type"] == "Split"]
    if any(step["type"] == "ByteLevel" and step.get("use_regex", True) for step in steps):
        patterns.append(PRE_TOKENIZERS["gpt-2"])  # the expression that this step has built in
    known = {pattern: name for name, pattern in PRE_TOKENIZERS.items()}
    return known.get(patterns[0]) if len(patterns) == 1 else None


def _steps(step: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
    """The steps of a normalizer or pre-tokenizer, which may be a sequence of them."""
    if step is None:
        return
    inner = step.get("pretokenizers") or step.get("normalizers")
    if inner is None:
        yield step
        return
    for part in inner:
        yield from _steps(part)


def _tokens_and_kinds(tokenizer: PreTrainedTokenizerFast) -> tuple[list[str], list[int]]:
    tokens = [""] * len(tokenizer)
    for token, index in tokenizer.get_vocab().items():
        tokens[index] = token
    added = tokenizer.added_tokens_decoder
    kinds = [
        NORMAL if index not in added else CONTROL if added[index].special else USER_DEFINED
        for index in range(len(tokens))
    ]
    return tokens, kinds


def _adds_begin(tokenizer: PreTrainedTokenizerFast, parts: dict[str, Any]) -> bool:
    """Whether a tokenizer puts its begin token before every text."""
    begin = tokenizer.bos_token
    return begin is not None and json.dumps(begin) in json.dumps(parts["post_processor"])


def _parts_of(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    """The parts of a fast tokenizer, as tokenizer.json describes them."""
    parts: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
    return parts


def _add_tokens(writer: GGUFWriter, tokens: list[str], kinds: list[int], num_rows: int) -> None:
    """Write tokens and types, padded to the rows of the embedding table, which may have more than there are tokens."""
    extra = range(len(tokens), num_rows)
    writer.add_token_list([*tokens, *(f"[PAD{index}]" for index in extra)])
    writer.add_token_types([*kinds, *(UNUSED for _ in extra)])


def tokenizer_notes(source: Source) -> list[str]:
    """Say where llama.cpp tokenizes text otherwise than the source's tokenizer."""
    tokenizer = source.tokenizer
    if not isinstance(tokenizer, LlamaSentencePieceTokenizer):
        parts = _parts_of(tokenizer)
        is_byte_level = any(step["type"] == "ByteLevel" for step in _steps(parts["pre_tokenizer"]))
        return byte_level_notes(parts) if is_byte_level else []
    notes = []
    if not tokenizer.legacy:
        notes.append(
            "llama.cpp puts a space before text that follows a special token, which this tokenizer does not (legacy: false): "
            "ids differ from the second turn of a conversation on"
        )
    if read_sentencepiece(Path(tokenizer.vocab_file)).kind == UNIGRAM:
        notes.append(
            "llama.cpp writes letters beyond ASCII that have no piece as <unk>, where this tokenizer has bytes"
        )
    return notes


def byte_level_notes(parts: dict[str, Any]) -> list[str]:
    notes = []
    if any(step["type"].startswith("NF") for step in _steps(parts["normalizer"])):
        notes.append(
            "llama.cpp does not bring letters and their accents together (Unicode NFC), which this tokenizer does: text in "
            "which they come apart gets other ids"
        )
    if pre_tokenizer_of(parts) is None and parts["model"]["merges"]:
        notes.append(
            "llama.cpp splits text as Qwen's own tokenizers do, and this one splits it otherwise: ids may differ"
        )
    return notes
