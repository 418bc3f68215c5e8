"""One answer of an engine in the form that the chat programs read: an iterator of text, and after its end an `Answer`.

In: an engine and a request. Out: an `EngineStream`, which is used as hf_engine.py's `AnswerStream` is.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from llava.engine.hf_engine import Answer, Sampling

if TYPE_CHECKING:
    from llava.engine.engine import Engine
    from llava.engine.request import Request, SamplingParams

DEFAULT_TOP_K = 50  # what transformers' `generate` keeps when it samples and nobody says otherwise


def sampling_params(sampling: Sampling) -> SamplingParams:
    """The same choice of tokens as `generate` makes for these settings; beams are not among them."""
    from llava.engine.request import SamplingParams

    return SamplingParams(
        temperature=sampling.temperature,
        top_p=1.0 if sampling.top_p is None else sampling.top_p,
        top_k=DEFAULT_TOP_K if sampling.temperature > 0 else 0,
        max_new_tokens=sampling.max_new_tokens,
    )


class EngineStream:
    """Iterator of text pieces, never empty; joined they are `answer.text`. Leaving a `with` block early cancels."""

    def __init__(self, engine: Engine, request: Request) -> None:
        self._handle = engine.stream(request)
        self.size, self.max_new_tokens = self._handle.size, self._handle.max_new_tokens
        self._pieces = (chunk.text for chunk in self._handle if chunk.text)

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        return next(self._pieces)

    def cancel(self) -> None:
        """Stop after the token that is being computed; what has come so far stays."""
        self._handle.abort()

    def __enter__(self) -> EngineStream:
        return self

    def __exit__(self, *exception: object) -> None:
        self.cancel()
        self._handle.wait_until_done()

    @property
    def answer(self) -> Answer:
        """The whole answer, once the stream has ended or was cancelled; waits for that."""
        result = self._handle.result()
        completion = result.completions[0]
        return Answer(
            text=completion.text,
            finish_reason=completion.finish_reason,
            token_ids=completion.token_ids,
            first_token_s=result.timings.first_token_s,
            total_s=result.timings.total_s,
        )
