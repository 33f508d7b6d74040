"""What the command `verify` does. Import it late: it takes JAX."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path

from pippin.core.bundle import Bundle
from pippin.core.errors import CheckpointError, ConfigError, DataError
from pippin.export.adapter_files import adapter_path
from pippin.export.compress.text import evaluation_text
from pippin.export.display import Display
from pippin.export.golden import record, record_adapter
from pippin.export.jax_reference import adapted_reference, stored_reference
from pippin.export.mil.interpreter import Interpreter, Mode
from pippin.export.mil.program import Program
from pippin.export.mil.spec import load_program
from pippin.export.model_source import ModelSource, open_source
from pippin.export.output import Places, read_manifest
from pippin.export.package_runner import sizes
from pippin.export.program_sizes import prompt_length
from pippin.export.verification import (
    RUNTIME,
    Check,
    check_bytes,
    check_files,
    check_sizes,
    check_states,
    compare,
    comparison_checks,
    perplexities,
    prompt_ids,
    read_adapter,
)
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
        PippinError: the package or the model cannot be opened, or do not belong together; the package is none of Core ML's.
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
    with_steps = len(modes) * (request.steps + 2)
    with Display("verifying", 3 + with_steps + windows) as display:
        display.step("hash the files")
        places = Places.of(request.package)
        if not places.package.is_dir():
            raise CheckpointError(
                f"{request.package} is no package: there is no such folder. Give an X.mlpackage."
            )
        exported = read_manifest(places)
        if exported.target != "coreml":
            raise ConfigError(
                f"all files of {request.package} are as its manifest says; its program is for {exported.target}, and this "
                "command runs those of Core ML. //packages/export:coreai ran it when it wrote it: see `parity` in the manifest."
            )
        checks = [check_files(places, exported)]
        display.step("open the model")
        source = exported_model(request.model, exported, places)
        display.step("open the package")
        program = load_program(places.package)
        checks += [check_sizes(program, exported), check_states(program), check_bytes(program, exported)]
        text = evaluation_text() if request.text is None else _read(request.text)
        length = _prompt_length(program, request.steps)
        prompt = prompt_ids(source.bundle, text, length)
        adapter, reference = None, stored_reference(source.bundle, length + request.steps)
        if request.adapter is not None:
            adapter = read_adapter(request.adapter, exported.adapter)
            reference = adapted_reference(source, adapter, exported.adapter, length + request.steps)
        comparisons = []
        for mode in modes:
            interpreter = Interpreter(program, mode)
            comparisons.append(compare(interpreter, reference, prompt, request.steps, display.step, adapter))
            checks += comparison_checks(comparisons[-1])
        parity = pb.ExportParity(
            max_logit_error=comparisons[0].max_error,
            tokens_equal=comparisons[0].tokens_equal,
            decode_steps=request.steps,
            runtime=RUNTIME,
        )
        if request.perplexity_tokens:
            model = float_model(request, source, exported)
            ids = prompt_ids(model, text, request.perplexity_tokens + 1)
            before, after = perplexities(Interpreter(program, modes[0]), model, ids, display.step)
            checks += _perplexity_checks(before, after, request.perplexity_tokens, bool(model.quantized))
            parity.perplexity_after = after
            if not model.quantized:
                parity.perplexity_before = before
    report = Report(tuple(checks), parity, _text(places, checks, length, time.monotonic() - began))
    if request.record and report.passed:
        runner = comparisons[-1].runner
        if request.adapter is None:
            record(places, exported, parity, runner, source.name)
        else:
            record_adapter(places, exported, runner, request.adapter.stem)
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


def _prompt_length(program: Program, steps: int) -> int:
    size = sizes(program)
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
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
    failed = sum(not check.passed for check in checks)
    verdict = "all checks passed" if not failed else f"{failed} of {len(checks)} checks FAILED"
    return "\n".join(
        [*lines, "", f"{places.package}: {verdict}; a prompt of {length} tokens, in {seconds:.0f} s"]
    )


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise DataError(f"the text {path} cannot be read: {e}. Give a file of UTF-8 text.") from None
