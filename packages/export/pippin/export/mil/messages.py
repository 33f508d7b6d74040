"""The protobuf messages of the .mlmodel format, which coremltools carries, without the rest of coremltools.

Importing coremltools takes seconds (and all of TensorFlow, where that is installed); its generated messages need
protobuf alone. They are loaded here as a package of another name, from where coremltools is installed.
"""

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

from pippin.export.mil.errors import PackageError

_ALIAS = "_pippin_mlmodel_messages"


def model_messages() -> ModuleType:
    """The module with the message `Model`."""
    _package()
    return importlib.import_module(f"{_ALIAS}.Model_pb2")


def mil_messages() -> ModuleType:
    """The module with the messages of programs, `Program` and what is in it."""
    _package()
    return importlib.import_module(f"{_ALIAS}.MIL_pb2")


def _package() -> None:
    if _ALIAS in sys.modules:
        return
    found = importlib.util.find_spec("coremltools")
    if found is None or not found.origin:
        raise PackageError(
            "coremltools is not installed, whose messages describe .mlpackages. Install it: pip install coremltools."
        )
    package = ModuleType(_ALIAS)
    package.__path__ = [str(Path(found.origin).parent / "proto")]
    sys.modules[_ALIAS] = package
