"""Which pippin-serve this is."""

import importlib.metadata


def server_version() -> str:
    """As installed, or as run from a working tree."""
    try:
        return importlib.metadata.version("pippin-serve")
    except importlib.metadata.PackageNotFoundError:
        return "0+source"
