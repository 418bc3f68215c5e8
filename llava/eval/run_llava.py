"""Answer one question about one image or several, as a program and as `eval_model(args)`, like the original.

    python -m llava.eval.run_llava --model-path llava-v1.5-7b --image-file a.jpg,b.jpg --query "What changed?"

`<image-placeholder>` in the question says where an image goes; without it, the images come first.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Sequence
from typing import TYPE_CHECKING

from llava.cli.model_flags import choose_conv_mode, find_model, sampling_from
from llava.cli.startup import quick_imports
from llava.constants import DEFAULT_IMAGE_TOKEN, IMAGE_PLACEHOLDER
from llava.conversation import get_model_name_from_path, get_template, image_placeholder, with_image_placeholders
from llava.engine.request import Request
from llava.errors import InputError
from llava.eval.common_flags import MODEL_BASE, MODEL_PATH, SAMPLING_FLAGS, EvalScript, ScriptFlag
from llava.images.io import load_image

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["build_parser", "eval_model", "image_parser", "load_image", "load_images", "main"]


def image_parser(args: Namespace) -> list[str]:
    """Return the names of the images."""
    return args.image_file.split(args.sep) if isinstance(args.image_file, str) else list(args.image_file)


def load_images(image_files: Sequence[str]) -> list[Image.Image]:
    return [load_image(name, upright=False) for name in image_files]


def eval_model(args: Namespace) -> str:
    """Answer `args.query` about `args.image_file`, print the answer and return it.

    A loaded model may come along as `args.model`, `args.tokenizer` and `args.image_processor`.
    """
    sampling = sampling_from(args)
    if args.conv_mode is not None:
        get_template(args.conv_mode)
    path = find_model(args.model_path)
    name = get_model_name_from_path(path)
    images = load_images(image_parser(args))
    with quick_imports():
        from llava.engine.hf_engine import HFEngine
        from llava.model.builder import load_pretrained_model
        from llava.model.tokenizer_setup import conv_mode

        parts = ("tokenizer", "model", "image_processor")
        tokenizer, model, image_processor = (getattr(args, part, None) for part in parts)
        if model is None or tokenizer is None or image_processor is None:
            tokenizer, model, image_processor, _ = load_pretrained_model(
                path, args.model_base, name, device=getattr(args, "device", "cuda")
            )
    if image_processor is None:
        raise InputError(f"{path!r} is a language model without a vision tower, so it cannot look at an image")
    conv = get_template(choose_conv_mode(args.conv_mode, conv_mode(model.config.to_dict(), tokenizer, name)))
    placeholder = image_placeholder(getattr(model.config, "mm_use_im_start_end", False))
    query = args.query.replace(IMAGE_PLACEHOLDER, DEFAULT_IMAGE_TOKEN)
    conv.append_message(conv.roles[0], with_image_placeholders(query, len(images), placeholder))
    conv.append_message(conv.roles[1], None)
    with HFEngine.of_parts(model, tokenizer, image_processor) as engine:
        text = engine.generate(Request(conv, images, sampling)).text
    print(text)
    return text


def run(args: Namespace) -> None:
    eval_model(args)


FLAGS = (
    MODEL_PATH,
    MODEL_BASE,
    ScriptFlag("--image-file", "paths or URLs, with --sep between them", required=True),
    ScriptFlag("--query", "the question", required=True),
    ScriptFlag("--conv-mode", "conversation template (default: the model's own)"),
    ScriptFlag("--sep", "what stands between the names of images", ","),
    *SAMPLING_FLAGS,
    ScriptFlag("--max_new_tokens", "maximum number of tokens of the answer", 512),
    ScriptFlag("--device", "cuda (where there is one), mps or cpu", "cuda"),
)
SCRIPT = EvalScript("run_llava.py", "One question about one image or several.", FLAGS, run)
build_parser, main = SCRIPT.build_parser, SCRIPT.main

if __name__ == "__main__":
    sys.exit(main())
