"""A model as an .mlpackage, with all that lies beside it. Import it late: see `coreml_tools`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from pippin.export.coreml_tools import ct
from pippin.export.export_package import Options, Target, export_package
from pippin.export.lower import Lowered, Sizes, lower
from pippin.export.lower_emitter import require_rules
from pippin.export.model_source import ModelSource
from pippin.export.output import Places
from pippin.export.package import write_package
from pippin.export.package_metadata import one_line, user_metadata
from pippin.export.swift.swift_package import write_swift_package
from pippin.layers.causal_lm_config import CausalLMConfig
from pippin.v1 import export_pb2 as pb

if TYPE_CHECKING:  # it takes JAX
    from pippin.export.verification import Comparison

_LIBRARY = {"com.github.apple.coremltools.version": ct.__version__}


def export_coreml(model: str | Path, out: str | Path, options: Options) -> str:
    """Writes a model as X.mlpackage, and what goes with it to the folder X: see `export_package`."""
    return export_package(_CoreML(), model, out, options)


class _CoreML(Target):
    """An .mlpackage, with sample code in Swift."""

    name, suffix = "coreml", ".mlpackage"

    def require_rules(self, cfg: CausalLMConfig) -> None:
        require_rules(cfg)

    def lower(self, source: ModelSource, sizes: Sizes, progress: Callable[[str], None]) -> Lowered:
        return lower(source.cfg, source.params, sizes, base_signature=source.signature, progress=progress)

    def write(
        self, places: Places, lowered: Lowered, exported: pb.ExportManifest, source: ModelSource
    ) -> None:
        metadata = user_metadata(exported, source.name) | _LIBRARY
        write_package(places, lowered, metadata, one_line(source))
        write_swift_package(places, exported)

    def measured(
        self, places: Places, source: ModelSource, options: Options, progress: Callable[[str, int, int], None]
    ) -> dict[str, Comparison]:
        from pippin.export.golden import write_golden
        from pippin.export.measure import parity  # it takes JAX

        found, runner = parity(places.package, source.bundle, options.verify_steps, progress)
        write_golden(places, runner)
        return found
