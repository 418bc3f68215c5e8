"""Hooks that record images: pixels at the tower, its layers, the projector, the features of each image.

In: a `Trace` and the modules. Out: hooks, which hooks.py installs. The sequence after the splice is in hooks_sequence.py.

    N tiles, P patches per tile, V width of the tower
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from llava.diagnose.tracer.record import Facts, Observation, Trace, check_finite, describe_stats, tensor_stats
from llava.images.layout import ImageSize, plan
from llava.images.video_layout import plan_video
from llava.model.features import split_entries
from llava.model.protocols import VisionTower


def pixels_hook(record: Trace, tile_size: int) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        images = args[0]
        obs = record.observations.get("pixels") or Observation("pixels")
        facts = tensor_stats(torch.cat([image[None] for image in images]) if isinstance(images, list) else images)
        obs.facts["at_the_tower"] = facts
        obs.rows = [row for row in obs.rows if row.label != "at the tower"]
        obs.add_stats("at the tower", facts)
        if facts["shape"][-2:] != [tile_size] * 2:
            obs.check("size", False, f"the tower takes {tile_size} pixels per side")
        record.add(obs, images=images)

    return hook


def hook_tower(record: Trace, tower: VisionTower, keep: Callable[[RemovableHandle], None]) -> None:
    """Record all hidden states of the tower. It stops at the layer that is read, so the whole tower is run once more."""
    pixels: list[Tensor] = []

    def see_pass(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        pixels[:] = args[:1]

    def hook(module: nn.Module, args: tuple[Tensor, ...], features: Tensor) -> None:
        output = tower.get_submodule("vision_tower")(pixels[0], output_hidden_states=True)
        states = output.hidden_states
        chosen = tower.hidden_state_indices
        norms = [float(state.float().norm(dim=-1).mean()) for state in states]
        selected = tower.feature_select(output)
        facts = tensor_stats(selected)
        obs = Observation("tower")
        obs.facts = {
            "hidden_states": len(states),
            "hidden_state_shape": list(states[-1].shape),
            "select_layer": tower.select_layer,
            "select_feature": tower.select_feature,
            "norms": norms,
            "features": facts,
            "weights_dtype": str(tower.dtype).removeprefix("torch."),
        }
        obs.add("hidden states", f"{len(states)} of {list(states[-1].shape)}, from {tower.dtype} weights")
        obs.add("norm by layer", " ".join(f"[{n:.3g}]" if i in chosen else f"{n:.3g}" for i, n in enumerate(norms)))
        drops = states[-1].shape[1] - selected.shape[1]
        dropped = " without the class feature" if drops else ""
        obs.add(
            "taken",
            f"layer {tower.select_layer} (number {', '.join(map(str, chosen))}), {tower.select_feature}{dropped}",
        )
        obs.add_stats("features", facts)
        expected = tower.num_patches + int(tower.has_class_feature)
        obs.check("count", selected.shape[1] == expected, f"{selected.shape[1]} features per tile, {expected} expected")
        check_finite(obs, facts)
        record.add(obs, hidden_states=states, features=selected, tower=tower)

    keep(tower.input_modules()[0].register_forward_pre_hook(see_pass))
    keep(tower.register_forward_hook(hook))


def hook_projector(record: Trace, projector: nn.Module, keep: Callable[[RemovableHandle], None]) -> None:
    steps: list[tuple[str, nn.Module, Facts]] = []

    def see_step(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            steps.append((name, module, tensor_stats(output)))

        return hook

    def see_all(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        obs = Observation("projector")
        weights = {name: tensor_stats(tensor) for name, tensor in module.named_parameters()}
        obs.facts = {"type": getattr(record.model.config, "mm_projector_type", None), "weights": weights}
        obs.facts["steps"] = [{"layer": name, "output": facts} for name, _, facts in steps]
        obs.facts["features"] = tensor_stats(output)
        for name, facts in weights.items():
            obs.add_stats(name, facts)
        obs.add_stats("takes", tensor_stats(args[0]))
        for name, step, facts in steps:
            obs.add(f"after {name or 'it'}", f"{type(step).__name__}: {describe_stats(facts)}")
        obs.check(
            "width", output.shape[-1] == record.model.config.hidden_size,
            f"features of width {output.shape[-1]}, text of width {record.model.config.hidden_size}",
        )  # fmt: skip
        check_finite(obs, obs.facts["features"])
        steps.clear()
        record.add(obs, features=output, projector=module)

    for name, module in projector.named_modules():
        if module is not projector and not list(module.children()):
            keep(module.register_forward_hook(see_step(name)))
    keep(projector.register_forward_hook(see_all))


def image_features_hook(record: Trace) -> Callable[..., None]:
    def hook(
        features: list[Tensor],
        images: Tensor | list[Tensor],
        image_sizes: Sequence[ImageSize] | None,
        **options: object,
    ) -> None:
        lengths = [len(feature) for feature in features]
        record.feature_lengths = lengths
        obs = Observation("image_features", facts={"lengths": lengths, "images": [tensor_stats(f) for f in features]})
        policy = record.model.image_policy()
        kinds = split_entries(images, options.get("modalities"))[1]  # type: ignore[arg-type]
        for number, feature in enumerate(features):
            obs.add_stats(f"image {number + 1}", obs.facts["images"][number])
            if image_sizes is not None:
                tiles = 1 if images[number].ndim == 3 else len(images[number])
                is_plain = isinstance(images, Tensor) and images.ndim == 4
                size = image_sizes[number]
                if kinds[number] == "video":
                    planned = plan_video(tiles, policy, record.model.video_policy()).num_features
                else:
                    newline = is_plain and policy.merge == "spatial_unpad"
                    planned = plan(size, policy, num_tiles=tiles).num_features - newline
                obs.check("count", planned == len(feature), f"{len(feature)} features, the layout has {planned}")
        record.add(obs, features=features, images=images, image_sizes=image_sizes)

    return hook
