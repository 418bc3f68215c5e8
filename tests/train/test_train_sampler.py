"""Orders of samples: equal to recorded ones, and the properties that they are for."""

from __future__ import annotations

import pytest
import torch
from train_kit import recording

from llava.errors import InputError
from llava.train.sampler import (
    LengthGroupedSampler,
    get_length_grouped_indices,
    get_modality_length_grouped_indices,
    split_to_even_chunks,
)

CASES = recording("training.json")["samplers"]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case['case']}-{case['batch_size']}x{case['world_size']}")
def test_recorded_orders(case: dict) -> None:
    lengths = case["lengths"]
    words = [abs(length) for length in lengths]
    shape = (case["batch_size"], case["world_size"])

    torch.manual_seed(case["global_torch_seed"])
    generator = torch.Generator().manual_seed(case["generator_seed"])
    assert get_modality_length_grouped_indices(lengths, *shape, generator=generator) == case["modality_grouped"]
    generator.manual_seed(case["generator_seed"])
    assert get_length_grouped_indices(words, *shape, generator=generator) == case["length_grouped"]

    for grouped, values in ((True, lengths), (False, words)):
        key = "sampler_no_generator_modality" if grouped else "sampler_no_generator_length"
        torch.manual_seed(case["global_torch_seed"])
        assert list(LengthGroupedSampler(*shape, values, group_by_modality=grouped)) == case[key]


@pytest.mark.parametrize("case", recording("training.json")["split_to_even_chunks"])
def test_even_chunks(case: dict) -> None:
    assert split_to_even_chunks(case["indices"], case["lengths"], case["n"]) == case["out"]


def test_batches_have_one_modality() -> None:
    lengths = [(-1) ** (index % 3 == 0) * (index + 1) for index in range(70)]
    order = get_modality_length_grouped_indices(lengths, batch_size=4, world_size=2)
    assert sorted(order) == list(range(70))
    mixed = sum(len({lengths[index] > 0 for index in order[start : start + 8]}) > 1 for start in range(0, 70, 8))
    assert mixed <= 2  # what is left of both modalities


def test_seeded_order_changes_by_epoch_and_leaves_the_global_generator_alone() -> None:
    sampler = LengthGroupedSampler(2, 2, list(range(1, 41)), seed=7)
    torch.manual_seed(0)
    first = list(sampler)
    after = torch.rand(1)
    torch.manual_seed(0)
    assert torch.rand(1) == after
    sampler.set_epoch(1)
    second = list(sampler)
    assert first != second
    resumed = LengthGroupedSampler(2, 2, list(range(1, 41)), seed=7)
    resumed.set_epoch(1)
    assert list(resumed) == second


def test_a_sample_without_words_is_named() -> None:
    with pytest.raises(InputError, match="sample 2 has no words"):
        get_modality_length_grouped_indices([3, -4, 0], batch_size=1, world_size=1)
