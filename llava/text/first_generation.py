"""The steps by which training of the first generation made ids and labels, for outside code that calls them.

In: turns of samples, texts, a tokenizer. Out: the text of a dialogue, ids, labels with -100. This package itself makes the
labels of every template from spans (labels.py).
"""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence
from typing import TYPE_CHECKING

from llava import conversation as conversation_lib
from llava.constants import IGNORE_INDEX
from llava.text.tokenization import Tokenizer

if TYPE_CHECKING:
    import torch


def _tokenize_fn(strings: Sequence[str], tokenizer: Tokenizer) -> dict[str, list[torch.Tensor] | list[int]]:
    """Encode texts one by one, each cut to `tokenizer.model_max_length`.

    Returns:
        `input_ids` and the same tensors as `labels`; `input_ids_lens` and `labels_lens`, their lengths without padding.
    """
    limit = tokenizer.model_max_length
    ids = [
        tokenizer(text, return_tensors="pt", padding="longest", max_length=limit, truncation=True).input_ids[0]
        for text in strings
    ]
    lengths = [int(row.ne(tokenizer.pad_token_id).sum()) for row in ids]
    return {"input_ids": ids, "labels": ids, "input_ids_lens": lengths, "labels_lens": lengths}


def _mask_targets(target: torch.Tensor, tokenized_lens: Sequence[int], speakers: Sequence[str]) -> None:
    """Mask in place the labels (T,) of a header and of what "human" says, but for the two tokens that begin each turn.

    `tokenized_lens` are the lengths of the header and of each turn.
    """
    start = tokenized_lens[0]
    target[:start] = IGNORE_INDEX
    for length, speaker in zip(tokenized_lens[1:], speakers, strict=False):
        if speaker == "human":
            target[start + 2 : start + length] = IGNORE_INDEX
        start += length


def _add_speaker_and_signal(
    header: str, source: Sequence[MutableMapping[str, str]], get_conversation: bool = True
) -> str:
    """Write each turn's text in place as a line "### Speaker: text", and return the dialogue, which ends in "### "."""
    names = dict(zip(("human", "gpt"), conversation_lib.default_conversation.roles, strict=True))
    for turn in source:
        turn["value"] = f"### {names.get(turn['from'].lower(), 'unknown')}: {turn['value']}\n"
    turns = "".join(turn["value"] for turn in source) if get_conversation else ""
    return f"{header}{turns}### "
