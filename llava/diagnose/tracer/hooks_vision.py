"""What a trace sees of images: pixels at the tower, its layers, the projector, the features of each image.

In: a `Trace` and the modules. Out: functions for hooks.py to hook up. What follows in the sequence is hooks_sequence.py's.

    N tiles, P patches per tile, V width of the tower
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from llava.diagnose.tracer.record import Observation, check_finite, figures, told
from llava.images.layout import plan

if TYPE_CHECKING:
    from llava.diagnose.tracer.hooks import Trace


def see_pixels(record: Trace) -> Callable[..., None]:
    def see(module: nn.Module, args: Any) -> None:
        images = args[0]
        seen = record.observations.get("pixels") or Observation("pixels")
        facts = figures(torch.cat([image[None] for image in images]) if isinstance(images, list) else images)
        seen.facts["at_the_tower"] = facts
        seen.rows = [row for row in seen.rows if row.label != "at the tower"]
        seen.say("at the tower", told(facts))
        if facts["shape"][-2:] != [record.model.get_vision_tower().tile_size] * 2:
            seen.check("size", False, f"the tower takes {record.model.get_vision_tower().tile_size} pixels per side")
        record.note(seen, images=images)

    return see


def see_tower(record: Trace, tower: Any, hook: Callable[[Any], None]) -> None:
    """Once the tower has made its features, all of its hidden states, for which the whole of it is run once more."""
    pixels: list[Tensor] = []

    def see_pass(module: nn.Module, args: Any) -> None:
        pixels[:] = args[:1]

    def see(module: nn.Module, args: Any, features: Any) -> None:
        output = tower.vision_tower(pixels[0], output_hidden_states=True)
        states = output.hidden_states
        chosen = tower.hidden_state_index
        norms = [float(state.float().norm(dim=-1).mean()) for state in states]
        selected = tower.feature_select(output)
        facts = figures(selected)
        seen = Observation("tower")
        seen.facts = {
            "hidden_states": len(states),
            "hidden_state_shape": list(states[-1].shape),
            "select_layer": tower.select_layer,
            "select_feature": tower.select_feature,
            "norms": norms,
            "features": facts,
            "weights_dtype": str(tower.dtype).removeprefix("torch."),
        }
        seen.say("hidden states", f"{len(states)} of {list(states[-1].shape)}, from {tower.dtype} weights")
        seen.say("norm by layer", " ".join(f"[{n:.3g}]" if i == chosen else f"{n:.3g}" for i, n in enumerate(norms)))
        drops = states[-1].shape[1] - selected.shape[1]
        dropped = " without the class feature" if drops else ""
        seen.say("taken", f"layer {tower.select_layer} (number {chosen}), {tower.select_feature}{dropped}")
        seen.say("features", told(facts))
        expected = tower.num_patches + int(tower.has_class_feature)
        seen.check(
            "count", selected.shape[1] == expected, f"{selected.shape[1]} features per tile, {expected} expected"
        )
        check_finite(seen, facts)
        record.note(seen, hidden_states=states, features=selected, tower=tower)

    hook(tower.input_modules()[0].register_forward_pre_hook(see_pass))
    hook(tower.register_forward_hook(see))


def watch_projector(record: Trace, projector: nn.Module, hook: Callable[[Any], None]) -> None:
    steps: list[tuple[str, nn.Module, dict[str, Any]]] = []

    def see_step(name: str) -> Callable[..., None]:
        def see(module: nn.Module, args: Any, output: Tensor) -> None:
            steps.append((name, module, figures(output)))

        return see

    def see_all(module: nn.Module, args: Any, output: Tensor) -> None:
        seen = Observation("projector")
        weights = {name: figures(tensor) for name, tensor in module.named_parameters()}
        seen.facts = {"type": getattr(record.model.config, "mm_projector_type", None), "weights": weights}
        seen.facts["steps"] = [{"layer": name, "output": facts} for name, _, facts in steps]
        seen.facts["features"] = figures(output)
        for name, facts in weights.items():
            seen.say(name, told(facts))
        seen.say("takes", told(figures(args[0])))
        for name, step, facts in steps:
            seen.say(f"after {name or 'it'}", f"{type(step).__name__}: {told(facts)}")
        seen.check(
            "width", output.shape[-1] == record.model.config.hidden_size,
            f"features of width {output.shape[-1]}, text of width {record.model.config.hidden_size}",
        )  # fmt: skip
        check_finite(seen, seen.facts["features"])
        steps.clear()
        record.note(seen, features=output, projector=module)

    for name, module in projector.named_modules():
        if module is not projector and not list(module.children()):
            hook(module.register_forward_hook(see_step(name)))
    hook(projector.register_forward_hook(see_all))


def see_image_features(record: Trace) -> Callable[..., None]:
    def see(features: list[Tensor], images: Any, image_sizes: Any, **options: Any) -> None:
        lengths = [len(feature) for feature in features]
        record.feature_lengths = lengths
        seen = Observation("image_features", facts={"lengths": lengths, "images": [figures(f) for f in features]})
        policy = record.model.image_policy()
        for number, feature in enumerate(features):
            seen.say(f"image {number + 1}", told(seen.facts["images"][number]))
            if image_sizes is not None:
                tiles = 1 if images[number].ndim == 3 else len(images[number])
                is_plain = isinstance(images, Tensor) and images.ndim == 4
                size = image_sizes[number]
                planned = plan(size, policy, num_tiles=tiles).num_features - (
                    is_plain and policy.merge == "spatial_unpad"
                )
                seen.check("count", planned == len(feature), f"{len(feature)} features, the layout has {planned}")
        record.note(seen, features=features, images=images, image_sizes=image_sizes)

    return see
