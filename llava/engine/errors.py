"""What an engine raises, beside InputError for what cannot work. No torch: servers translate these to statuses."""

from __future__ import annotations

from llava.errors import InputError


class EngineError(RuntimeError):
    """The engine could not finish a request; the message says what happened."""


class QueueFull(EngineError):
    """So many requests wait that no more is taken; a server answers 429, a program waits and asks again."""


class EngineClosed(EngineError):
    """The engine was closed before the request was finished, or before it was handed in."""


class Cancelled(EngineError):
    """A request without a partial answer to return was aborted."""


class UnsupportedModelError(InputError):
    """The engine has no arithmetic for this model; `model.generate` has."""
