"""Pick the device and dtype of a model when it is loaded.

In: what a user asked for ("auto", "cuda:1", "bf16", …). Out: a `torch.device` and a `torch.dtype`, or an error that says
what this machine has. No other module asks what hardware there is.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias

import torch

from llava.errors import InputError

logger = logging.getLogger(__name__)

DTYPES = {
    "float32": torch.float32,
    "fp32": torch.float32,
    "float16": torch.float16,
    "fp16": torch.float16,
    "half": torch.float16,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
}

# What `device_map` may be: a strategy of accelerate, a device, or a device for each part of the model.
DeviceMap: TypeAlias = str | torch.device | int | Mapping[str, str | int | torch.device] | None

# The strategies by which accelerate shards a model; any other text given as device_map is a device.
STRATEGIES = ("auto", "balanced", "balanced_low_0", "sequential")

# The share of a GPU's free memory that weights may take; the rest is for activations and the cache.
LARGEST_SHARE = 0.8


def pick_device(wanted: str | torch.device | int = "auto") -> torch.device:
    """Resolve "auto" (cuda, else mps, else cpu), or check that this machine has the given device."""
    if isinstance(wanted, int):
        wanted = f"cuda:{wanted}"
    if wanted == "auto":
        return torch.device(
            "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        )
    try:
        device = torch.device(wanted)
    except RuntimeError as error:
        raise InputError(f"unknown device {wanted!r}; known: auto, cpu, cuda, cuda:0, mps") from error
    if not is_present(device):
        raise InputError(
            f"device {str(wanted)!r} was asked for, but this machine has no such device; use device='cpu' or 'auto'"
        )
    return device


def is_present(device: torch.device) -> bool:
    """Whether this machine has a device; types of devices that come with plug-ins are not checked."""
    if device.type == "cuda":
        return torch.cuda.is_available() and (device.index or 0) < torch.cuda.device_count()
    if device.type == "mps":
        return torch.backends.mps.is_available()
    return True


def pick_dtype(wanted: str | torch.dtype | None, device: torch.device) -> torch.dtype:
    """Resolve "auto" (bf16 on a GPU that has it, else fp16; fp32 on a CPU), or a dtype by name."""
    if isinstance(wanted, torch.dtype):
        return wanted
    if wanted is None or wanted == "auto":
        if device.type == "cuda":
            return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
        return torch.float16 if device.type == "mps" else torch.float32
    name = wanted.removeprefix("torch.")
    if name not in DTYPES:
        raise InputError(f"unknown dtype {wanted!r}; known: auto, {', '.join(DTYPES)}")
    return DTYPES[name]


@dataclass(frozen=True)
class Placement:
    """The device that inputs go to, and the device map of a model that is sharded."""

    device: torch.device
    device_map: str | Mapping[str, str | int | torch.device] | None = None  # None: the whole model is on `device`
    max_memory: Mapping[int | str, int] | None = None  # bytes for each GPU and for "cpu"; None: what is free


def pick_placement(
    device: str | torch.device | int,
    device_map: DeviceMap,
    *,
    needed_bytes: int,
    max_memory: Mapping[int | str, int | str] | None = None,
) -> Placement:
    """Decide whether a model goes to one device or is sharded by accelerate.

    A `device_map` takes precedence over `device`; weights of `needed_bytes` that fit on one GPU are not sharded, unless
    `max_memory` says how much each device may hold.
    """
    if max_memory is not None and device_map is None:
        device_map = "auto"
    if max_memory is not None and (isinstance(device_map, Mapping) or device_map not in STRATEGIES):
        logger.warning("max_memory is not used: device_map %r says already where the model goes", device_map)
    if isinstance(device_map, Mapping) and len(set(map(str, device_map.values()))) == 1:
        device_map = next(iter(device_map.values()))
    if isinstance(device_map, Mapping):
        if not device_map or "disk" in device_map.values():
            raise InputError(
                f"device_map {dict(device_map)!r} does not place every part on a device; use 'cpu' in place of 'disk'"
            )
        present = [pick_device(device) for device in device_map.values()]
        return Placement(present[0], dict(device_map))
    if device_map is not None and device_map not in STRATEGIES:
        return Placement(pick_device(device_map))
    target = pick_device(device)
    if max_memory is not None and target.type != "cuda":
        logger.warning("max_memory is not used: there is no GPU to share the model with")
    if device_map is None or target.type != "cuda":
        return Placement(target)
    if max_memory is not None:
        return Placement(target, device_map, _memory_limits(max_memory))
    free, _ = torch.cuda.mem_get_info(target)
    return Placement(target) if needed_bytes < LARGEST_SHARE * free else Placement(target, device_map)


def _memory_limits(given: Mapping[int | str, int | str]) -> dict[int | str, int]:
    """Bytes by device, as accelerate takes them, from `{0: "10GiB", "cpu": "30GiB"}`."""
    from accelerate.utils import convert_file_size_to_int

    limits: dict[int | str, int] = {}
    for name, size in given.items():
        key = name if name == "cpu" else pick_device(name).index or 0
        try:
            limits[key] = convert_file_size_to_int(size)
        except (ValueError, TypeError, AttributeError) as error:
            raise InputError(
                f"max_memory {size!r} for {name!r} is no size; give bytes, or a text such as '10GiB'"
            ) from error
    return limits
