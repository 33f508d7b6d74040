"""The adapters of a server: registered by name in a directory, and loaded and unloaded while it serves."""

import asyncio
import contextlib
import dataclasses
import itertools
import logging
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Protocol

from pippin.core import adapter as stored
from pippin.core.errors import CheckpointError, PippinError
from pippin.serve.busy_threads import in_busy_thread
from pippin.serve.engine.request import Adapter
from pippin.serve.errors import NotFoundError, PreconditionError

_log = logging.getLogger(__name__)

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


class Slots(Protocol):
    """Where a model has room for adapters."""

    @property
    def count(self) -> int:
        """How many there are, from 1."""
        ...

    def put(self, slot: int, adapter: stored.Adapter) -> None:
        """Reads an adapter into a slot that no request uses. Called in a thread, one at a time.

        Raises:
            CheckpointError: it does not fit the model, or is damaged.
        """
        ...


@dataclasses.dataclass
class Loaded:
    """An adapter that is loaded."""

    adapter: Adapter
    rank: int
    num_requests: int = 0  # that use it
    # Set once no request uses an adapter that is to go.
    unused: asyncio.Event | None = None


class Adapters:
    """Gives each loaded adapter a slot, until it is unloaded and the last request that uses it has ended.

    Clients and administrators name adapters, and never a path. Its methods are for one event loop.
    """

    def __init__(self, directory: Path, slots: Slots, model_name: str = ""):
        """`model_name`: of the base, which no adapter may have."""
        self._directory, self._slots, self._model_name = directory, slots, model_name
        self._loaded: dict[str, Loaded] = {}  # name -> loaded
        self._free = list(range(slots.count, 0, -1))
        self._numbers = itertools.count(1)
        self._loading = asyncio.Lock()

    @property
    def count(self) -> int:
        """How many adapters may be loaded."""
        return self._slots.count

    def loaded(self) -> list[Loaded]:
        """Those that requests may use, by name. For any thread."""
        return [loaded for _, loaded in sorted(self._loaded.copy().items())]

    async def load(self, name: str) -> Loaded:
        """Loads a registered adapter; one that is loaded stays as it is.

        Raises:
            NotFoundError: none is registered under this name.
            PreconditionError: it does not fit the model, is damaged, or there is no room.
        """
        async with self._loading:
            if name in self._loaded:
                return self._loaded[name]
            path = self._path(name)
            if name == self._model_name:
                raise PreconditionError(
                    f"{name} is the name of the model, and whoever asks for it gets that. Register the adapter under another."
                )
            if not self._free:
                names = ", ".join(sorted(self._loaded)) or "none"
                raise PreconditionError(
                    f"All {self.count} places for adapters are taken; loaded are {names}. Unload one, or wait until "
                    "the requests of one that was unloaded have ended."
                )
            slot = self._free.pop()
            try:
                rank = await in_busy_thread(self._read, path, slot)
            except (PippinError, OSError, UnicodeDecodeError) as error:
                self._free.append(slot)
                # Files are told by the adapter's name: a client learns no path of this machine.
                text = "its files cannot be read" if not isinstance(error, PippinError) else str(error)
                text = text.replace(str(self._directory.absolute()), "").lstrip("/")
                raise PreconditionError(f"The adapter {name} was not loaded: {text}") from error
            except BaseException:
                self._free.append(slot)
                raise
            self._loaded[name] = Loaded(Adapter(name, slot, next(self._numbers)), rank)
            _log.info("adapter %s is loaded: rank %d", name, rank)
            return self._loaded[name]

    async def unload(self, name: str) -> None:
        """Unloads an adapter: no request gets it from now on. Returns when none uses it any more.

        Raises:
            NotFoundError: it is not loaded.
        """
        loaded = self._loaded.pop(name, None)
        if loaded is None:
            raise NotFoundError(f"No adapter {name!r} is loaded.")
        _log.info("adapter %s is unloaded; %d requests use it still", name, loaded.num_requests)
        loaded.unused = asyncio.Event()
        self._free_if_unused(loaded)
        await loaded.unused.wait()

    @contextlib.asynccontextmanager
    async def kept_out(self) -> AsyncIterator[None]:
        """A time in which no adapter is loaded, or is on its way.

        Raises:
            PreconditionError: there is one.
        """
        async with self._loading:
            if len(self._free) < self.count:
                names = ", ".join(sorted(self._loaded)) or "none, and requests use one that was unloaded"
                raise PreconditionError(
                    f"Adapters fit the weights that are served now, and no others. Unload them first; loaded are: {names}."
                )
            yield

    def take(self, name: str) -> Loaded:
        """A loaded adapter, for a request, until it is given back.

        Raises:
            NotFoundError: it is not loaded.
        """
        loaded = self._loaded.get(name)
        if loaded is None:
            raise NotFoundError(
                f"no adapter {name[:128]!r} is loaded; loaded are: {', '.join(sorted(self._loaded)) or 'none'}."
            )
        loaded.num_requests += 1
        return loaded

    def give_back(self, loaded: Loaded) -> None:
        """A request that had taken an adapter has ended."""
        loaded.num_requests -= 1
        self._free_if_unused(loaded)

    def _free_if_unused(self, loaded: Loaded) -> None:
        if loaded.unused is not None and loaded.num_requests == 0:
            self._free.append(loaded.adapter.slot)
            loaded.unused.set()

    def _path(self, name: str) -> Path:
        path = self._directory.absolute() / name
        if not NAME.fullmatch(name) or path.is_symlink() or not path.is_dir():
            raise NotFoundError(f"No adapter is registered as {name[:128]!r}.")
        return path

    def _read(self, path: Path, slot: int) -> int:
        if any(file.is_symlink() for file in path.iterdir()):
            raise CheckpointError(f"{path} holds links. Copy the files into it.")
        adapter = stored.load_adapter(path)
        self._slots.put(slot, adapter)
        return adapter.rank
