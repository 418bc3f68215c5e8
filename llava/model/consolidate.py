"""Write a checkpoint of several shards, or of an old layout, as one weight file.

python -m llava.model.consolidate --src ./llava-7b --dst ./llava-7b-consolidated
The program is in convert/original_programs.py; it is found by name, since nothing in model/ imports convert/.
"""

import sys
from importlib import import_module

_programs = import_module("llava.convert.original_programs")
consolidate_ckpt, main = _programs.consolidate_ckpt, _programs.consolidate_main

if __name__ == "__main__":
    sys.exit(main())
