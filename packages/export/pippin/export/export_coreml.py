"""A model as an .mlpackage, with all that lies beside it. Import it late: see `coreml_tools`."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from pippin.core import manifest
from pippin.core.adapter import load_adapter
from pippin.core.module import unflatten_params
from pippin.export.adapter_layout import packed_adapter
from pippin.export.display import Display
from pippin.export.lower import Lowered, Sizes, lower
from pippin.export.model_source import ModelSource, open_source
from pippin.export.output import Places, new_export, write_manifest, write_tokenizer
from pippin.export.package import user_metadata, write_package
from pippin.export.report import report_page
from pippin.export.summary import summary_text
from pippin.layers.adapter import unrolled_maps
from pippin.layers.named_models import find_model
from pippin.v1 import export_pb2 as pb

SUFFIX = ".mlpackage"
ADAPTERS = "adapters"
REPORT = "report.html"

_STEPS = ("open the model", "write prefill", "write decode", "store the weights", "hash the files")


@dataclasses.dataclass(frozen=True)
class Options(Sizes):
    """What to make of a model."""

    adapters: tuple[Path, ...] = ()  # directories of adapters that are written beside the package


def export_coreml(model: str | Path, out: str | Path, options: Options) -> str:
    """Writes a model as a package, whole or not at all.

    Args:
        model: a path, or the name of a fetched model.
        out: where the package is to lie: X.mlpackage. What goes with it is written to the folder X.
        options: sizes and adapters.

    Returns:
        What a person wants to know of it, as lines.

    Raises:
        ConfigError: sizes do not fit each other, or a component has no rule.
        CheckpointError: there is no model, an adapter fits another one, or the package cannot be written.
    """
    began = time.monotonic()
    with Display("exporting", len(_STEPS)) as display:
        display.step(_STEPS[0])
        source = open_source(find_model(model))
        lowered = lower(
            source.cfg,
            source.params,
            options,
            base_signature=source.signature,
            progress=lambda name: display.step(f"write {name}"),
        )
        exported = _described(source, lowered, options)
        with new_export(out, SUFFIX, sum(w.bytes for w in exported.weights)) as places:
            display.step(_STEPS[3])
            write_package(places, lowered, user_metadata(exported, source.name), _one_line(source))
            write_tokenizer(source.tokenizer, places)
            _write_adapters(places, options.adapters, source, exported)
            (places.folder / REPORT).write_text(report_page(source.name, exported))
            display.step(_STEPS[4])
            write_manifest(places, exported)
    return summary_text(exported, Places.of(out), time.monotonic() - began)


def _described(source: ModelSource, lowered: Lowered, sizes: Sizes) -> pb.ExportManifest:
    count = sum(weight.count for weight in lowered.weights)
    return pb.ExportManifest(
        target="coreml",
        model_signature=source.signature,
        context_length=sizes.context_length,
        prefill_length=sizes.prefill_length,
        functions=lowered.functions,
        weights=lowered.weights,
        bits_per_weight=8 * sum(weight.bytes for weight in lowered.weights) / count,
        adapter=lowered.adapter,
        recipe=source.recipe,
        provenance=manifest.provenance(
            recipe=source.provenance.recipe, step=source.provenance.step, source=source.name
        ),
    )


def _write_adapters(
    places: Places, directories: Sequence[Path], source: ModelSource, exported: pb.ExportManifest
) -> None:
    """Writes adapters as the program takes them: NAME.bin, float16 in the order of the manifest's layout."""
    for directory in directories:
        adapter = load_adapter(directory)
        maps = unrolled_maps(source.bundle.component, unflatten_params(source.bundle.weights), adapter.maps())
        flat = packed_adapter(adapter, maps, exported.adapter)
        folder = places.folder / ADAPTERS
        folder.mkdir(exist_ok=True)
        manifest.write_file(folder / f"{adapter.directory.name}.bin", flat.tobytes())


def _one_line(source: ModelSource) -> str:
    count = sum(int(np.prod(values.shape)) for values in source.params.values())
    return f"{source.name}: a causal language model of {count / 1e6:,.1f} million parameters, by pippin."
