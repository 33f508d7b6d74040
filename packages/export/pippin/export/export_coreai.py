"""A model as an .aimodel, with all that lies beside it. Import it late: see `coreai_tools`."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pippin.core.errors import ConfigError
from pippin.export.coreai_emitter import require_rules
from pippin.export.coreai_runtime import PRECISION
from pippin.export.coreai_tools import AIModelAssetMetadata
from pippin.export.export_package import Options, Target, export_package
from pippin.export.lower_coreai import lower_coreai
from pippin.export.model_source import ModelSource
from pippin.export.output import Places, library_writes
from pippin.export.package_metadata import one_line, user_metadata
from pippin.export.program_interface import Lowered
from pippin.export.program_sizes import Sizes
from pippin.layers.causal_lm_config import CausalLMConfig
from pippin.v1 import export_pb2 as pb

if TYPE_CHECKING:  # it takes JAX
    from pippin.export.verification import Comparison

PRECISIONS = {"float16": np.float16, "float32": np.float32}


@dataclasses.dataclass(frozen=True)
class CoreAIOptions(Options):
    """What to make of a model."""

    precision: str = (
        "float16"  # that is computed in; weights, states and logits are numbers of float16 either way
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.precision not in PRECISIONS:
            raise ConfigError(
                f"there is no precision {self.precision!r}. Choose one of {', '.join(PRECISIONS)}."
            )


def export_coreai(model: str | Path, out: str | Path, options: CoreAIOptions) -> str:
    """Writes a model as X.aimodel, and what goes with it to the folder X: see `export_package`."""
    return export_package(_CoreAI(PRECISIONS[options.precision]), model, out, options)


class _CoreAI(Target):
    """An .aimodel, which Apple's own runtime runs here too."""

    name, suffix = "coreai", ".aimodel"

    def __init__(self, dtype: type):
        self._dtype = dtype

    def require_rules(self, cfg: CausalLMConfig) -> None:
        require_rules(cfg)

    def lower(self, source: ModelSource, sizes: Sizes, progress: Callable[[str], None]) -> Lowered:
        return _lower(source, sizes, self._dtype, progress)

    def write(
        self, places: Places, lowered: Lowered, exported: pb.ExportManifest, source: ModelSource
    ) -> None:
        metadata = AIModelAssetMetadata()
        metadata.model_description = one_line(source)
        for key, value in user_metadata(exported, source.name).items():
            metadata.set_custom(key, value)
        metadata.set_custom(PRECISION, np.dtype(self._dtype).name)
        with library_writes(places.package):
            lowered.program.save_asset(places.package, metadata)

    def scratch_bytes(self, weight_bytes: int, options: Options) -> int:
        return 2 * weight_bytes if options.verify_steps and self._dtype is np.float16 else 0

    def measured(
        self, places: Places, source: ModelSource, options: Options, progress: Callable[[str, int, int], None]
    ) -> dict[str, Comparison]:
        from pippin.export.coreai_parity import measured  # it takes JAX

        if self._dtype is np.float32:
            return measured(places.package, source.bundle, options, options.verify_steps)
        with tempfile.TemporaryDirectory(dir=places.package.parent) as folder:
            in_float32 = Path(folder) / places.package.name
            progress("the same in float32", 1, 2)
            lowered = _lower(source, options, np.float32)
            with library_writes(in_float32):
                lowered.program.save_asset(in_float32)
            progress("run", 2, 2)
            return measured(places.package, source.bundle, options, options.verify_steps, in_float32)


def _lower(
    source: ModelSource, sizes: Sizes, dtype: type, progress: Callable[[str], None] = lambda _: None
) -> Lowered:
    return lower_coreai(
        source.cfg, source.params, sizes, dtype=dtype, base_signature=source.signature, progress=progress
    )
