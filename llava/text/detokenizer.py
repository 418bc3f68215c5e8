"""Token ids one after another to text: as much of it as is certain to stay.

In: ids as a model chooses them. Out: pieces of text. Everything that must hold for streamed text is here: no half
characters, no stop strings, and where the answer ends. Both ways to an answer use it, the engine and engine/hf_engine.py.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from llava.text.piece_decoder import REPLACEMENT, PieceDecoder

CONTEXT = 12  # tokens that are decoded again with each new one, at most; few are needed, and moving on costs a decoding


class IncrementalDetokenizer:
    """Token ids in, text out. Blank space around the answer is left out, unless `keep_space`.

    The answer ends with a stop string or one of `end_ids` (left out: the tokenizer's end token), but not within its first
    `min_tokens` tokens.
    """

    def __init__(
        self,
        tokenizer: Any,
        stop: Sequence[str],
        *,
        end_ids: Collection[int] | None = None,
        min_tokens: int = 0,
        keep_space: bool = False,
    ) -> None:
        self._decoder = stream_decoder(tokenizer)
        self._stop = [text for text in stop if text]
        # A stop string that is one special token never shows in the text; its id does. Not every vocabulary counts such
        # tokens among all_special_ids, so decoding is asked.
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
        self._is_cut = False  # by a stop string, rather than ended by a token

    @property
    def has_stop_strings(self) -> bool:
        return bool(self._stop)

    def read(self, token_ids: Sequence[int]) -> str:
        """The text that became certain with these ids. Without stop strings, many are decoded as quickly as one."""
        if self._stop and len(token_ids) > 1:
            return "".join([self._read([token]) for token in token_ids])
        return self._read(token_ids)

    def _read(self, token_ids: Sequence[int]) -> str:
        if self.stopped:  # several beams: what follows the end is padding
            return ""
        has_ended = False
        for number, token in enumerate(token_ids):
            if self.is_end(token, len(self.token_ids) + number):
                token_ids, has_ended = token_ids[: number + 1], True
                break
        self.token_ids += token_ids
        piece = self._let_through(self._decoder.push(token_ids))
        self.stopped = self.stopped or has_ended
        return piece

    def is_end(self, token: int, num_before: int) -> bool:
        """Whether this token ends an answer of so many tokens."""
        return token in self.end_ids and num_before >= self._min_tokens

    def finish(self) -> str:
        """The last of the text: what was held back and turned out to be no stop string."""
        piece = "" if self._is_cut else self._let_through(self._decoder.finish())
        rest, self._held = self._trimmed(self._held), ""
        self.text += rest
        return piece + rest

    def _let_through(self, text: str) -> str:
        if not (text or self._held):
            return ""
        self._held += text if self.text or self._held or self._keep_space else text.lstrip()
        stop = self._stop if len(self.token_ids) > self._min_tokens else []
        ends = [place for word in stop if (place := self._held.find(word)) >= 0]
        if ends:
            self.stopped = self._is_cut = True
            ready, self._held = self._trimmed(self._held[: min(ends)]), ""
        else:
            keep = max([overlap(self._held, word) for word in stop], default=0)
            ready = self._trimmed(self._held[: len(self._held) - keep])
            self._held = self._held[len(ready) :]
        self.text += ready
        return ready

    def _trimmed(self, text: str) -> str:
        return text if self._keep_space else text.rstrip()


def overlap(text: str, stop: str) -> int:
    """How many characters at the end of `text` may be the beginning of `stop`."""
    if text[-1:] not in stop[:-1]:  # most of the time
        return 0
    longest = min(len(text), len(stop) - 1)
    return next((size for size in range(longest, 0, -1) if text.endswith(stop[:size])), 0)


def stream_decoder(tokenizer: Any) -> StreamDecoder | PieceDecoder:
    """What decodes ids as they come; the pieces joined are what decoding all of them together gives."""
    return tokenizer.piece_decoder() if hasattr(tokenizer, "piece_decoder") else StreamDecoder(tokenizer)


class StreamDecoder:
    """For any tokenizer.

    A token's text depends on those before it (spaces, bytes of one character), so new ones are decoded after some that
    were handed out, whose own text is then taken away. Text that ends in a broken character waits for the rest of it.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._context: list[int] = []  # tokens handed out last, with more than blank space among them
        self._known = ""  # their text
        self._pending: list[int] = []  # tokens whose text is not handed out yet

    def push(self, token_ids: Sequence[int]) -> str:
        self._pending += token_ids
        text = self._decode(self._context + self._pending)
        if len(text) <= len(self._known) or text.endswith(REPLACEMENT):
            return ""
        return self._hand_out(text)

    def finish(self) -> str:
        return self._hand_out(self._decode(self._context + self._pending))

    def _hand_out(self, text: str) -> str:
        new = text[len(self._known) :]
        self._context, self._known = self._context + self._pending, text
        # Spaces at the beginning are lost in decoding, so blank tokens are no context by themselves.
        if len(self._context) > CONTEXT and new.strip():
            self._context = self._pending
            self._known = self._decode(self._context)
        self._pending = []
        return new

    def _decode(self, token_ids: list[int]) -> str:
        if not token_ids:
            return ""
        return self._tokenizer.decode(token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
