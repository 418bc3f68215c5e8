"""The model card: what the embedded model is, how it was made, what it can and cannot do, and what was measured.

In: a model folder, the report of evaluate.py, the log of build.py. Out: README.md in the model folder.

    python recipes/tiny/card.py --model DIR --report outputs/tiny/evaluation.json [--before OTHER.json] [--log WORK/log.jsonl]
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
    """Shares of right answers: to all questions, and to those worded by the grammar and by hand."""

    name: str
    n: int
    right: float
    target: float | None
    grammar: float | None
    hand: float | None


READING = ("read_seen_words", "read_unseen_words", "read_numbers")
YES_NO = (
    *(f"yesno_{kind}" for kind in ("existence", "colour", "size", "position", "count", "relation", "same", "reading")),
    *("yesno_any_text", "yesno_chart", "yesno_pair", "yesno_photo"),
    *("pope_drawn_random", "pope_drawn_near", "pope_photo_random", "pope_photo_near"),
)
HEADLINES = (
    Headline("Colours, shapes, positions", ("colour", "shape", "position"), 0.98),
    Headline("- colour", ("colour",)),
    Headline("- shape", ("shape",)),
    Headline("- position", ("position",)),
    Headline("Sizes", ("size",)),
    Headline("Relations", ("relation",)),
    Headline("Counts, one to six", ("count",), 0.95),
    Headline("Counts, none", ("count_none",)),
    Headline("Reading, exact", READING, 0.95),
    Headline("- trained words, new typefaces", ("read_seen_words",)),
    Headline("- new words, new typefaces", ("read_unseen_words",)),
    Headline("- new numbers, new typefaces", ("read_numbers",)),
    Headline("- a word beside drawn things", ("read_signs",)),
    Headline("Photographs", ("photo",), 0.85),
    Headline("Yes/no, all kinds", YES_NO, 0.95),
    Headline("- in POPE's form, drawn things", ("pope_drawn_random", "pope_drawn_near")),
    Headline("- in POPE's form, photographs", ("pope_photo_random", "pope_photo_near")),
    Headline("Boxes that overlap by half or more", ("box",)),
    Headline("What is in a box", ("region",)),
    Headline("Charts", ("chart", "yesno_chart")),
    Headline("Two images in one question", ("pair", "yesno_pair"), 0.90),
    Headline("Two questions in one", ("two_questions",)),
    Headline('Follow-ups with "it"', ("follow_up",)),
    Headline("Conversations of five turns", ("conversation",)),
    Headline("Unanswerable, and says so", ("unknown",), 0.97),
    Headline("Not there, and says so", ("absent",)),
    Headline("Descriptions, every fact", ("describe_scene", "describe_text", "describe_photo")),
    Headline("Small talk", ("talk",)),
    Headline("Square images of 64 to 448 pixels", ("side_64", "side_112", "side_224", "side_448")),
    Headline("Wide and high images", ("side_wide", "side_high")),
)


def headlines(report: dict[str, Any]) -> list[Line]:
    """The measures that the report holds, groups weighted by their number of questions."""
    lines = []
    for headline in HEADLINES:
        found = [report["groups"][name] for name in headline.groups if name in report["groups"]]
        if found:
            by_wording = (
                mean([g["wordings"][name] for g in found if name in g["wordings"]]) for name in ("grammar", "hand")
            )
            total, right = sum(group["n"] for group in found), mean(found, headline.field)
            lines.append(Line(headline.name, total, right or 0.0, headline.target, *by_wording))
    return lines


def mean(found: Sequence[dict[str, Any]], field: str = "right") -> float | None:
    total = sum(group["n"] for group in found)
    return sum(group["n"] * group[field] for group in found) / total if total else None


def write_card(
    folder: Path, report: dict[str, Any], log: Path | None = None, before: dict[str, Any] | None = None
) -> Path:
    """`before`: the report of an earlier model on the same suite, shown beside."""
    parts = [CARD.format(**facts_of(folder)), measured(report, before)]
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

A complete LLaVA of {millions} million parameters ({megabytes} MB in half precision) that answers questions about
drawn scenes, simple charts, short words and numbers in images, and small photographs. It ships inside the package so
that the software can be tried, tested and taught with a model that really works, on any machine, without a download.
It is not a general assistant.

## What it is

| part | |
| --- | --- |
| vision tower | CLIP ViT, {tower_layers} layers, width {tower_width}, {side} x {side} pixels in patches of {patch} |
| projector | `mlp2x_gelu` on the {patches} patch features after the last layer but one |
| language model | LLaMA architecture, {layers} layers, width {width}, {pieces} pieces |
| layout | that of the original LLaVA v1.5 checkpoints, the tower's weights inside |
| prompts | conversation template `{conv_mode}`; images are padded to a square |

It answers in English, in a sentence, or in one word when the question ends with the line
"Answer the question using a single word or phrase." Asked for a box, it gives LLaVA's form: [x1, y1, x2, y2], fractions of the
padded square.

## How it was made

One command, `python recipes/tiny/build.py --preset full`, makes everything from nothing on one GPU:

1. a generator draws scenes (one to six shapes in eleven colours), charts, words and numbers in many styles, with
   questions whose answers are right by construction (`recipes/tiny/scenes.py`, `lettering.py`, `questions.py`), each
   kind in hundreds of wordings (`wordings.txt`);
2. a small CLIP learns from images and captions by contrast, by a captioner that is thrown away afterwards, and on
   photographs from the kinds of the training images;
3. a small language model learns the same conversations as text, with a description where the image will be;
4. the two stages of LLaVA, both by `python -m llava.train.train`: first the projector on captions, then everything on
   conversations;
5. a second round of the last stage, on what was still hard: reading, counting, and what no image tells.

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
- It counts to six. Sizes are "small" and "large" only, and places are the nine fields of the image.
- Photographs were 32 x 32 pixels; sharp, large ones are unlike anything it has seen.
- It knows about 1,000 words and spells all others letter by letter. A question with words that it never saw is answered less
  well, and sometimes refused: compare the columns "grammar" and "by hand" below.
- Two questions in one, two images in one question, and descriptions asked for in unusual words are its weakest kinds.
- Letters whose capital is the same drawing (c, o, s, ...) are told apart only by their neighbours.
"""


def measured(report: dict[str, Any], before: dict[str, Any] | None = None) -> str:
    """The section of figures, with what it takes to get them again."""
    lines = [MEASURED.format(**report, share=f"{SHARE_BY_HAND:.0%}"), HEADS[before is not None]]
    former = {line.name: line.right for line in headlines(before)} if before else {}
    for line in headlines(report):
        cells = [line.name, f"{line.n:,}", percent(line.right), percent(line.grammar), percent(line.hand)]
        cells += [percent(former.get(line.name))] if before else []
        target = "" if line.target is None else f"{line.target:.0%}" + ("" if line.right >= line.target else ", missed")
        lines.append(f"| {' | '.join(cells)} | {target} |")
    lines += [YES_NO_HEAD, "| kind | questions | right | F1 | says yes |", "| --- | ---: | ---: | ---: | ---: |"]
    for name, found in report["yes_no"].items():
        kind = name.removeprefix("yesno_").replace("_", " ")
        values = " | ".join(f"{found[key]:.1%}" for key in ("accuracy", "f1", "yes_rate"))
        lines.append(f"| {kind} | {found['n']:,} | {values} |")
    lines.append(FALSE_NO.format(**report))
    if before:
        lines.append(BEFORE.format(**before))
    return "\n".join(lines)


def percent(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"


SHARE_BY_HAND = 0.5  # samples.Source.asker
HEADS = {
    False: "| measure | questions | right | grammar | by hand | target |\n| --- | ---: | ---: | ---: | ---: | ---: |",
    True: "| measure | questions | right | grammar | by hand | before | target |\n"
    "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
}
MEASURED = """
## Measured

{questions:,} held-out questions about {images:,} images: drawn by another hand with another rasterizer, in
typefaces, texts and wordings that were never trained, the data set's test images; greedy decoding, follow-ups after
the model's own answers. {share} of the wordings were written by hand; the others are from the grammar of training,
kept out of it. The questions of `pope` are in the benchmark's own words, which were trained. On {date}, {dtype} on
{device}, torch {torch}, by `{command}`.
"""
YES_NO_HEAD = """
Yes/no questions, half of them with the answer yes; `pope` asks whether something is there, and the wrong thing is any
(`random`) or nearly right (`near`):
"""
FALSE_NO = """
Boxes overlap with the right ones by {mean_overlap[share]:.2f} on average (intersection over union; target 0.70). Of
{false_refusals[n]:,} questions that the image answers, it refused {false_refusals[share]:.2%} (target 0.5 %); of
{false_denials[n]:,} about something that is there, it said "there is no ..." to {false_denials[share]:.2%}. To
LLaVA's own request for a short answer it gave one in {requests[published][share]:.1%}, to requests in other words in
{requests[other][share]:.1%}. In descriptions of scenes {descriptions[thing_precision]:.1%} of the things named are
there, and {descriptions[thing_recall]:.1%} of the things that are there are named.
"""
BEFORE = """
"Before" is the model that this one replaces, on {questions:,} questions of the same suite ({dtype}, {device}, torch
{torch}): it refused {false_refusals[share]:.1%} of those that the image answers, its boxes overlap by
{mean_overlap[share]:.2f}, and it says yes to {yes_no[all][yes_rate]:.1%} of the yes/no questions.
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
    parser.add_argument("--before", type=Path, help="evaluation.json of an earlier model, shown beside")
    args = parser.parse_args(argv)
    before = json.loads(args.before.read_text()) if args.before else None
    print(write_card(args.model, json.loads(args.report.read_text()), args.log, before))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
