"""The interfaces that components provide and slots take, and the structures that their methods speak in.

They are textprotos in `pippin.v1`, so that code in any language can read them. No JAX.
"""

from __future__ import annotations

import functools
from pathlib import Path

from google.protobuf import text_format

from pippin import v1
from pippin.core.errors import ConfigError
from pippin.core.registry import nearest
from pippin.v1 import interface_pb2 as pb


@functools.cache
def interface(name: str) -> pb.Interface:
    """The interface of a name. It is shared: do not change it.

    Raises:
        ConfigError: there is none.
    """
    path = _files("interfaces").get(name)
    if path is None:
        raise ConfigError(
            f"there is no interface {name!r}{nearest(name, interfaces())}. "
            f"Use one of {', '.join(interfaces())}, or describe a new one in {name}.textproto beside them."
        )
    return text_format.Parse(path.read_bytes(), pb.Interface())


def interfaces() -> list[str]:
    """The names of all interfaces."""
    return sorted(_files("interfaces"))


def structure(name: str) -> pb.Structure:
    """The structure of a name, such as `KeyValues`. It is shared: do not change it.

    Raises:
        ConfigError: there is none.
    """
    if name not in structures():
        known = list(structures())
        raise ConfigError(
            f"there is no structure {name!r}{nearest(name, known)}. Use one of {', '.join(known)}."
        )
    return structures()[name]


@functools.cache
def structures() -> dict[str, pb.Structure]:
    """All structures by name. They are shared: do not change them."""
    found = [
        text_format.Parse(p.read_bytes(), pb.Structure()) for _, p in sorted(_files("structures").items())
    ]
    return {s.name: s for s in found}


@functools.cache
def _files(folder: str) -> dict[str, Path]:
    # Beside the package's own file: importlib.resources takes longer to import than all of them to read.
    found = (Path(v1.__file__).parent / folder).glob("*.textproto")  # type: ignore[arg-type]
    return {path.stem: path for path in found}
