"""`llava embed`: the vectors of images, or of texts, into a file.

In: image files and folders of them, or a file with a text in each line. Out: an .npy or .npz file, or a table in Parquet, with
one vector for each, in order. What a vector is, engine/request.py says; the engine computes many at a time.
"""

from __future__ import annotations

import json
import os
import sys
from argparse import Namespace
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from llava.cli.model_flags import add_loading_flags, add_path_flag, find_model
from llava.cli.program import ArgumentParser
from llava.cli.startup import prepare
from llava.engine.request import POOLINGS, SPANS, STAGES, EmbedRequest
from llava.errors import InputError, describe_system_error, require
from llava.files import STAGING, write_whole
from llava.utils import waiting

if TYPE_CHECKING:
    import numpy as np

    from llava.model.builder import LoadedModel

EXAMPLES = """\
examples:
  llava embed photos/ --out photos.npy                     what the vision tower sees: the mean of its patches
  llava embed a.jpg b.jpg --stage projector --out two.npz  the same as features of the language model's width
  llava embed photos/ --prompt "In one word:" --pooling last --out words.parquet
  llava embed --texts captions.txt --out captions.npy      the language model's hidden states, their mean

An .npz file has the arrays `vectors` and `names`, a Parquet table has the columns `name` and `vector`; beside an .npy file,
the names are a list of JSON in a file of the same name that ends with .json.
"""
ENDINGS = (".npy", ".npz", ".parquet")
IMAGE_ENDINGS = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".heic", ".heif",
)  # fmt: skip
AT_ONCE = 64  # images that are open together


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="llava embed", description="Write the vectors of images or texts to a file.", epilog=EXAMPLES
    )
    parser.add_argument(
        "images", nargs="*", metavar="IMAGE", help="image files and URLs; of a folder, all images in it"
    )
    parser.add_argument("--out", required=True, metavar="FILE", help=f"what is written: {', '.join(ENDINGS)}")
    parser.add_argument("--overwrite", action="store_true", help="replace FILE where it exists")
    parser.add_argument("--texts", metavar="FILE", help="embed the lines of this file, in place of images")
    parser.add_argument("--prompt", metavar="TEXT", help="a question about each image, in the model's template")
    parser.add_argument(
        "--stage", choices=STAGES, help="tower, projector, or language (default: language with words, else tower)"
    )
    parser.add_argument("--layer", type=int, help="hidden states of this layer; -1 is the last (default: -1)")
    parser.add_argument("--span", choices=SPANS, help="the positions that are taken (default: all)")
    parser.add_argument("--pooling", choices=[name for name in POOLINGS if name != "none"], default="mean")
    parser.add_argument("--normalize", action="store_true", help="scale every vector to length 1")
    parser.add_argument("--skip-unreadable", action="store_true", help="name images that cannot be opened, and go on")
    add_path_flag(parser)
    add_loading_flags(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    return build_parser().run(run, argv)


def run(args: Namespace) -> None:
    prepare()
    out = _checked_out(args)
    items = _texts_of(args.texts) if args.texts is not None else _images_of(args.images)
    if args.texts is not None and (args.images or args.prompt is not None):
        raise InputError("--texts embeds lines of text; leave out images and --prompt, or --texts")
    has_words = args.texts is not None or args.prompt is not None
    stage = args.stage or ("language" if has_words else "tower")
    if stage != "language" and has_words:
        raise InputError(f"--stage {stage} looks at images alone; leave out --prompt and --texts, or take language")
    if stage != "language" and not (args.layer is None and args.span is None):
        raise InputError(f"--layer and --span have no effect with --stage {stage}; take --stage language")
    path = find_model(args.model_path, args.mmproj)

    from llava.cli.terminal import quiet_libraries
    from llava.engine.engine import Engine
    from llava.model.builder import load

    quiet_libraries()
    loaded = load(path, base=args.model_base, device=args.device, dtype=args.dtype)
    asked = {"stage": stage, "pooling": args.pooling, "normalize": args.normalize}
    asked |= {name: getattr(args, name) for name in ("layer", "span") if getattr(args, name) is not None}
    make_request = _maker(args, loaded, asked)
    rows: list[tuple[str, np.ndarray]] = []
    with Engine.from_loaded(loaded) as engine, waiting("embedding", len(items)) as wait:
        for start in range(0, len(items), AT_ONCE):
            group = items[start : start + AT_ONCE]
            requests = list(_requests(group, make_request, skips=args.skip_unreadable))
            embeddings = engine.embed([request for _, request in requests])
            rows += [(name, made.vectors[0]) for (name, _), made in zip(requests, embeddings, strict=True)]
            wait.done += len(group)
    if not rows:
        raise InputError("none of the images could be opened, so nothing was written")
    _write(out, [name for name, _ in rows], [vector for _, vector in rows])
    skipped = f"; skipped: {len(items) - len(rows)}" if len(rows) < len(items) else ""
    count = f"{len(rows)} vector{'s' * (len(rows) > 1)}"
    print(f"{out}: {count} of {len(rows[0][1])} numbers ({args.pooling}, {stage}){skipped}")


def _checked_out(args: Namespace) -> Path:
    """The file to write, whose folder and library are there."""
    out = Path(args.out).expanduser()
    if out.suffix not in ENDINGS:
        raise InputError(f"--out is {args.out!r}, whose ending says no format; use one of {', '.join(ENDINGS)}")
    if out.suffix == ".parquet":
        require("pyarrow", extra="eval")
    if not out.parent.is_dir():
        raise InputError(f"--out is {args.out!r}, and there is no folder {str(out.parent)!r}; make it first")
    for file in (out, *([_names_file(out)] if out.suffix == ".npy" else [])):
        if file.is_dir() or (file.exists() and not args.overwrite):
            raise InputError(f"{str(file)!r} exists; name another file, or add --overwrite to replace it")
    begun = out.with_name(f"{STAGING}{out.name}")
    try:  # now rather than after the work
        begun.touch()
        begun.unlink()
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(out)) from None
    return out


def _names_file(out: Path) -> Path:
    return out.with_suffix(".json")


def _texts_of(file: str) -> list[str]:
    try:
        lines = Path(file).expanduser().read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError:
        raise InputError(f"--texts is {file!r}, which is not text in UTF-8") from None
    empty = next((number for number, line in enumerate(lines, start=1) if not line.strip()), None)
    if empty is not None or not lines:
        raise InputError(f"--texts is {file!r}, whose line {empty or 1} is empty; each line is a text to embed")
    return lines


def _images_of(words: Sequence[str]) -> list[str]:
    """Files and URLs as they are; of a folder, its images, by name."""
    if not words:
        raise InputError("there is nothing to embed; name images or folders of them, or a file with --texts")
    images: list[str] = []
    for word in words:
        folder = Path(word).expanduser()
        if not folder.is_dir():
            images.append(word)
            continue
        found = sorted(
            str(file) for file in folder.rglob("*") if file.suffix.lower() in IMAGE_ENDINGS and file.is_file()
        )
        if not found:
            raise InputError(f"the folder {word!r} has no images in it ({', '.join(IMAGE_ENDINGS)})")
        images += found
    twice = next((name for name, count in Counter(images).items() if count > 1), None)
    if twice is not None:
        raise InputError(f"{twice!r} is named twice; name every image once")
    return images


def _maker(args: Namespace, loaded: LoadedModel, asked: dict[str, object]) -> Callable[[str], EmbedRequest]:
    """What makes a request of a text or of the source of an image."""
    from llava.images.frames import Video
    from llava.session import LoadedImage, Session

    make = partial(EmbedRequest, **asked)  # type: ignore[arg-type]
    if args.texts is not None:
        return lambda text: make(prompt=text)

    def of_image(source: str) -> EmbedRequest:
        session = Session(loaded)
        shown = LoadedImage.open(source)
        if isinstance(shown.image, Video) and (loaded.processor is None or loaded.processor.video_policy is None):
            raise InputError(
                f"{source} is a video, and {loaded.info.folder} takes images alone; give frames of it as files"
            )
        session.attach([shown])
        prompt = None if args.prompt is None else session.conversation(args.prompt)
        return make(prompt=prompt, images=[image.image for image in session.images])

    return of_image


def _requests(
    items: Sequence[str], make_request: Callable[[str], EmbedRequest], *, skips: bool
) -> Iterator[tuple[str, EmbedRequest]]:
    for item in items:
        try:
            request = make_request(item)
        except (InputError, OSError) as error:
            if not skips:
                raise
            print(f"llava embed: skipped: {describe_system_error(error) or error}", file=sys.stderr)
        else:
            yield item, request


def _write(out: Path, names: list[str], vectors: list[np.ndarray]) -> None:
    """Write all files beside their places first, so that none is left half."""
    import numpy as np

    begun = out.with_name(f"{STAGING}{out.name}")
    try:
        with begun.open("wb") as file:
            if out.suffix == ".npy":
                np.save(file, np.stack(vectors))
            elif out.suffix == ".npz":
                np.savez(file, vectors=np.stack(vectors), names=np.array(names))
            else:
                import pyarrow
                from pyarrow import parquet

                column = pyarrow.FixedSizeListArray.from_arrays(np.concatenate(vectors), len(vectors[0]))
                parquet.write_table(pyarrow.table({"name": names, "vector": column}), file)
        if out.suffix == ".npy":
            write_whole(_names_file(out), json.dumps(names, ensure_ascii=False))
        os.replace(begun, out)
    finally:
        begun.unlink(missing_ok=True)
