"""Let GPT-4 compare two answers to text questions, as the original does.

python llava/eval/eval_gpt_review.py -q question.jsonl -a answer_a.jsonl answer_b.jsonl -r rule.json -o review.jsonl
"""

from __future__ import annotations

import sys

from llava.eval.common_flags import review_script
from llava.eval.harness.judge import get_eval
from llava.eval.metrics.gpt_review import parse_score

__all__ = ["build_parser", "get_eval", "main", "parse_score"]

SCRIPT = review_script("eval_gpt_review")
build_parser, main = SCRIPT.build_parser, SCRIPT.main

if __name__ == "__main__":
    sys.exit(main())
