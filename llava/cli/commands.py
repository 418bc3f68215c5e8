"""The commands of the program `llava`, by name: the modules that run them, and where their parsers are.

In: nothing. Out: a table of names, from which nothing is imported. A new command is one line in `COMMANDS`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Command:
    """A command: `module.main(argv)` returns an exit status.

    `parsers` are the functions that build its parsers, `module:function`, by the name of a program within the command; the one
    without a name is the command's own. None: `module:build_parser`.
    """

    module: str
    help: str
    parsers: Mapping[str, str] | None = None


DATA_PARSERS = {"check": "llava.data.program:check_parser", "show": "llava.data.program:show_parser"}
EVAL_PARSERS = {
    "": "llava.eval.harness.run:build_parser",
    "score": "llava.eval.harness.scoring:build_parser",
    "compare": "llava.eval.harness.compare:build_parser",
    "report": "llava.eval.harness.report:build_parser",
    "list": "llava.eval.harness.task_list:build_parser",
}
COMMANDS = {
    "chat": Command("llava.cli.chat", "ask a model about images: one question, or a conversation"),
    "models": Command("llava.cli.models", "list the models that have a name, their sizes, and which fit here"),
    "pull": Command("llava.cli.pull", "download a model and all that it needs"),
    "rm": Command("llava.cli.remove", "remove the copy of a model that was downloaded"),
    "cli": Command("llava.serve.cli", "the same with the flags and output of the original command line"),
    "serve": Command("llava.serve.serve", "serve a model: OpenAI-compatible API and web page, at one address"),
    "controller": Command("llava.serve.controller", "for many machines: register workers and route requests to them"),
    "worker": Command("llava.serve.model_worker", "for many machines: serve a model to a controller"),
    "web": Command("llava.serve.gradio_web_server", "for many machines: the web page over a controller"),
    "embed": Command("llava.cli.embed", "write the vectors of images or texts to a file"),
    "bench": Command("llava.cli.bench", "measure how fast a model answers on this machine"),
    "train": Command("llava.train.train", "pretrain or fine-tune a model", {"": "llava.train.arguments:build_parser"}),
    "examples": Command("llava.cli.examples", "write example configurations and data into a folder"),
    "data": Command(
        "llava.data.program", "check training data before a run, or show a sample as training reads it", DATA_PARSERS
    ),
    "trace": Command("llava.diagnose.trace", "show every stage from a question to its answer, or of a training step"),
    "doctor": Command(
        "llava.diagnose.doctor", "find the cause of a fault of a checkpoint, data, a training run or a server"
    ),
    "selftest": Command("llava.diagnose.selftest", "check the parts of a model, with numbers"),
    "eval": Command("llava.eval.harness.main", "run benchmarks; score, compare and show answers", EVAL_PARSERS),
    "info": Command("llava.convert.info", "describe a model folder without loading it"),
    "convert": Command("llava.convert.program", "write a checkpoint in another layout, and verify it"),
    "completion": Command("llava.cli.shell_completion", "print a script by which a shell completes commands and flags"),
    "merge": Command("llava.convert.merge_lora", "merge a LoRA adapter into its base model"),
}
