"""Compile native.cpp for this machine, once, and load it.

In: a C++ compiler, if the machine has one. Out: the functions of native.cpp, or None; PyTorch's operators then compute the
same. The library is kept in the user's cache folder under a hash of the source, flags and processor. LLAVA_NATIVE=0 in the
environment turns it off.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

from llava.errors import InputError
from llava.files import cache_folder
from llava.utils import waiting

logger = logging.getLogger(__name__)

SOURCE, HEADER = (Path(__file__).with_name(name) for name in ("native.cpp", "native_threads.h"))
COMPILERS = ("g++", "clang++", "c++") if os.name == "posix" else ()  # native.cpp needs `long` to have 64 bits
FLAGS = (
    *("-O3", "-march=native", "-std=c++17", "-fopenmp-simd", "-fno-math-errno", "-fno-trapping-math"),
    *("-pthread", "-shared", "-fPIC"),
)
COMPILE_SECONDS = 60

_POINTER, _LONG, _FLOAT = ctypes.c_void_p, ctypes.c_long, ctypes.c_float
ARGUMENTS = {  # the last of each is the number of threads
    "rms_norm": [*[_POINTER] * 4, *[_LONG] * 2, _FLOAT, _LONG],
    "silu_mul": [*[_POINTER] * 2, *[_LONG] * 3],
    "rope_store": [*[_POINTER] * 3, _LONG, *[_POINTER] * 4, _FLOAT, *[_POINTER] * 3, *[_LONG] * 5],
    "attend": [*[_POINTER] * 4, _LONG, *[_POINTER] * 2, _FLOAT, _LONG, _POINTER, *[_LONG] * 6],
    "linear": [*[_POINTER] * 3, *[_LONG] * 4],
    "linear_int8": [*[_POINTER] * 4, *[_LONG] * 4],
}


class NativeFunctions:
    """The functions of native.cpp for one dtype."""

    def __init__(self, library: ctypes.CDLL, dtype: torch.dtype) -> None:
        functions = [getattr(library, f"{name}_{str(dtype).removeprefix('torch.')}") for name in ARGUMENTS]
        for function, types in zip(functions, ARGUMENTS.values(), strict=True):
            function.argtypes, function.restype = types, None
        self.rms_norm, self.silu_mul, self.rope_store, self.attend, self.linear, self.linear_int8 = functions


def load() -> dict[torch.dtype, NativeFunctions] | None:
    """Return the functions by dtype; None where nothing is compiled and no compiler is found."""
    path = None if os.environ.get("LLAVA_NATIVE") == "0" else _compiled()
    if path is None:
        return None
    library = ctypes.CDLL(str(path))
    return {dtype: NativeFunctions(library, dtype) for dtype in (torch.float32, torch.bfloat16)}


@functools.cache
def _compiled() -> Path | None:
    facts = "\n".join([SOURCE.read_text(), HEADER.read_text(), *FLAGS, _processor()])
    try:
        folder = cache_folder() / "kernels"
    except InputError as error:
        logger.info(
            "the engine computes with PyTorch's own operators, since what is compiled cannot be kept: %s", error
        )
        return None
    path = folder / f"engine-{hashlib.sha256(facts.encode()).hexdigest()[:16]}.so"
    if path.exists():
        return path
    compiler = next((name for name in COMPILERS if shutil.which(name)), None)
    if compiler is None:
        logger.info("no C++ compiler on this machine: the engine computes with PyTorch's own operators")
        return None
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
            made = Path(scratch) / path.name
            command = [compiler, *FLAGS, str(SOURCE), "-o", str(made)]
            with waiting("compiling the engine's arithmetic for this processor"):
                subprocess.run(command, check=True, capture_output=True, text=True, timeout=COMPILE_SECONDS)
            os.replace(made, path)
    except (OSError, subprocess.SubprocessError) as error:
        logger.info(
            "the engine computes with PyTorch's own operators: compiling %s failed: %s\n%s",
            SOURCE.name, error, getattr(error, "stderr", None) or "",
        )  # fmt: skip
        return None
    return path


def _processor() -> str:
    """Return what the compiler's -march=native depends on."""
    facts = Path("/proc/cpuinfo")
    lines = facts.read_text().splitlines() if facts.exists() else [platform.processor()]
    features = {line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))}
    return "\n".join([platform.machine(), *sorted(features or lines)])
