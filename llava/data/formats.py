"""Convert training samples of published forms to LLaVA's own.

In: a record of a file, of a form that `FORMS` lists. Out: `ReadRecord`: a sample of LLaVA's form, `{"id", "image",
"conversations": [{"from", "value"}]}`, and what of the record was not read; or an `InputError` about the record's form.
Turns are read in turns.py, images and videos in media.py; train/data.py and validate.py check a sample's text and images;
index.py finds records in files.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from llava.constants import DEFAULT_IMAGE_TOKEN
from llava.data.fields import ID_NAMES, Fields, is_nothing
from llava.data.media import MediaSource, VideoSource, is_plain, read_media, read_videos
from llava.data.turns import GPT, HUMAN, SYSTEM, VIDEO_TOKEN, Turns
from llava.errors import InputError, shortened

Sample = dict[str, Any]

IMAGES = ("image", "images", "image_path", "image_paths", "image_file", "img", "img_path", "file_name")
VIDEOS = ("video", "videos", "video_path")
SOUNDS = ("audio", "audios", "sound", "speech")
QUESTIONS = ("query", "question", "instruction", "prompt")
ANSWERS = ("response", "answer", "output", "completion", "multiple_choice_answer", "chosen", "answers")
CAPTIONS = ("caption", "captions", "text")
# Fields that say how a sample is to be trained, and that supervised training has no use for.
MEANT_FOR_OTHERS = (
    "rejected", "rejected_response", "rejected_answer", "rejected_messages", "tools", "functions", "objects",
    "loss", "train", "weight", "loss_weight", "loss_scale", "loss_mask", "reward",
)  # fmt: skip


def is_lost(note: str) -> bool:
    """Whether a note of `ReadRecord` says that something is lost that the sample was meant to teach."""
    return any(note == _unread(name) for name in MEANT_FOR_OTHERS)


def _unread(name: str) -> str:
    return f"the key {name!r} is not read"


class ReadRecord(NamedTuple):
    """A sample, and a sentence for each thing in its record that was not read as it stands there."""

    sample: Sample
    notes: tuple[str, ...] = ()


class SampleForm(NamedTuple):
    """A form of records: the groups of fields of which a record has one each, and how it is read.

    Attributes:
        places_images: Its texts need no placeholders; without any, images come before the first question.
    """

    name: str
    fields: tuple[tuple[str, ...], ...]
    read: Callable[[Fields, Turns], None]
    places_images: bool = True

    def fits(self, fields: Fields) -> bool:
        return all(fields.has(*names) for names in self.fields)


def to_sample(record: object) -> Sample:
    """Convert a record to LLaVA's form; one that has it is returned as it is."""
    return read_record(record).sample


def read_record(record: object) -> ReadRecord:
    """Convert a record, and say what of it is not read.

    Raises:
        InputError: it has none of the known forms, or is a broken one.
    """
    if not isinstance(record, dict):
        raise InputError(f"it is not an object but {shortened(repr(record), 60)}; {_KNOWN}")
    if _is_own(record):
        unread = [name for name in record if name not in _OWN_KEYS and not is_nothing(record[name])]
        return ReadRecord(record, tuple(map(_unread, unread)))
    fields = Fields(record)
    form = next((form for form in FORMS if form.fits(fields)), None)
    if form is None:
        if any(record.get(name) == [] for name in ("conversations", "messages")):
            raise InputError("it has no turns")
        raise InputError(f"it has the keys {shortened(', '.join(map(repr, record)), 120)}; {_KNOWN}")
    turns = Turns()
    form.read(fields, turns)
    turns.begin_with_system(fields.text("system", "system_prompt"))
    if not turns.turns:
        raise InputError("it has no turns")
    media = _media(fields, turns)
    if media and form.places_images:
        _place(turns, media)
    sample: Sample = {"conversations": turns.turns}
    name = fields.first(*ID_NAMES)
    if name is not None:
        sample["id"] = name
    if media:
        sample["image"] = media
    return ReadRecord(sample, _notes(fields, turns.notes))


def media_sources(sample: Sample) -> list[MediaSource]:
    """List the images and videos of a sample in LLaVA's form, in the order of their placeholders."""
    image = sample.get("image")
    if not image:
        return []
    return list(image) if isinstance(image, (list, tuple)) else [image]


def num_words(sample: Sample) -> int:
    """Count the words of all turns, as samplers do."""
    return sum(len(turn["value"].split()) for turn in sample["conversations"])


# LLaVA's own form


_OWN_SPEAKERS = frozenset((HUMAN, GPT, SYSTEM, "user", "assistant"))
_OWN_KEYS = frozenset(("conversations", "image", *ID_NAMES))
_OTHER_KEYS = frozenset((*IMAGES, *VIDEOS, *SOUNDS, "system", "system_prompt", "messages")) - _OWN_KEYS


def _is_own(record: Mapping[str, object]) -> bool:
    """Whether a record needs no conversion. Most records do not, so this takes little time."""
    turns, image = record.get("conversations"), record.get("image")
    if not isinstance(turns, list) or not turns or (image and not is_plain(image)):
        return False
    if any(record[name] for name in record.keys() & _OTHER_KEYS):
        return False
    last = None
    for turn in turns:
        if not isinstance(turn, dict) or len(turn) != 2:
            return False
        speaker, text = turn.get("from"), turn.get("value")
        if not isinstance(speaker, str) or not isinstance(text, str):
            return False
        if speaker not in _OWN_SPEAKERS and speaker.lower() not in _OWN_SPEAKERS:
            return False
        if speaker == last == HUMAN:
            return False
        last = speaker
    return True


# What stands beside the turns


def _media(fields: Fields, turns: Turns) -> list[MediaSource]:
    """The images and videos of a record, in the order of their placeholders, which all become `<image>`."""
    if fields.has(*SOUNDS):
        raise InputError("it has a sound, which no model here hears; leave the sample out")
    beside: dict[str, list[MediaSource]] = {
        DEFAULT_IMAGE_TOKEN: _listed(fields, IMAGES, read_media),
        VIDEO_TOKEN: _listed(fields, VIDEOS, read_videos),
    }
    found = beside[DEFAULT_IMAGE_TOKEN] + beside[VIDEO_TOKEN]
    if found and turns.media:
        raise InputError("it names images both in its turns and beside them; use one of the two places")
    if beside[VIDEO_TOKEN] and beside[DEFAULT_IMAGE_TOKEN]:
        found = _in_order(beside, turns)
    found = turns.media or found
    if any(isinstance(media, VideoSource) for media in found):
        for turn in turns.turns:
            turn["value"] = str(turn["value"]).replace(VIDEO_TOKEN, DEFAULT_IMAGE_TOKEN)
    return found


def _listed(
    fields: Fields, names: Sequence[str], read: Callable[[object, str], Sequence[MediaSource]]
) -> list[MediaSource]:
    value = fields.parsed(*names)
    name = next((name for name in names if fields.has(name)), names[0])
    return [] if value is None else list(read(value, name))


def _in_order(beside: Mapping[str, list[MediaSource]], turns: Turns) -> list[MediaSource]:
    """Images and videos as their placeholders follow each other."""
    left = {token: list(media) for token, media in beside.items()}
    found: list[MediaSource] = []
    for turn in turns.turns:
        for piece in str(turn["value"]).split("<"):
            token = f"<{piece.partition('>')[0]}>"
            if left.get(token):
                found.append(left[token].pop(0))
    if any(left.values()):
        raise InputError(
            f"it has images and videos, and not one {DEFAULT_IMAGE_TOKEN} for each image and one {VIDEO_TOKEN} for each video"
        )
    return found


def _place(turns: Turns, media: Sequence[MediaSource]) -> None:
    """Put placeholders before the first question where no turn has any."""
    if any(DEFAULT_IMAGE_TOKEN in str(turn["value"]) for turn in turns.turns):
        return
    question = next((turn for turn in turns.turns if turn["from"] == HUMAN), None)
    if question is not None:
        placeholders = "\n".join([DEFAULT_IMAGE_TOKEN] * len(media))
        question["value"] = f"{placeholders}\n{question['value']}" if question["value"] else placeholders


def _notes(fields: Fields, found: Sequence[str]) -> tuple[str, ...]:
    unread = [_unread(name) for name in fields.unread(ID_NAMES)]
    return tuple(dict.fromkeys([*found, *unread]))


# Forms, the first that fits


def _from_conversations(fields: Fields, turns: Turns) -> None:
    turns.extend(fields.parsed("conversations"), "conversations")


def _from_messages(fields: Fields, turns: Turns) -> None:
    turns.extend(fields.parsed("messages"), "messages")


def _from_texts(fields: Fields, turns: Turns) -> None:
    turns.extend(fields.parsed("texts"), "texts")


def _from_answer(fields: Fields, turns: Turns) -> None:
    """A question and an answer, each a text or a list of turns; earlier rounds may stand under "history"."""
    if fields.has("history"):
        turns.extend(fields.parsed("history"), "history")
    question, more = fields.parsed(*QUESTIONS), fields.text("input")
    if isinstance(question, str):
        turns.add(HUMAN, f"{question}\n{more}" if more else question)
    else:
        turns.extend(question, next(name for name in QUESTIONS if fields.has(name)))
    answer = fields.parsed(*ANSWERS)
    if _is_messages(answer):
        rest = list(answer)  # type: ignore[call-overload]
        given = list(question) if isinstance(question, list) else []
        turns.extend(rest[len(given) :] if rest[: len(given)] == given else rest, "completion")
    else:
        turns.add(GPT, _one_answer(answer))


def _from_chosen(fields: Fields, turns: Turns) -> None:
    """The better one of two conversations."""
    turns.extend(fields.parsed("chosen"), "chosen")


def _from_caption(fields: Fields, turns: Turns) -> None:
    caption = fields.parsed(*CAPTIONS)
    if isinstance(caption, list):
        if len(caption) > 1:
            turns.notes.append("of several captions only the first is read")
        caption = caption[0] if caption else None
    if not isinstance(caption, str):
        raise InputError(f"its caption is {shortened(repr(caption), 60)} where a text is expected")
    turns.ask("", caption)


def _is_messages(value: object) -> bool:
    """Whether an answer is a list of turns, not of the answers that several people gave."""
    return isinstance(value, list) and all(
        isinstance(turn, Mapping) and ("role" in turn or "from" in turn) for turn in value
    )


def _one_answer(value: object) -> str:
    """One answer of several people's: the most frequent, of equally frequent ones the first."""
    if isinstance(value, list):
        texts = [entry.get("answer", entry.get("text")) if isinstance(entry, Mapping) else entry for entry in value]
        common = Counter(text for text in texts if isinstance(text, str)).most_common(1)
        value = common[0][0] if common else None
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str):
        raise InputError(f"its answer is {shortened(repr(value), 60)} where a text is expected")
    return value


FORMS = (
    SampleForm("LLaVA, ShareGPT", (("conversations",),), _from_conversations, places_images=False),
    SampleForm("OpenAI, ms-swift, LLaMA-Factory", (("messages",),), _from_messages),
    SampleForm("The Cauldron, FineVision", (("texts",),), _from_texts),
    SampleForm("question and answer", (QUESTIONS, ANSWERS), _from_answer),
    SampleForm("chosen conversation", (("chosen",),), _from_chosen),
    SampleForm("caption", (IMAGES + VIDEOS, CAPTIONS), _from_caption),
)
_KNOWN = (
    "known are 'conversations', 'messages', 'texts', a question with an answer, an image with a caption (docs/data.md)"
)
