"""The tokenizer's fields of a GGUF file.

In: a `Source`. Out: tokens, scores, types, merges, special ids and the chat template under the keys that llama.cpp reads.
Where llama.cpp splits text by other rules than the model was trained with, `tokenizer_notes` says so.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava.conversation import image_placeholder
from llava.convert.chat_template import chat_template
from llava.convert.sentencepiece_file import (
    BPE,
    BYTE,
    CONTROL,
    NORMAL,
    UNIGRAM,
    UNUSED,
    USER_DEFINED,
    ScoredPiece,
    SentencePieceFile,
    read_sentencepiece,
)
from llava.convert.source import Source
from llava.errors import InputError
from llava.text.sentencepiece_tokenizer import LlamaSentencePieceTokenizer

if TYPE_CHECKING:
    from gguf import GGUFWriter
    from transformers import PreTrainedTokenizerFast

# The name that llama.cpp gives to the pre-tokenizer of a language model's byte-level tokenizer.
PRE_TOKENIZERS = {"qwen2": "qwen2", "qwen3": "qwen2"}
# The expression behind that name, which is Qwen's own.
QWEN_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
MODELS = {BPE: "llama", UNIGRAM: "t5"}
UNKNOWN_PENALTY = 10.0  # what sentencepiece subtracts from the lowest score for a character without a piece


def add_tokenizer(writer: GGUFWriter, source: Source) -> None:
    """Write the tokenizer and the chat template of a source; a tokenizer that GGUF cannot hold is an `InputError`."""
    tokenizer = source.tokenizer
    if isinstance(tokenizer, LlamaSentencePieceTokenizer):
        _add_sentencepiece(writer, tokenizer, source.model.config.vocab_size)
    elif source.info.language_model in PRE_TOKENIZERS and getattr(tokenizer, "is_fast", False):
        _add_byte_level(writer, tokenizer, source)
    else:
        raise InputError(
            f"the gguf layout cannot express the tokenizer of {source.folder} ({type(tokenizer).__name__} of a "
            f"{source.info.language_model} model); known are sentencepiece models and Qwen's"
        )
    for name in ("bos", "eos", "unk", "pad"):
        if (index := getattr(tokenizer, f"{name}_token_id", None)) is not None:
            getattr(writer, f"add_{name}_token_id")(index)
    writer.add_chat_template(
        chat_template(source.conv_mode, image_placeholder(source.settings.tokens.use_im_start_end))
    )


def _add_sentencepiece(writer: GGUFWriter, tokenizer: LlamaSentencePieceTokenizer, num_rows: int) -> None:
    file = read_sentencepiece(Path(tokenizer.vocab_file))
    if file.kind not in MODELS:
        raise InputError(f"{tokenizer.vocab_file} is a sentencepiece model of kind {file.kind}; known: unigram and BPE")
    pieces = with_characters_for_bytes(file) if file.kind == UNIGRAM else list(file.pieces)
    for index, token in sorted(tokenizer.added_tokens_decoder.items()):
        if index >= len(file.pieces):
            pieces.append(ScoredPiece(str(token.content), -1000.0, CONTROL if token.special else USER_DEFINED))
    _add_tokens(writer, [piece.text for piece in pieces], [piece.kind for piece in pieces], num_rows)
    writer.add_token_scores([piece.score for piece in pieces] + [-10000.0] * (num_rows - len(pieces)))
    writer.add_tokenizer_model(MODELS[file.kind])
    writer.add_tokenizer_pre("default")
    writer.add_add_bos_token(tokenizer.add_bos_token)
    writer.add_add_eos_token(tokenizer.add_eos_token)
    writer.add_add_space_prefix(True)
    writer.add_remove_extra_whitespaces(False)


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


def _add_byte_level(writer: GGUFWriter, tokenizer: PreTrainedTokenizerFast, source: Source) -> None:
    model = _parts_of(tokenizer)["model"]
    if model["type"] != "BPE":
        raise InputError(
            f"the gguf layout cannot express a tokenizer of kind {model['type']}, which {source.folder} has"
        )
    tokens = [""] * len(tokenizer)
    for token, index in tokenizer.get_vocab().items():
        tokens[index] = token
    added = tokenizer.added_tokens_decoder
    kinds = [
        1 if index not in added else CONTROL if added[index].special else USER_DEFINED for index in range(len(tokens))
    ]
    _add_tokens(writer, tokens, kinds, source.model.config.vocab_size)
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    writer.add_token_merges(merges)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(PRE_TOKENIZERS[source.info.language_model])
    writer.add_add_bos_token(False)


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
        return byte_level_notes(_parts_of(tokenizer))
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
    if parts["normalizer"] is not None:
        notes.append(
            "llama.cpp does not bring letters and their accents together (Unicode NFC), which this tokenizer does: text in "
            "which they come apart gets other ids"
        )
    steps = parts["pre_tokenizer"] or {}
    found = [step.get("pattern", {}).get("Regex") for step in steps.get("pretokenizers", [steps])]
    if QWEN_PATTERN not in found and parts["model"]["merges"]:
        notes.append(
            "llama.cpp splits text as Qwen's own tokenizers do, and this one splits it otherwise: ids may differ"
        )
    return notes
