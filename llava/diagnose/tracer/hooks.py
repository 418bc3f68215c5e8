"""Forward hooks that record what a model does: `with trace(model) as t:`.

In: a model, perhaps its tokenizer. Out: a `Trace` (record.py). Hooks of torch and wrappers around three methods of this
one model are installed at the beginning of the block and removed at its end; an untraced model has no overhead. The hooks
themselves are in hooks_vision.py and hooks_sequence.py; the points around the model (prompt, ids, text; samples, labels,
optimizer) are added by generation.py and training.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from llava.diagnose.tracer.hooks_sequence import generate_hook, hook_language_model, logits_hook, splice_hook
from llava.diagnose.tracer.hooks_vision import hook_projector, hook_tower, image_features_hook, pixels_hook
from llava.diagnose.tracer.record import Trace
from llava.errors import InputError
from llava.model.protocols import LlavaModel
from llava.text.tokenization import Tokenizer


@contextmanager
def trace(model: LlavaModel, tokenizer: Tokenizer | None = None, *, break_at: str | None = None) -> Iterator[Trace]:
    """Record every forward pass of a LLaVA model within the block.

    Without a tokenizer, tokens are shown as ids. `break_at` is the point (a key of `POINTS`) at which to open pdb.

    Raises:
        InputError: If the model is not one of this package, or there is no such point.
    """
    if not hasattr(model, "get_vision_tower"):
        raise InputError(f"a {type(model).__name__} is not a model of this package; load it with llava.load")
    record = Trace(model, tokenizer, break_at=break_at)
    with install_hooks(record):
        yield record


@contextmanager
def install_hooks(record: Trace) -> Iterator[None]:
    """Install the hooks of a trace for the duration of the block."""
    model = record.model
    inner, tower = model.get_model(), model.get_vision_tower()
    with ExitStack() as stack:

        def keep(handle: RemovableHandle) -> None:
            stack.callback(handle.remove)

        if tower is not None:
            keep(tower.register_forward_pre_hook(pixels_hook(record, tower.tile_size)))
            for module in (tower, inner.mm_projector):
                _time(record, module, "vision tower" if module is tower else "projector", keep)
            hook_tower(record, tower, keep)  # after the timers, so that the hook's own work is not timed
            hook_projector(record, inner.mm_projector, keep)
            wrap(stack, model, "image_features", image_features_hook(record))
            wrap(stack, model, "_splice_batch", splice_hook(record))
        hook_language_model(record, inner, keep)
        head = model.get_output_embeddings()
        if head is not None:
            keep(head.register_forward_hook(logits_hook(record)))
        forget = partial(record.observations.pop, "first_tokens", None)
        wrap(stack, model, "generate", generate_hook(record), before=forget)
        yield


def _time(record: Trace, module: nn.Module, name: str, keep: Callable[[RemovableHandle], None]) -> None:
    started: list[float] = []
    keep(module.register_forward_pre_hook(lambda *_: started.append(record.clock())))
    keep(module.register_forward_hook(lambda *_: record.end_stage(name, started.pop())))


def wrap(
    stack: ExitStack,
    owner: object,
    name: str,
    callback: Callable[..., None],
    *,
    before: Callable[[], object] | None = None,
    timed: tuple[Trace, str] | None = None,
) -> None:
    """Replace `owner.name` until the stack is closed by a function that also calls `callback(result, *args, **kwargs)`.

    `owner` is a module object, a class or an `nn.Module`. `before` is called before the original function; `timed` is a trace
    and the name of the stage that it is recorded as.
    """
    original = getattr(owner, name)

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        if before is not None:
            before()
        with timed[0].stage(timed[1]) if timed is not None else nullcontext():
            result = original(*args, **kwargs)
        callback(result, *args, **kwargs)
        return result

    setattr(owner, name, wrapper)
    if isinstance(owner, nn.Module):  # the class has the method; the wrapper hides it on this one object
        stack.callback(delattr, owner, name)
    else:
        stack.callback(setattr, owner, name, original)
