"""What the original's scoring scripts do alike: say what was wrong with their input on stderr, where results are not disturbed.

In: counted faults. Out: lines. Their command lines and output are in eval_*.py, one file for each script.
"""

from __future__ import annotations

import sys

from llava.eval.files import Faults


def report_faults(faults: Faults) -> None:
    for sentence in faults.sentences():
        print(f"warning: {sentence}", file=sys.stderr)
