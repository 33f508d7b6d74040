"""A model as an .aimodel, with all that lies beside it. Import it late: see `coreai_tools`."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from pippin.core import manifest
from pippin.core.bundle import Bundle
from pippin.core.errors import ConfigError
from pippin.core.quantized_array import Palettized, QuantizedArray, Scaled
from pippin.core.stored_tensor import StoredTensor
from pippin.core.tokenizer import load_tokenizer
from pippin.export.coreai_emitter import require_rules
from pippin.export.coreai_runtime import CoreAIModel
from pippin.export.coreai_tools import AIModelAssetMetadata
from pippin.export.display import Display
from pippin.export.lower_coreai import LoweredCoreAI, lower_coreai
from pippin.export.model_source import ModelSource, compressed, open_source
from pippin.export.output import (
    Places,
    library_writes,
    new_export,
    require_free,
    write_manifest,
    write_tokenizer,
)
from pippin.export.program_sizes import Sizes
from pippin.export.summary import tables
from pippin.layers.named_models import find_model
from pippin.v1 import export_pb2 as pb

SUFFIX = ".aimodel"
PRECISIONS = {"float16": np.float16, "float32": np.float32}

_PROMPT = "The quick brown fox jumps over the lazy dog. An apple tree grows from a seed, and it takes years"


@dataclasses.dataclass(frozen=True)
class Options(Sizes):
    """What to make of a model."""

    precision: str = "float16"  # that is computed in; weights, states and logits are float16 either way
    recipe: str = ""  # that weights are compressed by; "": they are stored as they are
    check_steps: int = (
        0  # greedy tokens that the saved program is held against the model with; 0: it is not run
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.check_steps < 0:
            raise ConfigError(
                f"--check {self.check_steps}: the steps must not be negative. Give 0 for no check."
            )

    @property
    def num_steps(self) -> int:
        """That a person sees go by."""
        return 5 + bool(self.recipe) + bool(self.check_steps)


def export_coreai(model: str | Path, out: str | Path, options: Options) -> str:
    """Writes a model as a program for Core AI, whole or not at all.

    Args:
        model: a path, or the name of a fetched model.
        out: where the program is to lie: X.aimodel. What goes with it is written to the folder X.
        options: sizes, precision, compression.

    Returns:
        What a person wants to know of it, as lines.

    Raises:
        ConfigError: sizes do not fit each other, or a component has no rule.
        CheckpointError: there is no model, or the program cannot be written.
    """
    began = time.monotonic()
    require_free(out, SUFFIX)
    if options.precision not in PRECISIONS:
        raise ConfigError(
            f"there is no precision {options.precision!r}. Choose one of {', '.join(PRECISIONS)}."
        )
    with Display("exporting", options.num_steps) as display:
        display.step("open the model")
        source = open_source(find_model(model))
        require_rules(source.cfg)
        if options.recipe:
            display.step("compress")
            source = compressed(source, options.recipe, display.part)
        lowered = lower_coreai(
            source.cfg,
            source.params,
            options,
            dtype=PRECISIONS[options.precision],
            progress=lambda name: display.step(f"write {name}"),
        )
        exported = _described(source, lowered, options)
        with new_export(out, SUFFIX, sum(w.bytes for w in exported.weights)) as places:
            display.step("store the weights")
            with library_writes(places.package):
                lowered.program.save_asset(
                    places.package, AIModelAssetMetadata(description=_one_line(source))
                )
            write_tokenizer(source.tokenizer, places)
            if options.check_steps:
                display.step("run it, and the model in JAX")
                exported.parity.CopyFrom(parity(places.package, source, options.check_steps))
            display.step("hash the files")
            write_manifest(places, exported)
    return _summary(exported, Places.of(out), time.monotonic() - began)


def parity(package: Path, source: ModelSource, steps: int) -> pb.ExportParity:
    """How far a saved program, run by Apple's runtime, is from its model in JAX: prefill and greedy decoding."""
    from pippin.export.jax_reference import stored_reference

    prompt = _prompt(source)
    with CoreAIModel(package) as program:
        steps = min(steps, program.context_length - len(prompt))
        written, logits = program.greedy(prompt, steps)
    reference = stored_reference(_floats(source), len(prompt) + steps)
    expected = reference.logits([*prompt, *written[:-1]])
    choices = expected[len(prompt) - 1 :].argmax(-1)
    return pb.ExportParity(
        max_logit_error=float(np.abs(expected - logits).max()),
        tokens_equal=int((choices == written).sum()),
        decode_steps=steps,
        runtime="coreai",
    )


def _summary(exported: pb.ExportManifest, places: Places, seconds: float) -> str:
    size = sum(f.bytes for f in exported.files if f.path.startswith(f"{places.package.name}/"))
    what = (
        f"{size / 1e6:,.1f} MB, a context of {exported.context_length} tokens, {exported.prefill_length} of a prompt at a "
        f"time; written in {seconds:.0f} s"
    )
    return "\n".join(
        [
            *tables(exported),
            f"{places.package}: {what}",
            f"{places.folder}: the manifest and the tokenizer",
        ]
    )


def _prompt(source: ModelSource) -> list[int]:
    if source.tokenizer is None:
        return np.random.default_rng(0).integers(0, source.cfg.vocab_size, 24).tolist()
    tokenizer = load_tokenizer(source.tokenizer)
    return [*tokenizer.start_ids, *tokenizer.encode(_PROMPT)][:24]


def _floats(source: ModelSource) -> Bundle:
    """The model that was exported, compressed weights as the floats that they stand for."""

    def tensor(values: np.ndarray | QuantizedArray) -> StoredTensor:
        if isinstance(values, Palettized | Scaled):
            return StoredTensor(values.shape, np.dtype(np.float32), values.dequantized)
        return StoredTensor(values.shape, values.dtype, functools.partial(np.asarray, values))

    weights: Mapping[str, StoredTensor] = {name: tensor(values) for name, values in source.params.items()}
    return dataclasses.replace(source.bundle, component=source.cfg, weights=weights)


def _described(source: ModelSource, lowered: LoweredCoreAI, sizes: Sizes) -> pb.ExportManifest:
    count = sum(weight.count for weight in lowered.weights)
    return pb.ExportManifest(
        target="coreai",
        model_signature=source.signature,
        context_length=sizes.context_length,
        prefill_length=sizes.prefill_length,
        functions=lowered.functions,
        weights=lowered.weights,
        bits_per_weight=8 * sum(weight.bytes for weight in lowered.weights) / count,
        recipe=source.recipe,
        provenance=manifest.provenance(
            recipe=source.provenance.recipe, step=source.provenance.step, source=source.name
        ),
    )


def _one_line(source: ModelSource) -> str:
    count = sum(int(np.prod(values.shape)) for values in source.params.values())
    return f"{source.name}: a causal language model of {count / 1e6:,.1f} million parameters, by pippin."
