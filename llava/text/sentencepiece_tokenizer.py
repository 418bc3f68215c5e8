"""The tokenizer of LLaMA-type checkpoints that hold a bare `tokenizer.model`, over the sentencepiece library.

In: the model file, a text. Out: ids and text exactly as the library and the rules below give them, since those
checkpoints were trained with them; and for each token its offsets in the text, from which labels are made. The
tokenizer that transformers 5 builds from the same file gives other ids (no <s>, other pieces around spaces and after
special tokens). Choosing and loading a tokenizer is in tokenization.py.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache, partial
from itertools import accumulate
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, overload

import sentencepiece
from transformers import AddedToken, PreTrainedTokenizer

from llava.errors import InputError

_UNDERLINE = "▁"  # how sentencepiece writes a space
# Appended to a serialized model, this sets normalizer_spec.add_dummy_prefix to false: of a field that occurs twice, the
# later one wins. It spares a dependency on protobuf.
_NO_DUMMY_PREFIX = b"\x1a\x02\x18\x00"
# Attributes that a copy in another process rebuilds from the model's bytes.
_REBUILT = ("sp_model", "_pieces", "_byte_values", "_widths", "_widths_by_id", "_ids", "_token_texts")
_ANY_WORD = "a"  # decoded after it, a token has the text that it has inside a text


class SeparateText(str):
    """The text of a token that is written with spaces around it, whatever is beside it."""


# What a token stands for: characters, bytes of a character, or None where decoding leaves it out.
TokenText = str | bytes | SeparateText | None


class SentencePiece(NamedTuple):
    """One token and the characters `start` to `end` of the text that it stands for; none of them for an added space."""

    token: str
    start: int
    end: int


class LlamaSentencePieceTokenizer(PreTrainedTokenizer):
    """The tokenizer of LLaMA-type checkpoints, over the sentencepiece library, for both of its historical rules.

    `legacy=True` (the meaning of a checkpoint without that key) adds a space before every stretch of text between
    special tokens. `legacy=False` adds one at the start of the whole text only.
    """

    vocab_files_names: ClassVar[dict[str, str]] = {"vocab_file": "tokenizer.model"}
    model_input_names: ClassVar[list[str]] = ["input_ids", "attention_mask"]

    def __init__(
        self,
        vocab_file: str | os.PathLike[str],
        unk_token: str | AddedToken = "<unk>",
        bos_token: str | AddedToken | None = "<s>",
        eos_token: str | AddedToken | None = "</s>",
        pad_token: str | AddedToken | None = None,
        *,
        legacy: bool | None = None,
        add_bos_token: bool = True,
        add_eos_token: bool = False,
        sp_model_kwargs: dict[str, Any] | None = None,
        **kwargs: object,
    ) -> None:
        self.vocab_file = os.fspath(vocab_file)
        self.legacy = legacy is None or legacy
        self.add_bos_token = add_bos_token
        self.add_eos_token = add_eos_token
        self.sp_model_kwargs = sp_model_kwargs or {}
        self._model_bytes = _read_model(Path(vocab_file))
        self._start_processor()
        kwargs |= _described_tokens(kwargs.pop("additional_special_tokens", None), kwargs)
        super().__init__(
            unk_token=_as_special(unk_token),
            bos_token=_as_special(bos_token),
            eos_token=_as_special(eos_token),
            pad_token=_as_special(pad_token),
            legacy=self.legacy,
            add_bos_token=add_bos_token,
            add_eos_token=add_eos_token,
            sp_model_kwargs=self.sp_model_kwargs,
            **kwargs,
        )

    def _start_processor(self) -> None:
        model = self._model_bytes if self.legacy else self._model_bytes + _NO_DUMMY_PREFIX
        try:
            self.sp_model = sentencepiece.SentencePieceProcessor(model_proto=model, **self.sp_model_kwargs)
        except RuntimeError as error:
            raise InputError(
                f"{self.vocab_file} is not a sentencepiece model (damaged, or the pointer file of an unfinished "
                "download); fetch the file again."
            ) from error
        ids = range(self.sp_model.get_piece_size())
        self._pieces = [self.sp_model.id_to_piece(index) for index in ids]
        self._byte_values = {
            self._pieces[index]: int(self._pieces[index][3:5], 16) for index in ids if self.sp_model.is_byte(index)
        }
        # Per piece, how many bytes of (unescaped) text it stands for.
        self._widths = {piece: 1 if piece in self._byte_values else _num_bytes(piece) for piece in self._pieces}
        self._widths_by_id = [self._widths[piece] for piece in self._pieces]
        self._ids = {piece: self.sp_model.piece_to_id(piece) for piece in self._pieces}
        self._token_texts = _TokenTexts(self, set(), {})

    # The library's object is rebuilt from the model's bytes, so that data-loader workers and copies get their own.

    def __getstate__(self) -> dict[str, object]:
        return {key: value for key, value in self.__dict__.items() if key not in _REBUILT}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self._start_processor()

    @property
    def vocab_size(self) -> int:
        return len(self._pieces)

    def get_vocab(self) -> dict[str, int]:
        vocab = {piece: index for index, piece in enumerate(self._pieces)}
        return vocab | self._added_tokens_encoder

    # Encoding

    def tokenize(self, text: str, split_special_tokens: bool | None = None, **_: object) -> list[str]:
        return [piece.token for piece in self.pieces(text, split_special_tokens=split_special_tokens)]

    def pieces(self, text: str, *, split_special_tokens: bool | None = None) -> list[SentencePiece]:
        """Cut a text into tokens (without <s> and </s> around it), each with its offsets."""
        pieces: list[SentencePiece] = []
        for stretch, start, leading, is_added in self._stretches(text, split_special_tokens):
            if is_added:
                if leading:
                    pieces.append(SentencePiece(leading, 0, 0))
                pieces.append(SentencePiece(stretch, start, start + len(stretch)))
            else:
                pieces += self._pieces_of(stretch, start, leading)
        return pieces

    def encode_ids(self, text: str) -> list[int]:
        """Encode a text to the ids that calling the tokenizer without options gives, in less time."""
        inner: list[int] = []
        for stretch, _, leading, is_added in self._stretches(text, None):
            if is_added:
                tokens = [leading, stretch] if leading else [stretch]
                inner += self._ids_of_tokens(tokens)
            else:
                ids: list[int] = self.sp_model.encode(leading + stretch) if leading or stretch else []
                # An unknown token, or a text that was rewritten: take the way that checks every token.
                num_added = sum([self._widths_by_id[index] for index in ids]) - _num_bytes(stretch)
                if num_added not in (0, 1) or self.sp_model.unk_id() in ids:
                    ids = self._ids_of_tokens([piece.token for piece in self._pieces_of(stretch, 0, leading)])
                inner += ids
        return self.build_inputs_with_special_tokens(inner)

    def _stretches(self, text: str, split_special_tokens: bool | None) -> Iterator[tuple[str, int, str, bool]]:
        """Cut a text at its added tokens: each stretch, its offset, the space put before it, whether it is such a token."""
        _check_unicode(text)
        if split_special_tokens is None:
            split_special_tokens = self.split_special_tokens
        added = {} if split_special_tokens else self._added_tokens_encoder
        segments = [text] if split_special_tokens else self._segments(text)
        # Without the legacy rule, one space is added for the whole text; it yields to a special token.
        first = next((one for n, one in enumerate(segments) if one in added or self._is_kept(segments, n, added)), "")
        yields = first in added and first in self.all_special_tokens
        leading = "" if self.legacy or not text or yields else _UNDERLINE
        start = 0
        for index, segment in enumerate(segments):
            if segment in added:
                yield segment, start, leading, True
            else:
                left, right = self._strip(segments, index, added)
                yield segment[left:right], start + left, leading, False
            start += len(segment)
            leading = ""

    def _segments(self, text: str) -> list[str]:
        """Cut a text at its added tokens, which are segments of their own; of several that fit, the longest counts."""
        added = tuple(self._added_tokens_encoder)
        segments = _any_of(added).split(text) if added else [text]
        return [segment for segment in segments if segment] or [text]

    def _is_kept(self, segments: list[str], index: int, added: dict[str, int]) -> bool:
        """Whether anything of a segment is left when the added tokens beside it have stripped its spaces."""
        left, right = self._strip(segments, index, added)
        return left < right

    def _strip(self, segments: list[str], index: int, added: dict[str, int]) -> tuple[int, int]:
        """Where a segment begins and ends without the spaces that the added tokens beside it strip."""
        segment = segments[index]
        left, right = 0, len(segment)
        before = segments[index - 1] if index else ""
        after = segments[index + 1] if index + 1 < len(segments) else ""
        if before in added and self._added_tokens_decoder[added[before]].rstrip:
            left = len(segment) - len(segment.lstrip())
        if after in added and self._added_tokens_decoder[added[after]].lstrip:
            right = max(left, len(segment.rstrip()))
        return left, right

    def _pieces_of(self, text: str, start: int, leading: str) -> list[SentencePiece]:
        """Cut a text without special tokens. `leading` is a space put before it that is not in the text."""
        if not text and not leading:
            return []
        tokens = self.sp_model.encode(leading + text, out_type=str)
        # Offsets in bytes: a character without a piece of its own is written as the pieces of its UTF-8 bytes.
        widths = [self._width(token) for token in tokens]
        # What the pieces hold beyond the text is the space put before it: ours, or the model's own.
        added = sum(widths) - _num_bytes(text)
        if added not in (0, 1):
            raise InputError(
                f"{self.vocab_file} rewrites text while encoding it ({text[:40]!r} came back with another length); "
                "only models that keep text as it is can be used."
            )
        if widths:
            widths[0] -= added
        ends = list(accumulate(widths))
        begins = [0, *ends[:-1]]
        if not text.isascii():  # to offsets in characters: a piece covers every character of which it holds a byte
            plain = text.replace(_UNDERLINE, " ")
            char_at = [at for at, char in enumerate(plain) for _ in range(1 if char < "\x80" else len(char.encode()))]
            char_at.append(len(text))
            ends = [
                char_at[end - 1] + 1 if end > begin else char_at[begin] for begin, end in zip(begins, ends, strict=True)
            ]
            begins = [char_at[begin] for begin in begins]
        # Equal to SentencePiece(...) for each, in less time.
        make = partial(tuple.__new__, SentencePiece)
        return list(map(make, zip(tokens, [start + at for at in begins], [start + at for at in ends], strict=True)))

    def _width(self, token: str) -> int:
        """Bytes of text that a token stands for; a token that is no piece is the unknown characters themselves."""
        return self._widths[token] if token in self._widths else _num_bytes(token)

    @overload
    def convert_tokens_to_ids(self, tokens: str) -> int: ...

    @overload
    def convert_tokens_to_ids(self, tokens: list[str]) -> list[int]: ...

    def convert_tokens_to_ids(self, tokens: str | list[str]) -> int | list[int]:
        if not isinstance(tokens, list):
            return super().convert_tokens_to_ids(tokens)
        return self._ids_of_tokens(tokens)

    def _ids_of_tokens(self, tokens: list[str]) -> list[int]:
        added, ids, unknown = self._added_tokens_encoder, self._ids, self.sp_model.unk_id()
        return [added[token] if token in added else ids.get(token, unknown) for token in tokens]

    def _convert_token_to_id(self, token: str) -> int:
        return self._ids.get(token, self.sp_model.unk_id())

    def build_inputs_with_special_tokens(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        before = [self.bos_token_id] if self.add_bos_token else []
        after = [self.eos_token_id] if self.add_eos_token else []
        ids = before + token_ids_0 + after
        return ids if token_ids_1 is None else ids + before + token_ids_1 + after

    def get_special_tokens_mask(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None, already_has_special_tokens: bool = False
    ) -> list[int]:
        if already_has_special_tokens:
            return super().get_special_tokens_mask(token_ids_0, token_ids_1, already_has_special_tokens=True)
        before, after = [1] * self.add_bos_token, [1] * self.add_eos_token
        mask = before + [0] * len(token_ids_0) + after
        return mask if token_ids_1 is None else mask + before + [0] * len(token_ids_1) + after

    def create_token_type_ids_from_sequences(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        return [0] * len(self.build_inputs_with_special_tokens(token_ids_0, token_ids_1))

    # Decoding

    def _convert_id_to_token(self, index: int) -> str:
        if not 0 <= index < len(self._pieces):
            raise InputError(f"token id {index} is outside the vocabulary of {len(self)} tokens.")
        return self._pieces[index]

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """Join tokens to text: special tokens verbatim, those between them decoded by the library."""
        special = set(self.all_special_tokens)
        if tokens and tokens[0].startswith(_UNDERLINE):
            tokens = [tokens[0][1:], *tokens[1:]]  # the space that encoding put in front
        text = ""
        run: list[str] = []
        after_special = False
        for index, token in enumerate(tokens):
            if token not in special:
                run.append(token)
                after_special = False
                continue
            if self.legacy and index and not after_special:
                text += " "
            text += self.sp_model.decode(run) + token
            run, after_special = [], True
        return text + self.sp_model.decode(run)

    def _decode(
        self,
        token_ids: int | list[int],
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
        spaces_between_special_tokens: bool = True,
        **kwargs: object,
    ) -> str:
        """Decode ids. Tokens added to the vocabulary are written with spaces around them, as version 4 did."""
        ids = [token_ids] if isinstance(token_ids, int) else token_ids
        tokens = self.convert_ids_to_tokens(list(ids), skip_special_tokens=skip_special_tokens)
        separate = self._separate_tokens()
        texts: list[str] = []
        run: list[str] = []
        for token in tokens:
            if token not in separate:
                run.append(token)
                continue
            if run:
                texts.append(self.convert_tokens_to_string(run))
                run = []
            texts.append(token)
        texts = [part for part in texts if part]
        if run:  # also where nothing comes of it: a space before the end is kept
            texts.append(self.convert_tokens_to_string(run))
        text = (" " if spaces_between_special_tokens else "").join(texts)
        clean = (
            self.clean_up_tokenization_spaces if clean_up_tokenization_spaces is None else clean_up_tokenization_spaces
        )
        return self.clean_up_tokenization(text) if clean else text

    def token_texts(self) -> tuple[Mapping[int, TokenText], Callable[[list[int]], str]]:
        """What detokenizer.py's `TableDecoder` needs to decode without special tokens.

        The first value is what each token stands for inside a text; the second decodes the tokens at the start of a text.
        """
        skipped = set(self.all_special_ids)
        separate = {index: token for token, index in self._added_tokens_encoder.items() if index not in skipped}
        if (skipped, separate) != (self._token_texts.skipped, self._token_texts.separate):
            self._token_texts = _TokenTexts(self, skipped, separate)
        return self._token_texts, self._opening_text

    def _opening_text(self, ids: list[int]) -> str:
        return self.convert_tokens_to_string([self._pieces[index] for index in ids])

    def _separate_tokens(self) -> set[str]:
        """Added tokens, except the named ones (<s>, </s>, <unk>, ...) and pieces that were only marked as special."""
        special, named = set(self.all_special_tokens), set(self.special_tokens_map.values())
        return {
            token
            for token, index in self._added_tokens_encoder.items()
            if token not in special or (token not in named and index >= self.vocab_size)
        }

    # Saving

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str, ...]:
        name = self.vocab_files_names["vocab_file"]
        target = Path(save_directory) / (f"{filename_prefix}-{name}" if filename_prefix else name)
        target.write_bytes(self._model_bytes)
        return (str(target),)

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        *args: object,
        filename_prefix: str | None = None,
        **kwargs: object,
    ) -> tuple[str, ...]:
        """Write the files that every release of transformers reads, under the class name that it knows."""
        files = super().save_pretrained(save_directory, *args, filename_prefix=filename_prefix, **kwargs)
        prefix = f"{filename_prefix}-" if filename_prefix else ""
        config_file = Path(save_directory) / f"{prefix}tokenizer_config.json"
        config = json.loads(config_file.read_text(encoding="utf-8"))
        for private in ("backend", "is_local", "local_files_only", "files_loaded"):
            config.pop(private, None)
        if "extra_special_tokens" in config:  # a list under this name stops version 4 from loading
            config["additional_special_tokens"] = config.pop("extra_special_tokens")
        config |= {
            "tokenizer_class": "LlamaTokenizer",
            "legacy": self.legacy,
            "add_bos_token": self.add_bos_token,
            "add_eos_token": self.add_eos_token,
            "padding_side": self.padding_side,
        }
        config_file.write_text(
            json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8"
        )
        map_file = Path(save_directory) / f"{prefix}special_tokens_map.json"
        map_file.write_text(json.dumps(self.special_tokens_map, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        return (*files, str(map_file))


class _TokenTexts(dict[int, TokenText]):
    """What each token stands for inside a text; filled when a token is first met."""

    def __init__(self, tokenizer: LlamaSentencePieceTokenizer, skipped: set[int], separate: dict[int, str]) -> None:
        super().__init__(dict.fromkeys(skipped) | {index: SeparateText(token) for index, token in separate.items()})
        self._tokenizer = tokenizer
        self.skipped, self.separate = skipped, separate

    def __missing__(self, index: int) -> TokenText:
        tokenizer = self._tokenizer
        piece = tokenizer._convert_id_to_token(index)
        text: TokenText
        if piece in tokenizer._byte_values:
            text = bytes([tokenizer._byte_values[piece]])
        else:
            text = tokenizer.sp_model.decode([_ANY_WORD, piece]).removeprefix(_ANY_WORD)
        self[index] = text
        return text


def _num_bytes(text: str) -> int:
    """Bytes in UTF-8, a sign for a space counted as one."""
    return len(text) if text.isascii() else len(text.replace(_UNDERLINE, " ").encode())


@lru_cache(maxsize=16)
def _any_of(tokens: tuple[str, ...]) -> re.Pattern[str]:
    """A pattern for any of these tokens; several times as fast as the trie of transformers."""
    return re.compile(f"({'|'.join(re.escape(token) for token in sorted(tokens, key=len, reverse=True))})")


def _as_special(token: str | AddedToken | None) -> AddedToken | None:
    if not isinstance(token, str):
        return token
    return AddedToken(token, lstrip=False, rstrip=False, normalized=False, special=True)


def _described_tokens(given: object, options: Mapping[str, object]) -> dict[str, object]:
    """Special tokens that special_tokens_map.json describes as objects, as options of transformers' constructor.

    transformers 5 hands them on as they are in the file, under the name that version 4 had for them.
    """
    if not isinstance(given, (list, tuple)):
        return {}
    tokens = [AddedToken(**token, special=True) if isinstance(token, dict) else token for token in given]
    described = {str(token): token for token in tokens}
    listed, decoder = options.get("extra_special_tokens"), options.get("added_tokens_decoder")
    others = [token for token in listed if str(token) not in described] if isinstance(listed, (list, tuple)) else []
    found: dict[str, object] = {"extra_special_tokens": [*tokens, *others]}
    if isinstance(decoder, dict):
        found["added_tokens_decoder"] = {
            index: _as_special(described.get(str(token), token)) for index, token in decoder.items()
        }
    return found


def _read_model(path: Path) -> bytes:
    try:
        model = path.read_bytes()
    except OSError as error:
        raise InputError(f"the tokenizer file {path} cannot be read ({error.strerror}); fetch it again.") from error
    if not model:
        raise InputError(f"the tokenizer file {path} is empty; fetch it again.")
    return model


def _check_unicode(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"the text has half of a surrogate pair ({text[error.start]!r}) at character {error.start}, which cannot "
            "be encoded; repair the text where it was read."
        ) from error
