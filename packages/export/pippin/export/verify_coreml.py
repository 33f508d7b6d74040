"""A saved .mlpackage that is open to be verified: an interpreter of ours runs it. Import it late: it takes JAX."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from pippin.export.mil.interpreter import Interpreter, Mode
from pippin.export.mil.spec import load_program
from pippin.export.package_runner import PackageRunner, sizes
from pippin.export.verification import (
    EXACT_UNITS,
    FLOAT16_UNITS,
    RUNTIME,
    Check,
    check_bytes,
    check_sizes,
    check_states,
)
from pippin.export.verify_target import OpenPackage
from pippin.v1 import export_pb2 as pb

_UNITS = {Mode.FLOAT16: FLOAT16_UNITS, Mode.EXACT: EXACT_UNITS}


class CoreMLPackage(OpenPackage):
    """An .mlpackage, by the modes of the interpreter."""

    runtime = RUNTIME

    def __init__(self, path: Path, modes: Sequence[Mode]):
        """
        Raises:
            PackageError: it cannot be read, or is of no language model.
        """
        self._program = load_program(path)
        self.sizes = sizes(self._program)
        self.ways = {mode.value: _UNITS[mode] for mode in modes}

    def checks(self, exported: pb.ExportManifest) -> list[Check]:
        return [
            check_sizes(self.sizes, exported),
            check_states(self._program),
            check_bytes(self._weight_bytes(), exported),
        ]

    def _weight_bytes(self) -> int:
        files = self._program.weight_files.values()
        for file in files:
            for _ in file.blobs():  # looks at each, and at how they fill the file
                pass
        return sum(map(len, files))

    def runner(self, way: str, adapter: np.ndarray | None = None) -> PackageRunner:
        return PackageRunner(Interpreter(self._program, Mode(way)), adapter)
