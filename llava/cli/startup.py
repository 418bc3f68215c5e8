"""Faster imports of torch and transformers, for programs.

In: nothing. Out: the same modules as by plain imports, sooner. `prepare()` is called as early as possible and works in the
background while arguments are parsed and images are read; `quick_imports()` wraps the block that imports and loads the model.
Only programs use this; the package as a library imports as usual.

The changes, measured on two cores with torch 2.13 and transformers 5.23, where plain imports take 4.4 s:

- no garbage collection during imports (-1.0 s), which create no garbage;
- `torch._dynamo` is executed at its first use (-0.5 s): transformers imports the compiler for a few decorators;
- `bitsandbytes`, which PEFT imports and which imports the compiler, at its first use (-2 s of 9 for `llava train`);
- transformers lists its own model files once instead of twice (-0.3 s);
- a thread maps the shared library of torch meanwhile (-0.2 s);
- waiting OpenMP threads sleep soon instead of spinning, which on busy cores costs a second of loading.
"""

from __future__ import annotations

import ctypes
import gc
import importlib.abc
import importlib.util
import os
import sys
import threading
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import TypeVar

F = TypeVar("F", bound=Callable[..., object])


def prepare() -> None:
    """Set variables that torch reads when it is imported, and map its CPU library in the background where that is simple."""
    if "torch" in sys.modules or not sys.platform.startswith("linux"):
        return
    if "OMP_WAIT_POLICY" not in os.environ:  # do not override a setting of the user
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    spec = importlib.util.find_spec("torch")
    for location in (spec and spec.submodule_search_locations) or ():
        folder = Path(location) / "lib"
        # `import torch` of a CUDA build loads its libraries in an order of its own.
        if (folder / "libtorch_cpu.so").is_file() and not (folder / "libtorch_cuda.so").exists():
            # No daemon: the program must not end while the library is being mapped.
            threading.Thread(target=_map_library, args=(folder / "libtorch_cpu.so",)).start()


def _map_library(path: Path) -> None:
    with suppress(OSError):  # `import torch` will raise the same error, with an explanation
        ctypes.CDLL(str(path))


@contextmanager
def quick_imports() -> Iterator[None]:
    """Shorten imports of torch and transformers within the block. The garbage collector is restored at its end."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        import transformers  # noqa: F401  # needs no torch: imported while the thread maps torch's library

        with _compiler_deferred(), _models_listed_once():
            defer("bitsandbytes")  # which imports the compiler
            yield
    finally:
        gc.freeze()  # objects that exist now live until the end; later collections skip them
        if collecting:
            gc.enable()


@contextmanager
def _compiler_deferred() -> Iterator[None]:
    """Execute `torch._dynamo` at its first use; its decorators used within the block are applied then."""
    import torch

    lazy_disable = getattr(torch, "_disable_dynamo", None)  # torch's own decorator that does not import the compiler
    if lazy_disable is None:
        yield
        return

    def disable(fn: object = None, recursive: bool = True, *, reason: str | None = None) -> object:
        return lazy_disable(fn, recursive)

    # The names that transformers uses while it is imported. Any other name or submodule executes the package at once, so
    # another version of transformers is at worst slower.
    defer("torch._dynamo", marks=("assume_constant_result", "allow_in_graph"), free=("_trace_wrapped_higher_order_op",))
    original, torch.compiler.disable = torch.compiler.disable, disable
    try:
        yield
    finally:
        torch.compiler.disable = original


def defer(name: str, *, marks: Sequence[str] = (), free: Sequence[str] = ()) -> None:
    """Register a package whose code is executed at its first use, unless it is imported already.

    The decorators in `marks` do not count as a use: they return their function, and are applied when the code has run. Nor do
    the submodules in `free`, which do not need the package's code.
    """
    if name in sys.modules:
        return
    spec = importlib.util.find_spec(name)
    if spec is None or spec.loader is None or spec.submodule_search_locations is None:
        return
    module = _DeferredPackage(name)
    module.__spec__, module.__loader__, module.__file__ = spec, spec.loader, spec.origin
    module.__path__, module.__package__ = list(spec.submodule_search_locations), name
    marked: list[tuple[str, Callable[..., object]]] = []

    def marker(mark: str) -> Callable[[F], F]:
        def apply(function: F) -> F:
            marked.append((mark, function))
            return function

        return apply

    vars(module).update({mark: marker(mark) for mark in marks}, _deferred_marks=marked)
    sys.modules[name] = module
    parent, _, child = name.rpartition(".")
    if parent:
        setattr(sys.modules[parent], child, module)
    sys.meta_path.insert(0, _SubmoduleWatch(module, tuple(f"{name}.{submodule}" for submodule in free)))


class _DeferredPackage(types.ModuleType):
    """A package whose code is executed at the first missing name or the first submodule that needs it."""

    _lock = threading.RLock()

    def __getattr__(self, name: str) -> object:
        if name.startswith("__"):  # probed by the import system, which is no use
            raise AttributeError(name)
        run_body(self)
        return getattr(self, name)


def run_body(module: types.ModuleType) -> None:
    """Execute a deferred package; nothing if that has happened."""
    with _DeferredPackage._lock:
        if type(module) is not _DeferredPackage:
            return
        module.__class__ = types.ModuleType  # type: ignore[assignment]  # first, since the code imports its own package
        spec = module.__spec__
        if spec is not None and spec.loader is not None:  # always; `defer` made sure
            spec.loader.exec_module(module)
        for mark, function in vars(module).pop("_deferred_marks"):
            getattr(module, mark)(function)


class _SubmoduleWatch(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Executes a deferred package before any of its submodules is imported, which rely on that order."""

    def __init__(self, package: types.ModuleType, free: tuple[str, ...]):
        self._package, self._free = package, free

    def find_spec(self, fullname: str, path: object, target: object = None) -> ModuleSpec | None:
        if not fullname.startswith(self._package.__name__ + ".") or fullname in self._free:
            return None
        sys.meta_path.remove(self)
        run_body(self._package)
        found = sys.modules.get(fullname)
        if found is None:
            return None
        # The package's code has imported this module: return that one, not a second copy. The import system prefers the
        # spec on the module to the one returned here, so both are the same.
        self._found_spec, found.__spec__ = found.__spec__, ModuleSpec(fullname, self)
        return found.__spec__

    def create_module(self, spec: ModuleSpec) -> types.ModuleType:
        return sys.modules[spec.name]

    def exec_module(self, module: types.ModuleType) -> None:
        module.__spec__ = self._found_spec


@contextmanager
def _models_listed_once() -> Iterator[None]:
    """Let `transformers.models` reuse the listing of its folder that `transformers` made when it was imported."""
    from transformers.utils import import_utils

    original = getattr(import_utils, "define_import_structure", None)
    if original is None or not hasattr(original, "cache_info") or "transformers.models" in sys.modules:
        yield
        return

    def reuse(module_path: str, prefix: str | None = None) -> object:
        path = Path(module_path)
        if prefix is None and path.parts[-3:] == ("transformers", "models", "__init__.py"):
            listed = original(path.parent, prefix="models")
            strip = len("models.")
            return {
                needs: {name[strip:]: exports for name, exports in modules.items() if name.startswith("models.")}
                for needs, modules in listed.items()
            }
        return original(module_path, prefix)

    import_utils.define_import_structure = reuse  # type: ignore[assignment]
    try:
        yield
    finally:
        import_utils.define_import_structure = original
