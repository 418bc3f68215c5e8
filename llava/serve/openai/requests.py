"""Translate bodies of the OpenAI-compatible API to prompts and sampling parameters.

In: a validated body and the `ModelCard`. Out: a `ParsedRequest` (serve/chat_turns.py): prompts, image URLs, sampling
parameters. Replies are made in replies.py. Pure functions: no HTTP, no model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import cast

from llava.constants import DEFAULT_IMAGE_TOKEN
from llava.conversation import check_placeholders
from llava.engine.request import MAX_SEED, SamplingParams
from llava.errors import InputError
from llava.images.frames import FrameSampling
from llava.serve.backends.base import ModelCard
from llava.serve.chat_turns import ChatTurn, ParsedRequest, ShownImage, checked_turn, parsed_chat
from llava.serve.http.limits import VideoUrl
from llava.serve.json_schema import closed
from llava.serve.openai import schema
from llava.serve.tools import Tool, ToolCall, ToolUse, form_of

DEFAULT_NEW_TOKENS = 512
# Fields that `SamplingParams` calls by the same name.
SAME_NAMES = (
    "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "seed",
    "ignore_eos", "n", "regex",
)  # fmt: skip
ANY_OBJECT: dict[str, object] = {"type": "object"}


def parse_chat(body: schema.ChatRequest, card: ModelCard) -> ParsedRequest:
    """Return the conversation of a chat request in the model's template, with its last answer open."""
    if body.max_tokens is not None and body.max_completion_tokens not in (None, body.max_tokens):
        raise InputError("max_tokens and max_completion_tokens are two names of one number; give one of them")
    max_new_tokens = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    if max_new_tokens == 0:
        raise InputError("max_tokens is 0; an answer has 1 or more")
    if body.top_logprobs and not body.logprobs:
        raise InputError("top_logprobs has no effect without logprobs: true; give both")
    if body.continue_final_message and body.add_generation_prompt:
        raise InputError("continue_final_message and add_generation_prompt exclude each other; give one of them")
    json_schema: dict[str, object] | None = None
    if isinstance(body.response_format, schema.JsonObjectFormat):
        json_schema = ANY_OBJECT
    elif isinstance(body.response_format, schema.JsonSchemaFormat):
        json_schema = closed(body.response_format.json_schema.schema_)
    turns = [chat_turn(message, index) for index, message in enumerate(body.messages)]
    if body.continue_final_message and turns[-1].role != "assistant":
        raise InputError("continue_final_message has no effect: the last message is not the assistant's")
    sampling = sampling_of(
        body,
        max_new_tokens=max_new_tokens,
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        json_schema=json_schema,
    )
    continues = body.continue_final_message is not False and not body.add_generation_prompt
    return parsed_chat(turns, card, sampling, tools=tool_use(body, card), continues=continues)


def tool_use(body: schema.ChatRequest, card: ModelCard) -> ToolUse | None:
    """Return which tools the answer may call; None where it may call none."""
    if body.functions is not None and body.tools is not None:
        raise InputError("functions is the older form of tools; give one of them")
    functions = [tool.function for tool in body.tools or ()] or body.functions or []
    tools = [
        Tool(one.name, one.description or "", one.parameters or {}, is_strict=bool(one.strict)) for one in functions
    ]
    choice: schema.ToolChoice | schema.FunctionName | None = body.tool_choice or body.function_call
    if isinstance(choice, schema.FunctionName):
        return chosen_tools(tools, card, named=(choice.name,), is_required=True, is_parallel=False)
    if isinstance(choice, schema.NamedTool):
        return chosen_tools(tools, card, named=(choice.function.name,), is_required=True, is_parallel=False)
    is_parallel = body.parallel_tool_calls if body.functions is None else False
    if isinstance(choice, schema.AllowedToolChoice):
        allowed = choice.allowed_tools
        names = [tool.function.name for tool in allowed.tools]
        return chosen_tools(tools, card, named=names, is_required=allowed.mode == "required", is_parallel=is_parallel)
    if choice == "none":
        return None
    return chosen_tools(tools, card, is_required=choice == "required", is_parallel=is_parallel)


def chosen_tools(
    tools: Sequence[Tool],
    card: ModelCard,
    *,
    named: Sequence[str] = (),
    is_required: bool,
    is_parallel: bool | None,
) -> ToolUse | None:
    """Return the use of tools, of those that are `named` if any are; None where none is offered and none required.

    Without `is_parallel`, an answer that must call calls once, and a model that chooses may call several times.
    """
    known = {tool.name: tool for tool in tools}
    missing = next((name for name in named if name not in known), None)
    if missing is not None:
        raise InputError(f"tool_choice names {missing[:80]!r}, which is none of the tools")
    if not tools and is_required:
        raise InputError("tool_choice asks for a call, and there are no tools")
    if not tools:
        return None
    parallel = not is_required if is_parallel is None else is_parallel
    offered = tuple(known[name] for name in dict.fromkeys(named)) if named else tuple(tools)
    return ToolUse(offered, form_of(card.template), is_required=is_required, is_parallel=parallel)


def parse_completion(body: schema.CompletionRequest, card: ModelCard) -> ParsedRequest:
    """Return the prompts of a completion request as they are."""
    if body.best_of is not None and body.best_of != (body.n or 1):
        raise InputError("best_of is another number than n, and this server does not choose among completions")
    prompts: list[str | list[int]] = []
    if isinstance(body.prompt, str):
        prompts = [body.prompt]
    elif body.prompt and isinstance(body.prompt[0], int):
        prompts = [cast("list[int]", body.prompt)]
    else:
        prompts = list(cast("list[str | list[int]]", body.prompt))
    images = tuple(_shown(image) for image in body.images or ())
    if images and len(prompts) > 1:
        raise InputError("images go with a single prompt; send a request for each prompt that has images")
    texts = [prompt if isinstance(prompt, str) else "" for prompt in prompts]
    for text in texts:
        check_placeholders(text.count(DEFAULT_IMAGE_TOKEN), len(images))
    if body.echo and images:
        raise InputError("echo gives back a prompt of text alone; leave it or the images out")
    if body.max_tokens == 0 and not body.echo:
        raise InputError("max_tokens is 0, which asks for nothing without echo: true")
    sampling = sampling_of(body, max_new_tokens=body.max_tokens, logprobs=body.logprobs)
    filled = tuple(
        prompt.replace(DEFAULT_IMAGE_TOKEN, card.image_placeholder) if isinstance(prompt, str) else prompt
        for prompt in prompts
    )
    return ParsedRequest(filled, images, replace(sampling, keep_space=True))


def sampling_of(
    body: schema.SamplingFields,
    *,
    max_new_tokens: int | None,
    logprobs: int | None = None,
    json_schema: dict[str, object] | None = None,
) -> SamplingParams:
    """Translate the sampling fields that a body has."""
    fields = dict(body)
    stop = fields.get("stop") or ()
    if fields.get("top_k") == -1:
        fields["top_k"] = 0
    if fields.get("seed") is not None:
        fields["seed"] = None if fields["seed"] == -1 else fields["seed"] & MAX_SEED
    if fields.get("top_p") == 0:  # the most probable token alone
        fields |= {"top_p": None, "top_k": 1}
    return SamplingParams.given(
        max_new_tokens=max_new_tokens or DEFAULT_NEW_TOKENS,
        min_new_tokens=body.min_tokens,
        stop=(stop,) if isinstance(stop, str) else tuple(stop),
        logit_bias={int(token): bias for token, bias in (fields.get("logit_bias") or {}).items()},
        stop_token_ids=tuple(body.stop_token_ids or ()),
        logprobs=logprobs,
        json_schema=json_schema,
        **{name: fields.get(name) for name in SAME_NAMES},
    )


def chat_turn(message: schema.Message, index: int) -> ChatTurn:
    path = f"messages[{index}]"
    texts = [message.content or ""] if isinstance(message.content, str | None) else []
    images: tuple[ShownImage | VideoUrl, ...] = ()
    for at, part in enumerate(message.content if isinstance(message.content, list) else ()):
        if isinstance(part, schema.ImagePart):
            images += (_shown(part.image_url),)
        elif isinstance(part, schema.VideoPart):
            images += (_shown_video(part.video_url, f"{path}.content[{at}].video_url"),)
        else:
            texts.append(part.refusal if isinstance(part, schema.RefusalPart) else part.text)
    text = "\n".join(texts)
    if isinstance(message, schema.AssistantMessage):
        called = [ToolCall(call.function.name, call.function.arguments, call.id) for call in message.tool_calls or ()]
        if message.function_call is not None:
            called.append(ToolCall(message.function_call.name, message.function_call.arguments))
        return checked_turn(ChatTurn("assistant", text, calls=tuple(called)), path)
    if isinstance(message, schema.ToolMessage):
        return checked_turn(ChatTurn("tool", text, call_id=message.tool_call_id, name=message.name or ""), path)
    if isinstance(message, schema.FunctionMessage):
        return checked_turn(ChatTurn("tool", text, name=message.name), path)
    role = "system" if isinstance(message, schema.SystemMessage) else message.role
    return checked_turn(ChatTurn(role, text, images), path)


def _shown_video(video: schema.VideoURL, path: str) -> VideoUrl:
    try:
        sampling = FrameSampling(video.num_frames, video.fps, video.start or 0.0, video.end)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    return VideoUrl(video.url, sampling, video.time_instruction)


def _shown(image: schema.ImageURL) -> ShownImage:
    return ShownImage(image.url, "low" if image.detail == "low" else "auto")
