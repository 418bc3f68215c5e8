"""The adapters of an engine by name, within a bound of the device's memory.

In: folders. Out: adapters on the device. Those used last stay there; the others wait in the host's memory, and are copied when
a request names them again. A request keeps the adapter that it began with, whatever happens here meanwhile.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from pathlib import Path

import torch

from llava.engine.adapters.adapter import AdapterReader, LoadedAdapter
from llava.errors import InputError

MAX_ADAPTERS = 1024  # that an engine knows, on the device and on the host together
HOST = torch.device("cpu")


class AdapterStore:
    """Thread-safe. `max_bytes` is for those on the device, of which there is always room for one."""

    def __init__(self, reader: AdapterReader, device: torch.device, *, max_bytes: int) -> None:
        self.reader, self._device, self._max_bytes = reader, device, max_bytes
        self._on_device: OrderedDict[str, LoadedAdapter] = OrderedDict()  # the one used last at the end
        self._on_host: dict[str, LoadedAdapter] = {}
        self._lock = threading.Lock()

    @property
    def names(self) -> list[str]:
        with self._lock:
            return sorted({*self._on_device, *self._on_host})

    def load(self, name: str, path: str | Path, *, any_base: bool = False) -> LoadedAdapter:
        """Read an adapter; the new one replaces one of the same name, for requests that come after this."""
        if not name or name != name.strip() or not name.isprintable():
            raise InputError(f"an adapter's name is {name!r}; give a word that requests can name")
        with self._lock:
            known = {*self._on_device, *self._on_host}
            if name not in known and len(known) >= MAX_ADAPTERS:
                raise InputError(f"{len(known):,} adapters are loaded, and no more are kept; unload one first")
        adapter = self.reader.read(name, path, any_base=any_base)
        with self._lock:
            self._forget(name)
            self._keep(adapter)
        return adapter

    def unload(self, name: str) -> None:
        """Forget an adapter; requests that use it are finished."""
        with self._lock:
            self._check(name)
            self._forget(name)

    def get(self, name: str) -> LoadedAdapter:
        """The adapter of this name, on the device."""
        with self._lock:
            self._check(name)
            waiting = self._on_host.pop(name, None)
            if waiting is not None:
                self._keep(waiting.to(self._device))
            self._on_device.move_to_end(name)
            return self._on_device[name]

    def _keep(self, adapter: LoadedAdapter) -> None:
        self._on_device[adapter.name] = adapter
        while len(self._on_device) > 1 and self._num_bytes() > self._max_bytes:
            name, oldest = self._on_device.popitem(last=False)
            self._on_host[name] = oldest.to(HOST)

    def _num_bytes(self) -> int:
        return sum(adapter.num_bytes for adapter in self._on_device.values())

    def _forget(self, name: str) -> None:
        self._on_device.pop(name, None)
        self._on_host.pop(name, None)

    def _check(self, name: str) -> None:
        known = {*self._on_device, *self._on_host}
        if name not in known:
            loaded = f"loaded are {', '.join(sorted(known)[:20])}" if known else "none is loaded"
            raise InputError(f"there is no adapter {name!r}; {loaded}")
