"""Gradio's application, whose failed events are a line of the log each.

In: events of browsers, which may be anything. Out: what Gradio makes of them; where that fails, a sentence for the visitor and
one line for the operator, with the traceback at the level debug. page.py lays out what is in it.
"""

from __future__ import annotations

import logging
import traceback
from typing import Any

import gradio as gr

from llava.errors import shortened

logger = logging.getLogger("llava.serve")

FAILED = "The page could not do that; load it again. The server's log says why."


class PageBlocks(gr.Blocks):
    async def process_api(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        try:
            return await super().process_api(*args, **kwargs)
        except Exception as error:
            *_, place = traceback.extract_tb(error.__traceback__)
            reason = shortened(" ".join(f"{type(error).__name__}: {error}".split()), 300)
            logger.error("an event of the page failed: %s (%s, line %s)", reason, place.filename, place.lineno)
            logger.debug("its traceback", exc_info=error)
            message = error.message if isinstance(error, gr.Error) else FAILED
            raise gr.Error(message, print_exception=False) from error
