"""`llava chat`: ask a model about images, once or in a conversation.

In: images, a question or typed lines, flags. Out: answers on stdout, streamed; everything else on stderr. The conversation is
in session.py, its commands in chat_commands.py, input and output in terminal.py, generation in engine/.
"""

from __future__ import annotations

import json
import sys
import time
from argparse import BooleanOptionalAction, Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llava.assets import EMBEDDED_INTRODUCTION, embedded_model_path
from llava.cli.chat_commands import COMMANDS, EXIT, PLAIN_WORDS, SETTINGS, find_command, unknown_command
from llava.cli.config_file import configured_parser
from llava.cli.image_words import read_line, read_words, starts_with_path
from llava.cli.inline_images import PROTOCOLS
from llava.cli.line_completion import LineCompleter
from llava.cli.model_flags import add_model_flags, find_model, quantization_from, sampling_from
from llava.cli.program import EXIT_BAD_INPUT, ArgumentParser, add_number
from llava.cli.startup import prepare, quick_imports
from llava.cli.terminal import Terminal, quiet_libraries, show
from llava.cli.waits import hide_waits
from llava.conversation import check_question, get_template
from llava.engine.request import Result
from llava.errors import InputError
from llava.images.download import ImageLimits
from llava.images.frames import FrameSampling
from llava.session import LoadedImage, Session, VideoOptions
from llava.utils import waiting

if TYPE_CHECKING:
    from llava.model.builder import LoadedModel

EXAMPLES = """\
examples:
  llava chat photo.jpg "What is in this image?"
  llava chat before.png after.png "What changed?"      several images, in this order
  llava chat clip.mp4 "What happens?" --num-frames 16  a video, as 16 frames of it
  llava chat photo.jpg                                 a conversation; /help lists its commands
  llava chat photo.jpg < questions.txt                 one answer per line
  echo "Describe it." | llava chat photo.jpg -         the question from a pipe
  llava chat - "What is this?" < photo.jpg             the image from a pipe
"""


def build_parser() -> ArgumentParser:
    parser = configured_parser(
        "chat",
        first=(
            "words",
            "--model-path",
            "--system",
            "--temperature",
            "--max-new-tokens",
            "--device",
            "--load-4bit",
            "--config",
        ),
        prog="llava chat",
        usage="%(prog)s [FLAGS] [IMAGE ...] [QUESTION]",
        description="Ask a model about images and videos, once or in a conversation.",
        epilog=EXAMPLES,
    )
    words = "image or video files or URLs, and the question, in any order; - reads either from stdin"
    parser.add_argument("words", nargs="*", metavar="IMAGE ... QUESTION", help=words)
    model = parser.add_argument_group("model")
    add_model_flags(model)
    model.add_argument("--system", metavar="TEXT", help="system text in place of the template's own")
    answers = parser.add_argument_group("answers")
    add_number(answers, "--temperature", 0.0, "T", "0 decodes greedily")
    answers.add_argument("--top-p", type=float, metavar="P", help="sample from top tokens of this total probability")
    answers.add_argument("--top-k", type=int, metavar="K", help="sample from so many most probable tokens; 0: all")
    answers.add_argument("--repetition-penalty", type=float, metavar="R", help="above 1, repeat less")
    answers.add_argument("--seed", type=int, metavar="N", help="the same seed samples the same answer")
    add_number(answers, "--num-beams", 1, "N", "beam search; the answer is not streamed")
    add_number(answers, "--max-new-tokens", 512, "N", "at most so many per answer")
    images = parser.add_argument_group("images")
    add_number(images, "--image-timeout", 20.0, "SECONDS", "seconds for a download")
    images.add_argument("--allow-private-hosts", action="store_true", help="download from this machine's network too")
    videos = parser.add_argument_group("videos")
    videos.add_argument(
        "--num-frames", type=int, metavar="N", help="frames that the model sees, with equal distances (default: 32)"
    )
    videos.add_argument(
        "--fps", type=float, metavar="F", help="frames for each second; with --num-frames, at most so many"
    )
    videos.add_argument("--video-start", type=float, default=0.0, metavar="SECONDS", help="see nothing before")
    videos.add_argument("--video-end", type=float, metavar="SECONDS", help="see nothing after")
    videos.add_argument("--as-video", action="store_true", help="take folders of frames and animated images as videos")
    videos.add_argument(
        "--frames-as-images", action="store_true", help="give each frame as an image, to a model that takes no videos"
    )
    videos.add_argument(
        "--time-instruction",
        action=BooleanOptionalAction,
        help="say in the prompt when the frames are (default: as the model was trained)",
    )
    output = parser.add_argument_group("output")
    output.add_argument("--json", action="store_true", help="a line of JSON per answer, with token counts and times")
    output.add_argument(
        "--show-images",
        choices=("auto", *PROTOCOLS, "off"),
        default="auto",
        help="show attached images in the terminal, by this protocol (default: what the terminal can)",
    )
    output.add_argument("--quiet", "-q", action="store_true", help="nothing but answers and errors")
    output.add_argument("--verbose", "-v", action="store_true", help="show prompts, token counts and times on stderr")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    return build_parser().run(run, argv)


def run(args: Namespace) -> int:
    prepare()
    sampling = sampling_from(args)
    words = read_words(args.words)
    question = words.question
    if args.conv_mode is not None:
        get_template(args.conv_mode)
    limits = ImageLimits(timeout_s=args.image_timeout, allow_private_hosts=args.allow_private_hosts)
    # Check all that needs no torch before it is loaded.
    videos = VideoOptions(
        FrameSampling(args.num_frames, args.fps, args.video_start, args.video_end),
        as_video=args.as_video,
        as_images=args.frames_as_images,
        tells_times=args.time_instruction,
    )
    images = [image for source in words.sources for image in LoadedImage.open_all(source, limits, videos)]
    if question is not None:
        check_question(question, len(images))
    args.model_path = find_model(args.model_path, args.mmproj)
    if args.quiet:
        hide_waits()
    terminal = Terminal(quiet=args.quiet, image_protocol=args.show_images)
    inside = [image for image in images if image.source in words.inside]
    terminal.name_images([image for image in images if image.videos is not None and image not in inside])
    terminal.attached(inside, question)

    started = time.perf_counter()
    if question is None and terminal.interactive:
        terminal.info("loading the model ...")
    loaded = load_model(args)
    if loaded.info.folder == embedded_model_path() and sys.stdout.isatty():
        terminal.info(EMBEDDED_INTRODUCTION.format(command="chat -m"))
    template = get_template(args.conv_mode or loaded.conv_mode)
    session = Session(loaded, template.with_system(args.system) if args.system is not None else template, sampling)
    session.attach(images)
    chat = Chat(session, terminal, args, limits, videos, load_s=time.perf_counter() - started)
    if args.verbose:
        chat.describe(loaded)
    if question is not None:
        chat.answer(question)
        return 0
    return chat.converse()


def load_model(args: Namespace) -> LoadedModel:
    with quick_imports():
        if not args.verbose:
            quiet_libraries()
        with waiting("loading libraries"):
            from llava.model.builder import load

        bits = quantization_from(args)
        return load(args.model_path, base=args.model_base, device=args.device, dtype=args.dtype, quantization=bits)


@dataclass
class Chat:
    """A conversation at a terminal: a session, and how its answers are shown."""

    session: Session
    terminal: Terminal
    args: Namespace
    limits: ImageLimits
    videos: VideoOptions
    load_s: float

    def converse(self) -> int:
        """Handle lines until the input ends. An error in one is printed, and the next one is read."""
        if self.terminal.interactive:
            num_images = len(self.session.waiting)
            self.terminal.info(
                f"{num_images} image{'s' * (num_images != 1)}; /help lists commands, Ctrl-C stops an answer, Ctrl-D leaves"
            )
            self.terminal.show_images(self.session.waiting)
        status = 0
        completer = LineCompleter([*COMMANDS], {"/set": [*SETTINGS]})
        for line in self.terminal.lines(complete=completer.complete):
            try:
                if line.is_block:
                    self.ask(line.text.strip())
                elif not self.handle(line.text.strip()):
                    break
            except InputError as error:
                self.terminal.error(error)
                status = 0 if self.terminal.interactive else EXIT_BAD_INPUT
            except KeyboardInterrupt:  # outside of an answer, as in a slow download
                if not self.terminal.interactive:
                    raise
                self.terminal.info("stopped")
        return status

    def handle(self, line: str) -> bool:
        """Answer a question or run a command; False ends the conversation."""
        if not line:
            return True
        word, _, argument = line.partition(" ")
        name = find_command(word, interactive=self.terminal.interactive)
        if name is None and line.startswith("/") and not starts_with_path(line):
            raise unknown_command(word)
        if name is None or (word in PLAIN_WORDS and argument):
            self.ask(line)
            return True
        COMMANDS[name].run(self, argument.strip())
        return name != EXIT

    def ask(self, line: str) -> None:
        """Answer a typed line, after attaching the images that it names; a line of images alone waits for its question."""
        read = read_line(line, [image.source for image in self.session.images])
        images = self.attach(read.sources)
        self.terminal.attached(images, read.question)
        if read.question is not None:
            self.answer(read.question)

    def attach(self, sources: Sequence[str | bytes]) -> list[LoadedImage]:
        """Open images, which go with the next question, and show them where the terminal can."""
        images = [image for source in sources for image in LoadedImage.open_all(source, self.limits, self.videos)]
        self.session.attach(images)
        self.terminal.show_images(images)
        return images

    def answer(self, question: str) -> None:
        sources = [image.source for image in self.session.waiting]
        handle = self.session.ask(question)
        if self.args.verbose:
            size, max_new_tokens = handle.size, handle.max_new_tokens
            self.terminal.info(f"prompt: {self.session.prompt(question)!r}")
            self.terminal.info(
                f"{size.num_text_tokens} text and {size.num_image_tokens} image tokens; at most {max_new_tokens} new ones"
                + (" (all that the context holds)" if max_new_tokens < self.args.max_new_tokens else "")
            )
        result = show(handle, (lambda text: None) if self.args.json else self.terminal.write)
        self.terminal.write((self.as_json(question, sources, result) if self.args.json else "") + "\n")
        self.session.record(question, result.text)
        if self.args.verbose:
            num_new, timings = result.usage.num_new_tokens, result.timings
            speed = num_new / max(timings.total_s, 1e-9)
            first = f"first after {timings.first_token_s:.2f} s, " if timings.first_token_s is not None else ""
            reason = result.completions[0].finish_reason
            self.terminal.info(f"{num_new} tokens, {first}{speed:.1f} per second; {reason}")

    def as_json(self, question: str, sources: list[str], result: Result) -> str:
        usage, timings = result.usage, result.timings
        row = {
            "question": question,
            "images": sources,
            "answer": result.text,
            "finish_reason": result.completions[0].finish_reason,
            "num_text_tokens": usage.num_text_tokens,
            "num_image_tokens": usage.num_image_tokens,
            "num_new_tokens": usage.num_new_tokens,
            "seconds": {
                "load": round(self.load_s, 3),
                "first_token": None if timings.first_token_s is None else round(timings.first_token_s, 3),
                "total": round(timings.total_s, 3),
            },
        }
        return json.dumps(row, ensure_ascii=False)

    def describe(self, loaded: LoadedModel) -> None:
        model = loaded.model
        template = f"{loaded.conv_mode} ({loaded.template_origin})"
        if self.args.conv_mode:
            template = f"{self.args.conv_mode} (given by --conv-mode)"
        self.terminal.info(
            f"{loaded.info.folder}: {type(model).__name__} on {model.device} in {str(model.dtype).removeprefix('torch.')}, "
            f"template {template}, context {loaded.context_len}, loaded in {self.load_s:.2f} s"
        )


if __name__ == "__main__":
    sys.exit(main())
