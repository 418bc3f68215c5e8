"""The embedded model in llama.cpp, compared with this package: greedy answers about the sample images.

In: llama.cpp's program `llama-mtmd-cli` (`cmake -B build && cmake --build build --target llama-mtmd-cli`). Out: a table of
how many answers are equal. Images are given as they are, which both programs resample in their own way to the tower's size,
and in that size already, where the inputs are the same.

    python -m benchmarks.convert.llama_cpp /path/to/llama-mtmd-cli --output benchmarks/results/llama_cpp.md
"""

from __future__ import annotations

import argparse
import subprocess
import tempfile
from pathlib import Path

import torch
from PIL import Image

from benchmarks import ROOT
from benchmarks.measure import add_output, publish, table
from llava.assets import embedded_model_path
from llava.convert.convert import ConversionOptions, convert
from llava.engine.request import SamplingParams
from llava.mm_utils import expand2square
from llava.model.builder import load
from llava.session import Session

IMAGES = ("demo.jpg", "counting.png", "reading.png", "wide.png")
QUESTIONS = (
    "What do you see in this picture?",
    "How many shapes are there?",
    "What colour is the star?",
    "What is written in the picture?",
)
NUM_TOKENS = 60
ATTEMPTS = 20


def ask_llama(program: str, pair: Path, image: Path, question: str) -> str:
    (vision,) = pair.glob("mmproj-*.gguf")
    (text,) = [file for file in pair.glob("*.gguf") if file != vision]
    command = [program, "-m", text, "--mmproj", vision, "--image", image, "--jinja", "--temp", "0"]
    command += ["-n", NUM_TOKENS, "-t", "1", "-p", f"<__media__>\n{question}"]
    for _ in range(ATTEMPTS):
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=True, timeout=300)
        if done.stdout.endswith("\n"):  # the program may end before the thread that prints has caught up
            return done.stdout.strip()
    raise SystemExit(f"llama.cpp did not print a whole answer in {ATTEMPTS} attempts")


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare answers with those of llama.cpp.")
    parser.add_argument("program", help="llama-mtmd-cli")
    parser.add_argument("--version", default="not given", help="which llama.cpp it is, for the table")
    add_output(parser)
    args = parser.parse_args()
    ours = load(embedded_model_path(), device="cpu", dtype=torch.float32)
    assert ours.image_processor is not None
    side = ours.model.image_policy().tile_size
    mean = tuple(int(value * 255) for value in ours.image_processor.image_mean)
    rows, different = [], []
    with tempfile.TemporaryDirectory() as scratch:
        for precision in ("f16", "q8_0"):
            pair = Path(scratch) / precision
            convert(embedded_model_path(), pair, to="gguf", options=ConversionOptions(precision=precision))
            for name, prepared in (("as they are", False), (f"{side} x {side}", True)):
                equal = 0
                for image in IMAGES:
                    file = ROOT / "images" / image
                    if prepared:
                        square = expand2square(Image.open(file).convert("RGB"), mean)
                        file = Path(scratch) / f"{image}.png"
                        square.resize((side, side), Image.Resampling.BICUBIC).save(file)
                    for question in QUESTIONS:
                        theirs = ask_llama(args.program, pair, file, question)
                        mine = Session(ours, sampling=SamplingParams(max_new_tokens=NUM_TOKENS)).answer(
                            question, str(file)
                        )
                        equal += mine.strip() == theirs
                        if mine.strip() != theirs:
                            different.append(
                                f"- {precision}, {name}, {image}, {question!r}: {mine!r} here, {theirs!r} there"
                            )
                rows.append((precision, name, f"{equal} of {len(IMAGES) * len(QUESTIONS)}"))
    conditions = (
        f"The embedded model, greedy, {len(QUESTIONS)} questions about each of {len(IMAGES)} images; "
        f"llama.cpp: {args.version}; torch {torch.__version__}, float32, on a CPU."
    )
    parts = [conditions, table(("precision", "images", "equal answers"), rows), "\n".join(different)]
    publish("\n\n".join(filter(None, parts)), args.output)


if __name__ == "__main__":
    main()
