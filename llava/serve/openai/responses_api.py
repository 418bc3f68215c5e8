"""OpenAI's newer API, /v1/responses: translation of its bodies, and its replies.

In: a body (responses_schema.py) and the answers that are kept (response_store.py). Out: a `ParsedRequest` as for a chat, and a
writer of replies. Routes are in routes.py.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from llava.engine.request import Chunk
from llava.errors import InputError
from llava.serve.backends.base import ModelCard
from llava.serve.chat_turns import ChatTurn, ParsedRequest, ShownImage, checked_turn, parsed_chat
from llava.serve.http.keys import current_client, owner_of
from llava.serve.json_schema import closed
from llava.serve.openai import responses_schema as bodies
from llava.serve.openai import schema
from llava.serve.openai.replies import PieceOf, ReplyWriter, inspection_of, prompt_details_of, token_logprobs
from llava.serve.openai.requests import ANY_OBJECT, chosen_tools, sampling_of
from llava.serve.openai.response_store import ResponseStore
from llava.serve.service import RequestStats
from llava.serve.tools import AnswerChunk, Tool, ToolCall, ToolUse


def parse_responses(
    body: bodies.ResponsesRequest, card: ModelCard, store: ResponseStore
) -> tuple[ParsedRequest, list[ChatTurn]]:
    """Return the request, and the turns of its conversation without instructions, which are for one answer.

    Raises:
        InputError, ApiError: it cannot be answered, or goes on from an answer that is not kept.
    """
    previous, turns = body.previous_response_id, list[ChatTurn]()
    if previous is not None:
        turns += store.turns(previous, owner=owner_of(current_client.get()))
    if isinstance(body.input, str):
        turns.append(checked_turn(ChatTurn("user", body.input), "input"))
    else:
        for index, item in enumerate(body.input):
            turns += _turns_of(item, f"input[{index}]", store)
    instructions = [ChatTurn("system", body.instructions)] if body.instructions is not None else []
    text_format = body.text.format if body.text is not None else None
    json_schema = closed(text_format.schema_) if isinstance(text_format, bodies.SchemaFormat) else None
    if isinstance(text_format, bodies.PlainFormat) and text_format.type == "json_object":
        json_schema = ANY_OBJECT
    with_logprobs = bodies.TOKEN_LOGPROBS in (body.include or ())
    if body.top_logprobs and not with_logprobs:
        raise InputError(f"top_logprobs has no effect without include: [{bodies.TOKEN_LOGPROBS!r}]; give both")
    sampling = sampling_of(
        body,
        max_new_tokens=body.max_output_tokens,
        logprobs=(body.top_logprobs or 0) if with_logprobs else None,
        json_schema=json_schema,
    )
    return parsed_chat([*instructions, *turns], card, sampling, tools=_tool_use(body, card)), turns


def _turns_of(item: bodies.InputItem, path: str, store: ResponseStore) -> Iterator[ChatTurn]:
    if isinstance(item, bodies.InputMessage):
        yield _message_turn(item, path)
    elif isinstance(item, bodies.InputCall):
        yield ChatTurn("assistant", "", calls=(ToolCall(item.name, item.arguments, item.call_id),))
    elif isinstance(item, bodies.InputCallOutput):
        text = item.output if isinstance(item.output, str) else "\n".join(part.text for part in item.output)
        yield checked_turn(ChatTurn("tool", text, call_id=item.call_id), path)
    elif isinstance(item, bodies.ItemReference):
        yield store.item(item.id, owner=owner_of(current_client.get()))


def _message_turn(message: bodies.InputMessage, path: str) -> ChatTurn:
    role = "system" if message.role == "developer" else message.role
    if isinstance(message.content, str):
        return checked_turn(ChatTurn(role, message.content), path)
    images: list[ShownImage] = []
    texts: list[str] = []
    for part in message.content:
        if isinstance(part, bodies.InputImage):
            images.append(ShownImage(part.image_url, "low" if part.detail == "low" else "auto"))
        else:
            texts.append(part.refusal if isinstance(part, schema.RefusalPart) else part.text)
    if images and role != "user":
        raise InputError(f"{path}: only the user shows images")
    return checked_turn(ChatTurn(role, "\n".join(texts), tuple(images)), path)


def _tool_use(body: bodies.ResponsesRequest, card: ModelCard) -> ToolUse | None:
    """Return which tools the answer may call; None where it may call none."""
    tools = [
        Tool(one.name, one.description or "", one.parameters or {}, is_strict=bool(one.strict))
        for one in body.tools or ()
    ]
    choice, is_parallel = body.tool_choice, body.parallel_tool_calls
    if choice == "none":
        return None
    if isinstance(choice, bodies.NamedFunction):
        return chosen_tools(tools, card, named=[choice.name], is_required=True, is_parallel=False)
    if isinstance(choice, bodies.AllowedFunctions):
        names = [tool.name for tool in choice.tools]
        return chosen_tools(tools, card, named=names, is_required=choice.mode == "required", is_parallel=is_parallel)
    return chosen_tools(tools, card, is_required=choice == "required", is_parallel=is_parallel)


@dataclass
class _Item:
    """One item of the answer, as far as it has come: a text, or a call where it has a name."""

    number: int
    item_id: str
    name: str | None = None
    call_id: str = ""
    text: str = ""  # of a call, its arguments
    logprobs: list[schema.TokenLogprobBody] = field(default_factory=list)

    def content(self, *, is_new: bool = False) -> bodies.TextContent:
        text, logprobs = ("", []) if is_new else (self.text, self.logprobs)
        return bodies.TextContent(type="output_text", text=text, annotations=[], logprobs=logprobs)

    def reply(self, status: bodies.Status) -> bodies.OutputItem:
        if self.name is None:
            content = [] if status == "in_progress" else [self.content()]
            return bodies.OutputMessage(
                id=self.item_id, type="message", role="assistant", status=status, content=content
            )
        return bodies.OutputCall(
            id=self.item_id,
            type="function_call",
            status=status,
            call_id=self.call_id,
            name=self.name,
            arguments="" if status == "in_progress" else self.text,
        )

    def turn(self) -> ChatTurn:
        if self.name is None:
            return ChatTurn("assistant", self.text)
        return ChatTurn("assistant", "", calls=(ToolCall(self.name, self.text, self.call_id),))


class ResponsesWriter(ReplyWriter):
    """Write the answer as items: a message, and calls of tools. A finished answer goes into the store."""

    id_prefix = "resp_"

    def __init__(
        self,
        body: bodies.ResponsesRequest,
        parsed: ParsedRequest,
        turns: Sequence[ChatTurn],
        card: ModelCard,
        piece_of: PieceOf,
        store: ResponseStore,
    ) -> None:
        super().__init__(body.model, piece_of, inspect=body.inspect)
        self._body, self._parsed, self._turns, self._store = body, parsed, turns, store
        self._owner = owner_of(current_client.get())
        self._top_p = card.sampling_defaults.top_p if body.top_p is None else body.top_p
        self._sequence_number = 0
        self._items: list[_Item] = []
        self._open: _Item | None = None
        self._is_cut = False

    def opening(self, num_choices: int) -> Iterable[bodies.ResponsesEvent]:
        for kind in ("response.created", "response.in_progress"):
            yield self._event(kind, response=self._response("in_progress", [], None))
        if self._parsed.tools is None:
            yield from self._opened(self._new_item())

    def deltas(self, chunk: Chunk) -> Iterable[bodies.ResponsesEvent]:
        self._is_cut = chunk.finish_reason == "length"
        logprobs = token_logprobs(chunk.logprobs, self.piece_of)
        calls = chunk.calls if isinstance(chunk, AnswerChunk) else ()
        if chunk.text or (logprobs and not calls) or self._parsed.tools is None:
            if self._open is None or self._open.name is not None:
                yield from self._closed()
                yield from self._opened(self._new_item())
            assert self._open is not None
            self._open.text += chunk.text
            self._open.logprobs += logprobs
            yield self._item_event("response.output_text.delta", delta=chunk.text, logprobs=logprobs, content_index=0)
        for call in calls:
            if call.name is not None:
                yield from self._closed()
                yield from self._opened(self._new_item(call.name, call.call_id))
            assert self._open is not None
            if call.arguments:
                self._open.text += call.arguments
                yield self._item_event("response.function_call_arguments.delta", delta=call.arguments)

    def closing(self, stats: RequestStats) -> Iterable[bodies.ResponsesEvent]:
        if not self._items:  # an answer without a word
            yield from self._opened(self._new_item())
        yield from self._closed(is_last=True)
        whole = self._whole(stats)
        yield self._event(f"response.{whole.status}", response=whole)

    def whole(self, chunks: Sequence[Chunk], stats: RequestStats) -> bodies.ResponsesReply:
        (chunk,) = chunks
        for _ in self.deltas(chunk):
            pass
        if not self._items:
            self._new_item()
        return self._whole(stats)

    def _whole(self, stats: RequestStats) -> bodies.ResponsesReply:
        status: bodies.Status = "incomplete" if self._is_cut else "completed"
        *before, last = self._items
        response = self._response(status, [*(item.reply("completed") for item in before), last.reply(status)], stats)
        if self.inspect:
            response.inspect = inspection_of(stats)
        if self._is_stored:
            items = {item.item_id: item.turn() for item in self._items}
            self._store.add(self.id, self._turns, items, response.as_json(), owner=self._owner)
        return response

    @property
    def _is_stored(self) -> bool:
        return self._body.store is not False

    def _new_item(self, name: str | None = None, call_id: str = "") -> _Item:
        prefix = "msg_" if name is None else "fc_"
        self._open = _Item(len(self._items), f"{prefix}{uuid.uuid4().hex}", name, call_id)
        self._items.append(self._open)
        return self._open

    def _opened(self, item: _Item) -> Iterator[bodies.ResponsesEvent]:
        yield self._event("response.output_item.added", output_index=item.number, item=item.reply("in_progress"))
        if item.name is None:
            yield self._item_event("response.content_part.added", part=item.content(is_new=True), content_index=0)

    def _closed(self, *, is_last: bool = False) -> Iterator[bodies.ResponsesEvent]:
        item = self._open
        if item is None:
            return
        if item.name is None:
            done = {"text": item.text, "logprobs": item.logprobs, "content_index": 0}
            yield self._item_event("response.output_text.done", **done)
            yield self._item_event("response.content_part.done", part=item.content(), content_index=0)
        else:
            yield self._item_event("response.function_call_arguments.done", arguments=item.text, name=item.name)
        status: bodies.Status = "incomplete" if is_last and self._is_cut else "completed"
        yield self._event("response.output_item.done", output_index=item.number, item=item.reply(status))
        self._open = None

    def _response(
        self, status: bodies.Status, output: list[bodies.OutputItem], stats: RequestStats | None
    ) -> bodies.ResponsesReply:
        body, tools = self._body, self._parsed.tools
        choice = body.tool_choice or ("auto" if tools is not None else "none")
        text_format: Mapping[str, Any] = {"type": "text"}
        if body.text is not None and body.text.format is not None:
            text_format = body.text.format.model_dump(by_alias=True, exclude_unset=True)
        return bodies.ResponsesReply(
            id=self.id,
            object="response",
            created_at=self.created,
            status=status,
            model=self.model,
            output=output,
            usage=_usage(stats) if stats is not None else None,
            error=None,
            incomplete_details=bodies.Incomplete(reason="max_output_tokens") if status == "incomplete" else None,
            instructions=body.instructions,
            max_output_tokens=body.max_output_tokens,
            metadata=body.metadata or {},
            parallel_tool_calls=tools is not None and tools.is_parallel,
            previous_response_id=body.previous_response_id,
            store=self._is_stored,
            temperature=self._parsed.sampling.temperature,
            text={"format": text_format},
            tool_choice=choice if isinstance(choice, str) else choice.model_dump(exclude_unset=True),
            tools=[tool.model_dump(exclude_unset=True) for tool in body.tools or ()],
            top_p=self._top_p,
            truncation="disabled",
        )

    def _item_event(self, kind: str, **fields: Any) -> bodies.ResponsesEvent:
        assert self._open is not None
        return self._event(kind, item_id=self._open.item_id, output_index=self._open.number, **fields)

    def _event(self, kind: str, **fields: Any) -> bodies.ResponsesEvent:
        event = bodies.ResponsesEvent(type=kind, sequence_number=self._sequence_number, **fields)
        self._sequence_number += 1
        return event


def _usage(stats: RequestStats) -> bodies.ResponseUsage:
    usage = stats.usage
    return bodies.ResponseUsage(
        input_tokens=usage.num_prompt_tokens,
        input_tokens_details=prompt_details_of(usage),
        output_tokens=usage.num_new_tokens,
        output_tokens_details=bodies.OutputTokenDetails(reasoning_tokens=0),
        total_tokens=usage.num_prompt_tokens + usage.num_new_tokens,
    )
