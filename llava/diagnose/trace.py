"""`llava trace`: show every step between a question and its answer, or of a training step on one sample.

In: images and a question, or a data file and the number of a sample. Out: every point on stdout, as text or JSON, and with
`--html` a page. Exit status: 0 if every check holds, 1 if one does not, 2 for a wrong call.
"""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from llava.cli.colors import Colors, shows_unicode, wants_colors
from llava.cli.model_flags import add_model_flags, sampling_from
from llava.cli.program import ArgumentParser, add_number
from llava.conversation import check_question, get_template
from llava.diagnose.tracer.record import POINTS, Trace, TraceStopped
from llava.errors import InputError

EXIT_FAILED = 1
EXAMPLES = """\
examples:
  llava trace photo.jpg "What is in this picture?"               every point on the way, in order
  llava trace photo.jpg "Which colour?" --html trace.html        the same as a page: where did each token look?
  llava trace photo.jpg "Which colour?" --break splice           open the debugger where images join the text
  llava trace -m ./llava-v1.5-7b photo.jpg "Why?" --json
  llava trace --data train.json --index 3 --image-folder images  a training sample: labels, loss, gradients
  llava trace --data train.json -m ./llava-v1.5-7b -- --mm_projector_lr 2e-5 --freeze_backbone True
  llava trace --data train.json -- run.yaml                      the same with a run's configuration file
"""


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="llava trace",
        usage="%(prog)s [FLAGS] [IMAGE ...] QUESTION\n       %(prog)s [FLAGS] --data FILE [-- TRAINING FLAGS]",
        description="Show everything that happens between a question and its answer, or in a training step of one sample.",
        epilog=EXAMPLES,
    )
    parser.add_argument("words", nargs="*", metavar="IMAGE ... QUESTION", help="image files or URLs, and the question")
    add_model_flags(parser, bits=False)
    add_number(parser, "--temperature", 0.0, "T", "0 is greedy")
    add_number(parser, "--max-new-tokens", 64, "N", "length of the answer")
    parser.add_argument("--data", metavar="FILE", help="trace a training sample of this file instead of a question")
    add_number(parser, "--index", 0, "N", "with --data: its number, from 0")
    parser.add_argument("--image-folder", metavar="FOLDER", help="with --data: the folder that images are relative to")
    parser.add_argument("--json", action="store_true", help="print all facts as JSON")
    parser.add_argument("--html", metavar="FILE", help="write a page that needs nothing else")
    parser.add_argument("--break", dest="break_at", metavar="POINT", help=f"open pdb at a point: {', '.join(POINTS)}")
    gradients = "with --html: attention alone, without relevance (saves memory and time)"
    parser.add_argument("--no-gradients", action="store_true", help=gradients)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    place = words.index("--") if "--" in words else len(words)
    return build_parser().run(partial(run, training_flags=words[place + 1 :]), words[:place])


def run(args: Namespace, training_flags: Sequence[str] = ()) -> int:
    if args.break_at is not None and args.break_at not in POINTS:
        raise InputError(f"there is no point {args.break_at!r} to break at; known: {', '.join(POINTS)}")
    if args.data is None and training_flags:
        raise InputError("flags after -- are those of a training run; name its samples with --data")
    if args.data is not None and args.words:
        raise InputError("give a question, or a data file with --data, not both")
    try:
        return _trace_sample(args, training_flags) if args.data is not None else _trace_question(args)
    except TraceStopped:
        return EXIT_FAILED


def _trace_question(args: Namespace) -> int:
    from llava.cli.chat import load_model
    from llava.cli.image_words import read_words
    from llava.cli.model_flags import find_model
    from llava.images.frames import Video
    from llava.session import LoadedImage

    words = read_words(args.words)
    question = words.question
    if question is None:
        raise InputError('say what to ask: llava trace photo.jpg "What is in this picture?"')
    if args.conv_mode is not None:
        get_template(args.conv_mode)
    images = [LoadedImage.open(source) for source in words.sources]
    check_question(question, len(images))
    videos = [image.source for image in images if isinstance(image.image, Video)]
    if videos and args.html:
        raise InputError(
            f"the page of a trace shows images and no videos; trace {videos[0]} without --html, or give frames of it as images"
        )
    args.model_path = find_model(args.model_path, args.mmproj)
    sampling = sampling_from(args)
    args.load_8bit, args.load_4bit, args.verbose = False, False, False

    loaded = load_model(args)
    if not hasattr(loaded.model, "get_vision_tower"):
        raise InputError(f"{args.model_path} is a language model without a vision tower: there is nothing to trace")
    from llava.diagnose.tracer.generation import trace_question

    traced = trace_question(
        loaded, images, question, sampling=sampling, conv_mode=args.conv_mode, break_at=args.break_at
    )
    page = None
    if args.html:
        from llava.diagnose.tracer.attention import compute_views
        from llava.diagnose.tracer.html import page_of_answer

        page = page_of_answer(traced, compute_views(traced, gradients=not args.no_gradients))
    answer = traced.answer.text if traced.answer else None
    facts: dict[str, object] = {"question": question, "images": [image.source for image in images], "answer": answer}
    return _show(args, traced.record, facts, page)


def _trace_sample(args: Namespace, training_flags: Sequence[str]) -> int:
    from llava.cli.model_flags import find_model
    from llava.cli.terminal import quiet_libraries

    quiet_libraries()
    from llava.diagnose.tracer.training import trace_sample

    record = trace_sample(
        args.data,
        args.index,
        model_path=find_model(args.model_path, args.mmproj),
        image_folder=args.image_folder,
        flags=training_flags,
        break_at=args.break_at,
    )
    page = None
    if args.html:
        from llava.diagnose.tracer.html import page_of_sample

        page = page_of_sample(record)
    return _show(args, record, {"data": args.data, "index": args.index}, page)


def _show(args: Namespace, record: Trace, head: dict[str, object], page: str | None) -> int:
    from llava.diagnose.tracer.text import as_text

    if page is not None:
        try:
            Path(args.html).write_text(page, encoding="utf-8")
        except OSError as error:
            raise InputError(f"the page cannot be written to {args.html!r}: {error.strerror}") from error
    if args.json:
        print(json.dumps({**head, **record.as_json()}, ensure_ascii=False, indent=2))
    else:
        print(as_text(record, Colors(wants_colors(sys.stdout)), blocks=shows_unicode(sys.stdout)))
        if page is not None:
            print(f"page: {args.html}")
    return EXIT_FAILED if record.failed else 0


if __name__ == "__main__":
    sys.exit(main())
