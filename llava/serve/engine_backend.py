"""The engine in this process as a server's backend.

In: requests from an event loop. Out: chunks for it. What blocks, making a prompt of text and pictures, is done in threads.
"""

from __future__ import annotations

import asyncio
from argparse import Namespace
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from llava.conversation import get_model_name_from_path, get_template
from llava.engine.config import EngineConfig
from llava.engine.engine import Engine
from llava.engine.errors import EngineError, QueueFull
from llava.engine.prompt import prompt_bytes
from llava.engine.request import Chunk, Detail, Request, Result, Timings, Usage
from llava.model.builder import load
from llava.model.config import LlavaSettings
from llava.processor import image_mark
from llava.serve.backend import BackendError, ModelCard, ServerBusyError

if TYPE_CHECKING:
    from llava.engine.handle import RequestHandle
    from llava.geometry import ImageLayout
    from llava.model.builder import LoadedModel


def load_backend(args: Namespace) -> EngineBackend:
    """The backend that a worker's flags ask for."""
    loaded = load(args.model_path, base=args.model_base, device=args.device, dtype=args.dtype)
    config = EngineConfig(
        max_running=args.limit_model_concurrency,
        memory_fraction=args.memory_fraction,
        weights="int8" if args.load_8bit else "int4" if args.load_4bit else None,
    )
    name = args.model_name or get_model_name_from_path(str(args.model_path))
    return EngineBackend(loaded, name=name, conv_mode=args.conv_mode, config=config)


class EngineBackend:
    def __init__(
        self,
        loaded: LoadedModel,
        *,
        name: str,
        conv_mode: str | None = None,
        config: EngineConfig | None = None,
    ) -> None:
        conv_mode = conv_mode or loaded.conv_mode
        template = get_template(conv_mode)
        self.engine = Engine.from_loaded(loaded, config)
        self._loaded = loaded
        self._alone = _TokenTexts(loaded.tokenizer)
        self.card = ModelCard(
            name=name,
            template=template,
            conv_mode=conv_mode,
            context_len=self.engine.context_len,
            image_mark=image_mark(LlavaSettings.from_hf(loaded.model.config)),
            takes_images=loaded.processor is not None,
        )

    async def start(self, request: Request, *, streamed: bool) -> EngineAnswering:
        handing_in = asyncio.ensure_future(asyncio.to_thread(self.engine.submit, request, streamed=streamed))
        try:
            return EngineAnswering(await asyncio.shield(handing_in), streamed)
        except asyncio.CancelledError:  # the thread goes on; what it hands in is of no use any more
            handing_in.add_done_callback(_abort)
            raise
        except QueueFull as error:
            raise ServerBusyError(str(error)) from error
        except EngineError as error:
            raise BackendError(str(error)) from error

    def plan(self, sizes: Sequence[tuple[int, int]], details: Sequence[Detail]) -> list[ImageLayout]:
        assert self._loaded.processor is not None
        return self._loaded.processor.plan(sizes, details)

    def held_bytes(self, layouts: Sequence[ImageLayout]) -> int:
        if not layouts:
            return 0
        side = self._loaded.model.image_policy().tile_size
        return sum(prompt_bytes(layout, side) for layout in layouts)

    def token_text(self, token_id: int) -> str:
        return self._alone[token_id]

    def gauges(self) -> Mapping[str, float]:
        return {f"engine_{name.removeprefix('num_')}": value for name, value in asdict(self.engine.stats()).items()}

    async def is_alive(self) -> bool:
        return self.engine.alive

    async def close(self) -> None:
        await asyncio.to_thread(self.engine.close)


def _abort(handing_in: asyncio.Future[RequestHandle]) -> None:
    if not handing_in.cancelled() and handing_in.exception() is None:
        handing_in.result().abort()


class EngineAnswering:
    """One request on its way in the engine."""

    def __init__(self, handle: RequestHandle, streamed: bool) -> None:
        self._handle = handle
        self._streamed = streamed

    async def batches(self, pause: Callable[[], float]) -> AsyncIterator[Sequence[Chunk]]:
        try:
            async for chunks in self._handle.batches(pause):
                yield chunks
        except EngineError as error:
            raise BackendError(str(error)) from error
        if not self._streamed:
            yield [
                Chunk(whole.index, whole.text, whole.token_ids, whole.logprobs, whole.finish_reason)
                for whole in self._result.completions
            ]

    def abort(self) -> None:
        if not self._handle.done:
            self._handle.abort()

    @property
    def usage(self) -> Usage:
        return self._result.usage

    @property
    def timings(self) -> Timings:
        return self._result.timings

    @property
    def _result(self) -> Result:
        return self._handle.result(timeout=0)


class _TokenTexts(dict[int, str]):
    """The text of each token inside a text, which for many tokenizers is not what the token decodes to by itself."""

    def __init__(self, tokenizer: Any) -> None:
        super().__init__()
        self._tokenizer = tokenizer
        self._before = tokenizer("a", add_special_tokens=False)["input_ids"]

    def __missing__(self, token_id: int) -> str:
        decode = self._tokenizer.decode
        before = decode(self._before, skip_special_tokens=False)
        text = self[token_id] = decode([*self._before, token_id], skip_special_tokens=False)[len(before) :]
        return text
