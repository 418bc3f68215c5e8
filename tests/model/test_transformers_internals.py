"""The private names of transformers that the package relies on exist in the version that is installed."""

from __future__ import annotations

import ast
import re

import pytest
import torch
from repository import PACKAGE
from transformers import LlamaConfig, LlamaModel, PreTrainedModel, Trainer
from transformers.utils import output_capturing

from llava.model.transformers_internals import TRAINER_METHODS, attention_of, register_recorded_outputs, set_attention

PRIVATE = re.compile(r"_CAN_RECORD_REGISTRY|\._can_record_outputs|\._attn_implementation|transformers\S* import _")


class RenamedModel(LlamaModel):
    """As a model is whose class was changed after it was built."""


def test_attention_of_a_config() -> None:
    config = LlamaConfig(attn_implementation="eager")
    assert attention_of(config) == "eager"
    set_attention(config, "sdpa")
    assert attention_of(config) == "sdpa"


def test_recorded_outputs() -> None:
    config = LlamaConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=8)
    model = LlamaModel(config)
    model.__class__ = RenamedModel
    assert isinstance(model, PreTrainedModel)
    ids = torch.tensor([[1, 2]])
    assert not model(ids, output_hidden_states=True).hidden_states
    register_recorded_outputs(model)
    assert len(model(ids, output_hidden_states=True).hidden_states) == 2
    assert str(RenamedModel) in output_capturing._CAN_RECORD_REGISTRY


@pytest.mark.parametrize("name", TRAINER_METHODS)
def test_methods_of_trainer(name: str) -> None:
    assert callable(getattr(Trainer, name))


def test_the_list_of_overridden_methods_is_complete() -> None:
    tree = ast.parse((PACKAGE / "train/llava_trainer.py").read_text(encoding="utf-8"))
    trainer = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "LLaVATrainer")
    defined = {
        node.name for node in trainer.body if isinstance(node, ast.FunctionDef) and re.match("_[a-z]", node.name)
    }
    assert {name for name in defined if hasattr(Trainer, name)} == set(TRAINER_METHODS)


def test_private_names_are_in_one_file() -> None:
    own = PACKAGE / "model/transformers_internals.py"
    assert PRIVATE.search(own.read_text(encoding="utf-8"))
    assert not [
        path for path in PACKAGE.rglob("*.py") if path != own and PRIVATE.search(path.read_text(encoding="utf-8"))
    ]
