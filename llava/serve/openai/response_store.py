"""Answers of /v1/responses, kept for a while in bounded memory, so that a conversation may go on by their ids.

In: the turns of a conversation and its answer, by the ids of the response and of its items. Out: the turns again, until newer
answers have taken their place. Nothing is written to disk.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from llava.serve.chat_turns import ChatTurn
from llava.serve.http.errors import ApiError

MAX_RESPONSES = 2000
MAX_BYTES = 64 * 2**20  # of all texts and images
NOT_FOUND = "previous_response_not_found"  # the error's code, as OpenAI's; a controller asks another worker then


@dataclass(frozen=True)
class _StoredResponse:
    turns: tuple[ChatTurn, ...]  # the whole conversation
    items: Mapping[str, ChatTurn]  # what its last answer consists of
    num_bytes: int


class ResponseStore:
    def __init__(self, max_bytes: int = MAX_BYTES) -> None:
        self._max_bytes = max_bytes
        self._responses: OrderedDict[str, _StoredResponse] = OrderedDict()
        self._items: dict[str, ChatTurn] = {}
        self.num_bytes = 0

    def add(self, response_id: str, asked: Sequence[ChatTurn], items: Mapping[str, ChatTurn]) -> None:
        """Keep an answer: the turns before it, and its items by id. One that is too large is not kept."""
        turns = (*asked, *items.values())
        size = sum(_num_bytes(turn) for turn in turns)
        if size > self._max_bytes:
            return
        self._responses[response_id] = _StoredResponse(turns, items, size)
        self._items |= items
        self.num_bytes += size
        while self.num_bytes > self._max_bytes or len(self._responses) > MAX_RESPONSES:
            _, oldest = self._responses.popitem(last=False)
            self.num_bytes -= oldest.num_bytes
            for name in oldest.items:
                del self._items[name]

    def turns(self, response_id: str) -> tuple[ChatTurn, ...]:
        """Return a conversation with its answer; `ApiError` where it is not kept."""
        stored = self._responses.get(response_id)
        if stored is None:
            raise _unknown("response", response_id, "previous_response_id")
        return stored.turns

    def item(self, item_id: str) -> ChatTurn:
        """Return an item of an answer; `ApiError` where it is not kept."""
        if item_id not in self._items:
            raise _unknown("item", item_id, "input")
        return self._items[item_id]


def _unknown(kind: str, name: str, param: str) -> ApiError:
    message = (
        f"this server knows no {kind} {name[:80]!r} any more: it keeps some of the latest; send the conversation itself"
    )
    return ApiError(400, message, code=NOT_FOUND, param=param)


def _num_bytes(turn: ChatTurn) -> int:
    calls = sum(len(call.name) + len(call.arguments) for call in turn.calls)
    return 256 + len(turn.text) + sum(len(image.url) for image in turn.images) + calls
