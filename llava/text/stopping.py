"""A stopping criterion for transformers' `generate`: stop at a keyword.

In: the keywords, the tokenizer and the prompt's ids, then at every step the ids so far. Out: for each row whether it is
done. Which texts end an answer of a template is in conversation.py (`stop_string`, `answer_end`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from llava.text.tokenization import Tokenizer


class KeywordsStoppingCriteria:
    """Done when the ids end with a keyword's ids, or the newest tokens' text holds a keyword.

    Works with ids that repeat the prompt and with ids of new tokens only (what `generate` passes when it was given
    embeddings). A batch is done when all of its rows are.
    """

    def __init__(self, keywords: Sequence[str], tokenizer: Tokenizer, input_ids: torch.Tensor) -> None:
        self.keywords = [keyword for keyword in keywords if keyword]  # an empty text would stop at once
        self.tokenizer = tokenizer
        self.keyword_ids = [torch.tensor(self._ids_of(keyword)) for keyword in self.keywords]
        self.max_keyword_len = max((len(ids) for ids in self.keyword_ids), default=0)
        self.prompt = input_ids
        self.start_len = input_ids.shape[1]

    def _ids_of(self, keyword: str) -> list[int]:
        ids = self.tokenizer(keyword).input_ids
        return ids[1:] if len(ids) > 1 and ids[0] == self.tokenizer.bos_token_id else ids

    def __call__(self, output_ids: torch.Tensor, scores: object = None, **kwargs: object) -> torch.Tensor:
        num_new = output_ids.shape[1] - (self.start_len if self._repeats_prompt(output_ids) else 0)
        done = [self._is_done(row, num_new) for row in output_ids]
        return torch.tensor(done, dtype=torch.bool, device=output_ids.device)

    def _repeats_prompt(self, output_ids: torch.Tensor) -> bool:
        head = output_ids[:: max(1, len(output_ids) // len(self.prompt)), : self.start_len]
        return head.shape == self.prompt.shape and torch.equal(head, self.prompt.to(head.device))

    def _is_done(self, row: torch.Tensor, num_new: int) -> bool:
        if any(torch.equal(row[-len(ids) :].cpu(), ids) for ids in self.keyword_ids):
            return True
        # The same text may have come as other tokens, but hardly as more of them.
        newest = row[len(row) - min(num_new, self.max_keyword_len) :]
        text = self.tokenizer.decode(newest, skip_special_tokens=True)
        return any(keyword in text for keyword in self.keywords)
