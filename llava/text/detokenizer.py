"""Incremental detokenization: token ids one after another to text, with stop strings.

In: ids as a model chooses them. Out: text that later ids cannot change: no half characters, no part of a stop string.
`IncrementalDetokenizer` also finds where the answer ends. Both engines use it. Below it are two decoders without stop
strings: one for vocabularies in which every token stands for a text of its own, one for any tokenizer.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

    from llava.text.sentencepiece_tokenizer import TokenText
    from llava.text.tokenization import Tokenizer

REPLACEMENT = "\ufffd"  # what a tokenizer writes for bytes that are no character, or an incomplete one
MAX_CONTEXT = (
    12  # tokens that are decoded again with each new one; a few are enough, and a new context costs a decoding
)


class IncrementalDetokenizer:
    """Turn token ids into the text of an answer, up to its end.

    Args:
        stop: strings that end the answer and are left out of it.
        end_ids: token ids that end the answer; None means the tokenizer's end token.
        min_tokens: number of tokens within which nothing ends the answer.
        keep_space: keep blank space around the answer.
        after: ids of a text that the answer continues: its first token reads as in the middle of that text.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stop: Sequence[str],
        *,
        end_ids: Collection[int] | None = None,
        min_tokens: int = 0,
        keep_space: bool = False,
        after: Sequence[int] = (),
    ) -> None:
        self._decoder = stream_decoder(tokenizer)
        if after:
            self._decoder.push(after)
            self._decoder.finish()
        self._stop = [text for text in stop if text]
        # A stop string that is one special token never appears in the text, so its id is looked for. Some vocabularies
        # leave such tokens out of all_special_ids; decoding tells.
        known = {tokenizer.convert_tokens_to_ids(text) for text in self._stop} - {None, tokenizer.unk_token_id}
        self.end_ids = {token for token in known if not tokenizer.decode([token], skip_special_tokens=True)}
        if end_ids is not None:
            self.end_ids |= set(end_ids)
        elif tokenizer.eos_token_id is not None:
            self.end_ids.add(tokenizer.eos_token_id)
        self._min_tokens = min_tokens
        self._keep_space = keep_space
        self._held = ""
        self.token_ids: list[int] = []
        self.text = ""
        self.stopped = False
        self.stop_string: str | None = None  # the one that ended the answer, rather than a token

    @property
    def has_stop_strings(self) -> bool:
        return bool(self._stop)

    def read(self, token_ids: Sequence[int]) -> str:
        """Take further ids and return the text that they make certain; "" after the end.

        Without stop strings, many ids at once cost as much as one.
        """
        if self._stop and len(token_ids) > 1:
            return "".join([self._read([token]) for token in token_ids])
        return self._read(token_ids)

    def _read(self, token_ids: Sequence[int]) -> str:
        if self.stopped:  # with several beams, padding follows the end
            return ""
        has_ended = False
        for number, token in enumerate(token_ids):
            if self.is_end(token, len(self.token_ids) + number):
                token_ids, has_ended = token_ids[: number + 1], True
                break
        self.token_ids += token_ids
        delta = self._emit(self._decoder.push(token_ids))
        self.stopped = self.stopped or has_ended
        return delta

    def is_end(self, token: int, num_before: int) -> bool:
        """Whether this token ends an answer that has `num_before` tokens before it."""
        return token in self.end_ids and num_before >= self._min_tokens

    def finish(self) -> str:
        """Return the last of the text: what was held back and did not become a stop string."""
        delta = "" if self.stop_string is not None else self._emit(self._decoder.finish())
        rest, self._held = self._trimmed(self._held), ""
        self.text += rest
        return delta + rest

    def _emit(self, text: str) -> str:
        if not (text or self._held):
            return ""
        self._held += text
        stop = self._stop if len(self.token_ids) > self._min_tokens else []
        ends = [(position, word) for word in stop if (position := self._held.find(word)) >= 0]
        if ends:
            first, self.stop_string = min(ends)
            self.stopped = True
            ready, self._held = self._trimmed(self._held[:first]), ""
        else:
            keep = max([overlap(self._held, word) for word in stop], default=0)
            certain = self._held[: len(self._held) - keep]
            ready = self._trimmed(certain)
            # Blank space before the answer is dropped once it cannot begin a stop string.
            dropped = 0 if self.text or self._keep_space else len(certain) - len(certain.lstrip())
            self._held = self._held[dropped + len(ready) :]
        self.text += ready
        return ready

    def _trimmed(self, text: str) -> str:
        """Without blank space at the end, and at the beginning of the answer."""
        if self._keep_space:
            return text
        return text.rstrip() if self.text else text.strip()


def overlap(text: str, stop: str) -> int:
    """Count the characters at the end of `text` that may begin `stop`."""
    if text[-1:] not in stop[:-1]:  # most of the time
        return 0
    longest = min(len(text), len(stop) - 1)
    return next((size for size in range(longest, 0, -1) if text.endswith(stop[:size])), 0)


def stream_decoder(tokenizer: Tokenizer) -> ContextDecoder | TableDecoder:
    """Make a decoder of ids that come one after another; the texts joined equal decoding all ids together."""
    token_texts = getattr(tokenizer, "token_texts", None)  # of a LlamaSentencePieceTokenizer
    return TableDecoder(*token_texts()) if token_texts is not None else ContextDecoder(tokenizer)


class ContextDecoder:
    """Decodes the ids of any tokenizer.

    A token's text depends on the tokens before it (spaces, bytes of one character), so new tokens are decoded after some
    earlier ones, whose own text is then cut off. Text that ends in a broken character waits for the rest of it.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._context: list[int] = []  # tokens emitted last, with more than blank space among them
        self._known = ""  # their text
        self._pending: list[int] = []  # tokens whose text is not emitted yet

    def push(self, token_ids: Sequence[int]) -> str:
        self._pending += token_ids
        text = self._decode(self._context + self._pending)
        if len(text) <= len(self._known) or text.endswith(REPLACEMENT):
            return ""
        return self._emit(text)

    def finish(self) -> str:
        return self._emit(self._decode(self._context + self._pending))

    def _emit(self, text: str) -> str:
        new = text[len(self._known) :]
        self._context, self._known = self._context + self._pending, text
        # Decoding drops spaces at the beginning, so blank tokens are no context by themselves.
        if len(self._context) > MAX_CONTEXT and new.strip():
            self._context = self._pending
            self._known = self._decode(self._context)
        self._pending = []
        return new

    def _decode(self, token_ids: list[int]) -> str:
        if not token_ids:
            return ""
        return self._tokenizer.decode(token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


class TableDecoder:
    """Decodes ids by a table of what each token stands for, each id once.

    Args:
        texts: what a token stands for inside a text.
        opening: gives the text of the first tokens of a run between tokens that are written apart. It differs from the
            table's, since spaces are lost there; while it is empty, more tokens are waited for.
    """

    def __init__(self, texts: Mapping[int, TokenText], opening: Callable[[list[int]], str]) -> None:
        self._texts = texts
        self._opening_text = opening
        self._opening: list[int] | None = []  # the first tokens of a run that has no text yet
        self._bytes = _Utf8(_EACH_BYTE)
        self._gap = ""  # what comes before the text of this run, when its first token is there
        self._is_spaced = False  # whether that was the last text so far
        self._has_text = False
        self._ready = ""

    def push(self, token_ids: Sequence[int]) -> str:
        """Return the text that these make certain; what ends in a broken character waits for the rest of it."""
        for token in token_ids:
            text = self._texts[token]
            if type(text) is str and self._opening is None and not self._bytes.buffer:
                self._ready += text
            elif text is not None:
                self._add(token, text)
        ready = self._ready
        if not ready or ready[-1] == REPLACEMENT or self._bytes.buffer:
            return ""
        self._ready = ""
        return ready

    def finish(self) -> str:
        self._end_bytes()
        text, self._ready = self._ready, ""
        return text

    def _add(self, token: int, text: str | bytes) -> None:
        if isinstance(text, bytes):
            self._open_run()
            self._ready += self._bytes.decode(text)
            return
        self._end_bytes()
        if type(text) is not str:  # SeparateText
            self._ready += (" " if self._has_text and not self._is_spaced else "") + text
            self._opening, self._gap, self._has_text, self._is_spaced = [], " ", True, False
        elif self._opening is None:
            self._ready += text
        else:
            self._write_gap()
            self._opening.append(token)
            opening = self._opening_text(self._opening)
            if opening:
                self._open_run()
                self._ready += opening

    def _open_run(self) -> None:
        """Note that this run has text from here on."""
        if self._opening is not None:
            self._write_gap()
            self._opening, self._has_text, self._is_spaced = None, True, False

    def _write_gap(self) -> None:
        if self._gap:
            self._ready += self._gap
            self._gap, self._is_spaced = "", True

    def _end_bytes(self) -> None:
        """Emit incomplete bytes as they are: what comes next is no byte that would complete them."""
        if self._bytes.buffer:
            self._ready += self._bytes.decode(b"", True)


class _Utf8(codecs.BufferedIncrementalDecoder):
    """Python's incremental decoder, whose `buffer` holds the bytes of a character that is not complete."""

    buffer: bytes

    def _buffer_decode(self, data: ReadableBuffer, errors: str, final: bool) -> tuple[str, int]:
        return codecs.utf_8_decode(data, errors, final)


def _each_byte(error: UnicodeError) -> tuple[str, int]:
    """Show every byte that belongs to no character, as sentencepiece does."""
    assert isinstance(error, UnicodeDecodeError)
    return REPLACEMENT * (error.end - error.start), error.end


_EACH_BYTE = "llava-each-byte"
codecs.register_error(_EACH_BYTE, _each_byte)
