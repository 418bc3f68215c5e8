"""Measure a checkpoint on the held-out suite: a table on the screen, a JSON file, and the model card's measured section.

In: a model folder, typefaces (fonts.py), CIFAR-10's test images. Out: OUT/evaluation.json, OUT/answers.jsonl (every answer),
and with --card the README.md in the model folder. Questions come from suite.py, judgements from scoring.py, text from card.py.
--quick asks 100 questions for each measure instead of 1,000, for a CPU.

    python recipes/tiny/evaluate.py --model DIR --fonts .tinydata/fonts --cifar DIR --card
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch
from card import headlines, write_card
from photos import load_photos
from PIL import Image
from rows import Row, Suite
from scoring import Verdict, judge, summarise
from suite import make_suite
from torch import Tensor

from llava.conversation import conv_templates
from llava.mm_utils import process_images
from llava.model.builder import LoadedModel, load
from llava.text.labels import encode_spans

MAX_NEW_TOKENS = {"word": 24, "sentence": 72, "free": 192}
QUICK_SIZE = 100


@dataclass(frozen=True)
class Prompt:
    row: Row
    input_ids: list[int]


def answer_suite(loaded: LoadedModel, suite: Suite, images: Sequence[Image.Image], *, batch: int) -> dict[str, str]:
    """The model's answer to every row, by id. A row that follows another waits for that one's answer."""
    rows = {row.id: row for row in suite.rows}
    answers: dict[str, str] = {}
    waiting = list(suite.rows)
    while waiting:
        ready = [row for row in waiting if row.after is None or row.after in answers]
        assert ready, "a row follows one that is not in the suite"
        answers |= answer_rows(loaded, [build_prompt(loaded, row, rows, answers) for row in ready], images, batch=batch)
        waiting = [row for row in waiting if row.id not in answers]
    return answers


def build_prompt(loaded: LoadedModel, row: Row, rows: dict[str, Row], answers: dict[str, str]) -> Prompt:
    """The conversation so far in the checkpoint's own template, with the model's own answers in it."""
    chain = [row]
    while (before := chain[0].after) is not None:
        chain.insert(0, rows[before])
    conversation = conv_templates[loaded.conv_mode].copy()
    for number, turn in enumerate(chain):
        mark = "<image>\n" * len(turn.images) if number == 0 else ""
        conversation.append_message(conversation.roles[0], mark + turn.question)
        conversation.append_message(conversation.roles[1], answers[turn.id] if turn is not row else None)
    return Prompt(row, encode_spans(conversation.spans(), loaded.tokenizer)[0])


def answer_rows(
    loaded: LoadedModel, prompts: Sequence[Prompt], images: Sequence[Image.Image], *, batch: int
) -> dict[str, str]:
    """Greedy answers, in batches of similar length; the next batch's images are prepared while one is answered."""
    ordered = sorted(prompts, key=lambda p: (MAX_NEW_TOKENS[p.row.form], len(p.input_ids)))
    batches = [
        part
        for form in MAX_NEW_TOKENS
        for part in split([prompt for prompt in ordered if prompt.row.form == form], batch)
    ]
    answers: dict[str, str] = {}
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(build_pixels, loaded, batches[0], images)
        for number, part in enumerate(batches):
            pixels = coming.result()
            if number + 1 < len(batches):
                coming = pool.submit(build_pixels, loaded, batches[number + 1], images)
            texts = generate(loaded, part, pixels)
            answers |= {prompt.row.id: text for prompt, text in zip(part, texts, strict=True)}
    return answers


def split(prompts: Sequence[Prompt], size: int) -> Iterator[Sequence[Prompt]]:
    return (prompts[start : start + size] for start in range(0, len(prompts), size))


def build_pixels(loaded: LoadedModel, part: Sequence[Prompt], images: Sequence[Image.Image]) -> Tensor | None:
    shown = [images[number] for prompt in part for number in prompt.row.images]
    if not shown:
        return None
    pixels = process_images(shown, loaded.image_processor, loaded.model.config)
    return pixels if isinstance(pixels, Tensor) else torch.stack(list(pixels))


def generate(loaded: LoadedModel, part: Sequence[Prompt], pixels: Tensor | None) -> list[str]:
    """One batch, padded on the left, where new tokens follow the end of each row."""
    tokenizer, model = loaded.tokenizer, loaded.model
    longest = max(len(prompt.input_ids) for prompt in part)
    input_ids = torch.zeros(len(part), longest, dtype=torch.long)
    mask = torch.zeros(len(part), longest, dtype=torch.long)
    for place, prompt in enumerate(part):
        input_ids[place, longest - len(prompt.input_ids) :] = torch.tensor(prompt.input_ids)
        mask[place, longest - len(prompt.input_ids) :] = 1
    with torch.inference_mode():
        output = model.generate(
            input_ids.to(model.device),
            images=None if pixels is None else pixels.to(model.device, model.dtype),
            attention_mask=mask.to(model.device),
            do_sample=False,
            use_cache=True,
            max_new_tokens=MAX_NEW_TOKENS[part[0].row.form],
            pad_token_id=tokenizer.pad_token_id or 0,
        )
    return [decode(tokenizer, ids) for ids in output.tolist()]


def decode(tokenizer: Any, ids: list[int]) -> str:
    if tokenizer.eos_token_id in ids:
        ids = ids[: ids.index(tokenizer.eos_token_id)]
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False).strip()


def print_table(report: dict[str, Any]) -> None:
    print(f"{'measure':<36}{'n':>6}{'right':>8}{'grammar':>9}{'by hand':>9}     target")
    for line in headlines(report):
        target = "" if line.target is None else f"{line.target:.0%}" + ("" if line.right >= line.target else "  MISSED")
        parts = "".join(f"{'' if part is None else f'{part:.1%}':>9}" for part in (line.grammar, line.hand))
        print(f"{line.name:<36}{line.n:>6}{line.right:>8.1%}{parts}     {target}")
    print(f"\n{'group':<22}{'n':>6}{'right':>8}{'exact':>8}{'anycase':>8}  forms and tags")
    for name, found in report["groups"].items():
        finer = {**found.get("forms", {}), **found.get("tags", {})}
        detail = "  ".join(f"{tag} {value:.1%}" for tag, value in finer.items())
        print(
            f"{name:<22}{found['n']:>6}{found['right']:>8.1%}{found['exact']:>8.1%}{found['any_case']:>8.1%}  {detail}"
        )
    print(f"\n{'yes/no':<22}{'n':>6}{'right':>8}{'F1':>8}{'yes':>8}{'of':>8}")
    for name, found in report["yes_no"].items():
        values = (found["accuracy"], found["f1"], found["yes_rate"], found["yes_rate_expected"])
        print(f"{name:<22}{found['n']:>6}" + "".join(f"{value:>8.1%}" for value in values))
    print(
        f"\nfalse refusals {report['false_refusals']}, false denials {report['false_denials']}, boxes {report['mean_overlap']}"
    )
    print(f"short answers, where they were asked for {report['requests']}")
    print(f"descriptions of scenes {report['descriptions']}")
    for examples in report["wrong"].values():
        for wrong in examples:
            print(f"  {wrong['id']}: {wrong['question']!r} expected {wrong['expected']!r} said {wrong['said']!r}")


def evaluate(args: argparse.Namespace) -> dict[str, Any]:
    started = time.time()
    photos = load_photos(args.cifar, "test") if args.cifar else None
    suite = make_suite(args.fonts, photos, args.size)
    if args.answers:
        return judge_again(args, suite)
    if args.only:
        suite = Suite([row for row in suite.rows if row.group.startswith(tuple(args.only.split(",")))], suite.paints)
    images = suite.paint(workers=args.workers)  # before the model is loaded, since it may fork
    loaded = load(args.model, device=args.device, dtype=args.dtype)
    prepared = time.time()
    answers = answer_suite(loaded, suite, images, batch=args.batch)
    verdicts = [judge(row, answers[row.id]) for row in suite.rows]
    ended = time.time()
    report: dict[str, Any] = {
        "date": date.today().isoformat(),
        "command": command_of(args),
        "torch": torch.__version__,
        "dtype": str(loaded.model.dtype).removeprefix("torch."),
        "device": torch.cuda.get_device_name() if loaded.model.device.type == "cuda" else str(loaded.model.device),
        "questions": len(verdicts),
        "images": len(suite.paints),
        "seconds": {"prepare": round(prepared - started, 1), "answer": round(ended - prepared, 1)},
    }
    report |= summarise(verdicts)
    save(args.out, report, verdicts)
    return report


def judge_again(args: argparse.Namespace, suite: Suite) -> dict[str, Any]:
    """The report of answers that an earlier run has kept, by the present rules; who gave them is in the report beside them."""
    kept = {line["id"]: line for line in map(json.loads, (args.answers / "answers.jsonl").open())}
    if [(line["id"], line["question"]) for line in kept.values()] != [(row.id, row.question) for row in suite.rows]:
        raise SystemExit(f"the answers in {args.answers} are to other questions than those of this suite")
    before = json.loads((args.answers / "evaluation.json").read_text())
    verdicts = [judge(row, kept[row.id]["said"]) for row in suite.rows]
    origin = ("date", "command", "torch", "dtype", "device", "questions", "images", "seconds")
    report = {name: before[name] for name in origin} | summarise(verdicts)
    save(args.out, report, verdicts)
    return report


def command_of(args: argparse.Namespace) -> str:
    """As anyone would type it: without the paths of the machine it ran on."""
    size = "--quick" if args.quick else f"--size {args.size}"
    return f"python recipes/tiny/evaluate.py --model MODEL --fonts FONTS --cifar CIFAR {size}"


def save(folder: Path, report: dict[str, Any], verdicts: Sequence[Verdict]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "evaluation.json").write_text(json.dumps(report, indent=1) + "\n")
    with (folder / "answers.jsonl").open("w") as file:
        for v in verdicts:
            line = {
                "id": v.row.id,
                "question": v.row.question,
                "expected": v.row.answer,
                "said": v.said,
                "right": v.right,
            }
            file.write(json.dumps(line) + "\n")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="folder of the checkpoint")
    parser.add_argument(
        "--answers", type=Path, help="ask nothing: judge the answers that an earlier run left in this folder"
    )
    parser.add_argument(
        "--fonts", type=Path, help="folder with held/ typefaces; without it Pillow's own face (trial only)"
    )
    parser.add_argument("--cifar", type=Path, help="CIFAR-10 in any of its usual layouts; without it no photographs")
    parser.add_argument(
        "--out", type=Path, default=Path("outputs/tiny"), help="folder for evaluation.json and answers.jsonl"
    )
    parser.add_argument("--size", type=int, default=1000, help="questions for each measure")
    parser.add_argument("--quick", action="store_true", help=f"--size {QUICK_SIZE}: some minutes on a CPU")
    parser.add_argument("--only", help="groups whose names begin with one of these, separated by commas")
    parser.add_argument("--batch", type=int, help="questions at a time (512 on a GPU, 64 on a CPU)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="bfloat16 on a GPU, float32 on a CPU"
    )
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes that draw pictures")
    parser.add_argument("--card", action="store_true", help="write README.md into the model folder")
    parser.add_argument("--before", type=Path, help="evaluation.json of an earlier model, for the card")
    parser.add_argument("--log", type=Path, help="log.jsonl of build.py, for the card's table of times")
    args = parser.parse_args(argv)
    on_gpu = args.device.startswith("cuda")
    args.size = QUICK_SIZE if args.quick else args.size
    args.batch = args.batch or (512 if on_gpu else 64)
    args.dtype = args.dtype or ("bfloat16" if on_gpu else "float32")
    report = evaluate(args)
    print_table(report)
    if args.card:
        write_card(args.model, report, args.log, json.loads(args.before.read_text()) if args.before else None)
    print(json.dumps({"stage": "evaluate", "questions": report["questions"], **report["seconds"]}), flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
