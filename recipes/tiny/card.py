"""The model card: what the embedded model is, how it was made, what it can and cannot do, and what was measured.

In: a model folder, the report of evaluate.py, the log of build.py. Out: README.md in the model folder.

    python recipes/tiny/card.py --model DIR --report outputs/tiny/evaluation.json [--log WORK/log.jsonl]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Headline:
    """A measure over one or more groups of the report."""

    name: str
    groups: tuple[str, ...]
    target: float | None = None
    field: str = "right"


@dataclass(frozen=True)
class Line:
    name: str
    n: int
    right: float
    target: float | None


READING = ("read_seen_words", "read_unseen_words", "read_numbers")
YES_NO = tuple(
    f"yesno_{k}" for k in ("existence", "colour", "size", "position", "count", "relation", "reading", "photo")
)
HEADLINES = (
    Headline("Scene attributes", ("colour", "shape", "size", "position", "relation"), 0.97),
    Headline("- colour", ("colour",)),
    Headline("- shape", ("shape",)),
    Headline("- size", ("size",)),
    Headline("- position", ("position",)),
    Headline("- relation", ("relation",)),
    Headline("Counts, one to six", ("count",), 0.95),
    Headline("Counts, none", ("count_none",)),
    Headline("Reading, exact", READING, 0.95),
    Headline("- trained words, new typefaces", ("read_seen_words",)),
    Headline("- new words, new typefaces", ("read_unseen_words",)),
    Headline("- new numbers, new typefaces", ("read_numbers",)),
    Headline("- numbers of one or two digits", ("read_short_numbers",)),
    Headline("- a word beside drawn things", ("read_signs",)),
    Headline("Reading, capitals not counted", READING, None, "any_case"),
    Headline("Photographs", ("photo",), 0.80),
    Headline("Yes/no, all kinds", YES_NO),
    Headline('Follow-ups with "it"', ("follow_up",)),
    Headline("Conversations of five turns", ("conversation",)),
    Headline("Unanswerable, and says so", ("unknown",)),
    Headline("Not there, and says so", ("absent",)),
    Headline("Descriptions of scenes, every fact", ("describe_scene",)),
    Headline("Descriptions of texts, every fact", ("describe_text",)),
    Headline("Small talk", ("talk",)),
    Headline("Square pictures of 64 pixels", ("side_64",)),
    Headline("- of 112 pixels", ("side_112",)),
    Headline("- of 224 pixels", ("side_224",)),
    Headline("- of 448 pixels", ("side_448",)),
    Headline("- 358 x 224 pixels", ("side_wide",)),
    Headline("- 224 x 358 pixels", ("side_high",)),
)


def headlines(report: dict[str, Any]) -> list[Line]:
    """The measures that the report holds, groups weighted by their number of questions."""
    lines = []
    for headline in HEADLINES:
        found = [report["groups"][name] for name in headline.groups if name in report["groups"]]
        total = sum(group["n"] for group in found)
        if total:
            right = sum(group["n"] * group[headline.field] for group in found) / total
            lines.append(Line(headline.name, total, right, headline.target))
    return lines


def write_card(folder: Path, report: dict[str, Any], log: Path | None = None) -> Path:
    parts = [CARD.format(**facts_of(folder)), measured(report)]
    if log is not None and (times := read_times(log)):
        parts.append(time_table(times))
    path = folder / "README.md"
    path.write_text("\n".join(part.strip("\n") + "\n" for part in parts))
    return path


def facts_of(folder: Path) -> dict[str, Any]:
    """Figures of the model itself, from its files."""
    config = json.loads((folder / "config.json").read_text())
    tower = json.loads((folder / config["mm_vision_tower"] / "config.json").read_text())
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file() and path.name != "README.md")
    patches = (tower["image_size"] // tower["patch_size"]) ** 2
    return {
        "megabytes": f"{size / 2**20:.1f}", "millions": f"{index['metadata']['total_size'] / 2e6:.1f}",
        "tower_layers": tower["num_hidden_layers"], "tower_width": tower["hidden_size"], "side": tower["image_size"],
        "patch": tower["patch_size"], "patches": patches, "layers": config["num_hidden_layers"], "width": config["hidden_size"],
        "pieces": config["vocab_size"], "conv_mode": config.get("conv_mode", "v1"),
    }  # fmt: skip


CARD = """
# llava-v1.5-tiny

A complete LLaVA of {millions} million parameters ({megabytes} MB in half precision) that answers questions about drawn
scenes, short words and numbers in pictures, and small photographs. It ships inside the package so that the software can be
tried, tested and taught with a model that really works, on any machine, without a download. It is not a general assistant.

## What it is

| part | |
| --- | --- |
| vision tower | CLIP ViT, {tower_layers} layers, width {tower_width}, {side} x {side} pixels in patches of {patch} |
| projector | `mlp2x_gelu` on the {patches} patch features after the last layer but one |
| language model | LLaMA architecture, {layers} layers, width {width}, {pieces} pieces |
| layout | that of the original LLaVA v1.5 checkpoints, the tower's weights inside |
| prompts | conversation template `{conv_mode}`; pictures are padded to a square |

It answers in English, in a sentence, or in one word when the question ends with the line
"Answer the question using a single word or phrase."

## How it was made

One command, `python recipes/tiny/build.py --preset full`, makes everything from nothing on one GPU:

1. a generator draws scenes (one to six shapes in eleven colours) and renders words and numbers, with questions whose answers
   are right by construction (`recipes/tiny/scenes.py`, `lettering.py`, `questions.py`);
2. a small CLIP learns from pictures and captions by contrast, by a captioner that is thrown away afterwards, and on
   photographs from the kinds of the training images;
3. a small language model learns the same conversations as text, with a description where the picture will be;
4. the two stages of LLaVA, both by `python -m llava.train.train`: first the projector on captions, then everything on
   conversations;
5. a second round of the last stage, on what was still hard: reading, counting, and what no picture tells.

`recipes/tiny/README.md` says how long each step took.

No other model's weights or answers were used.

## Data and licences

- Drawn scenes and rendered texts: made by the generator, under the licence of this repository. Typefaces come from Debian
  packages under free licences; none is part of the model.
- Photographs: CIFAR-10 (A. Krizhevsky, *Learning Multiple Layers of Features from Tiny Images*, 2009), its training images
  only. No photograph is part of the model or of the repository.
- The weights are under the licence of this repository.

## Limits

- It knows ten shapes, eleven colours, ten kinds of photograph, and texts of up to seven letters on one line. Shown anything
  else, it answers within these.
- It counts to six. Sizes are "small" and "large" only, and places are the nine fields of the picture.
- Photographs were 32 x 32 pixels; sharp, large ones are unlike anything it has seen.
- It says that it cannot tell when asked about makers, names, prices, sounds and the like, not about everything that it
  does not know.
- Letters whose capital is the same drawing (c, o, s, ...) are told apart only by their neighbours.
- It was measured on pictures of the same generator that made its training data. Expect less on drawings by hand.
"""


def measured(report: dict[str, Any]) -> str:
    """The section of figures, with what it takes to get them again."""
    lines = [MEASURED.format(**report), "| measure | questions | right | target |", "| --- | ---: | ---: | ---: |"]
    for line in headlines(report):
        target = f"{line.target:.0%}" if line.target is not None else ""
        lines.append(f"| {line.name} | {line.n:,} | {line.right:.1%} | {target} |")
    lines += [YES_NO_HEAD, "| kind | questions | right | F1 | says yes |", "| --- | ---: | ---: | ---: | ---: |"]
    for name, found in report["yes_no"].items():
        kind = name.removeprefix("yesno_").replace("_", " ")
        values = " | ".join(f"{found[key]:.1%}" for key in ("accuracy", "f1", "yes_rate"))
        lines.append(f"| {kind} | {found['n']:,} | {values} |")
    lines.append(FALSE_NO.format(**{key: report[key] for key in ("false_refusals", "false_denials", "descriptions")}))
    return "\n".join(lines)


MEASURED = """
## Measured

{questions:,} held-out questions about {pictures:,} pictures: new scenes, typefaces and texts that were never drawn for
training, the data set's test images, greedy decoding, follow-ups after the model's own answers.
On {date}, {dtype} on {device}, torch {torch}, by
`{command}`.
"""
YES_NO_HEAD = """
Yes/no questions, half of them with the answer yes; `pope` asks whether something is there, and the wrong thing is any
(`random`) or nearly right (`near`):
"""
FALSE_NO = """
Of {false_refusals[n]:,} questions that the picture answers, it refused {false_refusals[share]:.2%}; of {false_denials[n]:,}
about something that is there, it said "there is no ..." to {false_denials[share]:.2%}. In descriptions of scenes
{descriptions[thing_precision]:.1%} of the things named are there, and {descriptions[thing_recall]:.1%} of the things that are
there are named.
"""


def read_times(log: Path) -> dict[str, float]:
    """Seconds of each stage, from lines {"stage": ..., "seconds": ...}; the last one of a stage counts."""
    times: dict[str, float] = {}
    for line in log.read_text().splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue  # the trainer's own progress lines are python, not JSON
        if isinstance(row, dict) and "seconds" in row and "stage" in row:
            times[row["stage"]] = row["seconds"]
    return times


def time_table(times: dict[str, float]) -> str:
    lines = ["## Time", "", "| stage | seconds |", "| --- | ---: |"]
    return "\n".join([*lines, *(f"| {stage} | {seconds:.0f} |" for stage, seconds in times.items())])


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--report", type=Path, required=True, help="evaluation.json of evaluate.py")
    parser.add_argument("--log", type=Path, help="log.jsonl of build.py, for a table of times")
    args = parser.parse_args(argv)
    print(write_card(args.model, json.loads(args.report.read_text()), args.log))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
