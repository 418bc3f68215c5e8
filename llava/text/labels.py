"""Turn training samples into ids and labels, by one tokenization of the whole prompt.

In: the turns of a sample ({"from": ..., "value": ...}), a template, a tokenizer. Out: input ids (-200 for each image)
and labels (-100 where nothing is learned). A token is trained when its last character lies in a trained span; the space
after `ASSISTANT:` belongs to the answer. Templates are in conversation.py, ids and offsets in tokenization.py.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import groupby
from typing import TYPE_CHECKING, Protocol, TypedDict

from llava import conversation as conversation_lib
from llava.constants import DEFAULT_IMAGE_TOKEN, IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava.conversation import MARKED_STYLES, Conversation, SeparatorStyle, Span, conv_templates, image_placeholder
from llava.errors import InputError
from llava.text.tokenization import Tokenizer, encode_with_offsets, num_doubled

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

SampleTurn = Mapping[str, object]  # {"from": "human" | "gpt" | ..., "value": text}
Source = Sequence[SampleTurn]  # the turns of one sample


class PlaceholderOptions(Protocol):
    """What `preprocess_multimodal` asks of DataArguments."""

    is_multimodal: bool
    mm_use_im_start_end: bool


class LabelledSamples(TypedDict):
    """Ids and labels of samples: padded tensors (N, T), or lists of tensors (T,), as `preprocess` says."""

    input_ids: torch.Tensor | list[torch.Tensor]
    labels: torch.Tensor | list[torch.Tensor]
    num_truncated: int


# Who speaks, by the names that data files use.
_QUESTION, _ANSWER, _SYSTEM = "question", "answer", "system"
_SPEAKERS = {"human": _QUESTION, "user": _QUESTION, "gpt": _ANSWER, "assistant": _ANSWER, "system": _SYSTEM}


def speaker_of(name: object) -> str | None:
    """What a turn's "from" means: "question", "answer", "system"; None for an unknown name."""
    return _SPEAKERS.get(str(name).lower())


def sample_spans(source: Source, conv: Conversation, *, keep_empty_answers: bool = True) -> list[Span]:
    """Render a sample's turns as training does: the text, and which of it is trained."""
    return _FORMS.get(conv.sep_style, _DIALOGUE).spans(source, conv, keep_empty_answers)


def encode_sample(
    source: Source,
    tokenizer: Tokenizer,
    *,
    conv: Conversation | None = None,
    has_image: bool,
    keep_empty_answers: bool = True,
) -> tuple[list[int], list[int]]:
    """Encode one sample, however long it is: ids and labels. The arguments are those of `preprocess`."""
    conv = conv or conversation_lib.default_conversation
    form = _FORMS.get(conv.sep_style, _DIALOGUE)
    spans = form.spans(source, conv, keep_empty_answers)
    reads_images = has_image or form.always_with_image
    return encode_spans(spans, tokenizer, image_token_index=IMAGE_TOKEN_INDEX if reads_images else None)


def encode_spans(
    spans: Sequence[Span], tokenizer: Tokenizer, *, image_token_index: int | None = IMAGE_TOKEN_INDEX
) -> tuple[list[int], list[int]]:
    """Encode the spans' joined text: ids and labels. With image_token_index None, `<image>` is ordinary text."""
    text = "".join(span.text for span in spans)
    ids, offsets = encode_with_offsets(text, tokenizer, image_token_index)
    first = num_doubled(ids, text, tokenizer)
    ids, offsets = ids[first:], offsets[first:]
    trained = b"".join((b"\1" if span.trained else b"\0") * len(span.text) for span in spans)
    last = len(text) - 1
    return ids, [
        token if offset >= 0 and trained[min(offset, last)] else IGNORE_INDEX
        for token, offset in zip(ids, offsets, strict=True)
    ]


def preprocess_multimodal(
    sources: Sequence[Source],
    data_args: PlaceholderOptions,
    *,
    conv: Conversation | None = None,
    move_placeholders: bool = True,
) -> list[list[dict[str, object]]]:
    """Copy samples with their image placeholders in the form that the model was set up for.

    Without `conv`, the template is `llava.conversation.default_conversation`. With `move_placeholders` a turn's placeholder
    goes to a first line of its own. In the templates of LLaVA 1.5 that leaves one of them however many there were, so samples
    with several images need False; in those of LLaVA-NeXT only one that is alone in its turn and not at its start moves.
    """
    if not data_args.is_multimodal:
        return [[dict(turn) for turn in source] for source in sources]
    conv = conv or conversation_lib.default_conversation
    placeholder = image_placeholder(data_args.mm_use_im_start_end)
    if "mmtag" in conv.version:
        placeholder = f"<Image>{placeholder}</Image>"
    keeps_order = conv.sep_style in MARKED_STYLES

    def placed(text: str) -> str:
        stays = keeps_order and (text.count(DEFAULT_IMAGE_TOKEN) > 1 or text.startswith(DEFAULT_IMAGE_TOKEN))
        if DEFAULT_IMAGE_TOKEN in text and move_placeholders and not stays:
            text = f"{DEFAULT_IMAGE_TOKEN}\n{text.replace(DEFAULT_IMAGE_TOKEN, '').strip()}".strip()
        return text.replace(DEFAULT_IMAGE_TOKEN, placeholder)

    return [
        [{**turn, "value": placed(_read_turn(turn, index)[1])} for index, turn in enumerate(source)]
        for source in sources
    ]


def preprocess(
    sources: Sequence[Source],
    tokenizer: Tokenizer,
    has_image: bool = False,
    conv: Conversation | None = None,
    *,
    keep_empty_answers: bool = False,
) -> LabelledSamples:
    """Encode samples and their labels: padded tensors, or lists of them for the templates of captions and oldest dialogues.

    Args:
        tokenizer: the model's. Samples without images are cut to its model_max_length; those with images are cut later,
            when the number of their features is known.
        has_image: read `<image>` as an image rather than as text.
        conv: the template; without it, `llava.conversation.default_conversation` is read at this call.
        keep_empty_answers: give an answer of "" its end token instead of leaving the turn open.
    """
    conv = conv or conversation_lib.default_conversation
    form = _FORMS.get(conv.sep_style, _DIALOGUE)
    reads_images = has_image or form.always_with_image
    max_length = None if reads_images else tokenizer.model_max_length
    rows: list[tuple[list[int], list[int]]] = []
    num_truncated = 0
    for source in sources:
        ids, labels = encode_sample(
            source, tokenizer, conv=conv, has_image=has_image, keep_empty_answers=keep_empty_answers
        )
        if max_length is not None and len(ids) > max_length:
            num_truncated += 1
            ids, labels = ids[:max_length], labels[:max_length]
        rows.append((ids, labels))
    if num_truncated:
        _warn_once(f"samples longer than model_max_length={max_length} tokens are cut to it")
    return {
        "input_ids": form.batch([ids for ids, _ in rows], tokenizer.pad_token_id),
        "labels": form.batch([labels for _, labels in rows], IGNORE_INDEX),
        "num_truncated": num_truncated,
    }


@cache
def _warn_once(message: str) -> None:
    logger.warning("%s; further ones are not reported", message)


def _pad(rows: list[list[int]], value: int | None) -> torch.Tensor:
    import torch

    longest = max((len(row) for row in rows), default=0)
    if value is None:
        if any(len(row) < longest for row in rows):
            raise InputError("samples of different lengths need a padding token; set tokenizer.pad_token first.")
        return torch.tensor(rows, dtype=torch.long)
    return torch.tensor([row + [value] * (longest - len(row)) for row in rows], dtype=torch.long)


def _list(rows: list[list[int]], value: int | None) -> list[torch.Tensor]:
    import torch

    return [torch.tensor(row, dtype=torch.long) for row in rows]


# From the turns of a sample to spans, one function per kind of template.


def dialogue_spans(source: Source, conv: Conversation, keep_empty_answers: bool = False) -> list[Span]:
    """Render a template with a sample's turns; a first turn from "system" replaces the template's system text."""
    turns = [_read_turn(turn, index) for index, turn in enumerate(source)]
    conv = conv.copy()
    first = 0
    if turns and turns[0][0] == _SYSTEM:
        conv = conv.with_system(turns[0][1])
        first = 1
    if len(turns) > first and turns[first][0] == _ANSWER:
        _warn_once("samples that begin with an answer lose it, since nothing was asked")
        first += 1
    if len(turns) == first:
        raise InputError("the sample has no turn from 'human'; give it a question and an answer.")
    conv.messages = []
    for index, (speaker, text) in enumerate(turns[first:]):
        expected = (_QUESTION, _ANSWER)[index % 2]
        if speaker != expected:
            names = " or ".join(repr(name) for name, who in _SPEAKERS.items() if who == expected)
            raise InputError(
                f"turn {first + index + 1} of the sample is from {source[first + index]['from']!r} where {names} is "
                "expected: questions and answers must alternate; merge or drop turns."
            )
        conv.append_message(conv.roles[index % 2], text)
    spans = conv.spans(keep_empty_answers=keep_empty_answers)
    if conv.chat_template is not None and len(turns) > first + 1 and not any(span.trained for span in spans):
        raise InputError(
            f"the chat template in {conv.chat_template.path} rewrites answers, so it is unknown what to train; name a "
            "template of this package (--version)."
        )
    return _without_unwanted(spans, source[first:])


def is_unwanted(turn: SampleTurn) -> bool:
    """Whether a sample says of an answer that it is not to be trained."""
    return turn.get("loss") is False


def _without_unwanted(spans: list[Span], source: Source) -> list[Span]:
    """Mark the spans of answers as not trained where the sample says so; an answer's trained spans lie together."""
    unwanted = [is_unwanted(turn) for turn in source[1::2]]
    if not any(unwanted):
        return spans
    runs = [(trained, list(group)) for trained, group in groupby(spans, key=lambda span: span.trained)]
    if sum(trained for trained, _ in runs) != len(unwanted):
        raise InputError(
            "the sample leaves an answer out of training, and this template joins its answers to other text"
        )
    answers = iter(unwanted)
    return [
        span._replace(trained=False) if trained and leave_out else span
        for trained, group in runs
        for leave_out in [trained and next(answers)]
        for span in group
    ]


def _signal_spans(source: Source, conv: Conversation, keep_empty_answers: bool = False) -> list[Span]:
    """Render turns as the oldest models were trained on them: "### Speaker: text" lines after the system text.

    These models also write the "###" of the next turn, so it is trained even before a question.
    """
    names = {_QUESTION: conv.roles[0], _ANSWER: conv.roles[1]}
    spans = [Span(f"{conv.system}\n\n", False)]
    for index, turn in enumerate(source):
        speaker, text = _read_turn(turn, index, any_speaker=True)
        line = f" {names.get(speaker, 'unknown')}: {text}\n"
        spans += [Span("###", True), Span(line, speaker != _QUESTION and not is_unwanted(turn))]
    return [*spans, Span("### ", True)]


def _caption_spans(source: Source, conv: Conversation, keep_empty_answers: bool = False) -> list[Span]:
    """Render an image placeholder and its caption; any other text of the question is left out."""
    if len(source) != 2:
        raise InputError(
            f"the sample has {len(source)} turns where the plain template pairs one image with one caption; use a "
            "dialogue template for it."
        )
    question, caption = (_read_turn(turn, index)[1] for index, turn in enumerate(source))
    if DEFAULT_IMAGE_TOKEN not in question:
        raise InputError(
            f"the first turn of the sample, {question[:60]!r}, has no {DEFAULT_IMAGE_TOKEN} placeholder, which the plain "
            "template needs; use a dialogue template for it."
        )
    return [Span(DEFAULT_IMAGE_TOKEN, False), Span(caption + conv.sep, True)]


def _read_turn(turn: SampleTurn, index: int, any_speaker: bool = False) -> tuple[str, str]:
    """Check a turn and return its speaker (_QUESTION, _ANSWER, _SYSTEM; "unknown" where any_speaker allows it) and text."""
    if not isinstance(turn, Mapping) or not {"from", "value"} <= turn.keys():
        raise InputError(
            f"turn {index + 1} of the sample is {str(turn)[:60]!r}; a turn needs the keys 'from' and 'value'."
        )
    text = turn["value"]
    if not isinstance(text, str):
        raise InputError(f"turn {index + 1} of the sample has {text!r} where its text is expected.")
    speaker = speaker_of(turn["from"])
    if speaker is None and not any_speaker:
        raise InputError(
            f"turn {index + 1} of the sample is from {turn['from']!r}; known speakers are {', '.join(_SPEAKERS)}."
        )
    return speaker or "unknown", text


@dataclass(frozen=True)
class _Form:
    """How samples of a template are rendered and returned."""

    spans: Callable[[Source, Conversation, bool], list[Span]]
    batch: Callable[[list[list[int]], int | None], torch.Tensor | list[torch.Tensor]]
    always_with_image: bool = False


_DIALOGUE = _Form(dialogue_spans, _pad)
_FORMS = {
    SeparatorStyle.SINGLE: _Form(_signal_spans, _list),
    SeparatorStyle.PLAIN: _Form(_caption_spans, _list, always_with_image=True),
}


# Names that outside code imports. Each takes the template that is the default at the call.


def preprocess_v1(sources: Sequence[Source], tokenizer: Tokenizer, has_image: bool = False) -> LabelledSamples:
    return preprocess(sources, tokenizer, has_image)


preprocess_llama_2 = preprocess_mpt = preprocess_v1


def preprocess_plain(sources: Sequence[Source], tokenizer: Tokenizer) -> LabelledSamples:
    return preprocess(sources, tokenizer, True)


def preprocess_gemma(sources: Sequence[Source], tokenizer: Tokenizer, has_image: bool = False) -> LabelledSamples:
    return preprocess(sources, tokenizer, has_image, conv_templates["gemma_instruct"], keep_empty_answers=True)


def preprocess_qwen(
    sources: Sequence[Source],
    tokenizer: Tokenizer,
    has_image: bool = False,
    max_len: int = 2048,
    system_message: str = "You are a helpful assistant.",
) -> LabelledSamples:
    """Encode samples in Qwen's form; `max_len` has no effect, as in LLaVA-NeXT: the tokenizer's own length counts."""
    conv = conv_templates["qwen_1_5"].with_system(system_message)
    return preprocess(sources, tokenizer, has_image, conv, keep_empty_answers=True)


def preprocess_llama3(
    sources: Sequence[Source],
    tokenizer: Tokenizer,
    has_image: bool = False,
    max_len: int = 2048,
    system_message: str = conv_templates["llava_llama_3"].system,
) -> LabelledSamples:
    """Encode samples in Llama 3's form; `max_len` has no effect, as in LLaVA-NeXT: the tokenizer's own length counts."""
    conv = conv_templates["llava_llama_3"].with_system(system_message)
    return preprocess(sources, tokenizer, has_image, conv, keep_empty_answers=True)
