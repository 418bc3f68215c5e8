"""Small benchmarks in their official layouts, written by hand so that every score can be checked by eye."""

from __future__ import annotations

import base64
import importlib
import importlib.util
import io
import json
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from repository import ROOT

from llava.eval.harness.scoring import TaskReport, score_file
from llava.eval.tasks import TASKS


def write_json(file: Path, value: Any) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(value), encoding="utf-8")


def write_lines(file: Path, rows: Sequence[Any]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def rows_of(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def answers(file: Path, texts: dict[Any, str], **more: Any) -> Path:
    return write_lines(
        file, [{"question_id": name, "prompt": "p", "text": text, **more} for name, text in texts.items()]
    )


def png(colour: str = "red") -> bytes:
    from PIL import Image

    out = io.BytesIO()
    Image.new("RGB", (8, 8), colour).save(out, "PNG")
    return out.getvalue()


def pope(data: Path) -> None:
    """Two splits of two questions: yes and no each."""
    questions = []
    for split in ("random", "adversarial"):
        labels = [
            {"question_id": n, "image": f"{n}.jpg", "text": f"Is there a {n}?", "label": label}
            for n, label in ((1, "yes"), (2, "no"))
        ]
        write_lines(data / f"pope/coco/coco_pope_{split}.json", labels)
        questions += [
            {
                "question_id": len(questions) + n,
                "image": row["image"],
                "text": row["text"] + "\nAnswer the question using a single word or phrase.",
                "category": split,
            }
            for n, row in enumerate(labels)
        ]
    for number, row in enumerate(questions):
        row["question_id"] = number
    write_lines(data / "pope/llava_pope_test.jsonl", questions)


def mme(data: Path) -> None:
    """One image of one category, in each of the two layouts; code_reasoning has its questions in the flat one."""
    rows = []
    for category, below in (("existence", "questions_answers_YN/"), ("code_reasoning", "")):
        file = data / f"MME/MME_Benchmark_release_version/{category}/{below}0001.txt"
        file.parent.mkdir(parents=True, exist_ok=True)
        image = data / f"MME/MME_Benchmark_release_version/{category}/{'images/' if below else ''}0001.png"
        image.parent.mkdir(exist_ok=True)
        image.write_bytes(png())
        file.write_text("Is it A?  Please answer yes or no.\tYes\nIs it B? Please answer yes or no.\tNo\n")
        for letter in "AB":
            text = f"Is it {letter}? Please answer yes or no.\nAnswer the question using a single word or phrase."
            rows.append(
                {
                    "question_id": f"{category}/0001.png",
                    "image": f"{category}/0001.png",
                    "text": text,
                    "category": category,
                }
            )
    write_lines(data / "MME/llava_mme.jsonl", rows)


def mmbench(data: Path) -> None:
    """A question with a hint and three options, and one with four that shares the first one's image."""
    cell = base64.b64encode(png()).decode()
    lines = [
        "index\tquestion\thint\tA\tB\tC\tD\tanswer\tcategory\timage\tsource\tl2-category\tcomment\tsplit",
        f'1\t"Which ""one""?"\tLook well\tred\tblue\tgreen\t\tA\tcolour\t{cell}\tmade\tseeing\tnan\tdev',
        "2\tWhat?\t\tcat\tdog\tcow\tpig\tD\tanimal\t1\tmade\tseeing\tnan\tdev",
    ]
    file = data / "mmbench/mmbench_dev_20230712.tsv"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")


def scienceqa(data: Path) -> None:
    problem = {"hint": "", "lecture": "", "solution": "", "split": "test"}
    problems = {
        "1": {
            **problem,
            "question": "One?",
            "choices": ["x", "y"],
            "answer": 1,
            "image": "image.png",
            "subject": "natural science",
        },
        "2": {
            **problem,
            "question": "Two?",
            "choices": ["x", "y", "z"],
            "answer": 0,
            "image": None,
            "subject": "language science",
        },
    }
    write_json(data / "scienceqa/problems.json", problems)
    write_json(data / "scienceqa/pid_splits.json", {"test": ["1", "2"]})


def seed(data: Path) -> None:
    rows = [
        {"question_id": "100", "data_type": "image", "question_type_id": 1, "answer": "A"},
        {"question_id": "v_1", "data_type": "video", "question_type_id": 2, "answer": "B"},
    ]
    write_json(data / "seed_bench/SEED-Bench.json", {"question_type": {"Scene": 1, "Action": 2}, "questions": rows})
    asked = [{"question_id": row["question_id"], "image": "i.jpg", "text": "What?"} for row in rows]
    write_lines(data / "seed_bench/llava-seed-bench.jsonl", asked)


def textvqa(data: Path) -> None:
    people = ["stop"] * 7 + ["go"] * 2 + ["Stop."]
    rows = [{"image_id": "i", "question": f"What {n}?", "answers": people} for n in (1, 2)]
    write_json(data / "textvqa/TextVQA_0.5.1_val.json", {"data": rows})
    asked = [
        {"question_id": "i", "image": "i.jpg", "text": f"What {n}?\nAnswer the question using a single word or phrase."}
        for n in (1, 2)
    ]
    write_lines(data / "textvqa/llava_textvqa_val_v051_ocr.jsonl", asked)


def gqa(data: Path) -> None:
    asked = [{"question_id": str(n), "image": "i.jpg", "text": "What?"} for n in (1, 2)]
    write_lines(data / "gqa/llava_gqa_testdev_balanced.jsonl", asked)
    truths = {
        str(n): {"answer": "dog", "question": "What?", "imageId": "i", "types": {"structural": "query"}}
        for n in (1, 2, 3)
    }
    write_json(data / "gqa/data/testdev_balanced_questions.json", truths)


def qbench(data: Path) -> None:
    rows = [
        {
            "img_path": "a.jpg",
            "question": "Sharp?",
            "candidates": ["Yes", "No"],
            "correct_ans": "No",
            "type": 0,
            "concern": 1,
        },
        {
            "img_path": "b.jpg",
            "question": "Dark?",
            "candidates": ["Yes", "No"],
            "correct_ans": "Yes",
            "type": 0,
            "concern": 0,
        },
    ]
    write_json(data / "qbench/llvisionqa_dev.json", rows)


def mmmu(data: Path) -> None:
    answers_file = {
        "validation_Art_1": {"question_type": "multiple-choice", "ground_truth": "B"},
        "validation_Math_1": {"question_type": "short-answer", "ground_truth": "3.14"},
    }
    write_json(data / "mmmu/answer_dict_val.json", answers_file)


def mmvet(data: Path) -> None:
    asked = [{"question_id": f"v1_{n}", "image": "i.jpg", "text": "What?"} for n in (0, 1)]
    write_lines(data / "mm-vet/llava-mm-vet.jsonl", asked)
    row = {"imagename": "i.jpg", "question": "What?", "answer": "a<AND>b"}
    write_json(
        data / "mm-vet/mm-vet.json",
        {"v1_0": {**row, "capability": ["ocr", "math"]}, "v1_1": {**row, "capability": ["ocr"]}},
    )


def llava_bench(data: Path) -> None:
    home = data / "llava-bench-in-the-wild"
    write_lines(
        home / "questions.jsonl",
        [{"question_id": n, "image": "1.jpg", "text": f"Tell {n}", "category": "conv"} for n in (0, 1)],
    )
    write_lines(home / "context.jsonl", [{"id": "1", "image": "1.jpg", "caption": "A red square."}])
    write_lines(home / "answers_gpt4.jsonl", [{"question_id": n, "text": f"Reference {n}"} for n in (0, 1)])


def vqa_like(data: Path) -> None:
    asked = [{"question_id": n, "image": f"{n}.jpg", "text": "What?"} for n in (1, 2)]
    write_lines(data / "vqav2/llava_vqav2_mscoco_test-dev2015.jsonl", asked)
    write_lines(
        data / "vqav2/llava_vqav2_mscoco_test2015.jsonl",
        [*asked, {"question_id": 3, "image": "3.jpg", "text": "What?"}],
    )
    write_lines(data / "vizwiz/llava_val.jsonl", asked)
    people = [{"answer": text} for text in ["a dog"] * 4 + ["dog"] * 5 + ["2 dogs"]]
    write_json(
        data / "vizwiz/val.json", [{"image": f"{n}.jpg", "answers": people, "answer_type": "other"} for n in (1, 2)]
    )


ALL = (pope, mme, mmbench, scienceqa, seed, textvqa, gqa, qbench, mmmu, mmvet, llava_bench, vqa_like)


def write_all(data: Path) -> Path:
    for write in ALL:
        write(data)
    return data


def load_script(path: str) -> ModuleType:
    if path.startswith("llava/"):
        return importlib.import_module(path.removesuffix(".py").replace("/", "."))
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def scored(task: str, path: Path, data: Path) -> TaskReport:
    return score_file(TASKS[task], path, data)


def kinds(report: TaskReport) -> dict[str, int]:
    return {kind: fault.count for kind, fault in report.faults.kinds.items()}
