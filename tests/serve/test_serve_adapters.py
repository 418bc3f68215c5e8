"""Adapters at real servers: each is a model of its own name, in every API, at a worker and through a controller."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
import torch
from serve_kit import DEMO, Program, data_url, wait_until, worker_and_controller

from llava.assets import embedded_model_path
from llava.cli.program import EXIT_BAD_INPUT
from llava.engine.request import SamplingParams
from llava.model.builder import load
from llava.serve.backends.in_process import EngineBackend
from llava.serve.model_worker import main
from llava.session import Session

BASE = "llava-v1.5-tiny"
QUESTION = "What do you see in this picture?"
NAMES = ("one", "two")
SHORT = SamplingParams(max_new_tokens=12)

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Two adapters over the embedded model, one of them with a projector of its own."""
    peft = pytest.importorskip("peft")
    folders = {}
    for seed, (name, saved) in enumerate(zip(NAMES, (None, ["mm_projector"]), strict=True)):
        model = load(embedded_model_path(), device="cpu").model
        settings = peft.LoraConfig(r=4, lora_alpha=8, target_modules=r".*layers.*v_proj", modules_to_save=saved)
        model = peft.get_peft_model(model, settings)
        torch.manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter) * 0.15)
        folder = tmp_path_factory.mktemp(name)
        model.save_pretrained(folder)
        folders[name] = str(folder)
    return folders


@pytest.fixture(scope="module")
def right(folders: dict[str, str]) -> dict[str, str]:
    """The answers of the merged models."""
    answers = {BASE: Session(load(embedded_model_path(), device="cpu"), sampling=SHORT).answer(QUESTION, DEMO)}
    for name, folder in folders.items():
        merged = load(folder, base=embedded_model_path(), device="cpu")
        answers[f"{BASE}:{name}"] = Session(merged, sampling=SHORT).answer(QUESTION, DEMO)
    assert len(set(answers.values())) == len(answers)
    return answers


@pytest.fixture(scope="module")
def addresses(folders: dict[str, str]) -> Iterator[list[str]]:
    backend = EngineBackend(load(embedded_model_path(), device="cpu"), name=BASE, adapters=folders)
    with worker_and_controller(backend) as addresses:
        yield list(addresses.values())
    backend.engine.close()


def asked(text: str) -> list[dict[str, Any]]:
    image = {"type": "image_url", "image_url": {"url": data_url()}}
    return [{"role": "user", "content": [image, {"type": "text", "text": text}]}]


def test_each_api_answers_by_the_adapter_that_is_named(addresses: list[str], right: dict[str, str]) -> None:
    image = data_url().partition(",")[2]
    shown = {"type": "image", "source": {"type": "base64", "media_type": "image/jpeg", "data": image}}
    for address in addresses:
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="none")
        assert [entry.id for entry in client.models.list()] == sorted(right)
        for model, answer in right.items():
            assert client.models.retrieve(model).id == model
            reply = client.chat.completions.create(model=model, messages=asked(QUESTION), max_tokens=12)
            assert (reply.model, reply.choices[0].message.content) == (model, answer)
            message = {"role": "user", "content": QUESTION, "images": [image]}
            body = {"model": model, "messages": [message], "stream": False, "options": {"num_predict": 12}}
            assert httpx.post(f"{address}/api/chat", json=body, timeout=60).json()["message"]["content"] == answer
            content = [shown, {"type": "text", "text": QUESTION}]
            body = {"model": model, "max_tokens": 12, "messages": [{"role": "user", "content": content}]}
            assert httpx.post(f"{address}/v1/messages", json=body, timeout=60).json()["content"][0]["text"] == answer
            parts = [{"type": "input_image", "image_url": data_url()}, {"type": "input_text", "text": QUESTION}]
            response = client.responses.create(
                model=model, input=[{"role": "user", "content": parts}], max_output_tokens=12
            )
            assert response.output_text == answer
        listed = httpx.post(f"{address}/list_models").json()["models"]
        assert sorted(listed) == sorted(right)
        asked_for = {"input": "x", "encoding_format": "float"}
        vectors = {tuple(client.embeddings.create(model=name, **asked_for).data[0].embedding) for name in right}
        assert len(vectors) == len(right)
        echo = {"prompt": "The star is yellow", "echo": True, "max_tokens": 0, "logprobs": 0}
        choices = [client.completions.create(model=name, **echo).choices[0] for name in right]
        assert len({tuple(choice.logprobs.token_logprobs[1:]) for choice in choices}) == len(right)
        with pytest.raises(openai.NotFoundError, match=f"{BASE}:one"):
            client.chat.completions.create(model=f"{BASE}:three", messages=asked(QUESTION))


def test_the_original_s_protocol_knows_them_too(addresses: list[str], right: dict[str, str]) -> None:
    prompt = (
        f"{Session(load(embedded_model_path(), device='cpu'))._template.system} USER: <image>\n{QUESTION} ASSISTANT:"
    )
    for address in addresses:
        for model, answer in right.items():
            body = {"model": model, "prompt": prompt, "images": [data_url()], "temperature": 0, "max_new_tokens": 12}
            reply = httpx.post(f"{address}/worker_generate_stream", json=body, timeout=60)
            assert reply.content.split(b"\0")[-2].decode().endswith(answer[-8:] + '", "error_code": 0}')


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--adapter", "one"], "NAME=PATH"),
        (["--adapter", "=x"], "NAME=PATH"),
        (["--adapter", "a b=x"], "NAME=PATH"),
        (["--adapter", "a=x", "--adapter", "a=y"], "taken"),
        (["--adapter", "latest=x"], "taken"),
        (["--adapter", "a=/no/such/folder"], "/no/such/folder"),
    ],
)
def test_flags_that_cannot_work(words: list[str], reason: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--no-register", "--port", "0", *words]) == EXIT_BAD_INPUT
    assert reason in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("flags", [["--engine-process", "on"], ["--num-workers", "2"]])
def test_llava_serve_with_adapters(folders: dict[str, str], right: dict[str, str], flags: list[str]) -> None:
    words = [word for name, folder in folders.items() for word in ("--adapter", f"{name}={folder}")]
    with Program("serve", "--no-page", "--port", "0", "--device", "cpu", *flags, *words) as program:
        program.line("try ")
        client = openai.OpenAI(base_url=program.line("API "), api_key="none")
        wait_until(lambda: len(list(client.models.list())) == len(right))
        for model, answer in right.items():
            reply = client.chat.completions.create(model=model, messages=asked(QUESTION), max_tokens=12)
            assert reply.choices[0].message.content == answer
