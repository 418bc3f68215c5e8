"""Make a program's first second count: the imports between its start and its first token, cut to what they must be.

In: nothing. Out: the same modules that plain imports give, sooner. `prepare()` is called as early as possible, and works
on while arguments are parsed and images are read; `quick_imports()` wraps the block that imports and loads the model.
Only programs use this, those that answer questions and `llava train`; the package as a library imports as usual.

What it changes, each measured on two cores with torch 2.13 and transformers 5.23, where plain imports take 4.4 s:

- no garbage collection while thousands of modules are built (-1.0 s): nothing that an import builds is garbage;
- `torch._dynamo` is entered at its first use (-0.5 s): transformers imports the compiler for a few marks on functions;
- `bitsandbytes`, which PEFT imports and which enters the compiler, at its first use (-2 s for `llava train`, of 9);
- transformers lists its own model files once instead of twice (-0.3 s);
- the shared library of torch is mapped by a thread while Python works (-0.2 s);
- threads that wait for each other sleep soon rather than spin, which on busy cores costs a second of loading.
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
from typing import Any


def prepare() -> None:
    """Settings that torch reads when it is loaded, and its CPU library mapped in the background where that is simple."""
    if "torch" in sys.modules or not sys.platform.startswith("linux"):
        return
    if "OMP_WAIT_POLICY" not in os.environ:  # a user who has tuned this knows better
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    spec = importlib.util.find_spec("torch")
    for place in (spec and spec.submodule_search_locations) or ():
        folder = Path(place) / "lib"
        # A CUDA build finds its libraries in an order that `import torch` arranges; leave that to it.
        if (folder / "libtorch_cpu.so").is_file() and not (folder / "libtorch_cuda.so").exists():
            # No daemon: a program that ends early must not end in the middle of this.
            threading.Thread(target=_map_library, args=(folder / "libtorch_cpu.so",)).start()


def _map_library(path: Path) -> None:
    with suppress(OSError):  # `import torch` will meet the same trouble, and explains it better
        ctypes.CDLL(str(path))


@contextmanager
def quick_imports() -> Iterator[None]:
    """Within the block, import torch and transformers the short way. Leaves the garbage collector on, as it was."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        import transformers  # noqa: F401  # needs no torch, so it is read while the thread maps torch's library

        with _compiler_deferred(), _models_listed_once():
            defer("bitsandbytes")  # whose body runs the compiler's
            yield
    finally:
        gc.freeze()  # What is alive now stays alive until the end: later collections need not look at it again.
        if collecting:
            gc.enable()


@contextmanager
def _compiler_deferred() -> Iterator[None]:
    """Keep the body of `torch._dynamo` for its first use; marks put on functions within the block are made up for then."""
    import torch

    lazy_disable = getattr(torch, "_disable_dynamo", None)  # torch's own way to mark a function without the compiler
    if lazy_disable is None:
        yield
        return

    def disable(fn: Any = None, recursive: bool = True, *, reason: str | None = None) -> Any:
        return lazy_disable(fn, recursive)

    # What transformers asks for while it is imported. Any other name or submodule runs the body at once, so another
    # transformers is at worst slower here and never wrong.
    defer(
        "torch._dynamo",
        marks=("assume_constant_result", "allow_in_graph"),
        free=("_trace_wrapped_higher_order_op",),
    )
    original, torch.compiler.disable = torch.compiler.disable, disable
    try:
        yield
    finally:
        torch.compiler.disable = original


def defer(name: str, *, marks: Sequence[str] = (), free: Sequence[str] = ()) -> None:
    """Register a package and leave its body for later, unless it is imported already.

    The body runs when anything is asked of the package but one of `marks` (decorators that return their function and are
    applied again when the body has run) or one of the submodules `free`, which do not need the body.
    """
    if name in sys.modules:
        return
    spec = importlib.util.find_spec(name)
    if spec is None or spec.loader is None or spec.submodule_search_locations is None:
        return
    module = _DeferredPackage(name)
    module.__spec__, module.__loader__, module.__file__ = spec, spec.loader, spec.origin
    module.__path__, module.__package__ = list(spec.submodule_search_locations), name
    marked: list[tuple[str, Any]] = []

    def marker(mark: str) -> Callable[[Any], Any]:
        def apply(function: Any) -> Any:
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
    """A package whose own body runs once, at the first name it lacks or the first submodule that needs it."""

    _lock = threading.RLock()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # import machinery probing; a body is never run for that
            raise AttributeError(name)
        run_body(self)
        return getattr(self, name)


def run_body(module: types.ModuleType) -> None:
    """Run what `defer` left for later; nothing if that has happened."""
    with _DeferredPackage._lock:
        if type(module) is not _DeferredPackage:
            return
        module.__class__ = types.ModuleType  # type: ignore[assignment]  # first: the body imports its own package
        spec = module.__spec__
        if spec is not None and spec.loader is not None:  # always; `defer` made sure
            spec.loader.exec_module(module)
        for mark, function in vars(module).pop("_deferred_marks"):
            getattr(module, mark)(function)


class _SubmoduleWatch(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Runs a deferred body before any of its submodules is imported, since the submodules rely on the body's order."""

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
        # The body has imported the very module that is being asked for: hand that one out, never a second copy. The
        # import system prefers the spec that it finds on the module to the one returned here, so they are the same.
        self._found_spec, found.__spec__ = found.__spec__, ModuleSpec(fullname, self)
        return found.__spec__

    def create_module(self, spec: ModuleSpec) -> types.ModuleType:
        return sys.modules[spec.name]

    def exec_module(self, module: types.ModuleType) -> None:
        module.__spec__ = self._found_spec


@contextmanager
def _models_listed_once() -> Iterator[None]:
    """Let `transformers.models` reuse the list that `transformers` made of the same folder when it was imported."""
    from transformers.utils import import_utils

    original = getattr(import_utils, "define_import_structure", None)
    if original is None or not hasattr(original, "cache_info") or "transformers.models" in sys.modules:
        yield
        return

    def reuse(module_path: str, prefix: str | None = None) -> Any:
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
