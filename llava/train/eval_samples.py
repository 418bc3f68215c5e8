"""Generate answers to validation samples while a model is trained.

In: the validation set and the model. Out: questions, greedy answers and the answers in the data, for the log and for
`eval_answers.jsonl`. The validation loss is computed in llava_trainer.py.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from llava.constants import IGNORE_INDEX
from llava.model.protocols import LanguageModel
from llava.text.tokenization import Tokenizer
from llava.train.data import LazySupervisedDataset
from llava.train.indexed_dataset import sample_name

ANSWERS_FILE = "eval_answers.jsonl"


@dataclass(frozen=True)
class SampleAnswer:
    """The model's answer to the first question of a sample."""

    step: int
    sample: str
    question: str
    answer: str
    expected: str

    def __str__(self) -> str:
        return f"{self.sample}: {self.answer!r}, expected {self.expected!r}"


@torch.no_grad()
def generate_answers(
    model: LanguageModel,
    tokenizer: Tokenizer,
    dataset: LazySupervisedDataset,
    *,
    num_samples: int,
    max_new_tokens: int,
    step: int,
) -> list[SampleAnswer]:
    """Generate greedy answers to the first turn of the first samples, from the ids that a training step would see."""
    was_training, device = model.training, next(model.parameters()).device
    model.eval()
    try:
        answers = []
        for index in range(min(num_samples, len(dataset))):
            item = dataset[index]
            ids, labels = item["input_ids"], item["labels"]
            first = int((labels != IGNORE_INDEX).nonzero()[0])
            untrained = (labels[first:] == IGNORE_INDEX).nonzero()
            last = first + int(untrained[0]) if len(untrained) else len(labels)
            given: dict[str, object] = {}
            if "image" in item:
                pixels = item["image"] if isinstance(item["image"], list) else [item["image"]]
                given["images"] = [image.to(device) for image in pixels]
            if "modality" in item:
                given["modalities"] = item["modality"]
            if "image_size" in item:
                sizes = item["image_size"]
                given["image_sizes"] = sizes if isinstance(sizes, list) else [sizes]
            new = model.generate(
                inputs=ids[None, :first].to(device),
                do_sample=False,
                max_new_tokens=max_new_tokens,
                use_cache=True,
                **given,
            )
            answers.append(
                SampleAnswer(
                    step=step,
                    sample=sample_name(dataset, index),
                    question=tokenizer.decode(ids[:first][ids[:first] >= 0], skip_special_tokens=True).strip(),
                    answer=tokenizer.decode(new[0], skip_special_tokens=True).strip(),
                    expected=tokenizer.decode(labels[first:last], skip_special_tokens=True).strip(),
                )
            )
        return answers
    finally:
        model.train(was_training)


def write_answers(answers: list[SampleAnswer], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ANSWERS_FILE).open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(asdict(answer), ensure_ascii=False) + "\n" for answer in answers)
