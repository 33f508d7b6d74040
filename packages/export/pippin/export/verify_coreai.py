"""A saved .aimodel that is open to be verified: Apple's runtime runs it. Import it late: it takes JAX, and the runtime."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType

import numpy as np

from pippin.core.bundle import Bundle
from pippin.export.coreai_parity import FEW, prefill_is_quick
from pippin.export.coreai_runtime import CoreAIModel
from pippin.export.package_runner import Sizes
from pippin.export.verification import EXACT_UNITS, PUBLISHED_UNITS, Check, bytes_beside_claim, check_sizes
from pippin.export.verify_target import OpenPackage
from pippin.v1 import export_pb2 as pb


class CoreAIPackage(OpenPackage):
    """An .aimodel, by what it computes in."""

    runtime = "coreai"

    def __init__(self, path: Path):
        """
        Raises:
            CheckpointError: it is no .aimodel.
        """
        self._model = CoreAIModel(path)
        self._bytes = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
        self._rounds = self._model.precision != "float32"
        # Linux's kernels of float16 add up what they round: ten units of the last place in a tiny model.
        self.ways = {self._model.precision: PUBLISHED_UNITS if self._rounds else EXACT_UNITS}

    def __enter__(self) -> CoreAIPackage:  # noqa: PYI034  the checks of annotations in tests refuse Self
        model = self._model.__enter__()
        self.sizes = Sizes(model.context_length, model.prefill_length, model.vocab_size, model.adapter_length)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        self._model.__exit__(kind, error, at)

    def checks(self, exported: pb.ExportManifest) -> list[Check]:
        # Weights lie in the program, where the library writes floats of a program in float32 as float32.
        told = Check("bytes of the program", bytes_beside_claim(self._bytes, exported), "")
        return [check_sizes(self.sizes, exported), told]

    def runner(self, way: str, adapter: np.ndarray | None = None) -> CoreAIModel:
        self._model.reset()
        self._model.use_adapter(adapter)
        return self._model

    def affordable(self, model: Bundle, prompt: int, steps: int) -> tuple[int, int]:
        if not self._rounds or prefill_is_quick(model, self.sizes.prefill):
            return prompt, steps
        return 1, min(steps, FEW)
