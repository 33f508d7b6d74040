"""What the command `verify` does. Import it late: it takes JAX."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import time
from collections.abc import Sequence
from pathlib import Path

from pippin.core.bundle import Bundle
from pippin.core.errors import CheckpointError, ConfigError, DataError
from pippin.export.adapter_files import adapter_path
from pippin.export.compress.text import evaluation_text
from pippin.export.display import Display
from pippin.export.golden import record, record_adapter
from pippin.export.jax_reference import adapted_reference, stored_reference
from pippin.export.mil.interpreter import Mode
from pippin.export.model_source import ModelSource, open_source
from pippin.export.output import Places, read_manifest
from pippin.export.package_runner import PackageRunner, Sizes
from pippin.export.program_sizes import prompt_length
from pippin.export.table import aligned
from pippin.export.verification import (
    Check,
    check_files,
    compare,
    comparison_checks,
    perplexities,
    prompt_ids,
    read_adapter,
)
from pippin.export.verify_target import OpenPackage
from pippin.layers.model_files import open_model
from pippin.layers.named_models import find_model
from pippin.v1 import export_pb2 as pb


@dataclasses.dataclass(frozen=True)
class Request:
    """What a user asks for."""

    package: Path
    model: str  # that was exported; of an export that compressed it, as it was before, or as it is beside the package
    float_model: str = ""  # that perplexity is held against; "": `model`
    steps: int = 32
    mode: str = "both"
    perplexity_tokens: int = 0
    text: Path | None = None
    record: bool = False
    adapter: Path | None = None


@dataclasses.dataclass(frozen=True)
class Report:
    """What came of it."""

    checks: tuple[Check, ...]
    parity: pb.ExportParity
    text: str

    @property
    def passed(self) -> bool:
        """All of it."""
        return all(check.passed for check in self.checks)


def verify_package(request: Request) -> Report:
    """Checks a package.

    Raises:
        DamageError: a file is absent, or not as it was written.
        PippinError: the package or the model cannot be opened, or do not belong together; what is asked for is not for
            packages of its kind.
    """
    began = time.monotonic()
    if request.steps < 1 or request.perplexity_tokens < 0:
        raise ConfigError(
            "the steps must be at least 1, and the tokens of --perplexity not negative. Give such numbers."
        )
    if request.adapter is not None and request.perplexity_tokens:
        raise ConfigError(
            "with --adapter there is no --perplexity, which is of the bare model. Leave it out."
        )
    if request.record and request.mode != "both":
        raise ConfigError(
            "--record writes what float16 measured, and vectors of the exact mode. Leave --mode out, or make it both."
        )
    if request.record and request.adapter is not None:
        _require_beside(request.adapter, request.package)
    modes = [mode for mode in Mode if request.mode in (mode.value, "both")]
    windows = -(-request.perplexity_tokens // 64)  # at most
    ways = 1 if request.package.suffix == ".aimodel" else len(modes)
    with_steps = ways * (request.steps + 2)
    with Display("verifying", 3 + with_steps + windows) as display, contextlib.ExitStack() as stack:
        display.step("hash the files")
        places = Places.of(request.package)
        if not places.package.is_dir():
            raise CheckpointError(
                f"{request.package} is no package: there is no such folder. Give an X.mlpackage or X.aimodel."
            )
        exported = read_manifest(places)
        checks = [check_files(places, exported)]
        display.step("open the model")
        source = exported_model(request.model, exported, places)
        display.step("open the package")
        package = stack.enter_context(_opened(request, exported.target, modes))
        checks += package.checks(exported)
        text = evaluation_text() if request.text is None else _read(request.text)
        wanted = (_prompt_length(package.sizes, request.steps), request.steps)
        length, steps = package.affordable(source.bundle, *wanted)
        if (length, steps) != wanted:
            checks.append(
                Check("tokens in float16, which is slow here", f"{length} read, {steps} decoded", "")
            )
            if request.perplexity_tokens:
                raise ConfigError(
                    "a program of this size in float16 takes hours here to measure perplexity. Leave --perplexity out, or export "
                    "with --precision float32."
                )
        prompt = prompt_ids(source.bundle, text, length)
        adapter, reference = None, stored_reference(source.bundle, length + steps)
        if request.adapter is not None:
            adapter = read_adapter(request.adapter, exported.adapter)
            reference = adapted_reference(source, adapter, exported.adapter, length + steps)
        comparisons, runner = [], None
        for way, units in package.ways.items():
            runner = package.runner(way, adapter)
            comparisons.append(
                compare(way, runner, reference, prompt, steps, units=units, progress=display.step)
            )
            checks += comparison_checks(comparisons[-1])
        parity = comparisons[0].parity(package.runtime)
        if request.perplexity_tokens:
            model = float_model(request, source, exported)
            ids = prompt_ids(model, text, request.perplexity_tokens + 1)
            make_runner = functools.partial(package.runner, next(iter(package.ways)))
            before, after = perplexities(make_runner, package.sizes, model, ids, display.step)
            checks += _perplexity_checks(before, after, request.perplexity_tokens, bool(model.quantized))
            parity.perplexity_after = after
            if not model.quantized:
                parity.perplexity_before = before
    report = Report(tuple(checks), parity, _text(places, checks, length, time.monotonic() - began))
    if request.record and report.passed:
        assert isinstance(runner, PackageRunner)  # or it would not be recorded
        if request.adapter is None:
            record(places, parity, runner, source.name)
        else:
            record_adapter(places, runner, request.adapter.stem)
    return report


def _require_beside(adapter: Path, package: Path) -> None:
    """Raises unless an adapter is one of a package: the check on a Mac looks for it there."""
    there = adapter_path(Places.of(package), adapter.stem)
    if adapter.resolve() != there.resolve():
        raise ConfigError(
            f"--record is for adapters beside the package, and {adapter} is not {there}. Put it there with "
            "//packages/export:adapter, or leave --record out."
        )


def exported_model(model: str, exported: pb.ExportManifest, places: Places) -> ModelSource:
    """The model whose weights a package holds.

    Args:
        model: that a user names: the model that was exported. Where the export compressed its weights, those lie beside
            the package, and either is the model that was exported.
        exported: the package's manifest.
        places: of the package.

    Raises:
        CheckpointError: there is no such model, or the package was made of another one.
    """
    path = find_model(model)
    source = open_source(path)
    if exported.source_signature and source.signature == exported.source_signature:
        path = places.compressed
        source = open_source(path)
    if source.signature != exported.model_signature:
        made_of = exported.source_signature or exported.model_signature
        raise CheckpointError(
            f"the package was made of the model with the signature {made_of[:12]}; {path} has {source.signature[:12]}. Give "
            "the model that was exported."
        )
    return source


def float_model(request: Request, source: ModelSource, exported: pb.ExportManifest) -> Bundle:
    """The model that perplexity is held against.

    Raises:
        CheckpointError: there is no such model, or the package's weights were compressed from another one.
    """
    path = find_model(request.float_model or request.model)
    if not request.float_model or not exported.source_signature:
        return open_model(path)
    found = open_source(path)
    if found.signature not in (exported.source_signature, source.signature):
        raise CheckpointError(
            f"the package's weights were compressed from the model with the signature {exported.source_signature[:12]}; "
            f"{path} has {found.signature[:12]}. Give the former as --float-model."
        )
    return found.bundle


def _opened(request: Request, target: str, modes: Sequence[Mode]) -> OpenPackage:
    if target == "coreml":
        from pippin.export.verify_coreml import CoreMLPackage

        return CoreMLPackage(request.package, modes)
    if target != "coreai":
        raise ConfigError(
            f"all files of {request.package} are as its manifest says; it is for {target}, and this command runs packages of "
            "Core ML and Core AI. Run it there."
        )
    if request.record or request.mode != "both":
        raise ConfigError(
            f"{request.package} is for Core AI, whose own runtime runs it as it is: --mode says how our interpreter computes, and "
            "--record writes vectors for a check of .mlpackages. Leave them out."
        )
    from pippin.export.verify_coreai import CoreAIPackage

    return CoreAIPackage(request.package)


def _prompt_length(size: Sizes, steps: int) -> int:
    if steps >= size.context - 1:
        raise ConfigError(
            f"{steps} steps do not fit behind a prompt in caches of {size.context} tokens. Give fewer --steps."
        )
    return prompt_length(size.prefill, size.context, steps)


def _perplexity_checks(before: float, after: float, tokens: int, compressed: bool) -> list[Check]:
    model = "the package's weights in JAX" if compressed else "the float model"
    return [
        Check(f"perplexity of {model}", f"{before:.4f}", f"over {tokens} tokens"),
        Check("perplexity of the package", f"{after:.4f} ({after / before - 1:+.2%})", ""),
    ]


def _text(places: Places, checks: list[Check], length: int, seconds: float) -> str:
    rows = [("check", "found", "must be", "")]
    rows += [(c.name, c.found, c.rule, "ok" if c.passed else "FAILED") for c in checks]
    failed = sum(not check.passed for check in checks)
    verdict = "all checks passed" if not failed else f"{failed} of {len(checks)} checks FAILED"
    return "\n".join(
        [
            *aligned(rows, words=range(len(rows[0]))),
            "",
            f"{places.package}: {verdict}; a prompt of {length} tokens, in {seconds:.0f} s",
        ]
    )


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise DataError(f"the text {path} cannot be read: {e}. Give a file of UTF-8 text.") from None
