"""The original's worker protocol: request bodies, response chunks, error codes.

In: the JSON of a request. Out: a checked body, or an `InputError`; and chunks, each a JSON object `{"text", "error_code"}`
that ends in a zero byte, whose text is the prompt and the answer so far. Routes are
worker_routes.py and routes.py.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from llava.constants import DEFAULT_IMAGE_TOKEN
from llava.conversation import check_placeholders
from llava.engine.request import SamplingParams
from llava.errors import InputError, shortened

if TYPE_CHECKING:
    import httpx

# Error codes of a chunk. With any but OK the text is a message for the user and nothing follows.
OK = 0
WORKER_FAILED = 1  # the worker refused the request or failed at it
NO_WORKER = 2  # the controller has no worker for this model
WORKER_UNREACHABLE = 3  # the controller lost the worker

# What the original's web page shows; outside code imports these names.
server_error_msg = "**NETWORK ERROR DUE TO HIGH TRAFFIC. PLEASE REGENERATE OR REFRESH THIS PAGE.**"
moderation_msg = "YOUR INPUT VIOLATES OUR CONTENT MODERATION GUIDELINES. PLEASE TRY AGAIN."

CONTEXT_FULL = "Exceeds max token length. Please start a new conversation, thanks."
DEFAULT_NEW_TOKENS = 256
MAX_ERROR = 64 * 1024  # bytes of another server's error that are read
MAX_NAMES = 64  # models of one worker
MAX_NAME = 200  # characters
GREEDY_BELOW = 0.001  # temperatures up to this mean greedy decoding

N = TypeVar("N", int, float)


def encode_chunk(text: str, error_code: int = OK, **more: object) -> bytes:
    """Encode one chunk. `more` are keys that the client has asked for."""
    return json.dumps({"text": text, "error_code": error_code, **more}).encode() + b"\0"


class ChunkReader:
    """Decode a stream of bytes, as they arrive, to chunks."""

    def __init__(self) -> None:
        self._incomplete = b""

    def feed(self, data: bytes) -> Iterator[dict[str, Any]]:
        *whole, self._incomplete = (self._incomplete + data).split(b"\0")
        return (json.loads(part) for part in whole if part)


def read_chunks(stream: Iterable[bytes]) -> Iterator[dict[str, Any]]:
    """Yield the chunks of a whole stream."""
    reader = ChunkReader()
    for data in stream:
        yield from reader.feed(data)


async def read_start(response: httpx.Response, limit: int = MAX_ERROR) -> bytes:
    """Read a body up to a limit, behind which it is of no interest."""
    data = b""
    async for part in response.aiter_raw():
        data += part
        if len(data) >= limit:
            break
    return data[:limit]


def sentence_of(body: bytes) -> str:
    """Return the sentence in an error of either protocol, which a server of others may have made."""
    try:
        value = json.loads(body.partition(b"\0")[0])
        return shortened(str(value["text"] if "text" in value else value["error"]["message"]), 500)
    except (ValueError, TypeError, KeyError, RecursionError):
        return "it does not say why"


@dataclass(frozen=True)
class GenerateBody:
    """A request to generate, as the original's page and test client post it."""

    prompt: str
    images: tuple[str, ...]  # base64 or data: URLs
    sampling: SamplingParams | None  # None: no new tokens were asked for
    inspect: bool = False  # ours: the last chunk also has usage and timings
    model: str | None = None  # which of a worker's models; the original's workers have one, and do not look

    @classmethod
    def parse(cls, body: object) -> GenerateBody:
        if not isinstance(body, Mapping):
            raise InputError("the body must be a JSON object")
        prompt = body.get("prompt")
        if not isinstance(prompt, str):
            raise InputError("the body needs a 'prompt', a string")
        images = body.get("images")
        images = [] if images is None else images
        if not isinstance(images, list) or not all(isinstance(image, str) for image in images):
            raise InputError("'images' must be a list of images in base64")
        check_placeholders(prompt.count(DEFAULT_IMAGE_TOKEN), len(images))
        num_new_tokens = _number(body, "max_new_tokens", DEFAULT_NEW_TOKENS)
        temperature = _number(body, "temperature", 1.0)
        stop = body.get("stop")
        if not isinstance(stop, str | None):
            raise InputError(f"'stop' is {stop!r}; it must be a string")
        top_p = _number(body, "top_p", 1.0)
        sampling = None
        if num_new_tokens >= 1:
            greedy = temperature <= GREEDY_BELOW
            sampling = SamplingParams.given(
                temperature=0.0 if greedy else temperature,
                top_p=None if greedy else top_p,
                max_new_tokens=num_new_tokens,
                stop=(stop,) if stop else (),
            )
        model = body.get("model")
        named = model if isinstance(model, str) else None
        return cls(prompt, tuple(images), sampling, inspect=body.get("inspect") is True, model=named)


def _number(body: Mapping[str, Any], name: str, default: N) -> N:
    value = body.get(name)
    if value is None:
        return default
    try:
        if isinstance(value, bool):
            raise TypeError
        return type(default)(value)
    except (TypeError, ValueError, OverflowError):
        raise InputError(f"{name!r} is {value!r}; it must be a number") from None


@dataclass(frozen=True)
class WorkerStatus:
    """What a worker reports to its controller."""

    model_names: tuple[str, ...]
    speed: float
    queue_length: int

    @classmethod
    def parse(cls, values: object) -> WorkerStatus:
        if not isinstance(values, Mapping):
            raise InputError("'worker_status' must be an object with model_names, speed and queue_length")
        names = values.get("model_names")
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise InputError("'model_names' of a worker must be a list of strings")
        if len(names) > MAX_NAMES or any(len(name) > MAX_NAME for name in names):
            raise InputError(f"a worker has at most {MAX_NAMES} models, with names of at most {MAX_NAME} characters")
        speed, queue_length = _count(values, "speed"), _count(values, "queue_length")
        return cls(tuple(names), speed, int(queue_length))

    def as_json(self) -> dict[str, object]:
        return {"model_names": list(self.model_names), "speed": self.speed, "queue_length": self.queue_length}


def _count(values: object, name: str) -> float:
    value = values.get(name) if isinstance(values, Mapping) else None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1e9:
        raise InputError(f"{name!r} of a worker is {value!r}; it must be a number from 0")
    return value


@dataclass(frozen=True)
class RegistrationBody:
    """The registration of a worker. Without a status the controller asks the worker for it."""

    worker_name: str
    check_heart_beat: bool
    status: WorkerStatus | None

    @classmethod
    def parse(cls, body: object) -> RegistrationBody:
        name = text_field(body, "worker_name")
        assert isinstance(body, Mapping)
        if not name.startswith(("http://", "https://")):
            raise InputError(f"worker_name is {shortened(name)!r}; it must be the worker's http address")
        if not isinstance(body.get("check_heart_beat"), bool):
            raise InputError("the body needs 'check_heart_beat', true or false")
        status = body.get("worker_status")
        return cls(name, body["check_heart_beat"], WorkerStatus.parse(status) if status is not None else None)


@dataclass(frozen=True)
class HeartbeatBody:
    worker_name: str
    queue_length: int

    @classmethod
    def parse(cls, body: object) -> HeartbeatBody:
        return cls(text_field(body, "worker_name"), int(_count(body, "queue_length")))


def text_field(body: object, name: str) -> str:
    """Return a field that a body must have, a string."""
    if not isinstance(body, Mapping) or not isinstance(body.get(name), str):
        raise InputError(f"the body must be a JSON object with {name!r}, a string")
    return body[name]
