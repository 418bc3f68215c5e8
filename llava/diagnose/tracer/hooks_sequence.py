"""Hooks that record the sequence: the splice, the language model's layers, the first new tokens, the limit on them.

In: a `Trace` and the modules. Out: hooks, which hooks.py installs. Images before the splice are in hooks_vision.py.

    T tokens after the splice, D text width
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from llava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava.diagnose.tracer.record import Facts, Observation, Trace, check_finite, is_finite, tensor_stats
from llava.model.config import LlavaSettings
from llava.model.features import VisionInputs
from llava.model.protocols import InnerModel
from llava.model.splice import PaddedBatch

# Names of the list of decoder layers in transformers' language models.
LAYER_LISTS = ("layers", "blocks", "h")
CANDIDATES = 5
FIRST_TOKENS = 8


def segments(ids: list[int], feature_lengths: list[int]) -> list[Facts]:
    """Split a sequence into segments of text and images, with their positions before and after the splice."""
    found: list[Facts] = []
    position, image = 0, 0
    for place, token in enumerate(ids):
        is_image = token == IMAGE_TOKEN_INDEX
        length = feature_lengths[image] if is_image else 1
        if found and found[-1]["kind"] == "text" and not is_image:
            found[-1]["ids"].append(token)
            found[-1]["stop"] += 1
        else:
            entry: Facts = {"kind": "image" if is_image else "text", "from_id": place, "start": position}
            entry["stop"] = position + length
            entry |= {"image": image} if is_image else {"ids": [token]}
            found.append(entry)
        image += is_image
        position += length
    return found


def splice_hook(record: Trace) -> Callable[..., None]:
    def hook(
        batch: PaddedBatch,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        labels: Tensor | None,
        vision: VisionInputs,
        *,
        side: str,
    ) -> None:
        obs = Observation("splice")
        limit = LlavaSettings.from_hf(record.model.config).max_length
        lengths = iter(record.feature_lengths)
        rows = []
        for number, row in enumerate(input_ids):
            valid = row if attention_mask is None else row[attention_mask[number].bool()]
            ids = valid.tolist()
            own = [next(lengths, 0) for token in ids if token == IMAGE_TOKEN_INDEX]
            if not own:
                next(lengths, None)  # the black image of a text-only sequence in a training batch
            rows.append(_row_of_splice(obs, number, ids, own, batch, labels is not None, len(input_ids)))
        obs.facts = {
            "side": side,
            "max_length": limit,
            "rows": rows,
            "inputs_embeds": tensor_stats(batch.embeds),
            "attention_mask": {**tensor_stats(batch.mask), "sum": int(batch.mask.sum())},
            "position_ids": tensor_stats(batch.positions),
        }
        obs.add_stats("inputs_embeds", obs.facts["inputs_embeds"])
        obs.add("mask", f"{list(batch.mask.shape)}, {int(batch.mask.sum())} of {batch.mask.numel()} attended to")
        obs.add("padded", f"on the {side}; limit {limit}")
        shapes = list(batch.mask.shape), list(batch.embeds.shape[:2])
        obs.check("agree", shapes[0] == shapes[1], f"mask {shapes[0]} and embeddings {shapes[1]}")
        check_finite(obs, obs.facts["inputs_embeds"])
        record.add(obs, batch=batch, input_ids=input_ids, labels=labels, images=vision.images)

    return hook


def _row_of_splice(
    obs: Observation, number: int, ids: list[int], lengths: list[int], batch: PaddedBatch, labelled: bool, num_rows: int
) -> Facts:
    """Record one sequence: its segments, its length beside the sum of their lengths, positions, and labels at images."""
    name = f"row {number + 1} " if num_rows > 1 else ""
    mask = batch.mask[number]
    parts = segments(ids, lengths)
    text, found = len(ids) - len(lengths), int(mask.sum())
    total = text + sum(lengths)
    by_hand = " + ".join([f"{text} text", *(f"{length} image" for length in lengths)])
    obs.add(f"{name}order", " ".join(f"{part['kind']} {part['start']}-{part['stop'] - 1}" for part in parts))
    cut = ", cut" if found < total else ""
    obs.check(f"{name}by hand", found <= total, f"{by_hand} = {total}, and the row is {found} long{cut}")
    positions = batch.positions[number][mask]
    in_order = positions.tolist() == list(range(found))
    order = f"0 to {found - 1}, one after another" if in_order else f"{positions[:8].tolist()} ..."
    obs.check(f"{name}positions", in_order, order)
    facts: Facts = {"text": text, "images": lengths, "expected": total, "length": found, "segments": parts}
    if labelled and batch.labels is not None:
        own = batch.labels[number][mask]
        trained = int((own != IGNORE_INDEX).sum())
        at_images = [own[part["start"] : part["stop"]] for part in parts if part["kind"] == "image"]
        untrained = all(bool((part == IGNORE_INDEX).all()) for part in at_images)
        facts |= {"trained": trained, "labels": own.tolist()}
        obs.add(f"{name}labels", f"{trained} of {found} positions are trained")
        state = f"labels at images are all {IGNORE_INDEX}" if untrained else "images are trained"
        obs.check(f"{name}images", untrained, state)
    return facts


def decoder_layers(inner: InnerModel) -> Sequence[nn.Module]:
    """Return a language model's list of layers; empty if it has none under a known name."""
    lists = (getattr(inner, name, None) for name in LAYER_LISTS)
    return next((layers for layers in lists if isinstance(layers, nn.ModuleList)), [])


def hook_language_model(record: Trace, inner: InnerModel, keep: Callable[[RemovableHandle], None]) -> None:
    state: Facts = {}

    def begin(module: nn.Module, args: tuple[Tensor, ...], kwargs: Facts) -> None:
        embeds, ids = kwargs.get("inputs_embeds"), kwargs.get("input_ids", args[0] if args else None)
        length = embeds.shape[1] if embeds is not None else ids.shape[1] if ids is not None else 1
        state.update(start=record.clock(), is_prompt=length > 1, layers=[], takes=embeds)

    def end(module: nn.Module, args: object, kwargs: object, output: Sequence[Tensor]) -> None:
        what = "prompt" if state["is_prompt"] else "one token"
        record.end_stage(f"language model: {what}", state["start"])
        if state["is_prompt"]:
            record.add(_layers_observation(state), hidden=output[0], layers=state["layers"])

    def see_layer(number: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: object, kwargs: Facts, output: Tensor | tuple[Tensor, ...]) -> None:
            if state.get("is_prompt"):
                hidden = output[0] if isinstance(output, tuple) else output
                state["layers"].append(tensor_stats(hidden) | {"largest": float(hidden.detach().abs().max())})
                if number == 0:
                    state["mask"], state["positions"] = kwargs.get("attention_mask"), kwargs.get("position_ids")

        return hook

    keep(inner.register_forward_pre_hook(begin, with_kwargs=True))
    for number, layer in enumerate(decoder_layers(inner)):
        keep(layer.register_forward_hook(see_layer(number), with_kwargs=True))
    keep(inner.register_forward_hook(end, with_kwargs=True))


def _layers_observation(state: Facts) -> Observation:
    layers = state["layers"]
    obs = Observation("layers", facts={"layers": layers})
    if state["takes"] is not None:
        obs.facts["takes"] = tensor_stats(state["takes"])
        obs.add_stats("takes", obs.facts["takes"])
    mask, positions = state.get("mask"), state.get("positions")
    shown = "none: causal, nothing is padded" if mask is None else f"{list(mask.shape)} {mask.dtype}"
    obs.add("mask in layer 1", shown)
    if isinstance(positions, Tensor):
        obs.facts["position_ids"] = positions[0].tolist()
        obs.add("positions", f"{int(positions.min())} to {int(positions.max())} in {list(positions.shape)}")
    if layers:
        obs.add("norm by layer", " ".join(f"{facts['norm']:.3g}" for facts in layers))
        obs.add("largest", " ".join(f"{facts['largest']:.3g}" for facts in layers))
        broken = next((number for number, facts in enumerate(layers) if not is_finite(facts)), None)
        text = "no NaN, no infinity" if broken is None else f"NaN or infinity from layer {broken + 1} on"
        obs.check("finite", broken is None, text)
    return obs


def logits_hook(record: Trace) -> Callable[..., None]:
    """Record the most probable candidates for each of the first new tokens of the first sequence in the batch."""

    def hook(module: nn.Module, args: object, output: Tensor) -> None:
        obs = record.observations.get("first_tokens") or Observation("first_tokens", facts={"steps": []})
        if len(obs.facts["steps"]) >= FIRST_TOKENS or output.dim() != 3 or not output.shape[1]:
            return
        logits = output[0, -1].detach().float()
        probabilities, ids = logits.softmax(-1).topk(min(CANDIDATES, len(logits)))
        step = [
            {
                "id": token,
                "text": record.tokenizer.convert_ids_to_tokens(token) if record.tokenizer else None,
                "p": probability,
            }
            for token, probability in zip(ids.tolist(), probabilities.tolist(), strict=True)
        ]
        obs.facts["steps"].append(step)
        number = len(obs.facts["steps"])
        candidates = "  ".join(f"{entry['text'] or entry['id']} {entry['p']:.1%}" for entry in step)
        obs.add(f"token {number}", candidates, "text")
        record.observations["first_tokens"] = obs
        if number == 1:
            obs.facts["logits"] = tensor_stats(logits)
            record.add(obs, logits=logits)

    return hook


def generate_hook(record: Trace) -> Callable[..., None]:
    def hook(output: object, *inputs: object, **kwargs: object) -> None:
        obs = record.observations.get("limit") or Observation("limit")
        obs.facts["given_to_generate"] = kwargs.get("max_new_tokens")
        obs.add("generate", f"max_new_tokens {kwargs.get('max_new_tokens')}")
        record.observations["limit"] = obs

    return hook
