"""Score yes/no questions: POPE's five figures and MME's accuracy and accuracy+.

In: answers as text, and the references. Out: figures, by the official rules for finding a yes or a no in an answer.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from llava.eval.types import ratio


def pope_answer(text: str) -> str:
    """Apply POPE's rule: no, if "No", "not" or "no" is a word of the first sentence, else yes."""
    words = text.split(".", 1)[0].replace(",", "").split(" ")
    return "no" if {"No", "not", "no"} & set(words) else "yes"


@dataclass(frozen=True)
class YesNoCounts:
    true_yes: int = 0
    false_yes: int = 0
    true_no: int = 0
    false_no: int = 0

    @classmethod
    def count(cls, pairs: Iterable[tuple[str | None, str]]) -> YesNoCounts:
        """Count (answer, reference) pairs; a missing answer (None) counts as the wrong one."""
        found = [(truth if answer == truth else ("no" if truth == "yes" else "yes"), truth) for answer, truth in pairs]
        return cls(*(found.count(kind) for kind in (("yes", "yes"), ("yes", "no"), ("no", "no"), ("no", "yes"))))

    def figures(self) -> dict[str, float | int]:
        """Return TP, FP, TN, FN and POPE's five figures; a figure with nothing to divide by is 0."""
        precision = ratio(self.true_yes, self.true_yes + self.false_yes)
        recall = ratio(self.true_yes, self.true_yes + self.false_no)
        num_yes = self.true_yes + self.false_yes
        total = num_yes + self.true_no + self.false_no
        return {
            "TP": self.true_yes,
            "FP": self.false_yes,
            "TN": self.true_no,
            "FN": self.false_no,
            "accuracy": ratio(self.true_yes + self.true_no, total),
            "precision": precision,
            "recall": recall,
            "f1": ratio(2 * precision * recall, precision + recall),
            "yes_ratio": ratio(num_yes, total),
        }

    def undefined(self) -> list[str]:
        """Name the figures that had nothing to divide by, where the original ends with a division by zero."""
        names = {
            "accuracy": self.true_yes + self.true_no + self.false_yes + self.false_no,
            "precision": self.true_yes + self.false_yes,
            "recall": self.true_yes + self.false_no,
            "f1": self.true_yes,
        }
        return [name for name, whole in names.items() if not whole]


def mme_answer(text: str) -> str:
    """Apply MME's rule: a yes, else a no, among the first four characters; anything else is "other" and wrong."""
    start = text.lower()[:4]
    return "yes" if "yes" in start else "no" if "no" in start else "other"


def mme_figures(images: Sequence[Sequence[tuple[str, str]]]) -> dict[str, float | int]:
    """Return accuracy over questions, accuracy+ over images whose answers are all right, and 100 times their sum.

    Each image has (answer as parsed by `mme_answer`, reference) pairs.
    """
    answers = [pair for image in images for pair in image]
    right = sum(answer == truth for answer, truth in answers)
    both_right = sum(all(answer == truth for answer, truth in image) for image in images)
    accuracy, plus = ratio(right, len(answers)), ratio(both_right, len(images))
    return {
        "score": accuracy * 100 + plus * 100,
        "accuracy": accuracy,
        "accuracy_plus": plus,
        "questions": len(answers),
        "images": len(images),
        "other": sum(answer == "other" for answer, _ in answers),
    }
