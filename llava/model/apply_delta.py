"""Add a base model's weights to a published difference.

python -m llava.model.apply_delta --base-model-path ./llama-7b --target-model-path ./llava-7b --delta-path ./llava-7b-delta
The program is in convert/original_programs.py; it is found by name, since nothing in model/ imports convert/.
"""

import sys
from importlib import import_module

_programs = import_module("llava.convert.original_programs")
apply_delta, main = _programs.apply_delta, _programs.apply_delta_main

if __name__ == "__main__":
    sys.exit(main())
