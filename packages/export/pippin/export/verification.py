"""Whether a saved package computes what its model computes: the checks, and what each one found."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from pippin.core.bundle import Bundle
from pippin.core.errors import CheckpointError
from pippin.core.tokenizer import load_tokenizer
from pippin.export.adapter_layout import SIGNATURE_CHARS
from pippin.export.jax_reference import JaxReference, cross_entropies, float_reference
from pippin.export.mil.program import Program
from pippin.export.output import Places
from pippin.export.package_runner import Sizes
from pippin.v1 import export_pb2 as pb

RUNTIME = "pippin.export.mil"  # as manifests call who ran a package here

# Without rounding between operations there are left: angles and caches that are stored as float16, and a reference
# that sums in float32. On SmolLM2-135M that comes to 1.5e-2.
# That grows with the logits, as their own last place does.
BOUND = 2e-2
EXACT_UNITS = 1
# With it, the least that can be asked depends on how large logits are: float16 has 11 bits, and each of the results of
# some ten operations in each of many layers is off by up to half a unit of its last place. Of logits below 4, eight
# units are less than 2e-2.
FLOAT16_UNITS = 8
# What an export must be below to be published at all. Roundings may add up to more than verify allows, which then tells so; a
# wrong program is off by as much as logits are large, hundreds of units.
PUBLISHED_UNITS = 32
BYTES_SHARE = 0.01
# Constants that are no weights: tables of angles, zeros where a format wants a bias. More than 1% of tiny models.
SMALL_CONSTANTS = 1 << 18


@dataclasses.dataclass(frozen=True)
class Check:
    """Something that was looked at."""

    name: str
    found: str
    rule: str  # what it must be; "" where it is only told
    passed: bool = True


class Runner(Protocol):
    """Whoever runs a package: a text that grows."""

    def extend(self, ids: Sequence[int]) -> np.ndarray:
        """The logits after each of the next tokens, [T, V]."""
        ...


@dataclasses.dataclass(frozen=True)
class Comparison:
    """A package beside its model: a prompt, and the tokens that it goes on with."""

    name: str  # of the way that it was run
    units: int  # of the last place of float16 that an error must be below
    max_error: float
    max_logit: float  # the largest magnitude in the model
    tokens_equal: int
    steps: int
    difference: str  # of the first token that differs; "" where all are equal

    @property
    def bound(self) -> float:
        """What the error must be below."""
        return bound(self.max_logit, self.units)

    def parity(self, runtime: str) -> pb.ExportParity:
        """The same as a manifest says it, of whoever ran the package."""
        return pb.ExportParity(
            max_logit_error=self.max_error,
            tokens_equal=self.tokens_equal,
            decode_steps=self.steps,
            runtime=runtime,
        )


def bound(max_logit: float, units: int = FLOAT16_UNITS) -> float:
    """What the error of a logit must be below where the largest is `max_logit`: so many units of the last place of float16."""
    return max(BOUND, units * float(np.spacing(np.float16(max_logit))))


def check_files(places: Places, exported: pb.ExportManifest) -> Check:
    """That the package has the files that the manifest lists, and no others. Their digests have been compared."""
    root = places.package.parent
    listed = {f.path for f in exported.files}
    there = {p.relative_to(root).as_posix() for p in places.package.rglob("*") if p.is_file()}
    extra = sorted(there - listed)
    found = f"{len(listed)} as the manifest says" if not extra else f"not in the manifest: {', '.join(extra)}"
    return Check("files and their SHA-256", found, "all", not extra)


def check_sizes(got: Sizes, exported: pb.ExportManifest) -> Check:
    """That a program takes what the manifest says."""
    told = (exported.context_length, exported.prefill_length, exported.adapter.length)
    found = f"context {got.context}, prefill {got.prefill}, adapter {got.adapter}"
    right = (got.context, got.prefill, got.adapter) == told
    return Check("sizes of the functions", found, "as the manifest says", right)


def check_states(program: Program) -> Check:
    """That every function reads each state once, and writes it once: devices break where it is otherwise."""
    wrong = []
    for function in program.functions.values():
        for name in function.states:
            uses = [o.type for o in function.operations if (name,) in o.inputs.values()]
            reads = uses.count("read_state")
            # An update gives the new value too, which coremltools writes as a write and a read.
            writes = uses.count("write_state") + uses.count("coreml_update_state")
            if (writes, min(reads, 1)) != (1, 1) or reads > 2:
                wrong.append(f"{function.name}: {name} read {reads} times, written {writes}")
    return Check("states", "; ".join(wrong) or "read and written as a whole", "each written once", not wrong)


def check_bytes(num_bytes: int, exported: pb.ExportManifest) -> Check:
    """That files of weights are as large as the weights that the manifest claims."""
    claimed = _claimed(exported)
    right = abs(num_bytes - claimed) <= max(BYTES_SHARE * claimed, SMALL_CONSTANTS)
    found = bytes_beside_claim(num_bytes, exported)
    rule = f"within {BYTES_SHARE:.0%} or {SMALL_CONSTANTS >> 10} KiB"
    return Check("bytes of weight files", found, rule, right)


def bytes_beside_claim(num_bytes: int, exported: pb.ExportManifest) -> str:
    """Bytes of what holds the weights, and of those that the manifest claims."""
    claimed = _claimed(exported)
    return f"{num_bytes:,} for {claimed:,} of weights ({num_bytes / claimed - 1:+.2%})"


def _claimed(exported: pb.ExportManifest) -> int:
    return sum(weight.bytes for weight in exported.weights)


def read_adapter(path: Path, layout: pb.AdapterLayout) -> np.ndarray:
    """The flat input in the file of an adapter, float16.

    Raises:
        CheckpointError: there is none, it is for another model, or the package takes none.
    """
    try:
        data = path.read_bytes()
    except OSError as e:
        raise CheckpointError(
            f"the adapter {path} cannot be read: {e.strerror}. Give a file of X/adapters."
        ) from None
    expected = SIGNATURE_CHARS + 2 * layout.length
    if len(data) != expected or not layout.length:
        raise CheckpointError(
            f"the adapter {path} has {len(data)} bytes; this package takes {expected if layout.length else 'none'}. Give an "
            "adapter that was exported with it, with --adapter."
        )
    base = data[:SIGNATURE_CHARS].decode("ascii", "replace")
    if base != layout.base_signature:
        raise CheckpointError(
            f"the adapter {path} is for the model with the signature {base[:12]}; this package holds "
            f"{layout.base_signature[:12]}. An adapter fits the weights that it was trained on, and no others."
        )
    return np.frombuffer(data, "<f2", offset=SIGNATURE_CHARS)


def prompt_ids(bundle: Bundle, text: str, count: int) -> list[int]:
    """Ids to verify with: the start of a text, or, of a model without a tokenizer, some that are drawn."""
    if bundle.tokenizer is None:
        vocab = bundle.component.vocab_size  # type: ignore[attr-defined]
        return np.random.default_rng(0).integers(0, vocab, count).tolist()
    tokenizer = load_tokenizer(bundle.tokenizer)
    ids = [*tokenizer.start_ids, *tokenizer.encode(text[: 64 * count])][:count]
    if len(ids) < count:
        raise CheckpointError(f"the text has {len(ids)} tokens; {count} are needed. Give a longer one.")
    return ids


def compare(
    name: str,
    runner: Runner,
    reference: JaxReference,
    prompt: Sequence[int],
    steps: int,
    *,
    units: int,
    progress: Callable[[str], None] = lambda _: None,
) -> Comparison:
    """Reads a prompt and decodes greedily, and holds all logits against those of the model in JAX.

    The model sees the tokens that the package chose: where its own choice is another, the two have parted.

    Args:
        name: of the way that the package is run.
        runner: of the package, which has read nothing.
        reference: the model.
        prompt: ids.
        steps: to decode.
        units: of the last place of float16 that an error must be below.
        progress: is told what is done.
    """
    progress(f"{name}: read the prompt")
    logits = [runner.extend(prompt)]
    chosen: list[int] = []
    for step in range(steps):
        progress(f"{name}: decode step {step + 1}")
        chosen.append(int(logits[-1][-1].argmax()))
        logits.append(runner.extend(chosen[-1:]))
    progress("compute the model in JAX")
    want = reference.logits([*prompt, *chosen])
    error = np.abs(np.concatenate(logits).astype(np.float64) - want)
    choices = want[len(prompt) - 1 : -1].argmax(axis=-1)
    return Comparison(
        name=name,
        units=units,
        max_error=math.inf if np.isnan(error).any() else float(error.max()),
        max_logit=float(np.abs(want).max()),
        tokens_equal=int((choices == chosen).sum()),
        steps=steps,
        difference=_difference(choices, chosen, want[len(prompt) - 1 :]),
    )


def _difference(choices: np.ndarray, chosen: Sequence[int], logits: np.ndarray) -> str:
    for step, (ours, theirs) in enumerate(zip(choices, chosen, strict=True)):
        if ours != theirs:
            gap = logits[step, ours] - logits[step, theirs]
            return f"; the first that differs is {step + 1}: {theirs}, not {ours}, whose logit is {gap:.4f} above it"
    return ""


def comparison_checks(comparison: Comparison) -> list[Check]:
    """What a comparison must have come to. Where errors may be that large, two tokens that are nearly as likely may be exchanged."""
    every = comparison.units <= FLOAT16_UNITS
    least = comparison.steps if every else comparison.steps / 2
    equal = f"{comparison.tokens_equal} of {comparison.steps}{comparison.difference}"
    error = f"{comparison.max_error:.2e} (logits up to {comparison.max_logit:.1f})"
    right = comparison.max_error < comparison.bound
    return [
        Check(f"{comparison.name}: largest error of a logit", error, f"below {comparison.bound:.3g}", right),
        Check(
            f"{comparison.name}: greedy tokens",
            equal,
            "all" if every else "half",
            comparison.tokens_equal >= least,
        ),
    ]


def perplexities(
    make_runner: Callable[[], Runner],
    size: Sizes,
    model: Bundle,
    ids: Sequence[int],
    progress: Callable[[str], None] = lambda _: None,
) -> tuple[float, float]:
    """Of a model in floats, and of the package, over a text.

    The text is read in windows of whole parts of a prompt, as many as the caches hold, each by a runner of its own.
    """
    window = size.context // size.prefill * size.prefill
    reference = float_reference(model, min(window, len(ids)))
    losses: list[list[np.ndarray]] = [[], []]
    for at in range(0, len(ids) - 1, window):
        part = list(ids[at : at + window])
        targets = np.array(ids[at + 1 : at + window + 1])
        progress(f"read tokens {at} to {at + len(part) - 1}")
        for which, logits in enumerate((reference.logits(part), make_runner().extend(part))):
            losses[which].append(cross_entropies(logits[: len(targets)], targets))
    before, after = (math.exp(float(np.concatenate(each).mean())) for each in losses)
    return before, after
