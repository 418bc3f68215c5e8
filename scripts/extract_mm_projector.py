"""Write the projector's tensors of a checkpoint, .bin or safetensors, into one file.

    python scripts/extract_mm_projector.py --model-path ./llava-v1.5-7b --output ./mm_projector.bin

What it does is in llava/convert/projector.py; `llava convert --to projector` writes a folder that loads beside a base.
"""

import sys
from collections.abc import Sequence

from llava.convert.projector import extract_mm_projector
from llava.program import ArgumentParser, run_program


def main(argv: Sequence[str] | None = None) -> int:
    parser = ArgumentParser(prog="extract_mm_projector.py", description="Extract the projector of a checkpoint.")
    parser.add_argument("--model-path", required=True, metavar="FOLDER", help="the checkpoint")
    parser.add_argument("--output", required=True, metavar="FILE", help="the file to write, which does not exist yet")
    args = parser.parse_args(argv)
    return run_program(extract, args.model_path, args.output, name="extract_mm_projector.py")


def extract(model_path: str, output: str) -> None:
    proof = extract_mm_projector(model_path, output)
    print(f"wrote {output}: {proof.num_tensors} tensors, largest difference {proof.largest:.3g}")


if __name__ == "__main__":
    sys.exit(main())
