"""Convert a tokenizer to a `tokenizer.json` that gives the ids that the model was trained with, and `<image>` an id.

In: a loaded tokenizer. Out: one of the tokenizers library, which other programs read, and the texts for which its ids or its
decoded text differ from ours. Of a sentencepiece model pieces and merges are converted, and the historical rule for the
space before a text becomes a normalizer: it is added before every segment between special tokens, or only where a text or
the text after an image begins.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava.constants import DEFAULT_IMAGE_TOKEN
from llava.convert.sentencepiece_file import read_sentencepiece
from llava.errors import InputError
from llava.model.checkpoints.gguf.tokenizer import BPE, UNIGRAM
from llava.text.sentencepiece_tokenizer import LlamaSentencePieceTokenizer
from llava.text.tokenization import tokenizer_image_token

if TYPE_CHECKING:
    import tokenizers
    from sentencepiece import SentencePieceProcessor
    from transformers import PreTrainedTokenizerBase

PAD_TOKEN = "<pad>"


def convert_tokenizer(tokenizer: PreTrainedTokenizerBase, more: Sequence[str] = ()) -> tokenizers.Tokenizer:
    """Convert a tokenizer to the tokenizers library; `<image>`, `<pad>` and `more` are appended where it lacks them."""
    from tokenizers import AddedToken, Tokenizer

    if isinstance(tokenizer, LlamaSentencePieceTokenizer):
        fast = _from_sentencepiece(tokenizer)
    elif getattr(tokenizer, "is_fast", False):
        fast = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    else:
        raise InputError(
            f"a tokenizer of class {type(tokenizer).__name__} cannot be written as tokenizer.json, which this layout needs"
        )
    for token in (DEFAULT_IMAGE_TOKEN, PAD_TOKEN, *more):
        if fast.token_to_id(token) is None:
            fast.add_special_tokens([AddedToken(token, normalized=False, special=True)])
    return fast


def save_tokenizer(fast: tokenizers.Tokenizer, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write tokenizer.json, and a tokenizer_config.json with which every version of transformers uses it unchanged.

    `fast` is the converted `tokenizer`.
    """
    fast.save(str(folder / "tokenizer.json"))
    named = {key: str(value) for key, value in tokenizer.special_tokens_map.items() if isinstance(value, str) and value}
    values = {
        **named,
        "pad_token": PAD_TOKEN,
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": bool(tokenizer.clean_up_tokenization_spaces),
        "model_max_length": tokenizer.model_max_length,
        "padding_side": "left",
        "extra_special_tokens": {"image_token": DEFAULT_IMAGE_TOKEN},
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", "utf-8")


# --- sentencepiece ----------------------------------------------------------------------------------------------------


def _from_sentencepiece(tokenizer: LlamaSentencePieceTokenizer) -> tokenizers.Tokenizer:
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, processors

    sp = tokenizer.sp_model
    pieces = [sp.id_to_piece(index) for index in range(sp.get_piece_size())]
    kind = read_sentencepiece(Path(tokenizer.vocab_file)).kind
    if kind == BPE:
        ids = {piece: index for index, piece in enumerate(pieces)}
        unknown = pieces[sp.unk_id()]
        model: Any = models.BPE(ids, _merges(sp, pieces, ids), unk_token=unknown, fuse_unk=True, byte_fallback=True)
    elif kind == UNIGRAM:
        scores = [(piece, sp.get_score(index)) for index, piece in enumerate(pieces)]
        model = models.Unigram(scores, unk_id=sp.unk_id(), byte_fallback=True)
    else:
        raise InputError(f"{tokenizer.vocab_file} is a sentencepiece model of kind {kind}; known: unigram and BPE")
    fast = Tokenizer(model)

    added = sorted(tokenizer.added_tokens_decoder.items())
    # A legacy tokenizer adds a space before every segment between special tokens, so that these are split off before the
    # space is added. The later rule adds it only at the start of a text, so that they are split off after it.
    late = not tokenizer.legacy
    if late:
        special = "|".join(re.escape(str(token.content)) for _, token in added) or r"\z"
        space: Any = normalizers.Replace(Regex(rf"\A(?!\z)(?!{special})"), "▁")
    else:
        space = normalizers.Prepend("▁")
    fast.normalizer = normalizers.Sequence([space, normalizers.Replace(" ", "▁")])
    for index, token in added:
        strips = {"lstrip": token.lstrip, "rstrip": token.rstrip, "single_word": token.single_word}
        fast.add_tokens([AddedToken(token.content, normalized=late, special=token.special, **strips)])
        if fast.token_to_id(token.content) != index:
            raise InputError(f"the token {token.content!r} has the id {index}, which a tokenizer.json cannot give it")
    before = [tokenizer.bos_token] if tokenizer.add_bos_token else []
    after = [tokenizer.eos_token] if tokenizer.add_eos_token else []
    fast.post_processor = processors.TemplateProcessing(
        single=[*before, "$A", *after],
        pair=[*before, "$A", *after, *(f"{token}:1" for token in before), "$B:1", *(f"{token}:1" for token in after)],
        special_tokens=[(token, tokenizer.convert_tokens_to_ids(token)) for token in before + after],
    )
    # The library removes the space that it added before a text, and ours removes one more under the legacy rule.
    strip = decoders.Strip(" ", 2 if tokenizer.legacy else 1, 0)
    fast.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), strip])
    return fast


def _merges(sp: SentencePieceProcessor, pieces: list[str], ids: dict[str, int]) -> list[tuple[str, str]]:
    """All pairs of pieces that form a piece, best score first: sentencepiece merges the pair with the best result."""
    merges = []
    for index, piece in enumerate(pieces):
        if sp.is_byte(index) or sp.is_control(index) or sp.is_unknown(index):
            continue
        cuts = ((piece[:at], piece[at:]) for at in range(1, len(piece)))
        merges += [(-sp.get_score(index), ids[a], ids[b], a, b) for a, b in cuts if a in ids and b in ids]
    return [(a, b) for *_, a, b in sorted(merges)]


# --- comparison -------------------------------------------------------------------------------------------------------

# Texts for which conversions of tokenizers are known to fail: leading, trailing and repeated spaces, text after a special
# token or an image, bytes without pieces, scripts, digits, code.
TEXTS = (
    "A chat between a curious human and an artificial intelligence assistant. USER: <image>\nWhat is this? ASSISTANT:",
    "USER: <image>\n<image>\nCompare them. ASSISTANT: The first is red.</s>USER: And the second? ASSISTANT:",
    "[INST] <image>\nRead the sign. [/INST] It says EXIT. </s>[INST] In which colour? [/INST]",
    "<|im_start|>system\nAnswer the questions.<|im_end|><|im_start|>user\n<image>\nHow many?<|im_end|>",
    " ASSISTANT: Two circles",
    "  two spaces before,   three within, two behind  ",
    "def f(x):\n    if x:\n        return '\\t'\n\treturn None\n",
    "no space<image>between</s> and<s>after",
    "</s>begins with a mark",
    "ends with one</s>",
    "<image>",
    "<image> then a space",
    "\n",
    "",
    "naïve café – “quoted” … 3.14159, 1,000,000 €",
    "这张图片里有什么？有两只猫。",
    "これは何ですか？ Что это? ما هذا؟ 이것은?",
    "emoji 🐈‍⬛ and rare 𓀀 𝔘 \u200b\u00a0 x",
    "http://example.org/a_b-c?d=e&f=%20#g",
    "▁ written out, and ▁▁ twice",
    "aaaaaaaaaaaaaaaabbbbbbbbbbbbbbbbccccccccccccccccdddddddddd",
    "Hello\r\nworld\x0b\x0c\x00end",
)


@dataclass(frozen=True)
class TokenizerDifference:
    """A text for which two tokenizers disagree."""

    text: str
    what: str  # "ids" or "decoded text"
    ours: list[int] | str
    theirs: list[int] | str

    def __str__(self) -> str:
        return f"{self.what} of {self.text!r}: {self.ours} here, {self.theirs} there"


def differences(
    tokenizer: PreTrainedTokenizerBase, fast: tokenizers.Tokenizer, texts: Iterable[str] = TEXTS
) -> list[TokenizerDifference]:
    """Find the texts for which a converted tokenizer gives other ids than ours, or decodes them to other text."""
    image = fast.token_to_id(DEFAULT_IMAGE_TOKEN)
    assert image is not None, "a converted tokenizer has <image>"
    special = set(tokenizer.all_special_ids)
    found = []
    for text in texts:
        ours, theirs = tokenizer_image_token(text, tokenizer, image), fast.encode(text).ids
        if ours != theirs:
            found.append(TokenizerDifference(text, "ids", ours, theirs))
        plain = [index for index in ours if index != image and index not in special]
        before, after = tokenizer.decode(plain, skip_special_tokens=True), fast.decode(plain)
        if before != after:
            found.append(TokenizerDifference(text, "decoded text", before, after))
    return found
