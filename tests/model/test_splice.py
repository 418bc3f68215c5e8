"""The splice against a token-by-token rewrite of its definition, over random batches."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llava.errors import InputError
from llava.model.splice import pad, splice

WIDTH = 4
TABLE = torch.randn(50, WIDTH, generator=torch.Generator().manual_seed(0))


def by_hand(rows, masks, features, labels):
    """One Python list per row: embeddings and labels, written down token by token."""
    num_marks = sum(
        t == -200 for row, mask in zip(rows, masks, strict=True) for t, m in zip(row, mask, strict=True) if m
    )
    every_row_owns_one = len(features) != num_marks
    position, out = 0, []
    for row, mask, row_labels in zip(rows, masks, labels, strict=True):
        embeds, targets, seen = [], [], 0
        for token, keep, label in zip(row, mask, row_labels, strict=True):
            if not keep:
                continue
            if token == -200:
                embeds += list(features[position])
                targets += [-100] * len(features[position])
                position += 1
                seen += 1
            else:
                embeds.append(TABLE[token])
                targets.append(label)
        if every_row_owns_one and not seen:
            position += 1
        out.append((torch.stack(embeds), targets))
    return out


@st.composite
def batches(draw):
    num_rows, width = draw(st.integers(1, 4)), draw(st.integers(2, 9))
    rows, masks = [], []
    for _ in range(num_rows):
        row = draw(st.lists(st.sampled_from([1, 2, 3, 7, 40, -200]), min_size=width, max_size=width))
        length = draw(st.integers(1, width))
        row[draw(st.integers(0, length - 1))] = 5  # at least one token of text
        mask = [1] * length + [0] * (width - length)
        rows.append(row), masks.append(mask)
    marks = [sum(t == -200 for t, m in zip(r, k, strict=True) if m) for r, k in zip(rows, masks, strict=True)]
    num_images = draw(st.sampled_from([sum(marks), sum(max(1, m) for m in marks)]))
    sizes = draw(st.lists(st.integers(1, 5), min_size=num_images, max_size=num_images))
    return rows, masks, sizes


@settings(deadline=None, max_examples=150)
@given(batch=batches(), side=st.sampled_from(["left", "right"]), limit=st.sampled_from([None, 3, 100]))
def test_splice_and_pad_equal_the_definition(batch, side, limit):
    rows, masks, sizes = batch
    ids, valid = torch.tensor(rows), torch.tensor(masks).bool()
    features = [torch.randn(size, WIDTH) for size in sizes]
    labels = torch.where(ids == 3, -100, ids * 10)
    expected = by_hand(rows, masks, features, labels.tolist())

    spliced = splice(ids, valid, features, lambda t: TABLE[t], labels=labels)
    assert spliced.lengths == [len(embeds) for embeds, _ in expected]
    padded = pad(spliced, side=side, max_length=limit)
    for row, (embeds, targets) in enumerate(expected):
        embeds, targets = embeds[:limit], targets[:limit]
        keep = padded.mask[row]
        assert torch.equal(padded.embeds[row][keep], embeds)
        assert padded.labels[row][keep].tolist() == targets
        assert padded.positions[row][keep].tolist() == list(range(len(embeds)))
        assert (padded.embeds[row][~keep] == 0).all()
        assert (padded.labels[row][~keep] == -100).all()
        start = len(keep) - len(embeds) if side == "left" else 0
        assert keep.nonzero().flatten().tolist() == list(range(start, start + len(embeds)))


def test_an_image_of_a_row_without_placeholders_stays_in_the_gradient_graph():
    features = [torch.randn(3, WIDTH, requires_grad=True) for _ in range(2)]
    spliced = splice(
        torch.tensor([[1, -200, 2], [1, 2, 3]]), torch.ones(2, 3, dtype=torch.bool), features, lambda t: TABLE[t]
    )
    spliced.embeds.sum().backward()
    assert (features[0].grad == 1).all()
    assert (features[1].grad == 0).all()


@pytest.mark.parametrize("num_images", [0, 1, 4])
def test_a_wrong_number_of_images_is_an_error_with_both_numbers(num_images):
    ids = torch.tensor([[1, -200, 2, -200]])
    with pytest.raises(InputError, match=rf"2 <image> placeholders but {num_images} image"):
        splice(ids, torch.ones_like(ids).bool(), [torch.zeros(1, WIDTH)] * num_images, lambda t: TABLE[t])
