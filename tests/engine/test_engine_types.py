"""Values of a wrong type in Python are answered where they are given, and never fail the requests that share a step."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engine_kit import loaded
from PIL import Image

from llava.engine import Engine, EngineConfig, Request, SamplingParams
from llava.engine.request import ScoreRequest
from llava.errors import InputError

WRONG: tuple[Any, ...] = (
    True,
    "x",
    b"x",
    1.5,
    7,
    [1],
    ["a"],
    [None],
    {},
    {1: 2},
    {"a": "b"},
    {1, 2},
    object(),
    1j,
    torch.ones(2),
)


def right(name: str, value: Any) -> bool:
    """What each field takes, said another way than the code does."""
    integers = ("top_k", "num_beams", "seed", "max_new_tokens", "min_new_tokens", "logprobs", "n")
    if name in integers:
        return type(value) is int
    if name in ("ignore_eos", "keep_space"):
        return type(value) is bool
    if name in ("regex", "grammar"):
        return type(value) is str
    if name == "json_schema":
        return type(value) in (str, dict)
    if name == "stop":
        return type(value) in (str, list) and value in ("x", ["a"])
    if name == "stop_token_ids":
        return type(value) in (list, set) and value in ([1], {1, 2})
    if name == "logit_bias":
        return type(value) is dict and "a" not in value
    return type(value) in (int, float)


@pytest.mark.parametrize("name", [field.name for field in fields(SamplingParams)])
def test_each_field_refuses_other_types_by_its_name(name: str) -> None:
    wrong = [value for value in WRONG if not right(name, value)]
    assert len(wrong) >= 8
    for value in wrong:
        with pytest.raises(InputError, match=name):
            SamplingParams(**{name: value})


def test_one_stop_string_is_one_and_numbers_of_numpy_are_numbers() -> None:
    params = SamplingParams(
        stop="vision", max_new_tokens=np.int64(5), temperature=np.float32(0.5), seed=np.uint8(3), stop_token_ids=[np.int32(4)],
        logit_bias={np.int64(2): np.float64(1.5)},
    )  # fmt: skip
    assert params == SamplingParams(
        stop=("vision",), max_new_tokens=5, temperature=0.5, seed=3, stop_token_ids=(4,), logit_bias={2: 1.5}
    )
    assert type(params.max_new_tokens) is int
    assert SamplingParams(stop=["a", "b"]).stop == ("a", "b")


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"images": ["cat.jpg"]}, "image 1 is 'cat.jpg'.*load_image"),
        ({"images": [Path("cat.jpg")]}, "image 1 .*load_image"),
        ({"images": [np.zeros((8, 8, 3), np.uint8)]}, "fromarray"),
        ({"images": [torch.zeros(3, 8, 8)]}, "not an image of PIL"),
        ({"images": [Image.new("RGB", (8, 8)), None]}, "image 2 is None"),
        ({"images": Image.new("RGB", (8, 8))}, "images is .* a list"),
        ({"images": "cat.jpg"}, "images is 'cat.jpg'"),
        ({"images": 5}, "images is 5"),
        ({"sampling": {"n": 1}}, "SamplingParams"),
        ({"sampling": None}, "SamplingParams"),
        ({"prompt": None}, "prompt is None"),
        ({"prompt": b"hi"}, "prompt is b'hi'"),
        ({"prompt": ["hi"]}, "prompt is 'hi'"),
        ({"prompt": [1.5]}, "prompt is 1.5"),
        ({"prompt": [[1, 2]]}, r"prompt is \[1, 2\]"),
        ({"prompt": {"text": "hi"}}, "prompt is"),
        ({"request_id": 7}, "request_id is 7"),
        ({"details": ["high"]}, "details is 'high'"),
        ({"details": 5}, "details is 5"),
    ],
)
def test_requests_refuse_other_types(given: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        Request(**({"prompt": "hi"} | given))


def test_scores_refuse_other_types_too() -> None:
    for given in ({"continuation": None}, {"continuation": [1.5]}, {"images": ["a"]}, {"num_top": True}, {"prompt": 5}):
        with pytest.raises(InputError):
            ScoreRequest(**({"prompt": "hi", "continuation": "x"} | given))


def test_ids_of_numpy_and_torch_are_ids_and_the_others_of_a_step_go_on() -> None:
    config = EngineConfig(max_running=8, context_len=256)
    with Engine.from_loaded(loaded("llama"), config) as engine:
        ids = [1, 2, 3, 4]
        alike = [engine.generate(Request(prompt)) for prompt in (ids, tuple(ids), np.array(ids), torch.tensor(ids))]
        assert len({result.text for result in alike}) == 1
        running = [
            engine.submit(Request("why? " * n, sampling=SamplingParams(max_new_tokens=60, ignore_eos=True)))
            for n in (1, 2)
        ]
        for given in (
            {"logprobs": True},
            {"logprobs": "2"},
            {"stop": [5]},
            {"logit_bias": {"5": 1.0}},
            {"temperature": "1"},
        ):
            with pytest.raises(InputError):
                engine.submit(Request("hi", sampling=SamplingParams(**given)))
        assert [handle.result(60).usage.num_new_tokens for handle in running] == [60, 60]
