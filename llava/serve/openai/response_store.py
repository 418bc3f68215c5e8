"""Answers of /v1/responses, kept for a while in bounded memory, so that a conversation may go on by their ids.

In: the turns of a conversation and its answer, by the ids of the response and of its items. Out: the turns or the answer again,
until it is deleted or newer answers have taken its place. A client sees the answers of its own key. Nothing is written to disk.
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
    owner: str
    turns: tuple[ChatTurn, ...]  # the whole conversation
    items: Mapping[str, ChatTurn]  # what its last answer consists of
    reply: str  # the answer as its client got it
    num_bytes: int


class ResponseStore:
    """`owner` is whose answer it is, which a client with another key does not find."""

    def __init__(self, max_bytes: int = MAX_BYTES) -> None:
        self._max_bytes = max_bytes
        self._responses: OrderedDict[str, _StoredResponse] = OrderedDict()
        self._of_item: dict[str, str] = {}  # the response that an item belongs to
        self.num_bytes = 0

    def add(
        self, response_id: str, asked: Sequence[ChatTurn], items: Mapping[str, ChatTurn], reply: str, *, owner: str
    ) -> None:
        """Keep an answer: the turns before it, its items by id, and its JSON. One that is too large is not kept."""
        turns = (*asked, *items.values())
        size = len(reply) + sum(_num_bytes(turn) for turn in turns)
        if size > self._max_bytes:
            return
        self._responses[response_id] = _StoredResponse(owner, turns, items, reply, size)
        self._of_item |= dict.fromkeys(items, response_id)
        self.num_bytes += size
        while self.num_bytes > self._max_bytes or len(self._responses) > MAX_RESPONSES:
            self._drop(next(iter(self._responses)))

    def turns(self, response_id: str, *, owner: str) -> tuple[ChatTurn, ...]:
        """Return a conversation with its answer; `ApiError` where it is not kept."""
        stored = self._find(response_id, owner)
        if stored is None:
            raise _unknown("response", response_id, "previous_response_id")
        return stored.turns

    def item(self, item_id: str, *, owner: str) -> ChatTurn:
        """Return an item of an answer; `ApiError` where it is not kept."""
        stored = self._find(self._of_item.get(item_id, ""), owner)
        if stored is None:
            raise _unknown("item", item_id, "input")
        return stored.items[item_id]

    def reply(self, response_id: str, *, owner: str) -> str | None:
        """Return an answer's JSON; None where it is not kept."""
        stored = self._find(response_id, owner)
        return None if stored is None else stored.reply

    def remove(self, response_id: str, *, owner: str) -> bool:
        """Forget an answer; returns whether it was kept. Later ones of its conversation stay."""
        if self._find(response_id, owner) is None:
            return False
        self._drop(response_id)
        return True

    def _find(self, response_id: str, owner: str) -> _StoredResponse | None:
        stored = self._responses.get(response_id)
        return stored if stored is not None and stored.owner == owner else None

    def _drop(self, response_id: str) -> None:
        stored = self._responses.pop(response_id)
        self.num_bytes -= stored.num_bytes
        for name in stored.items:
            del self._of_item[name]


def _unknown(kind: str, name: str, param: str) -> ApiError:
    message = (
        f"this server knows no {kind} {name[:80]!r} any more: it keeps some of the latest; send the conversation itself"
    )
    return ApiError(400, message, code=NOT_FOUND, param=param)


def _num_bytes(turn: ChatTurn) -> int:
    calls = sum(len(call.name) + len(call.arguments) for call in turn.calls)
    return 256 + len(turn.text) + sum(len(image.url) for image in turn.images) + calls
