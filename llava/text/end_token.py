"""Compare the text that ends an answer in a template with a tokenizer's vocabulary.

In: a template, a tokenizer. Out: the token that a model learns to stop with, or what the template says where the vocabulary has
no such token: spelt out in several tokens, no model stops at it. Templates are in conversation.py.
"""

from __future__ import annotations

from llava.conversation import Conversation, answer_end
from llava.text.tokenization import Tokenizer


def end_token_id(conv: Conversation, tokenizer: Tokenizer) -> int | None:
    """The id of the token that ends an answer; None where it is a text of several tokens."""
    return tokenizer.get_vocab().get(answer_end(conv))


def missing_end_token(conv: Conversation, tokenizer: Tokenizer) -> str | None:
    """The text that ends an answer, where it looks like a special token and the vocabulary has none."""
    end = answer_end(conv)
    if not (end.startswith("<") and end.endswith(">")):
        return None
    known = end_token_id(conv, tokenizer)
    return end if known is None or known == tokenizer.unk_token_id else None
