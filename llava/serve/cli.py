"""The original command line: one image, a conversation about it, the original's flags, prompts and look.

In: flags and typed lines. Out: answers, streamed. The path of a question to the model: template (conversation.py) -> ids with
-200 and pixels (processor.py) -> `model.generate` (engine/hf_engine.py). `llava chat` (cli/chat.py) is the friendlier program.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Sequence

from llava.cli.model_flags import choose_conv_mode, find_model, sampling_from
from llava.cli.program import ArgumentParser
from llava.cli.startup import prepare, quick_imports
from llava.cli.terminal import quiet_libraries, show
from llava.conversation import get_model_name_from_path, get_template, image_placeholder, with_image_placeholders
from llava.engine.request import Request
from llava.errors import InputError
from llava.images.io import load_image
from llava.utils import disable_torch_init

__all__ = ["build_parser", "load_image", "main"]


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(prog="llava cli", description="A conversation about one image. An empty line ends it.")
    parser.add_argument(
        "--model-path", type=str, default=None, help="folder or hub repository (default: the package's model)"
    )
    parser.add_argument("--model-base", type=str, default=None, help="language model under a LoRA or projector folder")
    parser.add_argument("--image-file", type=str, required=True, help="path or URL of the image")
    parser.add_argument("--device", type=str, default="cuda", help="cuda, cuda:1, mps or cpu (default: cuda if there)")
    parser.add_argument("--conv-mode", type=str, default=None, help="conversation template (default: the model's own)")
    parser.add_argument("--temperature", type=float, default=0.2, help="0 decodes greedily (default: 0.2)")
    parser.add_argument("--max-new-tokens", type=int, default=512, help="at most so many per answer (default: 512)")
    parser.add_argument("--load-8bit", action="store_true", help="weights in 8 bits")
    parser.add_argument("--load-4bit", action="store_true", help="weights in 4 bits")
    parser.add_argument("--debug", action="store_true", help="show the prompt and the raw answer after each turn")
    return parser


def main(argv: Sequence[str] | Namespace | None = None) -> int:
    """Run the program. With a Namespace instead of words, raise errors instead of printing them."""
    if isinstance(argv, Namespace):
        run(argv)
        return 0
    return build_parser().run(_run_prepared, argv)


def _run_prepared(args: Namespace) -> None:
    prepare()
    run(args)


def run(args: Namespace) -> None:
    sampling = sampling_from(args)
    model_path = find_model(args.model_path)
    model_name = get_model_name_from_path(model_path)
    if args.conv_mode is not None:
        get_template(args.conv_mode)  # refuse an unknown name before anything is loaded
    image = load_image(args.image_file)

    with quick_imports():
        quiet_libraries()
        from llava.engine.hf_engine import HFEngine
        from llava.model.builder import load_pretrained_model
        from llava.model.tokenizer_setup import conv_mode

        with disable_torch_init():
            tokenizer, model, image_processor, _ = load_pretrained_model(
                model_path, args.model_base, model_name, args.load_8bit, args.load_4bit, device=args.device
            )
    if image_processor is None:
        raise InputError(f"{model_path!r} is a language model without a vision tower, so it cannot look at an image")
    conv = get_template(choose_conv_mode(args.conv_mode, conv_mode(model.config.to_dict(), tokenizer, model_name)))
    roles = ("user", "assistant") if conv.version == "mpt" else conv.roles
    engine = HFEngine.of_parts(model, tokenizer, image_processor)
    placeholder: str | None = image_placeholder(getattr(model.config, "mm_use_im_start_end", False))

    while True:
        try:
            question = input(f"{roles[0]}: ")
        except EOFError:
            question = ""
        if not question:
            print("exit...")
            return
        print(f"{roles[1]}: ", end="", flush=True)
        if placeholder is not None:  # the image belongs to the first question; later ones find it in the history
            question, placeholder = with_image_placeholders(question, 1, placeholder), None
        conv.append_message(conv.roles[0], question)
        conv.append_message(conv.roles[1], None)
        prompt = conv.get_prompt()
        outputs = show(engine.stream(Request(conv, [image], sampling)), _write).text
        print()
        conv.messages[-1][-1] = outputs
        if args.debug:
            print("\n", {"prompt": prompt, "outputs": outputs}, "\n")


def _write(text: str) -> None:
    print(text, end="", flush=True)


if __name__ == "__main__":
    sys.exit(main())
