"""The labels of older software, for exact comparison with runs that it made; off unless asked for.

In: a prompt and its ids. Out: labels, found as that software found them: the prompt is cut into rounds at the
template's end mark, every round and its question are tokenized again on their own, and lengths are added up. Where the
sum misses the length of the whole, everything is masked: the sample teaches nothing. labels.py has the rule used otherwise.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

from llava.constants import IGNORE_INDEX
from llava.conversation import Conversation, SeparatorStyle
from llava.errors import InputError
from llava.text.tokenization import tokenizer_image_token

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _RoundRule:
    """The constants by which a kind of template is cut and counted."""

    end: str  # what ends a round
    answer_mark: str  # what stands between a round's question and its answer
    start: int  # tokens before the first round
    question_excess: int  # tokens that a question counted alone has too many
    later_rounds: int  # correction of both counts in every round but the first
    turns_per_piece: int = 1  # pieces between two end marks that make a round


def _rule(conv: Conversation, tokenizer: Any) -> _RoundRule:
    legacy = getattr(tokenizer, "legacy", None)
    if conv.sep_style is SeparatorStyle.LLAMA_2:
        return _RoundRule(str(conv.sep2), "[/INST] ", 1, 2, 0)
    if conv.sep_style is SeparatorStyle.TWO:
        return _RoundRule(str(conv.sep2), f"{conv.sep}{conv.roles[1]}: ", 1, 2, -1 if legacy is False else 0)
    if conv.sep_style is SeparatorStyle.MPT:
        return _RoundRule(conv.sep, conv.sep + conv.roles[1], 0, 1, 1 if legacy else 0, turns_per_piece=2)
    raise InputError(
        f"labels by rounds were never defined for templates of style {conv.sep_style.name}; use label_rule='spans'."
    )


def labels_by_rounds(prompt: str, ids: list[int], conv: Conversation, tokenizer: Any, *, has_image: bool) -> list[int]:
    rule = _rule(conv, tokenizer)

    def count(text: str) -> int:
        if has_image:
            return len(tokenizer_image_token(text, tokenizer))
        return len(tokenizer(text).input_ids)

    trained: list[tuple[int, int]] = []
    position = rule.start
    for index, text in enumerate(_rounds(prompt, rule)):
        parts = text.split(rule.answer_mark)
        if not text or len(parts) != 2:
            break
        correction = rule.later_rounds if index else 0
        question = count(parts[0] + rule.answer_mark) - rule.question_excess + correction
        end = position + count(text) + correction
        trained.append((position + question, end))
        position = end
    if position < tokenizer.model_max_length and position != len(ids):
        logger.warning("tokenization mismatch: %d vs. %d tokens; the sample is masked whole", position, len(ids))
        return [IGNORE_INDEX] * len(ids)
    labels = [IGNORE_INDEX] * len(ids)
    for start, end in trained:
        end = min(end, len(ids))  # a sample cut to the maximum length ends earlier than its rounds
        labels[start:end] = ids[start:end]
    return labels


def _rounds(prompt: str, rule: _RoundRule) -> list[str]:
    pieces = prompt.split(rule.end)
    if rule.turns_per_piece == 1:
        return pieces
    # The system text is a piece of its own and belongs to the first round.
    first = rule.turns_per_piece + 1
    return [
        rule.end.join(pieces[:first]),
        *(
            rule.end.join(pieces[at : at + rule.turns_per_piece])
            for at in range(first, len(pieces), rule.turns_per_piece)
        ),
    ]
