"""Compiles native.cpp for this machine, once, and loads it.

In: a C++ compiler, if the machine has one. Out: the functions of native.cpp, or None, which is no error: everything they do
is also done by PyTorch's operators. The library lies in the user's cache, by a name that changes with whatever it was made
from. It shares the threads of PyTorch, whose OpenMP library it is linked to.
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

logger = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("native.cpp")
FLAGS = ("-O3", "-march=native", "-std=c++17", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC")
COMPILE_SECONDS = 60  # the longest to wait for the compiler

_POINTER, _LONG, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_long, ctypes.c_int, ctypes.c_float
ARGUMENTS = {
    "rms_norm": [*[_POINTER] * 4, *[_LONG] * 2, _FLOAT, _INT],
    "silu_mul": [*[_POINTER] * 2, *[_LONG] * 2, _INT],
    "rope_store": [*[_POINTER] * 3, _LONG, *[_POINTER] * 4, _FLOAT, *[_POINTER] * 3, *[_LONG] * 4, _INT],
    "attend": [*[_POINTER] * 4, _LONG, *[_POINTER] * 2, _FLOAT, _LONG, _POINTER, *[_LONG] * 5, _INT],
}


class Library:
    """The functions for one type of numbers."""

    def __init__(self, path: Path, dtype: torch.dtype) -> None:
        library = ctypes.CDLL(str(path))
        kind = str(dtype).removeprefix("torch.")
        self.rms_norm, self.silu_mul, self.rope_store, self.attend = (
            _function(library, f"{name}_{kind}", types) for name, types in ARGUMENTS.items()
        )
        self.linear_int8 = _function(library, "linear_int8", [*[_POINTER] * 4, *[_LONG] * 3, _INT])


def load(dtype: torch.dtype) -> Library | None:
    """For float32 and bfloat16, on a machine with g++ or where it was compiled before."""
    if dtype not in (torch.float32, torch.bfloat16):
        return None
    path = _compiled()
    return None if path is None else Library(path, dtype)


@functools.cache
def _compiled() -> Path | None:
    # PyTorch's OpenMP comes before the compiler's, which is then not needed: two would keep twice as many threads awake.
    openmp = sorted(str(path) for path in Path(torch.__file__).parent.glob("lib/libgomp*"))
    options = [*FLAGS, str(SOURCE), *openmp, "-Wl,--as-needed"]
    name = hashlib.sha256("\n".join([SOURCE.read_text(), *options, _processor()]).encode()).hexdigest()[:16]
    path = _cache() / f"engine-{name}.so"
    if path.exists():
        return path
    compiler = shutil.which("g++")
    if compiler is None:
        logger.info("no g++ on this machine: the engine computes with PyTorch's own operators")
        return None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            made = Path(folder) / path.name
            command = [compiler, *options, "-o", str(made)]
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=COMPILE_SECONDS)
            os.replace(made, path)
    except (OSError, subprocess.SubprocessError) as error:
        logger.info(
            "the engine computes with PyTorch's own operators: compiling %s failed: %s\n%s",
            SOURCE.name, error, getattr(error, "stderr", None) or "",
        )  # fmt: skip
        return None
    return path


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llava" / "kernels"


def _processor() -> str:
    """What the compiler's idea of "native" depends on."""
    facts = Path("/proc/cpuinfo")
    lines = facts.read_text().splitlines() if facts.exists() else [platform.processor()]
    features = {line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))}
    return "\n".join([platform.machine(), *sorted(features or lines)])


def _function(library: ctypes.CDLL, name: str, types: list[type]) -> ctypes._NamedFuncPointer:
    function = getattr(library, name)
    function.argtypes, function.restype = types, None
    return function
