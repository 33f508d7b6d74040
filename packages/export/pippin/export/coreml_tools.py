"""The names of coremltools that are used here. Nothing else imports it; import this module late, within functions.

Where TensorFlow, PyTorch or scikit-learn are installed, coremltools would import them too, which takes most of 20 s and
is of no use here: meanwhile they count as absent. Of its own runtime, which exists on macOS alone, nothing is said.
"""

from __future__ import annotations

import logging
import sys
from typing import Any

_NOT_NOW = ("tensorflow", "torch", "sklearn")

_there = {name: sys.modules[name] for name in _NOT_NOW if name in sys.modules}
_logger = logging.getLogger("coremltools")
_level = _logger.level
sys.modules.update(dict.fromkeys(_NOT_NOW))  # type: ignore[arg-type]  None: as if it were not installed
_logger.setLevel(logging.ERROR)
try:
    import coremltools as ct
    from coremltools.converters.mil import Builder as _Builder
    from coremltools.converters.mil import mil
    from coremltools.converters.mil.backend.mil.load import load as load_program
    from coremltools.converters.mil.mil import types
    from coremltools.converters.mil.mil.types.type_mapping import nptype_from_builtin, string_to_builtin
    from coremltools.proto import MIL_pb2, Model_pb2
finally:
    _logger.setLevel(_level)
    for _name in _NOT_NOW:
        del sys.modules[_name]
    sys.modules.update(_there)

Builder: Any = _Builder  # it gets its operations as they are declared, when it is imported

__all__ = [
    "Builder",
    "MIL_pb2",
    "Model_pb2",
    "ct",
    "load_program",
    "mil",
    "nptype_from_builtin",
    "string_to_builtin",
    "types",
]
