"""What goes into an engine and what comes out, as values.

In: a `Request`, a conversation or a finished prompt with its images and `SamplingParams`. Out: a `Result` at the end, or
`Chunk`s as text becomes certain; joined, the chunks of a completion are its text. A `ScoreRequest` gives a `Score`, an
`EmbedRequest` an `Embedding`. No torch: servers validate what a client sent by making these values before a model is asked.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, Literal

from llava.conversation import Conversation
from llava.errors import InputError, shortened
from llava.images.frames import Video

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

# "stop": the end token, a stop string or a stop id. "length": the limit of new tokens or of the context.
FinishReason = Literal["stop", "length", "cancelled"]
Detail = Literal["auto", "low"]
Stage = Literal["tower", "projector", "language"]
Pooling = Literal["mean", "last", "none"]
MAX_SEED = 2**63 - 1
MAX_TOP_K = 2**31 - 1
MAX_LOGPROBS = 20
MAX_COMPLETIONS = 128
CONSTRAINTS = ("json_schema", "regex", "grammar")  # fields of `SamplingParams`


@dataclass(frozen=True)
class SamplingDefaults:
    """What a field of `SamplingParams` that is None means for one model: its generation_config, else transformers' default."""

    top_p: float = 1.0
    top_k: int = 50
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    @classmethod
    def of(cls, generation_config: object) -> SamplingDefaults:
        """The defaults of a model with this `GenerationConfig`."""
        named = {entry.name: getattr(generation_config, entry.name, None) for entry in fields(cls)}
        return cls(**{name: value for name, value in named.items() if value is not None})


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are chosen and when an answer ends.

    Without a temperature decoding is greedy: the argmax each time. The four fields that are None by default mean what the
    checkpoint's generation_config.json says, else what transformers' `generate` does (top_k 50), so that every program
    answers alike when asked alike.
    """

    temperature: float = 0.0  # 0: greedy
    top_p: float | None = None  # keep the most likely tokens that together have this much probability
    top_k: int | None = None  # keep this many of the most likely tokens; 0 keeps all
    min_p: float | None = None  # keep tokens with at least this share of the most likely one's probability
    repetition_penalty: float | None = (
        None  # divides positive logits of tokens in prompt or answer (Keskar et al. 2019)
    )
    presence_penalty: float = 0.0  # subtracted once from the logit of each token already in the answer
    frequency_penalty: float = 0.0  # subtracted for every occurrence of a token in the answer
    num_beams: int = 1  # beam search, by `model.generate` only; the answer comes in one piece
    logit_bias: Mapping[int, float] = field(default_factory=dict)  # added to logits, by token id
    seed: int | None = None  # the same seed gives the same answer, whatever else runs
    max_new_tokens: int = 512
    min_new_tokens: int = 0  # until then no end token is sampled and no stop string ends the answer
    stop: tuple[str, ...] = ()  # strings that end the answer and are not part of it
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False  # go on after the end token, for measurements
    keep_space: bool = False  # keep blank space around the answer, as what continues a text needs
    logprobs: int | None = None  # how many alternatives to report beside each token; None reports nothing
    n: int = 1  # completions of one prompt, each with its own random numbers
    json_schema: str | Mapping[str, Any] | None = None  # the answer is JSON that this schema allows
    regex: str | None = None  # the answer matches this expression as a whole
    grammar: str | None = None  # the answer matches this grammar, in llguidance's form of Lark

    def __post_init__(self) -> None:
        self._check_types()
        _require(0 <= self.temperature < math.inf, "temperature", self.temperature, "0 (greedy) or more")
        if self.top_p is not None:
            _require(0 < self.top_p <= 1, "top_p", self.top_p, "above 0 and at most 1")
        if self.top_k is not None:
            _require(0 <= self.top_k <= MAX_TOP_K, "top_k", self.top_k, f"0 (all tokens) to {MAX_TOP_K}")
        if self.min_p is not None:
            _require(0 <= self.min_p <= 1, "min_p", self.min_p, "0 to 1")
        if self.repetition_penalty is not None:
            _require(0 < self.repetition_penalty < math.inf, "repetition_penalty", self.repetition_penalty, "above 0")
        _require(self.num_beams >= 1, "num_beams", self.num_beams, "1 or more")
        for name in ("presence_penalty", "frequency_penalty"):
            _require(-2 <= getattr(self, name) <= 2, name, getattr(self, name), "-2 to 2")
        for token, bias in self.logit_bias.items():
            _require(token >= 0, "logit_bias", token, "token ids from 0")
            _require(-100 <= bias <= 100, f"logit_bias of token {token}", bias, "-100 to 100")
        if self.seed is not None:
            _require(0 <= self.seed <= MAX_SEED, "seed", self.seed, f"0 to {MAX_SEED}")
        _require(self.max_new_tokens >= 1, "max_new_tokens", self.max_new_tokens, "1 or more")
        _require(
            0 <= self.min_new_tokens <= self.max_new_tokens,
            "min_new_tokens", self.min_new_tokens, f"0 to max_new_tokens ({self.max_new_tokens})",
        )  # fmt: skip
        for text in self.stop:
            _require(bool(text), "stop", text, "strings with at least one character")
        for token in self.stop_token_ids:
            _require(token >= 0, "stop_token_ids", token, "token ids from 0")
        if self.logprobs is not None:
            _require(0 <= self.logprobs <= MAX_LOGPROBS, "logprobs", self.logprobs, f"0 to {MAX_LOGPROBS}")
        _require(1 <= self.n <= MAX_COMPLETIONS, "n", self.n, f"1 to {MAX_COMPLETIONS}")
        given = [name for name in CONSTRAINTS if getattr(self, name) is not None]
        if len(given) > 1:
            raise InputError(f"{' and '.join(given)} exclude each other; give one of them")

    def _check_types(self) -> None:
        """Refuse values of another type, which would fail in the middle of a step; take numpy's numbers and lists as ours."""
        for name, make in _FIELD_TYPES.items():
            value = getattr(self, name)
            if value is not None or name not in _OPTIONAL:
                object.__setattr__(self, name, make(name, value))

    @classmethod
    def given(cls, **values: Any) -> SamplingParams:
        """Build from what a user gave, by flags or JSON; a value of None was not given."""
        return cls(**{name: value for name, value in values.items() if value is not None})

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    @property
    def is_constrained(self) -> bool:
        """Whether the answer must match something."""
        return any(getattr(self, name) is not None for name in CONSTRAINTS)

    def resolved(self, defaults: SamplingDefaults) -> SamplingParams:
        """The same with the model's defaults for what is None."""
        missing = {name: value for name, value in vars(defaults).items() if getattr(self, name) is None}
        return replace(self, **missing)


def _require(holds: bool, name: str, value: object, allowed: str) -> None:
    """NaN fails every comparison, so it is refused too."""
    if not holds:
        raise InputError(f"{name} is {value!r}; allowed is {allowed}")


def _integer(name: str, value: object) -> int:
    if not isinstance(value, numbers.Integral) or isinstance(value, bool):
        raise InputError(f"{name} is {shortened(repr(value))}; it must be an integer")
    return int(value)


def _number(name: str, value: object) -> float:
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        raise InputError(f"{name} is {shortened(repr(value))}; it must be a number")
    return value if isinstance(value, (int, float)) else float(value)


def _truth(name: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise InputError(f"{name} is {shortened(repr(value))}; it must be True or False")
    return value


def _text(name: str, value: object) -> str:
    if not isinstance(value, str):
        raise InputError(f"{name} is {shortened(repr(value))}; it must be a string")
    return value


def _schema(name: str, value: object) -> str | Mapping[str, Any]:
    if not isinstance(value, (str, Mapping)):
        raise InputError(f"{name} is {shortened(repr(value))}; it must be a string of JSON, or a mapping")
    return value


def _items(name: str, value: object) -> tuple[object, ...]:
    if isinstance(value, (str, bytes, Mapping)) or not isinstance(value, Iterable):
        raise InputError(f"{name} is {shortened(repr(value))}; it must be a list")
    return tuple(value)


def _texts(name: str, value: object) -> tuple[str, ...]:
    """One string is one string, not its letters."""
    return (value,) if isinstance(value, str) else tuple(_text(name, text) for text in _items(name, value))


def _integers(name: str, value: object) -> tuple[int, ...]:
    return tuple(_integer(name, number) for number in _items(name, value))


def _biases(name: str, value: object) -> dict[int, float]:
    if not isinstance(value, Mapping):
        raise InputError(f"{name} is {shortened(repr(value))}; it must be a mapping from token ids to numbers")
    return {_integer(name, token): _number(f"{name} of token {token}", bias) for token, bias in value.items()}


_OPTIONAL = ("top_p", "top_k", "min_p", "repetition_penalty", "seed", "logprobs", "json_schema", "regex", "grammar")
_FIELD_TYPES: dict[str, Callable[[str, object], object]] = {
    **dict.fromkeys(
        ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty"), _number
    ),
    **dict.fromkeys(("top_k", "num_beams", "seed", "max_new_tokens", "min_new_tokens", "logprobs", "n"), _integer),
    **dict.fromkeys(("ignore_eos", "keep_space"), _truth),
    **dict.fromkeys(("regex", "grammar"), _text),
    "logit_bias": _biases,
    "stop": _texts,
    "stop_token_ids": _integers,
    "json_schema": _schema,
}


def _check_prompt(name: str, value: object) -> None:
    """A conversation, a text, or token ids in a list or in an array of one dimension."""
    if isinstance(value, (Conversation, str)):
        return
    ids = value.tolist() if hasattr(value, "tolist") else value  # numpy's and torch's
    _integers(name, ids)


def _check_images(images: object) -> None:
    for number, image in enumerate(_items("images", images), start=1):
        is_image = hasattr(image, "convert") and hasattr(image, "mode") and hasattr(image, "size")
        if not (is_image or isinstance(image, Video)):
            remedy = "PIL.Image.fromarray makes one of an array, llava.images.io.load_image one of a file or URL"
            raise InputError(f"image {number} is {shortened(repr(image))}, and not an image of PIL; {remedy}")


def _check_adapter(name: object) -> None:
    if name is not None:
        _text("adapter", name)


def _check_details(details: object) -> None:
    for detail in _texts("details", details):
        _require(detail in ("auto", "low"), "details", detail, "auto and low")


class PromptTooLongError(InputError):
    """A prompt leaves no room for even one new token."""


@dataclass(frozen=True)
class PromptSize:
    """How many positions of the context a prompt takes."""

    num_text_tokens: int
    num_image_tokens: int

    @property
    def total(self) -> int:
        return self.num_text_tokens + self.num_image_tokens

    def room(self, context_len: int, wanted: int) -> int:
        """How many of `wanted` new tokens fit after the prompt; an error when not even one does."""
        if self.total >= context_len:
            raise PromptTooLongError(
                f"the prompt is too long: {self.num_text_tokens} text tokens and {self.num_image_tokens} image tokens "
                f"make {self.total}, and the model's context holds {context_len} with at least one new token; "
                "shorten the question, start a new conversation, or give fewer images or frames"
            )
        return min(wanted, context_len - self.total)


@dataclass(frozen=True)
class Request:
    """One prompt and how to answer it.

    Args:
        prompt: A conversation whose last turn is unanswered, a finished prompt, or token ids with -200 for each image.
        images: Images of Pillow, or videos (`llava.images.video.load_video`); one for each `<image>` of the prompt.
        sampling: How tokens are chosen.
        request_id: Unique among those running; made up where it is None.
        details: One for each image, or none; "low" asks for the overview tile alone of a model that cuts into tiles.
        client: Who asks; where many wait, the clients take turns.
        adapter: The name of a LoRA adapter that the engine has loaded; None: the model as it is.
    """

    prompt: Conversation | str | Sequence[int]
    images: Sequence[Image.Image | Video] = ()
    sampling: SamplingParams = field(default_factory=SamplingParams)
    request_id: str | None = None
    details: Sequence[Detail] = ()
    client: str = ""
    adapter: str | None = None

    def __post_init__(self) -> None:
        _check_adapter(self.adapter)
        _check_prompt("prompt", self.prompt)
        _check_images(self.images)
        if not isinstance(self.sampling, SamplingParams):
            raise InputError(f"sampling is {shortened(repr(self.sampling))}; it must be SamplingParams")
        if self.request_id is not None:
            _text("request_id", self.request_id)
        _check_details(self.details)


@dataclass(frozen=True)
class TokenLogprob:
    """A token's log probability, and the most likely alternatives as (token id, log probability)."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Usage:
    """What a request cost, in tokens."""

    num_text_tokens: int  # of the prompt
    num_image_tokens: int  # of the prompt
    num_cached_tokens: int  # of the prompt, taken from the prefix cache
    num_new_tokens: int  # of all completions

    @property
    def num_prompt_tokens(self) -> int:
        return self.num_text_tokens + self.num_image_tokens


@dataclass(frozen=True)
class Timings:
    """Seconds since the request was submitted."""

    queued_s: float  # until its first step began
    first_token_s: float | None  # None when it was cancelled before
    total_s: float


@dataclass(frozen=True)
class Chunk:
    """Text and tokens of a completion that will not change. The last chunk of each completion has the finish reason.

    `text` may be empty where tokens came whose text is not certain yet, and in the last chunk.
    """

    index: int  # which of the request's n completions
    text: str
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: FinishReason | None = None
    stop_string: str | None = None  # the one that ended the completion


@dataclass(frozen=True)
class Completion:
    """A finished completion: its chunks, joined."""

    index: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...]  # empty unless asked for
    finish_reason: FinishReason
    stop_string: str | None = None  # the one that ended it


@dataclass(frozen=True)
class Result:
    """A finished request."""

    request_id: str
    completions: tuple[Completion, ...]
    usage: Usage
    timings: Timings

    @property
    def text(self) -> str:
        """The text of the first completion, which is the only one unless `n` is more."""
        return self.completions[0].text


@dataclass(frozen=True)
class ScoreRequest:
    """How probable `continuation` (text, or token ids) is after `prompt`. Nothing is sampled.

    Text is tokenized together with the prompt's where that leaves the prompt's tokens as they are, as a model would have
    seen it; mind the space before a first word. `num_top` most likely tokens are reported at each position.
    """

    prompt: Conversation | str | Sequence[int]
    continuation: str | Sequence[int]
    images: Sequence[Image.Image | Video] = ()
    num_top: int = 0
    request_id: str | None = None
    client: str = ""  # as in `Request`
    adapter: str | None = None  # likewise

    def __post_init__(self) -> None:
        _check_adapter(self.adapter)
        _check_prompt("prompt", self.prompt)
        _check_prompt("continuation", self.continuation)
        _check_images(self.images)
        _require(
            0 <= _integer("num_top", self.num_top) <= MAX_LOGPROBS, "num_top", self.num_top, f"0 to {MAX_LOGPROBS}"
        )


@dataclass(frozen=True)
class Score:
    """The tokens of a continuation, each one's log probability, and whether greedy decoding would have given them all.

    `tops` has for each position the most likely tokens as (token id, log probability), where they were asked for.
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    is_greedy: bool
    usage: Usage
    tops: tuple[tuple[tuple[int, float], ...], ...] = ()

    @property
    def total_logprob(self) -> float:
        return math.fsum(self.logprobs)


STAGES: tuple[Stage, ...] = ("tower", "projector", "language")
POOLINGS: tuple[Pooling, ...] = ("mean", "last", "none")
SPANS = ("all", "text", "images")


@dataclass(frozen=True)
class EmbedRequest:
    """Asks for the vectors behind an answer. Nothing is sampled.

    Args:
        prompt: As in `Request`; None is the images alone, which is all that stages before "language" look at.
        images: As many as the prompt has `<image>` placeholders.
        stage: "tower" is what the vision tower gives the projector, tile after tile, (tiles x patches, V); "projector" is
            the image features that enter the language model; "language" is its hidden states, (positions, D).
        layer: Which hidden states, counted as transformers' `output_hidden_states` does: 0 enters the first layer, k leaves
            the k-th one, and the last is behind the final norm. Negative numbers count from the end.
        span: The positions that are taken: "all", "text", "images", or (start, stop), where image features are in place.
        pooling: One vector, the "mean" of these positions or the "last" of them; "none" gives each its own.
        normalize: Scale every vector to length 1.
        request_id: As in `Request`.
        details: As in `Request`.
        client: As in `Request`.
        adapter: As in `Request`.
    """

    prompt: Conversation | str | Sequence[int] | None = None
    images: Sequence[Image.Image | Video] = ()
    stage: Stage = "language"
    layer: int = -1
    span: Literal["all", "text", "images"] | tuple[int, int] = "all"
    pooling: Pooling = "mean"
    normalize: bool = False
    request_id: str | None = None
    details: Sequence[Detail] = ()
    client: str = ""
    adapter: str | None = None

    def __post_init__(self) -> None:
        _check_adapter(self.adapter)
        _check_images(self.images)
        _check_details(self.details)
        _require(self.stage in STAGES, "stage", self.stage, ", ".join(STAGES))
        _require(self.pooling in POOLINGS, "pooling", self.pooling, ", ".join(POOLINGS))
        _truth("normalize", self.normalize)
        _integer("layer", self.layer)
        if self.prompt is not None:
            _check_prompt("prompt", self.prompt)
        if not isinstance(self.span, str):
            object.__setattr__(self, "span", _integers("span", self.span))
            _require(
                len(self.span) == 2 and 0 <= self.span[0] < self.span[1], "span", self.span, "start < stop, from 0"
            )
        else:
            _require(self.span in SPANS, "span", self.span, f"{', '.join(SPANS)}, or (start, stop)")
        if not self.images and (self.prompt is None or self.stage != "language"):
            raise InputError("there is nothing to embed: give images, or a prompt for the stage 'language'")
        if self.stage != "language" and (self.prompt is not None or self.span != "all" or self.layer != -1):
            raise InputError(
                f"the stage {self.stage!r} looks at images alone; leave out prompt, span and layer, or take 'language'"
            )


@dataclass(frozen=True)
class Embedding:
    """Vectors (n, D) in float32: one where they were pooled, else one for each position, in order."""

    vectors: np.ndarray
    usage: Usage
