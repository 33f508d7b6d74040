"""The steps by which a model becomes a package with all that lies beside it, whichever runtime it is for."""

from __future__ import annotations

import abc
import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from pippin.core import manifest
from pippin.core.bundle import load_bundle, save_bundle
from pippin.core.errors import CheckpointError, ConfigError
from pippin.core.module import unflatten_params
from pippin.export.adapter_files import write_adapters
from pippin.export.adapter_layout import open_adapter
from pippin.export.compress.recipes import NO_RECIPE
from pippin.export.display import Display
from pippin.export.model_source import ModelSource, chosen_recipe, compressed, open_source
from pippin.export.output import (
    REPORT,
    TOKENIZER,
    Places,
    new_export,
    require_free,
    write_manifest,
    write_tokenizer,
)
from pippin.export.program_interface import Lowered
from pippin.export.program_sizes import Sizes
from pippin.export.report import report_page
from pippin.export.summary import summary_text
from pippin.export.swift.swift_tokenizer import complete_tokenizer
from pippin.layers.causal_lm_config import CausalLMConfig
from pippin.layers.named_models import find_model
from pippin.v1 import export_pb2 as pb

if TYPE_CHECKING:  # it takes JAX
    from pippin.export.verification import Comparison


@dataclasses.dataclass(frozen=True)
class Options(Sizes):
    """What to make of a model. Where there are adapters and no rank, there is room for the largest of them."""

    adapters: tuple[Path, ...] = ()  # directories of adapters that are written beside the package
    recipe: str | None = None  # that weights are compressed by, or NO_RECIPE; None: see `chosen_recipe`
    perplexity_tokens: int = 0  # of the text that perplexity is measured on; 0: it is not measured
    verify_steps: int = 0  # tokens that the package and the model decode side by side; 0: they do not

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.perplexity_tokens < 0 or self.verify_steps < 0:
            raise ConfigError(
                f"perplexity is to be measured on {self.perplexity_tokens} tokens, and {self.verify_steps} are to be decoded "
                "to verify; both must be 0, for not at all, or more."
            )

        if self.verify_steps > self.context_length // 2:
            raise ConfigError(
                f"{self.verify_steps} tokens are to be decoded to verify; in a context of {self.context_length} there is room "
                f"for {self.context_length // 2} behind a prompt. Verify with fewer, or make the context larger."
            )

    @property
    def num_steps(self) -> int:
        """That a person sees go by."""
        return 6 + sum(map(bool, (self.perplexity_tokens, self.verify_steps)))


class Target(abc.ABC):
    """A kind of package: what is done for it in its own way."""

    name: ClassVar[str]  # in the manifest
    suffix: ClassVar[str]  # of the package

    @abc.abstractmethod
    def require_rules(self, cfg: CausalLMConfig) -> None:
        """Raises ConfigError unless each component of a model has a rule."""

    @abc.abstractmethod
    def lower(self, source: ModelSource, sizes: Sizes, progress: Callable[[str], None]) -> Lowered:
        """The program of a model; `progress` is told which function is written."""

    @abc.abstractmethod
    def write(
        self, places: Places, lowered: Lowered, exported: pb.ExportManifest, source: ModelSource
    ) -> None:
        """Writes the package, and what lies beside packages of this kind alone. The tokenizer is there already."""

    def scratch_bytes(self, weight_bytes: int, options: Options) -> int:
        """What the disk holds for a while when the package is measured, of so many bytes of weights; at most."""
        return 0

    @abc.abstractmethod
    def measured(
        self, places: Places, source: ModelSource, options: Options, progress: Callable[[str, int, int], None]
    ) -> Mapping[str, Comparison]:
        """How far the saved package is from its model in JAX, by each runtime; the manifest has the first.

        What is worth keeping of it may be written beside the package.
        """


def export_package(target: Target, model: str | Path, out: str | Path, options: Options) -> str:
    """Writes a model as a package, whole or not at all.

    Args:
        target: the kind of package.
        model: a path, or the name of a fetched model.
        out: where the package is to lie: X with the suffix of its kind. What goes with it is written to the folder X.
        options: sizes, compression, adapters.

    Returns:
        What a person wants to know of it, as lines.

    Raises:
        ConfigError: sizes do not fit each other, a component has no rule, or there is no such recipe.
        DataError: the recipe measures the model on text, and the model has no tokenizer.
        CheckpointError: there is no model, an adapter fits another one, the package cannot be written, or it does not
            compute what the model does.
    """
    began = time.monotonic()
    require_free(out, target.suffix)
    rank = max((open_adapter(directory).rank for directory in options.adapters), default=0)
    options = dataclasses.replace(options, adapter_rank=options.adapter_rank or rank)
    with Display("exporting", options.num_steps) as display:
        display.step("open the model")
        opened = open_source(find_model(model))
        target.require_rules(opened.cfg)
        source, recipe = opened, chosen_recipe(options.recipe, opened)
        if recipe == NO_RECIPE:
            display.step("keep the weights as they are")
        else:
            display.step(f"compress the weights by {recipe}")
            _require_adapters_of_compressed(options.adapters, opened, recipe)
            source = compressed(opened, recipe, display.part)
        lowered = target.lower(source, options, lambda name: display.step(f"write {name}"))
        exported = _described(target, opened, source, lowered, options)
        # What was compressed lies in the package and in the bundle beside it.
        weight_bytes = sum(w.bytes for w in exported.weights)
        num_bytes = weight_bytes * (1 if source is opened else 2) + target.scratch_bytes(
            weight_bytes, options
        )
        with new_export(out, target.suffix, num_bytes) as places:
            display.step("store the weights")
            write_tokenizer(source.tokenizer, places)
            complete_tokenizer(places.folder / TOKENIZER)
            target.write(places, lowered, exported, source)
            if source is not opened:
                source = _kept(source, places)
            write_adapters(places, options.adapters, source.bundle, exported.adapter)
            _measure(target, opened, source, places, exported, options, display)
            (places.folder / REPORT).write_text(report_page(source.name, exported))
            display.step("hash the files")
            write_manifest(places, exported)
    return summary_text(exported, Places.of(out), str(model), time.monotonic() - began)


def _require_adapters_of_compressed(directories: Sequence[Path], opened: ModelSource, recipe: str) -> None:
    """Raises CheckpointError where an adapter was trained on the weights as they are before they are compressed."""
    for directory in directories:
        if open_adapter(directory).base_signature == opened.signature:
            raise CheckpointError(
                f"the adapter {directory} was trained on the weights of {opened.name} as they are, and the package would hold "
                f"them compressed by {recipe}. Keep them with --recipe {NO_RECIPE}, or compress them with "
                "//packages/export:compress, train the adapter on that, and export both."
            )


def _described(
    target: Target, opened: ModelSource, source: ModelSource, lowered: Lowered, sizes: Sizes
) -> pb.ExportManifest:
    count = sum(weight.count for weight in lowered.weights)
    return pb.ExportManifest(
        target=target.name,
        model_signature=source.signature,
        source_signature="" if source is opened else opened.signature,
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
    target: Target,
    opened: ModelSource,
    source: ModelSource,
    places: Places,
    exported: pb.ExportManifest,
    options: Options,
    display: Display,
) -> None:
    """Adds to the manifest what was asked to be measured. Of a model without a tokenizer there is no perplexity."""
    if options.perplexity_tokens and source.tokenizer is not None:
        from pippin.export.measure import perplexities  # it takes JAX

        display.step("measure perplexity")
        before, after = perplexities(opened, source, options.perplexity_tokens, display.part)
        exported.parity.perplexity_before, exported.parity.perplexity_after = before, after
    if options.verify_steps:
        display.step("verify")
        found = target.measured(places, source, options, display.part)
        for runtime, comparison in found.items():
            _require_same(source.name, runtime, comparison)
        exported.parity.MergeFrom(next(comparison.parity(runtime) for runtime, comparison in found.items()))


def _require_same(name: str, runtime: str, found: Comparison) -> None:
    # A rounding of the last bit may exchange two tokens that are as likely; half of them is another model.
    if not found.max_error < found.bound or found.tokens_equal * 2 < found.steps:
        raise CheckpointError(
            f"the program of the package does not compute what {name} does ({runtime}): the largest error of a logit is "
            f"{found.max_error:.3g}, which must be below {found.bound:.3g}, and {found.tokens_equal} of {found.steps} greedy "
            "tokens are equal. This is a defect of the export, of which nothing was kept: report it, with the model's config."
        )
