"""Flags, `--help` and the start of the original's programs, one line a flag.

In: a program's name, its flags and the function that it runs. Out: its parser and its `main`. The programs are the other
files of this folder. What several of them run is eval/harness/answer_file.py and eval/harness/reviews.py.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from llava.cli.program import ArgumentParser
from llava.errors import InputError
from llava.eval.files import Faults
from llava.eval.harness.judge import REVIEWER, add_judge_flags
from llava.eval.harness.reviews import REVIEWS, review_files


@dataclass(frozen=True)
class ScriptFlag:
    """A flag. `type` is that of the default, or text; `help` is followed by the default, where there is one."""

    name: str
    help: str
    default: object = None
    type: Callable[[str], object] | None = None
    short: str | None = None
    nargs: str | None = None
    required: bool = False

    def add_to(self, parser: ArgumentParser) -> None:
        names = [name for name in (self.short, self.name) if name]
        if self.default is False:
            parser.add_argument(*names, action="store_true", help=self.help)
            return
        default = "".join(self.default) if isinstance(self.default, list) else self.default
        kind = self.type or (str if self.default is None or self.nargs else type(self.default))
        text = self.help if default in (None, "") else f"{self.help} (default: {default})"
        parser.add_argument(
            *names, type=kind, default=self.default, nargs=self.nargs, required=self.required, help=text
        )


@dataclass(frozen=True)
class EvalScript:
    """One of the original's programs. `judge` is the default model of those that ask a judge."""

    name: str
    description: str
    flags: Sequence[ScriptFlag]
    run: Callable[[Namespace], None]
    judge: str | None = None

    def build_parser(self) -> ArgumentParser:
        parser = ArgumentParser(prog=self.name, description=self.description)
        for flag in self.flags:
            flag.add_to(parser)
        if self.judge is not None:
            add_judge_flags(parser, model=self.judge)
        return parser

    def call(self, args: object) -> None:
        """Run the program with an object whose attributes are the flags, as outside code does; absent ones have defaults.

        Raises:
            InputError: A flag without a default is absent.
        """
        values: dict[str, object] = {}
        for flag in self.flags:
            name = flag.name.lstrip("-").replace("-", "_")
            values[name] = getattr(args, name, flag.default)
            if flag.required and not hasattr(args, name):
                raise InputError(f"the arguments of {self.name} have no {name!r}: {flag.help}")
        self.run(Namespace(**values))

    def main(self, argv: Sequence[str] | None = None) -> int:
        return self.build_parser().run(self.run, argv)


MODEL_PATH = ScriptFlag("--model-path", "folder or hub repository (default: the model in the package)")
MODEL_BASE = ScriptFlag("--model-base", "language model under a LoRA or projector folder")
ANSWERS_FILE = ScriptFlag("--answers-file", "the file to write", "answer.jsonl")
DEVICE = ScriptFlag("--device", "auto, cuda, mps or cpu", "auto")
LETTER_ALONE = ScriptFlag("--single-pred-prompt", "ask for the option's letter alone", False)
MAX_TOKENS = ScriptFlag("--max-tokens", "maximum number of tokens of a reply", 1024)
SAMPLING_FLAGS = (
    ScriptFlag("--temperature", "0 takes the most probable token", 0.2),
    ScriptFlag("--top_p", "sample from the most probable tokens of this total probability", type=float),
    ScriptFlag("--num_beams", "beam search, one question at a time", 1),
)


def answer_flags(
    *,
    questions: str = "tables/question.jsonl",
    conv_mode: str = "llava_v1",
    sampling: Sequence[ScriptFlag] = SAMPLING_FLAGS,
) -> tuple[ScriptFlag, ...]:
    """Return the flags of the programs that answer a file of questions, with these defaults."""
    return (
        MODEL_PATH,
        MODEL_BASE,
        ScriptFlag("--image-folder", "what the questions' images are relative to", ""),
        ScriptFlag("--question-file", "the questions", questions),
        ANSWERS_FILE,
        ScriptFlag("--conv-mode", "conversation template", conv_mode),
        ScriptFlag("--num-chunks", "into how many parts the questions are cut", 1),
        ScriptFlag("--chunk-idx", "which of them to answer", 0),
        *sampling,
        DEVICE,
    )


def review_script(name: str) -> EvalScript:
    """Make one of the scripts whose judge compares two answers to each question, by its name in `REVIEWS`."""
    kind = REVIEWS[name]
    context = ScriptFlag("--context", "the images in words, JSON lines", short="-c", required=True)
    flags = (
        ScriptFlag("--question", "the questions, JSON lines", short="-q", required=True),
        *((context,) if kind.describe is not None else ()),
        ScriptFlag("--answer-list", "two files of answers, JSON lines", [], short="-a", nargs="+"),
        ScriptFlag("--rule", "the judge's rules (default: those in the package)", short="-r"),
        ScriptFlag("--output", "the file of reviews; those in it are kept", short="-o", required=True),
        MAX_TOKENS,
    )
    description = "Let a language model compare two answers to each question."
    return EvalScript(f"{name}.py", description, flags, partial(review_files, kind=kind), judge=REVIEWER)


def report_faults(faults: Faults) -> None:
    """Print what was wrong with a program's input on stderr, where it does not disturb the results."""
    for sentence in faults.sentences():
        print(f"warning: {sentence}", file=sys.stderr)
