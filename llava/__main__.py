"""The program `llava`: run the command named by the first argument.

In: a command line. Out: an exit status. A command's module is imported when it is run, so that `llava --help` needs no
torch. The commands are in cli/commands.py.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module

from llava.cli.commands import COMMANDS
from llava.cli.program import closest, print_error, run_program

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
