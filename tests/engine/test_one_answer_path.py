"""Chat, evaluation, servers and tracing ask one interface, with the same parameters and answers for the same wish."""

from __future__ import annotations

import copy
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from engine_kit import loaded, random_image
from PIL import Image
from transformers import GenerationConfig

from llava.assets import embedded_model_path
from llava.cli.model_flags import sampling_from
from llava.conversation import get_template
from llava.diagnose.tracer.generation import trace_question
from llava.engine import BaseEngine, Engine, EngineConfig, HFEngine, Request, SamplingParams, open_engine
from llava.engine.request import SamplingDefaults, ScoreRequest
from llava.errors import InputError
from llava.eval.harness.client import EvalClient
from llava.eval.types import Question
from llava.model.builder import load
from llava.serve.openai.requests import parse_chat
from llava.serve.openai.schema import ChatRequest
from llava.serve.router.protocol import GenerateBody
from llava.session import LoadedImage, Session

QUESTION = "What colour is the star?"
WISHES: dict[str, dict[str, Any]] = {
    "nothing": {},
    "sampled": {"temperature": 0.7},
    "sampled narrowly": {"temperature": 1.3, "top_p": 0.6},
}
OWN = {"top_k": 7, "top_p": 0.5, "repetition_penalty": 1.2}  # as a checkpoint's generation_config.json may say


@pytest.fixture(scope="module")
def embedded() -> Any:
    return load(embedded_model_path(), device="cpu", dtype=torch.float32)


@pytest.fixture
def submitted(monkeypatch: pytest.MonkeyPatch) -> list[tuple[SamplingParams, tuple[int, ...]]]:
    """The resolved parameters of every request, and what was sampled."""
    found: list[Any] = []
    plain = BaseEngine.submit

    def submit(self: BaseEngine, request: Request, **options: Any) -> Any:
        seeded = request if request.sampling.greedy else replace(request, sampling=replace(request.sampling, seed=5))
        handle = plain(self, seeded, **options)
        found.append((request.sampling.resolved(self.sampling_defaults), handle))
        return handle

    monkeypatch.setattr(BaseEngine, "submit", submit)
    monkeypatch.setattr(BaseEngine, "stream", submit)
    return found


@pytest.mark.parametrize("own", [{}, OWN], ids=["transformers' defaults", "the checkpoint's defaults"])
@pytest.mark.parametrize("wish", WISHES.values(), ids=WISHES)
def test_the_same_wish_is_the_same_answer(
    embedded: Any, submitted: list[Any], wish: dict[str, Any], own: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedded.model, "generation_config", changed(embedded.model.generation_config, **own))
    image = Image.open("images/demo.jpg")
    flags = sampling_from(Namespace(**{"temperature": 0.0, "top_p": None, "num_beams": 1, "max_new_tokens": 24} | wish))

    Session(embedded, sampling=flags).answer(QUESTION, image)  # llava chat
    with EvalClient(embedded, flags) as client:  # llava eval, which gives each question a seed of its own
        texts: dict[int, Any] = {}
        item = Question(id=0, prompt=QUESTION, images=(open_bytes("images/demo.jpg"),))
        client.answer([(0, item)], texts.__setitem__, max_new_tokens=24)
    body = ChatRequest.model_validate(
        {"model": "m", "messages": [{"role": "user", "content": QUESTION}], "max_tokens": 24} | wish
    )
    card = Namespace(template=get_template(embedded.conv_mode), image_placeholder="<image>")
    served = parse_chat(body, card).sampling  # type: ignore[arg-type]
    conversation = get_template(embedded.conv_mode)
    conversation.append_message(conversation.roles[0], f"<image>\n{QUESTION}")
    conversation.append_message(conversation.roles[1], None)
    with open_engine(embedded) as engine:
        engine.generate(Request(conversation, [image], served))
    trace_question(embedded, [LoadedImage("demo", image)], QUESTION, sampling=flags)

    params = [replace(sampling, seed=None) for sampling, _ in submitted]
    assert len(params) == 4
    assert params == [params[0]] * 4
    expected = SamplingDefaults(**own)
    assert params[0].top_k == expected.top_k
    assert params[0].top_p == wish.get("top_p", expected.top_p)
    tokens = [handle.result().completions[0].token_ids for _, handle in submitted]
    alike = tokens if flags.greedy else tokens[:3]  # `generate` draws by torch's generator, the engine by its own
    assert alike == [tokens[0]] * len(alike)


def changed(config: GenerationConfig, **values: Any) -> GenerationConfig:
    config = copy.deepcopy(config)
    config.update(**values)
    return config


def open_bytes(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read()


def test_the_original_protocol_means_what_the_original_did() -> None:
    """Temperature 1 and top_p 1 where nothing is said, and the checkpoint's top_k, as its `generate` took it."""
    sampling = GenerateBody.parse({"prompt": "x"}).sampling
    assert sampling is not None
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (1.0, 1.0, None)


@pytest.mark.parametrize("own", [{}, OWN], ids=["transformers' defaults", "the checkpoint's defaults"])
def test_defaults_are_those_of_generate(own: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """What `generate` does when it is called without them: the values, and the tokens drawn."""
    whole = loaded("llama")
    model = whole.model
    monkeypatch.setattr(model, "generation_config", changed(model.generation_config, **own, renormalize_logits=False))
    prepared, _ = model._prepare_generation_config(None)
    defaults = SamplingDefaults.of(model.generation_config)
    assert (defaults.top_k, defaults.top_p) == (prepared.top_k, prepared.top_p)
    assert defaults.repetition_penalty == prepared.repetition_penalty
    if "repetition_penalty" in own:  # over embeddings, `generate` does not see the prompt's tokens, and the engine does
        return
    inputs = whole.processor("<image>\nwhat is it?", [random_image(1)])
    torch.manual_seed(11)
    expected = model.generate(
        inputs.input_ids[None], images=inputs.images, image_sizes=inputs.image_sizes, do_sample=True, temperature=1.5,
        max_new_tokens=20,
    )  # fmt: skip
    with HFEngine.from_loaded(whole) as engine:
        params = SamplingParams(temperature=1.5, seed=11, max_new_tokens=20)
        result = engine.generate(Request("<image>\nwhat is it?", [random_image(1)], params))
        again = engine.generate(Request("<image>\nwhat is it?", [random_image(1)], params))
    assert list(result.completions[0].token_ids) == expected[0].tolist()
    assert again.completions == result.completions


# Every field is honoured or refused


@pytest.fixture(scope="module")
def both() -> Iterator[tuple[Engine, HFEngine]]:
    with Engine.from_loaded(loaded("llama")) as engine, HFEngine.from_loaded(loaded("llama")) as other:
        yield engine, other


@pytest.mark.parametrize(
    "sampling",
    [
        {"repetition_penalty": 1.7},
        {"presence_penalty": 1.5, "frequency_penalty": 0.9},
        {"logit_bias": {7: 5.0, 9: -100.0}},
        {"min_new_tokens": 12},
        {"ignore_eos": True, "max_new_tokens": 40},
        {"stop_token_ids": tuple(range(3, 120))},
        {"stop": ("e", "a")},
        {"n": 3},
    ],
    ids=str,
)
def test_both_engines_do_what_a_field_asks(both: tuple[Engine, HFEngine], sampling: dict[str, Any]) -> None:
    params = SamplingParams(**{"max_new_tokens": 24} | sampling)
    requests = [
        Request("<image>\nwhat is it?", [random_image(2)], params),
        Request("well? " * 4, sampling=params),
    ]
    for request in requests:
        mine, theirs = (engine.generate(request) for engine in both)
        assert mine.completions == theirs.completions
        assert mine.usage.num_prompt_tokens == theirs.usage.num_prompt_tokens


def test_little_detail_is_the_same_to_both() -> None:
    request = Request("<image>\nWell?", [random_image(1)], SamplingParams(max_new_tokens=12), details=["low"])
    with Engine.from_loaded(loaded("anyres")) as engine, HFEngine.from_loaded(loaded("anyres")) as other:
        assert engine.generate(request).completions == other.generate(request).completions


@pytest.mark.parametrize("field", [{"logprobs": 2}, {"regex": "[a-c]+"}, {"json_schema": "{}"}], ids=str)
def test_generate_refuses_what_it_cannot_do(both: tuple[Engine, HFEngine], field: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=f"takes no {next(iter(field))}"):
        both[1].submit(Request("x", sampling=SamplingParams(**field)))


def test_what_one_engine_cannot_do_is_refused(both: tuple[Engine, HFEngine]) -> None:
    with pytest.raises(InputError, match="num_beams is 3"):
        both[0].submit(Request("x", sampling=SamplingParams(num_beams=3)))
    with pytest.raises(InputError, match="scores no continuations"):
        both[1].score(ScoreRequest("x", "y"))
    with pytest.raises(InputError, match="weights is 'int8'"):
        HFEngine.from_loaded(loaded("llama"), EngineConfig(weights="int8"))
    for engine in both:
        with pytest.raises(InputError, match="stop_token_ids names token 99999999"):
            engine.submit(Request("x", sampling=SamplingParams(stop_token_ids=(99999999,))))
        with pytest.raises(InputError, match="token id -7 is not one of"):
            engine.submit(Request([3, -7]))
        with pytest.raises(InputError, match="prompt is too long"):
            engine.submit(Request([3] * 5000))


def test_one_function_chooses_the_engine(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    whole = loaded("llama")
    with caplog.at_level("INFO", "llava"):
        with open_engine(whole) as engine:
            assert type(engine) is Engine
        with open_engine(whole, num_beams=2) as engine:
            assert type(engine) is HFEngine
        monkeypatch.setattr(whole.model.generation_config, "no_repeat_ngram_size", 3)
        with open_engine(whole) as engine:
            assert type(engine) is HFEngine
            (first,) = engine.generate(Request("a a a a", sampling=SamplingParams(max_new_tokens=12))).completions
            grams = list(zip(first.token_ids, first.token_ids[1:], first.token_ids[2:], strict=False))
            assert len(set(grams)) == len(grams)
        monkeypatch.undo()
        monkeypatch.setattr("llava.engine.selection.unsupported_reason", lambda model: "it is odd")
        with open_engine(whole) as engine:
            assert type(engine) is HFEngine
    assert [record.message for record in caplog.records] == [
        "answering by model.generate: num_beams is 2",
        "answering by model.generate: the model's generation_config has no_repeat_ngram_size 3",
        "answering by model.generate: it is odd",
    ]
