"""Provide the original's classes for TextVQA's and ST-VQA's metrics to outside code; eval/metrics/vqa.py computes them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module

from llava.errors import MissingPackageError
from llava.eval.metrics.vqa import (
    anls,
    drop_articles,
    drop_punctuation,
    exact_accuracy,
    mean_score,
    normalise,
    soft_accuracy,
    split_words,
)
from llava.eval.types import JsonRow


class EvalAIAnswerProcessor:
    """Normalises an answer as EvalAI does."""

    def __call__(self, question: str) -> str:
        return normalise(question)

    def word_tokenize(self, word: str) -> str:
        return split_words(word)

    def process_punctuation(self, in_text: str) -> str:
        return drop_punctuation(in_text)

    def process_digit_article(self, in_text: str) -> str:
        return drop_articles(in_text)


class _Evaluator:
    """Computes the mean score of rows with `pred_answer` and `gt_answers`."""

    score: Callable[[str, Sequence[str]], float]

    def eval_pred_list(self, pred_list: Sequence[JsonRow]) -> float:
        return mean_score([(row["pred_answer"], row["gt_answers"]) for row in pred_list], type(self).score)


class TextVQAAccuracyEvaluator(_Evaluator):
    score = staticmethod(soft_accuracy)


class STVQAAccuracyEvaluator(_Evaluator):
    score = staticmethod(exact_accuracy)


class TextCapsBleu4Evaluator:
    """Computes TextCaps' BLEU-4 with the package pycocoevalcap (and Java, for its tokenizer)."""

    def __init__(self) -> None:
        try:
            bleu = import_module("pycocoevalcap.bleu.bleu")
            tokenizer = import_module("pycocoevalcap.tokenizer.ptbtokenizer")
        except ModuleNotFoundError as error:
            raise MissingPackageError(
                "this needs the package 'pycocoevalcap'; install it with: pip install pycocoevalcap"
            ) from error
        self.tokenizer = tokenizer.PTBTokenizer()
        self.scorer = bleu.Bleu(4)

    def eval_pred_list(self, pred_list: Sequence[JsonRow]) -> float:
        """Return BLEU-4 of rows with `pred_answer` and `gt_answers`."""
        references = {n: [{"caption": text} for text in row["gt_answers"]] for n, row in enumerate(pred_list)}
        captions = {n: [{"caption": row["pred_answer"]}] for n, row in enumerate(pred_list)}
        scores, _ = self.scorer.compute_score(self.tokenizer.tokenize(references), self.tokenizer.tokenize(captions))
        return scores[3]


class STVQAANLSEvaluator(_Evaluator):
    score = staticmethod(anls)

    def get_anls(self, s1: str, s2: str) -> float:
        return anls(s1, [s2])
