"""Checks of `llava doctor URL`: send requests to a running server and examine its answers.

In: the address of an OpenAI-compatible server (`/health`, `/v1/models`, `/v1/chat/completions`) or of an original worker
(`/worker_get_status`). Out: a `DoctorReport`. Four short questions are asked: without an image, with one, the same again, and
streamed.
"""

from __future__ import annotations

import base64
import io
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from llava.cli.http_client import HttpFailureError, send
from llava.diagnose.checks.findings import CheckSkipped, DoctorCheck, DoctorFinding, DoctorReport, found, run_checks
from llava.diagnose.checks.sample_image import QUESTION, sample_image

MAX_TOKENS = 32
# An image is many tokens; this few more come from the words around it.
FEWEST_IMAGE_TOKENS = 8
LEFTOVER = re.compile(
    r"</?s>|<\|im_(?:start|end)\|>|</?im_(?:start|end|patch)>|<image>|<unk>|\[/?INST\]|<\|endoftext\|>"
)


@dataclass
class ServerUnderTest:
    """The address of the examined server, and the answers that it gave."""

    url: str
    api_key: str | None
    timeout: float
    model: str | None = None
    is_worker: bool = False
    answers: dict[str, dict[str, Any]] = field(default_factory=dict)

    def request(self, path: str, content: object = None) -> tuple[int, str]:
        """Send one request, GET without content, and return its status and body; status 0 where there is no reply."""
        try:
            reply = send(self.url + path, content, key=self.api_key, timeout_s=self.timeout)
        except HttpFailureError as error:
            return 0, str(error)
        return reply.status, reply.text

    def chat(self, *, image: bool, stream: bool = False) -> tuple[int, str]:
        content: list[dict[str, Any]] = [{"type": "text", "text": QUESTION}]
        if image:
            content.insert(0, {"type": "image_url", "image_url": {"url": image_url()}})
        messages = [{"role": "user", "content": content}]
        body = {"model": self.model, "messages": messages, "max_tokens": MAX_TOKENS, "temperature": 0, "stream": stream}
        return self.request("/v1/chat/completions", body)


def examine_server(url: str, *, api_key: str | None = None, timeout: float = 60.0) -> DoctorReport:
    server = ServerUnderTest(url.rstrip("/").removesuffix("/v1"), api_key, timeout)
    checks = (
        DoctorCheck("address", _check_address),
        DoctorCheck("models", _check_models, needs=("address",)),
        DoctorCheck("a question", _check_question, needs=("models",)),
        DoctorCheck("an image", _check_image, needs=("a question",)),
        DoctorCheck("streaming", _check_stream, needs=("an image",)),
    )
    report = run_checks(server, checks, DoctorReport(url, "server"))
    if server.model:
        report.facts = {"model": server.model, "interface": "worker" if server.is_worker else "OpenAI"}
    return report


def _check_address(server: ServerUnderTest) -> Iterator[DoctorFinding]:
    status, body = server.request("/health")
    if status == 0:
        yield found(
            "server-unreachable", f"nothing answers at {server.url}: {body}",
            "start the server, or give the address and port that it printed when it started", url=server.url,
        )  # fmt: skip
        return
    if status not in (200, 404):  # other servers have no such page
        yield found(
            "server-unhealthy", f"/health answers {status}: {body[:200]}",
            "wait until the model is loaded, and read the server's log", status=status,
        )  # fmt: skip


def _check_models(server: ServerUnderTest) -> Iterator[DoctorFinding]:
    status, body = server.request("/v1/models")
    if status == 404:
        status, body = server.request("/worker_get_status", {})
        name = _find(_json(body), "model_names", 0) if status == 200 else None
        if isinstance(name, str):
            server.model, server.is_worker = name, True
            return
    if status in (401, 403):
        yield found(
            "server-fails", f"/v1/models answers {status}: {body[:200]}", "give its key with --api-key", status=status
        )
        return
    listed = _find(_json(body), "data", 0, "id") if status == 200 else None
    if not isinstance(listed, str):
        yield found(
            "server-no-model", f"/v1/models answers {status} and lists no model: {body[:200]}",
            "start a worker or server with a model, and let it register with the controller", status=status,
        )  # fmt: skip
        return
    server.model = listed


def _check_question(server: ServerUnderTest) -> Iterator[DoctorFinding]:
    if server.is_worker:
        raise CheckSkipped("a worker of the original protocol answers finished prompts; only its status is asked for")
    yield from _ask(server, "text", image=False)


def _check_image(server: ServerUnderTest) -> Iterator[DoctorFinding]:
    faults = list(_ask(server, "image", image=True))
    yield from faults
    if faults:
        return
    with_image, without = (_prompt_tokens(server.answers[name]) for name in ("image", "text"))
    if with_image is not None and without is not None and with_image - without < FEWEST_IMAGE_TOKENS:
        yield found(
            "server-image-ignored",
            f"the prompt takes {without} tokens without an image and {with_image} with one: the image is left out",
            "serve a model with a vision tower, and see that images reach it (llava chat shows what the model itself says)",
            with_image=with_image,
            without=without,
        )


def _check_stream(server: ServerUnderTest) -> Iterator[DoctorFinding]:
    status, body = server.chat(image=True, stream=True)
    deltas = [_delta(line[5:]) for line in body.splitlines() if line.startswith("data:") and "[DONE]" not in line]
    streamed, whole = "".join(deltas), _text(server.answers["image"])
    if status != 200:
        yield found(
            "server-fails", f"a streamed question gets {status}: {body[:200]}", "read the server's log", status=status
        )
        return
    again = _text(_json(server.chat(image=True)[1]))
    if again != whole:
        raise CheckSkipped("the server gives another answer each time")
    if streamed.strip() != whole.strip():
        yield found(
            "server-stream", f"streamed, the answer is {streamed[:80]!r}; whole, it is {whole[:80]!r}",
            "send each piece of text once, and stop strings never", streamed=len(streamed), whole=len(whole),
        )  # fmt: skip


def _ask(server: ServerUnderTest, name: str, *, image: bool) -> Iterator[DoctorFinding]:
    """Ask one question, store the answer, and report what is wrong with it."""
    status, body = server.chat(image=image)
    if status != 200 or "choices" not in _json(body):
        yield found(
            "server-fails", f"a question {'with' if image else 'without'} an image gets {status}: {body[:200]}",
            "read the server's log; give its key with --api-key" if status in (401, 403) else "read the server's log",
            status=status,
        )  # fmt: skip
        return
    server.answers[name] = _json(body)
    text = _text(server.answers[name])
    if image and not text.strip():
        yield found(
            "server-empty", "a question with an image gets an empty answer",
            "examine the model with llava doctor FOLDER, and look at one question with llava trace", characters=0,
        )  # fmt: skip
    left = LEFTOVER.findall(text)
    if left:
        yield found(
            "server-special-token", f"the answer {text[:120]!r} has {left[0]!r} in it",
            "examine the model with llava doctor FOLDER: its template or its end token is wrong", leftovers=sorted(set(left)),
        )  # fmt: skip


def _json(text: str) -> dict[str, Any]:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _find(values: object, *path: str | int) -> object:
    """Return what is at a path of names and indices; None where there is nothing, whatever the server sent."""
    for step in path:
        try:
            values = values[step]  # type: ignore[index]
        except (LookupError, TypeError):
            return None
    return values


def _text(answer: dict[str, Any]) -> str:
    content = _find(answer, "choices", 0, "message", "content")
    return content if isinstance(content, str) else ""


def _delta(line: str) -> str:
    content = _find(_json(line), "choices", 0, "delta", "content")
    return content if isinstance(content, str) else ""


def _prompt_tokens(answer: dict[str, Any]) -> int | None:
    count = _find(answer, "usage", "prompt_tokens")
    return count if isinstance(count, int) else None


def image_url() -> str:
    """Return the sample image as a data URL."""
    buffer = io.BytesIO()
    sample_image().save(buffer, format="PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
