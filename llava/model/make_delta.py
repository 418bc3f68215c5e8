"""Subtract a base model's weights from a LLaVA's, for a checkpoint that is of no use without the base.

python -m llava.model.make_delta --base-model-path ./llama-7b --target-model-path ./llava-7b --delta-path ./llava-7b-delta
The program is in convert/original_programs.py; it is found by name, since nothing in model/ imports convert/.
"""

import sys
from importlib import import_module

_programs = import_module("llava.convert.original_programs")
make_delta, main = _programs.make_delta, _programs.make_delta_main

if __name__ == "__main__":
    sys.exit(main())
