"""A model as an .mlpackage, with all that lies beside it. Import it late: see `coreml_tools`."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path

import numpy as np

from pippin.core import manifest
from pippin.core.bundle import load_bundle, save_bundle
from pippin.core.errors import CheckpointError, ConfigError
from pippin.core.module import unflatten_params
from pippin.export.adapter_files import write_adapters
from pippin.export.display import Display
from pippin.export.lower import Lowered, Sizes, lower
from pippin.export.lower_emitter import require_rules
from pippin.export.model_source import ModelSource, compressed, open_source
from pippin.export.output import TOKENIZER, Places, new_export, require_free, write_manifest, write_tokenizer
from pippin.export.package import user_metadata, write_package
from pippin.export.report import report_page
from pippin.export.summary import summary_text
from pippin.export.swift.swift_package import write_swift_package
from pippin.export.swift.swift_tokenizer import complete_tokenizer
from pippin.layers.named_models import find_model
from pippin.v1 import export_pb2 as pb

SUFFIX = ".mlpackage"
REPORT = "report.html"


@dataclasses.dataclass(frozen=True)
class Options(Sizes):
    """What to make of a model."""

    adapters: tuple[Path, ...] = ()  # directories of adapters that are written beside the package
    recipe: str = ""  # that weights are compressed by; "": they are stored as they are
    perplexity_tokens: int = 0  # of the text that perplexity is measured on; 0: it is not measured
    verify_steps: int = 0  # tokens that the package and the model decode side by side; 0: they do not

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.perplexity_tokens < 0 or self.verify_steps < 0:
            raise ConfigError(
                f"perplexity is to be measured on {self.perplexity_tokens} tokens, and {self.verify_steps} are to be decoded "
                "to verify; both must be 0, for not at all, or more."
            )

    @property
    def num_steps(self) -> int:
        """That a person sees go by."""
        return 5 + sum(map(bool, (self.recipe, self.perplexity_tokens, self.verify_steps)))


def export_coreml(model: str | Path, out: str | Path, options: Options) -> str:
    """Writes a model as a package, whole or not at all.

    Args:
        model: a path, or the name of a fetched model.
        out: where the package is to lie: X.mlpackage. What goes with it is written to the folder X.
        options: sizes, compression, adapters.

    Returns:
        What a person wants to know of it, as lines.

    Raises:
        ConfigError: sizes do not fit each other, or a component has no rule.
        CheckpointError: there is no model, an adapter fits another one, the package cannot be written, or it does not
            compute what the model does.
    """
    began = time.monotonic()
    require_free(out, SUFFIX)
    with Display("exporting", options.num_steps) as display:
        display.step("open the model")
        opened = open_source(find_model(model))
        require_rules(opened.cfg)
        source = opened
        if options.recipe:
            display.step("compress")
            source = compressed(opened, options.recipe, display.part)
        lowered = lower(
            source.cfg,
            source.params,
            options,
            base_signature=source.signature,
            progress=lambda name: display.step(f"write {name}"),
        )
        exported = _described(source, lowered, options)
        if options.recipe:
            exported.source_signature = opened.signature
        # With a recipe the weights lie in the package and in the bundle beside it.
        num_bytes = sum(w.bytes for w in exported.weights) * (2 if options.recipe else 1)
        with new_export(out, SUFFIX, num_bytes) as places:
            display.step("store the weights")
            write_package(places, lowered, user_metadata(exported, source.name), _one_line(source))
            write_tokenizer(source.tokenizer, places)
            complete_tokenizer(places.folder / TOKENIZER)
            if options.recipe:
                source = _kept(source, places)
            write_adapters(places, options.adapters, source.bundle, exported.adapter)
            write_swift_package(places, exported)
            _measure(opened, source, places, exported, options, display)
            (places.folder / REPORT).write_text(report_page(source.name, exported))
            display.step("hash the files")
            write_manifest(places, exported)
    return summary_text(exported, Places.of(out), str(model), time.monotonic() - began)


def _kept(source: ModelSource, places: Places) -> ModelSource:
    """The compressed model as a bundle beside the package: what adapters are trained on, and what verify reads."""
    bundle = save_bundle(
        places.compressed,
        source.cfg,
        unflatten_params(source.params),
        tokenizer=source.tokenizer,
        provenance=source.provenance,
        quantization_recipe=source.recipe,
    )
    return dataclasses.replace(source, bundle=load_bundle(bundle))


def _measure(
    opened: ModelSource,
    source: ModelSource,
    places: Places,
    exported: pb.ExportManifest,
    options: Options,
    display: Display,
) -> None:
    """Adds to the manifest what was asked to be measured. Of a model without a tokenizer there is no perplexity."""
    from pippin.export.measure import parity, perplexities  # it takes JAX

    found = exported.parity
    if options.perplexity_tokens and source.tokenizer is not None:
        display.step("measure perplexity")
        tokens = options.perplexity_tokens
        found.perplexity_before, found.perplexity_after = perplexities(opened, source, tokens, display.part)
    if options.verify_steps:
        display.step("verify")
        comparison = parity(places.package, source.bundle, options.verify_steps, display.part)
        found.max_logit_error = comparison.max_error
        found.tokens_equal, found.decode_steps = comparison.tokens_equal, comparison.steps
        found.runtime = "pippin.export.mil"
        # A rounding of the last bit may exchange two tokens that are as likely; half of them is another model.
        if not np.isfinite(comparison.max_error) or comparison.tokens_equal * 2 < comparison.steps:
            raise CheckpointError(
                f"the program of the package does not compute what {source.name} does: the largest error of a logit is "
                f"{comparison.max_error:.3g}, and {comparison.tokens_equal} of {comparison.steps} greedy tokens are equal. "
                "This is a defect of the export, of which nothing was kept: report it, with the model's config."
            )


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


def _one_line(source: ModelSource) -> str:
    count = sum(int(np.prod(values.shape)) for values in source.params.values())
    return f"{source.name}: a causal language model of {count / 1e6:,.1f} million parameters, by pippin."
