"""Trace the answer to one question: `trace_question`.

In: a loaded model, images, a question. Out: `TracedAnswer`: the trace with all points of answering, the answer, and the
inputs that the page needs. The conversation is `llava chat`'s own (Session), answered by engine/hf_engine.py, which calls the
model's own methods; the engine gives the same tokens (tests/engine/test_engine.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from PIL import Image
from torch import Tensor

from llava import processor as processor_module
from llava.constants import DEFAULT_IM_END_TOKEN, DEFAULT_IM_START_TOKEN, DEFAULT_IMAGE_PATCH_TOKEN, IMAGE_TOKEN_INDEX
from llava.conversation import Conversation, Span, answer_end, get_template
from llava.diagnose.tracer.hooks import install_hooks, wrap
from llava.diagnose.tracer.record import Observation, Trace, tensor_stats
from llava.engine.config import EngineError
from llava.engine.hf_engine import HFEngine
from llava.engine.request import Completion, PromptSize, Result, SamplingParams
from llava.images.image_processor import ImageProcessor
from llava.images.layout import ImageLayout, ImagePolicy, image_mode
from llava.model.builder import LoadedModel
from llava.model.transformers_internals import attention_of
from llava.session import LoadedImage, Session
from llava.text.tokenization import Tokenizer

MARKERS = (DEFAULT_IM_START_TOKEN, DEFAULT_IM_END_TOKEN, DEFAULT_IMAGE_PATCH_TOKEN)
SPECIAL_TEXTS = (*MARKERS, "<image>", "<|im_start|>", "<|im_end|>")
SHOWN_IDS = 20

# One tensor (images, 3, H, W), or a list of each image's tiles (tiles, 3, H, W).
Pixels: TypeAlias = Tensor | list[Tensor]


@dataclass
class TracedAnswer:
    """A traced question and its answer. `ids` are the prompt's, with -200 for each image."""

    record: Trace
    loaded: LoadedModel
    question: str
    images: Sequence[LoadedImage]
    ids: list[int] = field(default_factory=list)
    pixels: Pixels | None = None
    answer: Completion | None = None


def trace_question(
    loaded: LoadedModel,
    images: Sequence[LoadedImage],
    question: str,
    *,
    sampling: SamplingParams | None = None,
    conv_mode: str | None = None,
    break_at: str | None = None,
    record: Trace | None = None,
) -> TracedAnswer:
    """Ask as `llava chat` does, and trace it. `record` may be a trace that began earlier, to time loading too."""
    record = record or Trace(loaded.model, loaded.tokenizer, break_at=break_at)
    record.model, record.tokenizer = loaded.model, loaded.tokenizer
    traced = TracedAnswer(record, loaded, question, images)
    template = get_template(conv_mode or loaded.conv_mode)
    with install_hooks(record), _hook_inputs(traced):
        record.add(arguments_observation(loaded, conv_mode), loaded=loaded)
        engine = HFEngine.from_loaded(loaded)
        session = Session(loaded, template, sampling, engine=engine)
        session.attach(images)
        _record_template(record, template, conv_mode or loaded.conv_mode)
        with engine:
            try:
                result = session.ask(question).result()
            except EngineError as error:  # show what failed in a hooked method as it is
                raise error.__cause__ or error from None
        with record.stage("text"):
            traced.answer = result.completions[0]
            _record_text(record, result, answer_end(template))
    record_cost(record)
    return traced


def arguments_observation(loaded: LoadedModel, conv_mode: str | None) -> Observation:
    model, config = loaded.model, loaded.model.config
    obs = Observation("arguments")
    number = sum(parameter.numel() for parameter in model.parameters())
    positions = getattr(config, "max_position_embeddings", None) or getattr(config, "max_seq_len", None)
    values = config.to_dict().items()
    vision = {key: value for key, value in values if key.startswith(("mm_", "image_")) and value is not None}
    obs.facts = {
        "folder": str(loaded.info.folder),
        "kind": loaded.info.kind,
        "model_class": type(model).__name__,
        "parameters": number,
        "device": str(model.device),
        "dtype": str(model.dtype).removeprefix("torch."),
        "attention": attention_of(config),
        "context_len": loaded.context_len,
        "max_position_embeddings": positions,
        "conv_mode": conv_mode or loaded.conv_mode,
        "vision": vision,
    }
    obs.add("folder", f"{loaded.info.folder} ({loaded.info.kind})")
    obs.add("model", f"{type(model).__name__}, {number:,} parameters in {obs['dtype']} on {model.device}")
    obs.add("attention", f"{attention_of(config)}; context {loaded.context_len}, positions {positions}")
    obs.add("tower", f"{vision.get('mm_vision_tower')}, layer {vision.get('mm_vision_select_layer')}")
    obs.add("images", f"{vision.get('image_aspect_ratio')}, merged {vision.get('mm_patch_merge_type', 'flat')}")
    return obs


def _record_template(record: Trace, template: Conversation, name: str) -> None:
    obs = Observation("template")
    obs.facts = {
        "name": name,
        "style": template.sep_style.name,
        "roles": list(template.roles),
        "system": template.system,
        "answer_end": answer_end(template),
    }
    obs.add("name", f"{name}, style {template.sep_style.name}")
    obs.add("roles", f"{template.roles[0]!r} and {template.roles[1]!r}; an answer ends with {answer_end(template)!r}")
    if template.system:
        obs.add("system", template.system, "text")
    record.add(obs, template=template)


@contextmanager
def _hook_inputs(traced: TracedAnswer) -> Iterator[None]:
    """Record the calls of the functions with which the processor makes the model's inputs."""
    record = traced.record

    def on_ids(result: tuple[list[int], list[int]], spans: Sequence[Span], tokenizer: Tokenizer, **_: object) -> None:
        ids, _labels = result
        traced.ids = list(ids)
        record_prompt(record, spans, ids, tokenizer)

    def on_pixels(pixels: Pixels, images: Sequence[Image.Image], image_processor: ImageProcessor, config: Any) -> None:
        traced.pixels = pixels
        if len(images):
            record_pixels(record, pixels, config.image_aspect_ratio, image_processor)

    def on_layouts(layouts: Sequence[ImageLayout], sizes: object, policy: ImagePolicy, *_: object) -> None:
        record.layouts += layouts
        record_layouts(record, record.layouts, policy)

    def on_room(left: int, prompt: PromptSize, context_len: int, wanted: int) -> None:
        obs = Observation("limit")
        obs.facts = {
            "text_tokens": prompt.num_text_tokens,
            "image_tokens": prompt.num_image_tokens,
            "prompt": prompt.total,
            "context_len": context_len,
            "wanted": wanted,
            "allowed": left,
        }
        obs.add("prompt", f"{prompt.num_text_tokens} text + {prompt.num_image_tokens} image = {prompt.total} tokens")
        obs.add("context", f"{context_len} - {prompt.total} = {context_len - prompt.total} tokens of room")
        obs.add("max_new_tokens", f"{wanted} wanted, {left} allowed" + (" (cut to the room)" if left < wanted else ""))
        obs.check("room", left > 0, f"{left} new tokens fit")
        record.add(obs, prompt=prompt)

    with ExitStack() as stack:
        wrap(stack, processor_module, "encode_spans", on_ids, timed=(record, "tokens"))
        wrap(stack, processor_module, "process_images", on_pixels, timed=(record, "pixels"))
        wrap(stack, processor_module, "plan_images", on_layouts)
        wrap(stack, PromptSize, "room", on_room)
        yield


def record_prompt(record: Trace, spans: Sequence[Span], ids: Sequence[int], tokenizer: Tokenizer) -> None:
    """Record the points of a prompt's text and of its ids."""
    obs = Observation("prompt")
    text = "".join(span.text for span in spans)
    num_placeholders = text.count("<image>")
    obs.facts = {"text": text, "placeholders": num_placeholders, "spans": [[span.text, span.trained] for span in spans]}
    obs.add("text", text, "text")
    obs.add("placeholders", f"{num_placeholders} <image> in {len(text)} characters, {len(spans)} spans")
    record.add(obs, prompt=text, spans=spans)
    _record_ids(record, ids, tokenizer, num_placeholders)


def _record_ids(record: Trace, ids: Sequence[int], tokenizer: Tokenizer, expected: int) -> None:
    obs = Observation("input_ids")
    tokens = ["<image>" if token == IMAGE_TOKEN_INDEX else tokenizer.convert_ids_to_tokens(token) for token in ids]
    num_placeholders = sum(token == IMAGE_TOKEN_INDEX for token in ids)
    obs.facts = {"ids": list(ids), "tokens": tokens, "placeholders": num_placeholders, "vocabulary": len(tokenizer)}
    obs.add("ids", " ".join(map(str, ids)))
    obs.add("tokens", " ".join(tokens), "text")
    obs.check(
        "placeholders",
        num_placeholders == expected,
        f"{num_placeholders} of {len(ids)} ids are {IMAGE_TOKEN_INDEX}, for {expected} <image> in the prompt",
    )
    known = all(token == IMAGE_TOKEN_INDEX or 0 <= token < len(tokenizer) for token in ids)
    state = f"every other id is below {len(tokenizer)}" if known else "ids outside of the vocabulary"
    obs.check("vocabulary", known, state)
    record.add(obs, input_ids=ids, tokenizer=tokenizer)


def record_pixels(record: Trace, pixels: Pixels, mode: str, image_processor: ImageProcessor) -> None:
    obs = Observation("pixels")
    each = [tensor_stats(image) for image in pixels]
    is_list = isinstance(pixels, list)
    obs.facts = {"mode": mode, "is_list": is_list, "images": each}
    obs.add("form", f"{'a list' if is_list else 'one tensor'} of {len(each)}; image_aspect_ratio {mode}")
    for number, facts in enumerate(each):
        obs.add_stats(f"image {number + 1}", facts)
    side = image_processor.crop_size["height"]
    fits = all(facts["shape"][-2:] == [side, side] for facts in each)
    obs.check("size", fits, f"{side} x {side} pixels, as the image processor says")
    tiles = image_mode(mode) not in ("square", "pad")
    shaped = all(len(facts["shape"]) == 3 + tiles for facts in each)
    obs.check("tiles", shaped, "an overview and tiles for each image" if tiles else "one tile for each image")
    record.add(obs, pixels=pixels, image_processor=image_processor)


def record_layouts(record: Trace, layouts: Sequence[ImageLayout], policy: ImagePolicy) -> None:
    obs = Observation("image")
    obs.facts = {"policy": {"mode": policy.mode, "merge": policy.merge, "tile_size": policy.tile_size}, "images": []}
    for number, layout in enumerate(layouts):
        grid = list(layout.tile_grid) if layout.tile_grid else None
        kept = [layout.crop.rows, layout.crop.cols]
        obs.facts["images"].append(
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
        how = f"{grid[0]} x {grid[1]} tiles{' and an overview' * layout.has_overview}" if grid else "one tile"
        obs.add(f"image {number + 1}", f"{layout.size[0]} x {layout.size[1]} pixels, {how}")
        obs.add("features", f"{_sum_of_features(layout, policy)} = {layout.num_features}")
    record.add(obs, layouts=layouts, policy=policy)


def _sum_of_features(layout: ImageLayout, policy: ImagePolicy) -> str:
    """Write out the sum that gives an image's number of features."""
    if policy.merge == "flat" or layout.tile_grid is None:
        side = policy.patches_per_side
        each = f"{side} x {side}" + (" + 1 class feature" if policy.cls_token else "")
        terms = [each if layout.num_tiles == 1 else f"{layout.num_tiles} x ({each})"]
    else:
        shown = layout.has_overview and layout.keeps_overview
        terms = [f"{policy.features_per_tile} of the overview"] if shown else []
        terms.append(f"{layout.end_grid.rows} x {layout.end_grid.cols}")
    if layout.num_newlines:
        terms.append(f"{layout.num_newlines} newline{'s' * (layout.num_newlines > 1)}")
    return " + ".join(terms)


def _record_text(record: Trace, result: Result, end: str) -> None:
    tokenizer, answer = record.tokenizer, result.completions[0]
    assert tokenizer is not None
    raw = tokenizer.decode(list(answer.token_ids))
    texts = {*SPECIAL_TEXTS, *tokenizer.all_special_tokens, end}
    left = [text for text in texts if text.strip() and text in answer.text]
    obs = Observation("text")
    obs.facts = {
        "ids": list(answer.token_ids),
        "raw": raw,
        "text": answer.text,
        "finish_reason": answer.finish_reason,
        "leftover": left,
        "stop": end,
        "first_token_s": result.timings.first_token_s,
        "total_s": result.timings.total_s,
    }
    obs.add("ids", " ".join(map(str, answer.token_ids[:SHOWN_IDS])))
    obs.add("as decoded", raw, "text")
    obs.add("cleaned", answer.text, "text")
    obs.add("ended by", f"{answer.finish_reason}; the stop text is {end!r}")
    obs.check("special tokens", not left, f"left over: {', '.join(left)}" if left else "none left over")
    record.add(obs, answer=answer)


def record_cost(record: Trace) -> None:
    obs = Observation("cost")
    total: dict[str, list[float]] = {}
    for stage in record.stages:
        total.setdefault(stage.name, []).append(stage.seconds)
    obs.facts = {"stages": {name: {"times": len(times), "seconds": sum(times)} for name, times in total.items()}}
    obs.facts["memory"] = max((stage.memory for stage in record.stages if stage.memory is not None), default=None)
    for name, times in total.items():
        obs.add(name, f"{sum(times) * 1000:8.1f} ms" + (f"  ({len(times)} times)" if len(times) > 1 else ""))
    if obs.facts["memory"] is not None:
        obs.add("memory", f"{obs.facts['memory'] / 2**20:,.0f} MiB")
    record.add(obs)
