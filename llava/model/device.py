"""Where a model runs and in which numbers, decided once, when it is loaded.

In: what a user asked for ("auto", "cuda:1", "bf16", …). Out: a `torch.device` and a `torch.dtype`, or one sentence that
says what this machine has. No other module asks what hardware there is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from llava.errors import InputError

DTYPES = {
    "float32": torch.float32,
    "fp32": torch.float32,
    "float16": torch.float16,
    "fp16": torch.float16,
    "half": torch.float16,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
}

# Ways in which accelerate spreads a model by itself; any other word in a device_map's place is a device.
STRATEGIES = ("auto", "balanced", "balanced_low_0", "sequential")

# How much of a GPU's free memory weights may take; the rest is for activations and the cache.
LARGEST_SHARE = 0.8


def pick_device(wanted: str | torch.device | int = "auto") -> torch.device:
    """The device meant by "auto" (cuda, else mps, else cpu), or the given one if this machine has it."""
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
    """Whether this machine has a device; kinds of device that only a plug-in brings are taken at their word."""
    if device.type == "cuda":
        return torch.cuda.is_available() and (device.index or 0) < torch.cuda.device_count()
    if device.type == "mps":
        return torch.backends.mps.is_available()
    return True


def pick_dtype(wanted: str | torch.dtype | None, device: torch.device) -> torch.dtype:
    """The number format meant by "auto": bf16 on a GPU that has it, else fp16; fp32 on a CPU."""
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
    """Where inputs go, and how a model that does not stand on that one device is spread."""

    device: torch.device
    device_map: Any = None  # None: the whole model stands on `device`


def pick_placement(device: str | torch.device | int, device_map: Any, *, needed_bytes: int) -> Placement:
    """One device where the model fits on one, which needs no help from accelerate; otherwise a map for accelerate."""
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
    if device_map is None or target.type != "cuda":
        return Placement(target)
    free, _ = torch.cuda.mem_get_info(target)
    return Placement(target) if needed_bytes < LARGEST_SHARE * free else Placement(target, device_map)
