"""What a trace sees of the sequence: the splice, the language model's layers, the first new tokens, the limit on them.

In: a `Trace` and the modules. Out: functions for hooks.py to hook up. What comes before is hooks_vision.py's.

    T tokens after the splice, D text width
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from llava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava.diagnose.tracer.record import Observation, check_finite, figures, is_finite, told

if TYPE_CHECKING:
    from llava.diagnose.tracer.hooks import Trace

# Where the decoder layers of a language model are, by the names that transformers gives them.
LAYER_LISTS = ("layers", "blocks", "h")
CANDIDATES = 5
FIRST_TOKENS = 8


def segments(ids: list[int], feature_lengths: list[int]) -> list[dict[str, Any]]:
    """A row's stretches of text and images, with their positions before and after the splice."""
    found: list[dict[str, Any]] = []
    position, image = 0, 0
    for place, token in enumerate(ids):
        is_image = token == IMAGE_TOKEN_INDEX
        length = feature_lengths[image] if is_image else 1
        if found and found[-1]["kind"] == "text" and not is_image:
            found[-1]["ids"].append(token)
            found[-1]["stop"] += 1
        else:
            entry: dict[str, Any] = {"kind": "image" if is_image else "text", "from_id": place, "start": position}
            entry["stop"] = position + length
            entry |= {"image": image} if is_image else {"ids": [token]}
            found.append(entry)
        image += is_image
        position += length
    return found


def see_splice(record: Trace) -> Callable[..., None]:
    def see(
        batch: Any, input_ids: Tensor, attention_mask: Any, labels: Any, images: Any, image_sizes: Any, **how: Any
    ) -> None:
        seen = Observation("splice")
        lengths = iter(record.feature_lengths)
        rows = []
        for number, row in enumerate(input_ids):
            valid = row if attention_mask is None else row[attention_mask[number].bool()]
            ids = valid.tolist()
            own = [next(lengths, 0) for token in ids if token == IMAGE_TOKEN_INDEX]
            if not own:
                next(lengths, None)  # the black image that a text-only row of a training batch brings
            rows.append(_row_of_splice(seen, number, ids, own, batch, labels is not None, len(input_ids)))
        seen.facts = {
            "side": how["side"],
            "max_length": how["settings"].max_length,
            "rows": rows,
            "inputs_embeds": figures(batch.embeds),
            "attention_mask": {**figures(batch.mask), "sum": int(batch.mask.sum())},
            "position_ids": figures(batch.positions),
        }
        seen.say("inputs_embeds", told(seen.facts["inputs_embeds"]))
        seen.say("mask", f"{list(batch.mask.shape)}, {int(batch.mask.sum())} of {batch.mask.numel()} attended to")
        seen.say("padded", f"on the {how['side']}; limit {how['settings'].max_length}")
        shapes = list(batch.mask.shape), list(batch.embeds.shape[:2])
        seen.check("agree", shapes[0] == shapes[1], f"mask {shapes[0]} and embeddings {shapes[1]}")
        check_finite(seen, seen.facts["inputs_embeds"])
        record.note(seen, batch=batch, input_ids=input_ids, labels=labels, images=images)

    return see


def _row_of_splice(
    seen: Observation, number: int, ids: list[int], lengths: list[int], batch: Any, labelled: bool, num_rows: int
) -> dict[str, Any]:
    """One row: its stretches, the sum done by hand beside what is there, positions, and labels at images."""
    name = f"row {number + 1} " if num_rows > 1 else ""
    mask = batch.mask[number]
    stretches = segments(ids, lengths)
    text, found = len(ids) - len(lengths), int(mask.sum())
    total = text + sum(lengths)
    by_hand = " + ".join([f"{text} text", *(f"{length} image" for length in lengths)])
    seen.say(f"{name}order", " ".join(f"{part['kind']} {part['start']}-{part['stop'] - 1}" for part in stretches))
    cut = found < total
    seen.check(
        f"{name}by hand",
        cut or found == total,
        f"{by_hand} = {total}, and the row is {found} long" + (", cut" if cut else ""),
    )
    positions = batch.positions[number][mask]
    in_order = positions.tolist() == list(range(found))
    seen.check(
        f"{name}positions",
        in_order,
        f"0 to {found - 1}, one after another" if in_order else f"{positions[:8].tolist()} ...",
    )
    facts: dict[str, Any] = {"text": text, "images": lengths, "expected": total, "length": found, "segments": stretches}
    if labelled and batch.labels is not None:
        own = batch.labels[number][mask]
        trained = int((own != IGNORE_INDEX).sum())
        at_images = [own[part["start"] : part["stop"]] for part in stretches if part["kind"] == "image"]
        untrained = all(bool((part == IGNORE_INDEX).all()) for part in at_images)
        facts |= {"trained": trained, "labels": own.tolist()}
        seen.say(f"{name}labels", f"{trained} of {found} positions are trained")
        seen.check(
            f"{name}images",
            untrained,
            f"labels at images are all {IGNORE_INDEX}" if untrained else "images are trained",
        )
    return facts


# Language model


def decoder_layers(inner: Any) -> Any:
    """The list of a language model's layers; empty where it has none under a known name."""
    return next(
        (getattr(inner, name) for name in LAYER_LISTS if isinstance(getattr(inner, name, None), nn.ModuleList)), []
    )


def watch_language_model(record: Trace, inner: Any, hook: Callable[[Any], None]) -> None:
    state: dict[str, Any] = {}

    def begin(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        embeds, ids = kwargs.get("inputs_embeds"), kwargs.get("input_ids", args[0] if args else None)
        length = embeds.shape[1] if embeds is not None else ids.shape[1] if ids is not None else 1
        state.update(start=record.clock(), is_prompt=length > 1, layers=[], takes=embeds)

    def end(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        record.end_stage(
            "language model: prompt" if state["is_prompt"] else "language model: one token", state["start"]
        )
        if state["is_prompt"]:
            record.note(_seen_layers(state), hidden=output[0], layers=state["layers"])

    def see_layer(number: int) -> Callable[..., None]:
        def see(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
            if state.get("is_prompt"):
                hidden = output[0] if isinstance(output, tuple) else output
                state["layers"].append(figures(hidden) | {"largest": float(hidden.detach().abs().max())})
                if number == 0:
                    state["mask"], state["positions"] = kwargs.get("attention_mask"), kwargs.get("position_ids")

        return see

    hook(inner.register_forward_pre_hook(begin, with_kwargs=True))
    for number, layer in enumerate(decoder_layers(inner)):
        hook(layer.register_forward_hook(see_layer(number), with_kwargs=True))
    hook(inner.register_forward_hook(end, with_kwargs=True))


def _seen_layers(state: dict[str, Any]) -> Observation:
    layers = state["layers"]
    seen = Observation("layers", facts={"layers": layers})
    if state["takes"] is not None:
        seen.facts["takes"] = figures(state["takes"])
        seen.say("takes", told(seen.facts["takes"]))
    mask, positions = state.get("mask"), state.get("positions")
    seen.say(
        "mask in layer 1", "none: causal, nothing is padded" if mask is None else f"{list(mask.shape)} {mask.dtype}"
    )
    if isinstance(positions, Tensor):
        seen.facts["position_ids"] = positions[0].tolist()
        seen.say("positions", f"{int(positions.min())} to {int(positions.max())} in {list(positions.shape)}")
    if layers:
        seen.say("norm by layer", " ".join(f"{facts['norm']:.3g}" for facts in layers))
        seen.say("largest", " ".join(f"{facts['largest']:.3g}" for facts in layers))
        broken = next((number for number, facts in enumerate(layers) if not is_finite(facts)), None)
        seen.check(
            "finite",
            broken is None,
            "no NaN, no infinity" if broken is None else f"NaN or infinity from layer {broken + 1} on",
        )
    return seen


def see_logits(record: Trace) -> Callable[..., None]:
    """The likeliest candidates for each of the first new tokens; the first row's, where there are several."""

    def see(module: nn.Module, args: Any, output: Tensor) -> None:
        seen = record.observations.get("first_tokens") or Observation("first_tokens", facts={"steps": []})
        if len(seen.facts["steps"]) >= FIRST_TOKENS or output.dim() != 3 or not output.shape[1]:
            return
        logits = output[0, -1].detach().float()
        chances, ids = logits.softmax(-1).topk(min(CANDIDATES, len(logits)))
        step = [
            {
                "id": token,
                "text": record.tokenizer.convert_ids_to_tokens(token) if record.tokenizer else None,
                "p": chance,
            }
            for token, chance in zip(ids.tolist(), chances.tolist(), strict=True)
        ]
        seen.facts["steps"].append(step)
        number = len(seen.facts["steps"])
        seen.say(
            f"token {number}", "  ".join(f"{entry['text'] or entry['id']} {entry['p']:.1%}" for entry in step), "text"
        )
        record.observations["first_tokens"] = seen
        if number == 1:
            seen.facts["logits"] = figures(logits)
            record.note(seen, logits=logits)

    return see


def see_generate(record: Trace) -> Callable[..., None]:
    def see(output: Any, inputs: Any = None, images: Any = None, image_sizes: Any = None, **kwargs: Any) -> None:
        seen = record.observations.get("limit") or Observation("limit")
        seen.facts["given_to_generate"] = kwargs.get("max_new_tokens")
        seen.say("generate", f"max_new_tokens {kwargs.get('max_new_tokens')}")
        record.observations["limit"] = seen

    return see
