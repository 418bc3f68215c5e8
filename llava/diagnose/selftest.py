"""`llava selftest`: the five items of the road map's check list, run on a model.

In: a model folder. Out: for each item what was done, with numbers, and whether it holds: from <image> to embeddings, the
length of a sequence by hand, the label mask, another projector trained and run (checks/projector_exercise.py), and an odd
output traced to its cause. Exit status: 0 if all hold, 1 if one does not, 2 for a wrong call.
"""

from __future__ import annotations

import copy
import json
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

from llava.cli.colors import Colors, shows_unicode, wants_colors
from llava.cli.model_flags import add_loading_flags
from llava.cli.program import ArgumentParser, add_number
from llava.cli.startup import prepare
from llava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava.diagnose.checks.sample_image import QUESTION, prepare_question, sample_image
from llava.diagnose.tracer.record import SelfTestItem, tensor_stats
from llava.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

    from llava.conversation import Conversation
    from llava.model.builder import LoadedModel
    from llava.processor import ModelInputs

EXIT_FAILED = 1
EXAMPLES = """\
examples:
  llava selftest                                   the model that comes with the package, in half a minute
  llava selftest ./llava-v1.5-7b --skip-training   without the projector exercise, which needs a training step's memory
  llava selftest ./llava-v1.5-7b-lora --model-base ./vicuna-7b-v1.5 --json
"""
ANSWERS = ("A red circle and a blue square.", "Rome.")


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="llava selftest",
        description="Show on a model, with numbers, the five things of the road map's check list.",
        epilog=EXAMPLES,
    )
    parser.add_argument("model", nargs="?", metavar="MODEL", help="model folder (default: the embedded model)")
    add_loading_flags(parser)
    add_number(parser, "--steps", 20, "N", "training steps of the projector exercise")
    parser.add_argument("--skip-training", action="store_true", help="leave the projector exercise out")
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    return build_parser().run(run, argv)


def run(args: Namespace) -> int:
    from llava.cli.model_flags import find_model
    from llava.cli.terminal import quiet_libraries

    if args.steps < 1:
        raise InputError(f"--steps is {args.steps}; give 1 or more, or --skip-training")
    path = find_model(args.model, args.mmproj)
    prepare()
    quiet_libraries()
    from llava.model.builder import load

    loaded = load(path, base=args.model_base, device=args.device, dtype=args.dtype)
    if loaded.processor is None:
        raise InputError(f"{path} is a language model without a vision tower; there is nothing of ours to test")
    items = examine(loaded, path, steps=0 if args.skip_training else args.steps)
    if args.json:
        content = {"model": path, "items": [item.as_json() for item in items]}
        print(json.dumps(content, ensure_ascii=False, indent=2))
    else:
        print(as_text(path, items))
    return EXIT_FAILED if any(not item.passed and not item.skipped for item in items) else 0


def examine(loaded: LoadedModel, path: str, *, steps: int) -> list[SelfTestItem]:
    """Run the five items in order; with `steps` 0 the projector exercise is skipped."""
    from llava.diagnose.checks.projector_exercise import exercise_projector

    exercise = partial(exercise_projector, path=path, steps=steps)
    checks: list[Callable[[LoadedModel], SelfTestItem]] = [
        check_embeddings, check_length, check_label_mask, exercise, check_odd_output,
    ]  # fmt: skip
    items = []
    for check in checks:
        started = time.perf_counter()
        item = check(loaded)
        item.seconds = time.perf_counter() - started
        items.append(item)
    return items


def ask(loaded: LoadedModel, num_images: int = 1) -> tuple[Conversation, ModelInputs]:
    """Build a conversation about drawn images of different sizes, and the model's inputs for it."""
    images = [sample_image(), sample_image(inverted=True).resize((300, 500)), sample_image().resize((640, 150))]
    return prepare_question(loaded, QUESTION, images[:num_images])


def splice_inputs(loaded: LoadedModel, inputs: ModelInputs) -> tuple[Tensor, Tensor]:
    """Run `prepare_inputs_labels_for_multimodal`; return embeddings (1, T, D) and mask (1, T)."""
    import torch

    ids = inputs.input_ids[None].to(loaded.model.device)
    with torch.inference_mode():
        _, _, mask, _, embeds, _ = loaded.model.prepare_inputs_labels_for_multimodal(
            ids, None, torch.ones_like(ids), None, None, inputs.images, inputs.image_sizes
        )
    return embeds, mask


def check_embeddings(loaded: LoadedModel) -> SelfTestItem:
    import torch

    item = SelfTestItem(
        "from <image> to embeddings",
        (
            "llava/text/tokenization.py:tokenizer_image_token",
            "llava/model/llava_arch.py:encode_images",
            "llava/model/llava_arch.py:prepare_inputs_labels_for_multimodal",
            "llava/model/splice.py:splice",
        ),
    )
    from llava.text.tokenization import num_doubled, tokenizer_image_token

    conversation, inputs = ask(loaded)
    ids = tokenizer_image_token(conversation.get_prompt(), loaded.tokenizer)
    ids = ids[num_doubled(ids, conversation.get_prompt(), loaded.tokenizer) :]
    place = ids.index(IMAGE_TOKEN_INDEX) if IMAGE_TOKEN_INDEX in ids else -1
    item.add("prompt", conversation.get_prompt(), "text")
    is_one = ids.count(IMAGE_TOKEN_INDEX) == 1
    item.check("image token", is_one, f"one of {len(ids)} ids is {IMAGE_TOKEN_INDEX}, at index {place}")
    item.check("processor", inputs.input_ids.tolist() == ids, "the processor's ids are those of tokenizer_image_token")
    embeds, _ = splice_inputs(loaded, inputs)
    with torch.inference_mode():
        features = loaded.model.image_features(inputs.images, inputs.image_sizes)[0]
        text = loaded.model.get_input_embeddings()(torch.tensor([t for t in ids if t >= 0], device=loaded.model.device))
    item.add_stats("features", tensor_stats(features))
    item.add_stats("embeddings", tensor_stats(embeds))
    stop = place + len(features)
    same = bool(torch.equal(embeds[0, place:stop], features.to(embeds)))
    item.check("image", same, f"positions {place} to {stop - 1} are the projector's features, number for number")
    around = torch.cat([embeds[0, :place], embeds[0, stop:]])
    same = bool(torch.equal(around, text))
    item.check("text", same, f"the other {len(around)} positions are rows of the embedding table")
    return item


def check_length(loaded: LoadedModel) -> SelfTestItem:
    item = SelfTestItem(
        "the length of a sequence, by hand",
        ("llava/images/layout.py:plan", "llava/engine/request.py:PromptSize", "llava/model/splice.py:pad"),
    )
    for number in range(4):
        _, inputs = ask(loaded, number)
        text = sum(token >= 0 for token in inputs.input_ids.tolist())
        features = [layout.num_features for layout in inputs.layouts]
        total = text + sum(features)
        if number:
            embeds, mask = splice_inputs(loaded, inputs)
            found, attended = embeds.shape[1], int(mask.sum())
        else:
            found = attended = len(inputs.input_ids)
        sizes = ", ".join(f"{width}x{height}" for width, height in inputs.image_sizes) or "none"
        hand = " + ".join(map(str, [text, *features]))
        holds = total == found == attended == inputs.num_tokens
        item.check(f"{number} images", holds, f"{hand} = {total}; embeddings {found}, mask {attended} (sizes {sizes})")
    return item


def check_label_mask(loaded: LoadedModel) -> SelfTestItem:
    item = SelfTestItem(
        "the label mask of a batch",
        (
            "llava/conversation.py:Conversation.spans",
            "llava/text/labels.py:encode_spans",
            "llava/train/data.py:DataCollatorForSupervisedDataset",
        ),
    )
    from llava.conversation import answer_end, get_template
    from llava.diagnose.tracer.training import trained_spans
    from llava.train.data import DataCollatorForSupervisedDataset, LazySupervisedDataset
    from llava.train.model_setup import prepare_tokenizer

    tokenizer, template = copy.deepcopy(loaded.tokenizer), get_template(loaded.conv_mode)
    prepare_tokenizer(tokenizer, loaded.model, "v1")  # sets the padding token
    with tempfile.TemporaryDirectory() as scratch:
        sample_image().save(Path(scratch) / "drawing.png")
        questions = (f"<image>\n{QUESTION}", "Where is the Pantheon?")
        records: list[dict[str, object]] = [
            {"id": question, "conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]}
            for question, answer in zip(questions, ANSWERS, strict=True)
        ]
        records[0]["image"] = "drawing.png"
        (Path(scratch) / "samples.json").write_text(json.dumps(records), encoding="utf-8")
        processor = loaded.processor
        policy = processor.policy if processor is not None else None
        settings = SimpleNamespace(
            image_folder=scratch,
            image_processor=loaded.image_processor,
            image_aspect_ratio=policy.mode if policy is not None else "square",
            image_grid_pinpoints=policy.pinpoints if policy is not None else None,
            image_crop_resolution=policy.crop_split.crop
            if policy is not None and policy.crop_split is not None
            else None,
            image_split_resolution=policy.crop_split.split
            if policy is not None and policy.crop_split is not None
            else None,
            is_multimodal=True,
            mm_use_im_start_end=processor is not None and processor.use_im_start_end,
        )
        dataset = LazySupervisedDataset(str(Path(scratch) / "samples.json"), tokenizer, settings, conv=template)
        batch = DataCollatorForSupervisedDataset(tokenizer)([dataset[0], dataset[1]])
    ids, labels, mask = batch["input_ids"], batch["labels"], batch["attention_mask"].bool()
    trained = labels != IGNORE_INDEX
    item.add("batch", f"ids {list(ids.shape)}, labels {list(labels.shape)}, {int(trained.sum())} labels are trained")
    end = answer_end(template)
    for row, answer in enumerate(ANSWERS):
        text = tokenizer.decode([token for token in labels[row][trained[row]].tolist() if token >= 0])
        own_ids, own_labels = (tensor[row][mask[row]].tolist() for tensor in (ids, labels))
        item.add_spans(f"row {row + 1}", trained_spans(own_ids, own_labels, tokenizer))
        wanted = answer + end
        holds = "".join(text.split()) == "".join(wanted.split())
        item.check(f"row {row + 1}", holds, f"trained is {text.strip()!r}: answer and end token, no question")
    item.check("image", not bool(trained[ids == IMAGE_TOKEN_INDEX].any()), f"{IGNORE_INDEX} at the image token")
    padding = int((~mask).sum())
    item.check("padding", not bool(trained[~mask].any()), f"{IGNORE_INDEX} at all {padding} positions of padding")
    item.check("labels", bool((labels[trained] == ids[trained]).all()), "every trained label is its own token")
    return item


def check_odd_output(loaded: LoadedModel) -> SelfTestItem:
    """Look for special tokens left in an answer, in the order: decoding, template, splice, stop text."""
    item = SelfTestItem(
        "an odd output, traced to its cause",
        (
            "llava/text/detokenizer.py:stream_decoder",
            "llava/conversation.py:answer_end",
            "llava/model/llava_arch.py:prepare_inputs_labels_for_multimodal",
            "llava/text/detokenizer.py:IncrementalDetokenizer",
        ),
    )
    from llava.conversation import answer_end, get_template
    from llava.engine.hf_engine import HFEngine
    from llava.engine.request import SamplingParams
    from llava.session import Session
    from llava.text.detokenizer import IncrementalDetokenizer

    tokenizer, end = loaded.tokenizer, answer_end(get_template(loaded.conv_mode))
    vocabulary = tokenizer.get_vocab()
    known = ("<im_start>", "<im_end>", "<im_patch>", end, tokenizer.eos_token)
    special = [token for token in known if token in vocabulary]
    word = tokenizer("yellow", add_special_tokens=False).input_ids
    odd = [*word, *(vocabulary[token] for token in special), *word]
    raw, clean = tokenizer.decode(odd), tokenizer.decode(odd, skip_special_tokens=True)
    item.add("provoked", f"{len(odd)} ids with {', '.join(dict.fromkeys(special))} among them, decoded: {raw!r}")
    item.check("1 decoding", not any(token in clean for token in special), f"skip_special_tokens leaves {clean!r}")
    looks_like_token = end.startswith("<") and end.endswith(">")
    size = len(tokenizer(end, add_special_tokens=False).input_ids)
    ends = f"{loaded.conv_mode} ends answers with {end!r}, {size} token{'s' * (size > 1)} here"
    item.check("2 template", size == 1 or not looks_like_token, ends)
    conversation, inputs = ask(loaded)
    embeds, _ = splice_inputs(loaded, inputs)
    holds = embeds.shape[1] == inputs.num_tokens and conversation.get_prompt().count("<image>") == 1
    item.check("3 splice", holds, f"one <image> for one image, {embeds.shape[1]} positions, none an image token")
    reader = IncrementalDetokenizer(tokenizer, [end])
    stop = [vocabulary[end]] if end in vocabulary else tokenizer(end, add_special_tokens=False).input_ids
    text = reader.read([*word, *stop, *word]) + reader.finish()
    item.check("4 stop text", reader.stopped and end not in text, f"after {end!r} nothing is shown: {text.strip()!r}")
    with HFEngine.from_loaded(loaded) as engine:
        session = Session(loaded, sampling=SamplingParams(max_new_tokens=32), engine=engine)
        answer = session.answer(QUESTION, sample_image())
    item.add("answer", answer, "text")
    left = [token for token in {*special, "<image>"} if token in answer]
    found = f"left over: {', '.join(left)}" if left else "no special token is left in a real answer"
    item.check("answer", not left, found)
    return item


def as_text(path: str, items: Sequence[SelfTestItem]) -> str:
    from llava.diagnose.tracer.text import show_rows, text_width

    colors, blocks, width = Colors(wants_colors(sys.stdout)), shows_unicode(sys.stdout), text_width()
    lines = [colors(path, "bold")]
    for number, item in enumerate(items, 1):
        state = ("skipped", "yellow") if item.skipped else ("passed", "green") if item.passed else ("FAILED", "red")
        title = colors(f"{number} {item.title}", "bold", "cyan")
        lines += ["", f"{title}  {colors(*state, 'bold')}  {item.seconds:.1f} s"]
        lines.append(colors("  " + " -> ".join(item.where), "dim"))
        lines += show_rows(item.rows, colors, blocks, width)
        if item.skipped:
            lines.append(f"  {item.skipped}")
    passed = sum(item.passed for item in items)
    left = [str(number) for number, item in enumerate(items, 1) if item.skipped]
    skipped = f" ({', '.join(left)} skipped)" if left else ""
    lines += ["", f"{passed} of {len(items)} items hold{skipped}"]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
