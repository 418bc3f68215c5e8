"""The program `llava`: run the command named by the first argument.

In: a command line. Out: an exit status. A command's module is imported when it is run, so that `llava --help` needs no
torch. A new command is one line in `COMMANDS`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module

from llava.cli.program import closest, print_error, run_program


@dataclass(frozen=True)
class Command:
    """A command: `module.main(argv)` returns an exit status."""

    module: str
    help: str


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
    "bench": Command("llava.cli.bench", "measure how fast a model answers on this machine"),
    "train": Command("llava.train.train", "pretrain or fine-tune a model"),
    "examples": Command("llava.cli.examples", "write example configurations and data into a folder"),
    "data": Command("llava.data.check", "check training data before a run, or show a sample as training reads it"),
    "trace": Command("llava.diagnose.trace", "show every stage from a question to its answer, or of a training step"),
    "doctor": Command(
        "llava.diagnose.doctor", "find the cause of a fault of a checkpoint, data, a training run or a server"
    ),
    "selftest": Command("llava.diagnose.selftest", "check the parts of a model, with numbers"),
    "eval": Command("llava.eval.harness.main", "run benchmarks; score, compare and show answers"),
    "info": Command("llava.convert.info", "describe a model folder without loading it"),
    "convert": Command("llava.convert.program", "write a checkpoint in another layout, and verify it"),
    "merge": Command("llava.convert.merge_lora", "merge a LoRA adapter into its base model"),
}

EXAMPLES = """\
examples:
  llava chat photo.jpg "What is in this image?"        one answer from the model that comes with the package
  llava chat photo.jpg                                 a conversation about an image; /help lists its commands
  llava chat -m llava-1.5-7b a.jpg b.jpg "What changed?"   a published model; llava models lists their names
  llava cli --model-path ./llava-v1.5-7b --image-file photo.jpg --device cuda
  llava serve ./llava-v1.5-7b                          an API and a web page on this machine
  llava train scripts/configs/finetune_lora.yaml learning_rate=1e-4
  llava data check train.json --image-folder images    the faults of training data, before a run
  llava eval pope --model-path ./llava-v1.5-7b         a benchmark, with a report
  llava convert ./llava-v1.5-7b ./hf --to transformers
  llava trace photo.jpg "What is this?" --html t.html  every stage between a question and its answer
  llava doctor ./llava-v1.5-7b                         its faults, and the remedies
  llava COMMAND --help                                 the flags of a command
"""


def main(argv: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help", "help"):
        return run_program(print_help, name="llava")
    if words[0] in ("-V", "--version", "version"):
        return run_program(print_version, name="llava")
    name, *rest = words
    if name not in COMMANDS:
        kind = "flag" if name.startswith("-") else "command"
        known = f"{closest(name, list(COMMANDS))} (commands: {', '.join(COMMANDS)})"
        return print_error(f"unknown {kind} {name!r}{known}", name="llava")
    return run_program(start, name, rest, name=f"llava {name}")


def start(name: str, argv: Sequence[str]) -> int:
    """Import a command's module and run it."""
    return import_module(COMMANDS[name].module).main(argv) or 0


def print_help() -> None:
    width = max(map(len, COMMANDS))
    print(
        "usage: llava COMMAND [ARGUMENTS]\n\n"
        "Large multimodal models: ask them about images, train, serve, measure and convert them, look inside.\n\n"
        "commands:"
    )
    for name, command in COMMANDS.items():
        print(f"  {name:<{width}}  {command.help}")
    print(
        f"\n  --help     show this\n  --version  show the versions that a bug report should name\n\n{EXAMPLES}", end=""
    )


def print_version() -> None:
    from importlib.metadata import PackageNotFoundError, version

    import llava

    print(f"llava {llava.__version__}")
    for package in ("torch", "transformers"):
        try:
            print(f"{package} {version(package)}")
        except PackageNotFoundError:
            print(f"{package} not installed")


if __name__ == "__main__":
    sys.exit(main())
