"""/v1/embeddings: the vectors of texts, of token ids, or of a chat that may show images.

In: a validated body and the `ModelCard`. Out: prompts and what is asked of each; then the reply. Vectors are hidden states of
the language model (engine/request.py says which), by default of the last layer, their mean, scaled to length 1. Pure functions:
no HTTP, no model.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Literal

from pydantic import Field

from llava.conversation import Conversation
from llava.engine.request import Embedding, EmbedRequest, SamplingParams
from llava.errors import InputError
from llava.serve.backends.base import ModelCard
from llava.serve.bodies import Body
from llava.serve.chat_turns import ShownImage, parsed_chat
from llava.serve.http.limits import VideoUrl
from llava.serve.openai.requests import chat_turn
from llava.serve.openai.schema import Message, Reply

SomeTexts = Annotated[list[str], Field(min_length=1)]
TokenIds = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]


class EmbeddingsRequest(Body):
    model: str
    input: (
        str
        | Annotated[list[str], Field(min_length=1)]
        | TokenIds
        | Annotated[list[TokenIds], Field(min_length=1)]
        | None
    ) = None
    messages: list[Message] | None = Field(None, description="in place of input: a chat, which may show images")
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: int | None = Field(None, ge=1, description="of the vectors; another number than the model's is refused")
    user: str | None = None
    # Not OpenAI's.
    stage: Literal["tower", "projector", "language"] = Field(
        "language", description="the vision tower's features, the projector's, or the language model's hidden states"
    )
    layer: int = Field(-1, description="0 enters the first layer, -1 is behind the last one and the final norm")
    span: Literal["all", "text", "images"] = Field("all", description="the positions that are taken")
    pooling: Literal["mean", "last"] = "mean"
    normalize: bool = Field(True, description="scale every vector to length 1")


class EmbeddingEntry(Reply):
    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class EmbeddingsUsage(Reply):
    prompt_tokens: int
    total_tokens: int


class EmbeddingsReply(Reply):
    object: Literal["list"]
    data: list[EmbeddingEntry]
    model: str
    usage: EmbeddingsUsage


@dataclass(frozen=True)
class ParsedEmbeddings:
    """Prompts, the images that go with each, and how a request of the engine is made of a prompt."""

    prompts: Sequence[Conversation | str | Sequence[int] | None]
    images: Sequence[ShownImage | VideoUrl]
    make_request: Callable[..., EmbedRequest]


def parse_embeddings(body: EmbeddingsRequest, card: ModelCard) -> ParsedEmbeddings:
    """Return the prompts of a request for embeddings: texts as they are, or a chat in the model's template."""
    if (body.input is None) == (body.messages is None):
        raise InputError("give either input or messages")
    asked = {name: getattr(body, name) for name in ("stage", "layer", "span", "pooling", "normalize")}
    make_request = partial(EmbedRequest, **asked)
    if body.messages is None:
        return ParsedEmbeddings(_inputs(body.input), (), make_request)
    turns = [chat_turn(message, index) for index, message in enumerate(body.messages)]
    if body.stage != "language":
        if any(turn.text.strip() for turn in turns):
            raise InputError(f"the stage {body.stage!r} looks at images alone; leave the text of messages empty")
        return ParsedEmbeddings((None,), [image for turn in turns for image in turn.images], make_request)
    parsed = parsed_chat(turns, card, SamplingParams())
    return ParsedEmbeddings(parsed.prompts, parsed.images, make_request)


def _inputs(given: object) -> list[str | list[int]]:
    if isinstance(given, str):
        return [given]
    assert isinstance(given, list)
    if isinstance(given[0], int):
        return [given]
    return given


def embeddings_reply(body: EmbeddingsRequest, embeddings: Sequence[Embedding]) -> EmbeddingsReply:
    """Return the reply to a request for embeddings; raises where vectors of another width are asked for."""
    check_dimensions(body.dimensions, embeddings)
    num_tokens = sum(embedding.usage.num_prompt_tokens for embedding in embeddings)
    return EmbeddingsReply(
        object="list",
        data=[
            EmbeddingEntry(object="embedding", index=index, embedding=_encoded(embedding, body.encoding_format))
            for index, embedding in enumerate(embeddings)
        ],
        model=body.model,
        usage=EmbeddingsUsage(prompt_tokens=num_tokens, total_tokens=num_tokens),
    )


def check_dimensions(wanted: int | None, embeddings: Sequence[Embedding]) -> None:
    """Raise where vectors of another width are asked for: a part of a hidden state is not trained to stand for it."""
    width = embeddings[0].vectors.shape[1]
    if wanted not in (None, width):
        raise InputError(f"dimensions is {wanted}, and this model's vectors have {width}; leave it out")


def _encoded(embedding: Embedding, form: str | None) -> list[float] | str:
    vector = embedding.vectors[0]
    return base64.b64encode(vector.astype("<f4").tobytes()).decode() if form == "base64" else vector.tolist()
