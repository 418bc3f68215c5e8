"""Let GPT-4 compare two answers about images, which it gets as captions and boxes.

    python llava/eval/eval_gpt_review_visual.py -q questions.jsonl -c caps_boxes.jsonl -a first.jsonl second.jsonl \\
        -r llava/eval/table/rule.json -o reviews.jsonl
"""

from __future__ import annotations

import sys

from llava.eval.common_flags import review_script
from llava.eval.harness.judge import get_eval
from llava.eval.metrics.gpt_review import parse_score

__all__ = ["build_parser", "get_eval", "main", "parse_score"]

SCRIPT = review_script("eval_gpt_review_visual")
build_parser, main = SCRIPT.build_parser, SCRIPT.main

if __name__ == "__main__":
    sys.exit(main())
