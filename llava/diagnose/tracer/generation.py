"""One question, answered on the true path and watched: `trace_question`.

In: a loaded model, images, a question. Out: `Answered`: the trace with all points of answering, the answer, and what the
page needs to draw. The conversation is `llava chat`'s own (Session), answered by `model.generate`, whose steps the road map
names; the engine gives the same tokens (tests/engine/test_engine.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

from llava import processor as processor_module
from llava.constants import DEFAULT_IM_END_TOKEN, DEFAULT_IM_START_TOKEN, DEFAULT_IMAGE_PATCH_TOKEN, IMAGE_TOKEN_INDEX
from llava.conversation import Conversation, answer_end, get_template
from llava.diagnose.tracer.hooks import Trace, watching, wrap
from llava.diagnose.tracer.record import Observation, figures, told
from llava.engine.hf_engine import Answer, Sampling
from llava.engine.request import PromptSize
from llava.images.layout import ImageLayout, ImagePolicy
from llava.model.builder import LoadedModel
from llava.session import LoadedImage, Session

MARKS = (
    DEFAULT_IM_START_TOKEN,
    DEFAULT_IM_END_TOKEN,
    DEFAULT_IMAGE_PATCH_TOKEN,
    "<image>",
    "<|im_start|>",
    "<|im_end|>",
)
SHOWN_IDS = 20


@dataclass
class Answered:
    """A traced question. `ids` are the prompt's, -200 for each image."""

    record: Trace
    loaded: LoadedModel
    question: str
    images: Sequence[LoadedImage]
    ids: list[int] = field(default_factory=list)
    pixels: Any = None
    answer: Answer | None = None


def trace_question(
    loaded: LoadedModel,
    images: Sequence[LoadedImage],
    question: str,
    *,
    sampling: Sampling | None = None,
    conv_mode: str | None = None,
    break_at: str | None = None,
    record: Trace | None = None,
) -> Answered:
    """Ask as `llava chat` does, and watch. `record` may have begun earlier, to time loading too."""
    record = record or Trace(loaded.model, loaded.tokenizer, break_at=break_at)
    record.model, record.tokenizer = loaded.model, loaded.tokenizer
    seen = Answered(record, loaded, question, images)
    template = get_template(conv_mode or loaded.conv_mode)
    with watching(record), _watching_inputs(seen):
        record.note(seen_arguments(loaded, conv_mode), loaded=loaded)
        session = Session(loaded, template, sampling, use_engine=False)
        session.attach(images)
        _note_template(record, template, conv_mode or loaded.conv_mode)
        asked = session.ask(question)
        with asked.stream as stream:
            for _ in stream:
                pass
        with record.stage("text"):
            seen.answer = stream.answer
            _note_text(record, seen.answer, answer_end(template))
    note_cost(record)
    return seen


def seen_arguments(loaded: LoadedModel, conv_mode: str | None) -> Observation:
    model, config = loaded.model, loaded.model.config
    seen = Observation("arguments")
    number = sum(parameter.numel() for parameter in model.parameters())
    positions = getattr(config, "max_position_embeddings", None) or getattr(config, "max_seq_len", None)
    vision = {
        key: value for key, value in config.to_dict().items() if key.startswith(("mm_", "image_")) and value is not None
    }
    seen.facts = {
        "folder": str(loaded.info.folder),
        "kind": loaded.info.kind,
        "model_class": type(model).__name__,
        "parameters": number,
        "device": str(model.device),
        "dtype": str(model.dtype).removeprefix("torch."),
        "attention": config._attn_implementation,
        "context_len": loaded.context_len,
        "max_position_embeddings": positions,
        "conv_mode": conv_mode or loaded.conv_mode,
        "vision": vision,
    }
    seen.say("folder", f"{loaded.info.folder} ({loaded.info.kind})")
    seen.say("model", f"{type(model).__name__}, {number:,} parameters in {seen['dtype']} on {model.device}")
    seen.say("attention", f"{config._attn_implementation}; context {loaded.context_len}, positions {positions}")
    seen.say("tower", f"{vision.get('mm_vision_tower')}, layer {vision.get('mm_vision_select_layer')}")
    seen.say("images", f"{vision.get('image_aspect_ratio')}, merged {vision.get('mm_patch_merge_type', 'flat')}")
    return seen


def _note_template(record: Trace, template: Conversation, name: str) -> None:
    seen = Observation("template")
    seen.facts = {
        "name": name,
        "style": template.sep_style.name,
        "roles": list(template.roles),
        "system": template.system,
        "answer_end": answer_end(template),
    }
    seen.say("name", f"{name}, style {template.sep_style.name}")
    seen.say("roles", f"{template.roles[0]!r} and {template.roles[1]!r}; an answer ends with {answer_end(template)!r}")
    if template.system:
        seen.say("system", template.system, "text")
    record.note(seen, template=template)


@contextmanager
def _watching_inputs(answered: Answered) -> Iterator[None]:
    """Watch the functions that make a model's inputs, where the processor calls them."""
    record = answered.record

    def see_ids(result: Any, spans: Any, tokenizer: Any, **_: Any) -> None:
        ids, _labels = result
        answered.ids = list(ids)
        note_prompt(record, spans)
        note_ids(record, ids, tokenizer)

    def see_pixels(pixels: Any, images: Any, image_processor: Any, config: Any) -> None:
        answered.pixels = pixels
        if len(images):
            note_pixels(record, pixels, config.image_aspect_ratio, answered.loaded.image_processor)

    def see_layout(layout: ImageLayout, size: Any, policy: Any, **_: Any) -> None:
        record.layouts.append(layout)
        note_layouts(record, record.layouts, policy)

    def see_room(left: int, prompt: PromptSize, context_len: int, wanted: int) -> None:
        seen = Observation("limit")
        seen.facts = {
            "text_tokens": prompt.num_text_tokens,
            "image_tokens": prompt.num_image_tokens,
            "prompt": prompt.total,
            "context_len": context_len,
            "wanted": wanted,
            "allowed": left,
        }
        seen.say("prompt", f"{prompt.num_text_tokens} text + {prompt.num_image_tokens} image = {prompt.total} tokens")
        seen.say("context", f"{context_len} - {prompt.total} = {context_len - prompt.total} tokens of room")
        seen.say("max_new_tokens", f"{wanted} wanted, {left} allowed" + (" (cut to the room)" if left < wanted else ""))
        seen.check("room", left > 0, f"{left} new tokens fit")
        record.note(seen, prompt=prompt)

    with ExitStack() as stack:
        wrap(stack, processor_module, "encode_spans", see_ids, timed=(record, "tokens"))
        wrap(stack, processor_module, "process_images", see_pixels, timed=(record, "pixels"))
        wrap(stack, processor_module, "plan", see_layout)
        wrap(stack, PromptSize, "room", see_room)
        yield


# Points that answering and training share


def note_prompt(record: Trace, spans: Any) -> None:
    seen = Observation("prompt")
    text = "".join(span.text for span in spans)
    marks = text.count("<image>")
    seen.facts = {"text": text, "marks": marks, "spans": [[span.text, span.trained] for span in spans]}
    seen.say("text", text, "text")
    seen.say("marks", f"{marks} <image> in {len(text)} characters, {len(spans)} spans")
    record.note(seen, prompt=text, spans=spans)


def note_ids(record: Trace, ids: Sequence[int], tokenizer: Any) -> None:
    seen = Observation("input_ids")
    tokens = ["<image>" if token == IMAGE_TOKEN_INDEX else tokenizer.convert_ids_to_tokens(token) for token in ids]
    marks = sum(token == IMAGE_TOKEN_INDEX for token in ids)
    seen.facts = {"ids": list(ids), "tokens": tokens, "marks": marks, "vocabulary": len(tokenizer)}
    seen.say("ids", " ".join(map(str, ids)))
    seen.say("tokens", " ".join(tokens), "text")
    expected = record["prompt"]["marks"] if "prompt" in record else marks
    seen.check(
        "marks", marks == expected, f"{marks} of {len(ids)} ids are {IMAGE_TOKEN_INDEX}, for {expected} <image> marks"
    )
    known = all(token == IMAGE_TOKEN_INDEX or 0 <= token < len(tokenizer) for token in ids)
    seen.check(
        "vocabulary", known, f"every other id is below {len(tokenizer)}" if known else "ids outside of the vocabulary"
    )
    record.note(seen, input_ids=ids, tokenizer=tokenizer)


def note_pixels(record: Trace, pixels: Any, mode: str, image_processor: Any) -> None:
    seen = Observation("pixels")
    each = [figures(image) for image in pixels]
    is_list = isinstance(pixels, list)
    seen.facts = {"mode": mode, "is_list": is_list, "images": each}
    seen.say("form", f"{'a list' if is_list else 'one tensor'} of {len(each)}; image_aspect_ratio {mode}")
    for number, facts in enumerate(each):
        seen.say(f"image {number + 1}", told(facts))
    side = image_processor.crop_size["height"]
    fits = all(facts["shape"][-2:] == [side, side] for facts in each)
    seen.check("size", fits, f"{side} x {side} pixels, as the image processor says")
    tiles = mode == "anyres"
    shaped = all(len(facts["shape"]) == 3 + tiles for facts in each)
    seen.check("tiles", shaped, "an overview and tiles for each image" if tiles else "one tile for each image")
    record.note(seen, pixels=pixels, image_processor=image_processor)


def note_layouts(record: Trace, layouts: Sequence[ImageLayout], policy: Any) -> None:
    seen = Observation("image")
    seen.facts = {"policy": {"mode": policy.mode, "merge": policy.merge, "tile_size": policy.tile_size}, "images": []}
    for number, layout in enumerate(layouts):
        grid = list(layout.tile_grid) if layout.tile_grid else None
        kept = [layout.crop.rows, layout.crop.cols]
        seen.facts["images"].append(
            {
                "size": list(layout.size),
                "tiles": layout.num_tiles,
                "tile_grid": grid,
                "feature_grid": list(layout.feature_grid),
                "kept": kept,
                "newlines": layout.num_newlines,
                "features": layout.num_features,
            }
        )
        how = f"{grid[0]} x {grid[1]} tiles and an overview" if grid else "one tile"
        seen.say(f"image {number + 1}", f"{layout.size[0]} x {layout.size[1]} pixels, {how}")
        seen.say("features", f"{_sum_of_features(layout, policy)} = {layout.num_features}")
    record.note(seen, layouts=layouts, policy=policy)


def _sum_of_features(layout: ImageLayout, policy: ImagePolicy) -> str:
    """The sum that gives an image's number of features, as one would write it down."""
    if policy.merge == "flat" or layout.tile_grid is None:
        side = policy.patches_per_side
        each = f"{side} x {side}" + (" + 1 class feature" if policy.cls_token else "")
        terms = [each if layout.num_tiles == 1 else f"{layout.num_tiles} x ({each})"]
    else:
        terms = [f"{policy.features_per_tile} of the overview", f"{layout.crop.rows} x {layout.crop.cols}"]
    if layout.num_newlines:
        terms.append(f"{layout.num_newlines} newline{'s' * (layout.num_newlines > 1)}")
    return " + ".join(terms)


def _note_text(record: Trace, answer: Answer, end: str) -> None:
    tokenizer = record.tokenizer
    raw = tokenizer.decode(list(answer.token_ids))
    left = [mark for mark in {*MARKS, *tokenizer.all_special_tokens, end} if mark.strip() and mark in answer.text]
    seen = Observation("text")
    seen.facts = {
        "ids": list(answer.token_ids),
        "raw": raw,
        "text": answer.text,
        "finish_reason": answer.finish_reason,
        "leftover": left,
        "stop": end,
        "first_token_s": answer.first_token_s,
        "total_s": answer.total_s,
    }
    seen.say("ids", " ".join(map(str, answer.token_ids[:SHOWN_IDS])))
    seen.say("as decoded", raw, "text")
    seen.say("cleaned", answer.text, "text")
    seen.say("ended by", f"{answer.finish_reason}; the stop text is {end!r}")
    seen.check("special tokens", not left, f"left over: {', '.join(left)}" if left else "none left over")
    record.note(seen, answer=answer)


def note_cost(record: Trace) -> None:
    seen = Observation("cost")
    total: dict[str, list[float]] = {}
    for stage in record.stages:
        total.setdefault(stage.name, []).append(stage.seconds)
    seen.facts = {"stages": {name: {"times": len(times), "seconds": sum(times)} for name, times in total.items()}}
    seen.facts["memory"] = max((stage.memory for stage in record.stages if stage.memory is not None), default=None)
    for name, times in total.items():
        seen.say(name, f"{sum(times) * 1000:8.1f} ms" + (f"  ({len(times)} times)" if len(times) > 1 else ""))
    if seen.facts["memory"] is not None:
        seen.say("memory", f"{seen.facts['memory'] / 2**20:,.0f} MiB")
    record.note(seen)
