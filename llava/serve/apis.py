"""The APIs that clients speak, together: OpenAI's, Ollama's and Anthropic's over one model or over many workers.

In: a served model, or what answers for several. Out: routers, and the bodies of the OpenAPI document. The original's protocol
is in serve/router/.
"""

from __future__ import annotations

from typing import Protocol

from fastapi import APIRouter

from llava.serve.anthropic import schema as anthropic
from llava.serve.anthropic.routes import AnthropicApi, ModelAnthropicApi, anthropic_routes
from llava.serve.http.app import Schemas
from llava.serve.ollama import schema as ollama
from llava.serve.ollama.routes import ModelOllamaApi, OllamaApi, ollama_routes
from llava.serve.openai.routes import SCHEMAS as OPENAI_SCHEMAS
from llava.serve.openai.routes import ModelApi, OpenAIApi, openai_routes
from llava.serve.service import Service

SCHEMAS: Schemas = {
    **OPENAI_SCHEMAS,
    ollama.OllamaChatRequest: "validation",
    ollama.GenerateRequest: "validation",
    ollama.EmbedBody: "validation",
    ollama.ModelRequest: "validation",
    ollama.Answer: "serialization",
    ollama.OllamaError: "serialization",
    anthropic.MessagesRequest: "validation",
    anthropic.CountTokensRequest: "validation",
    anthropic.MessagesReply: "serialization",
    anthropic.MessagesEvent: "serialization",
    anthropic.AnthropicError: "serialization",
}


class ClientApis(OpenAIApi, OllamaApi, AnthropicApi, Protocol):
    """What answers the routes of all three."""


def model_routes(service: Service) -> list[APIRouter]:
    """The routes of one model."""
    own = ModelApi(service)
    return [
        anthropic_routes(ModelAnthropicApi(service, own.models)),
        openai_routes(own),
        ollama_routes(ModelOllamaApi(service, own.models)),
    ]


def forwarded_routes(api: ClientApis) -> list[APIRouter]:
    """The routes of a controller."""
    return [anthropic_routes(api), openai_routes(api), ollama_routes(api)]
