"""The program `llava data show FILE --index N`: print one sample as training reads it, its trained text highlighted.

In: a data file, the number or id of a sample, a model folder (only its tokenizer and config are read). Out: the sample's
images, its numbers of tokens, and the prompt: trained text in colour on a terminal, between [ and ] elsewhere.
"""

from __future__ import annotations

import itertools
import sys
from argparse import Namespace
from collections.abc import Sequence

from llava.cli.colors import Colors, wants_colors
from llava.cli.program import closest
from llava.constants import DEFAULT_IMAGE_TOKEN, IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava.data.formats import media_sources
from llava.data.media_files import image_label, open_image
from llava.data.reader import EncodedSample, SampleReader, read_model
from llava.data.samples import Samples, open_samples
from llava.errors import InputError


def run(options: Namespace) -> None:
    from llava.assets import embedded_model_path

    samples = open_samples(options.file).distinct()
    index = options.index if options.id is None else _index_of(samples, options.id)
    if not 0 <= index < len(samples):
        raise InputError(f"--index {index} is not in the file, whose samples are 0 to {len(samples) - 1}")
    reader = read_model(
        options.model_path or embedded_model_path(), conv_mode=options.conv_mode, max_length=options.max_length
    )
    print(render(samples, index, reader, options.image_folder, use_colors=wants_colors(sys.stdout)))


def _index_of(samples: Samples, wanted: str) -> int:
    ids = (str(samples.id(index)) for index in range(len(samples)))
    found = next((index for index, name in enumerate(ids) if name == wanted), None)
    if found is None:
        some = [str(samples.id(index)) for index in range(min(len(samples), 10_000))]
        raise InputError(f"no sample has the id {wanted!r}{closest(wanted, some)}")
    return found


def render(samples: Samples, index: int, reader: SampleReader, image_folder: str | None, *, use_colors: bool) -> str:
    """Describe one sample: its images, its numbers of tokens, its prompt."""
    part, row = samples.locate(index)
    try:
        sample = part.file[row]
        encoded = reader.read(sample)
        sources = media_sources(sample)
        folder = part.image_folder or image_folder
        sizes = [open_image(source, folder, flag="--image-folder").size for source in sources]
    except InputError as error:
        raise InputError(f"{samples.describe(index)}: {error}") from error
    features = reader.image_tokens(sizes)
    num_tokens = len(encoded.ids) - len(sizes) + sum(features)
    num_trained = sum(label != IGNORE_INDEX for label in encoded.labels)
    lines = [f"{samples.describe(index)}, template {reader.conv_mode}"]
    for source, (width, height), count in zip(sources, sizes, features, strict=True):
        lines.append(f"image {image_label(source)}: {width}x{height} pixels, {count} tokens")
    over = f", over the limit of {reader.max_length}: the end is cut off" if num_tokens > reader.max_length else ""
    lines.append(f"{num_tokens} tokens, {num_trained} of them trained ({num_trained / num_tokens:.0%}){over}")
    return "\n".join([*lines, "", highlight_trained(encoded, features, use_colors=use_colors)])


def highlight_trained(sample: EncodedSample, features: Sequence[int], *, use_colors: bool) -> str:
    """Return the prompt with its trained text highlighted, split between tokens."""
    colors = Colors(use_colors)
    images = iter(features)
    parts: list[str] = []
    start = 0
    tokens = zip(sample.ids, sample.labels, sample.ends, strict=True)
    for (trained, is_image), run in itertools.groupby(
        tokens, key=lambda token: (token[1] != IGNORE_INDEX, token[0] == IMAGE_TOKEN_INDEX)
    ):
        members = list(run)
        end = max(start, members[-1][2])
        text = sample.text[start:end]
        if is_image:
            labels = [f"<image: {next(images, 0)} tokens>" for _ in members]
            text = text.replace(DEFAULT_IMAGE_TOKEN, "") + "".join(colors(label, "dim") for label in labels)
        shown = colors(text, "bold", "green") if use_colors else f"[{text}]"
        parts.append(shown if trained else text)
        start = end
    return "".join([*parts, sample.text[start:]])
