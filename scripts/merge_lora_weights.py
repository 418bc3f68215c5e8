"""Merge a LoRA adapter into its base model: the script's name for `llava merge`.

    python scripts/merge_lora_weights.py --model-path ./llava-lora --model-base ./vicuna-7b --save-model-path ./merged

What it does is in llava/convert/merge_lora.py.
"""

import sys

from llava.convert.merge_lora import build_parser, run

if __name__ == "__main__":
    sys.exit(build_parser("merge_lora_weights.py").run(run))
