"""A saved .aimodel, run by Apple's runtime, beside its model in JAX. Import it late: it takes JAX."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from pippin.core.bundle import Bundle
from pippin.export.coreai_runtime import CoreAIModel
from pippin.export.jax_reference import JaxReference, stored_reference
from pippin.export.measure import prompt_and_steps
from pippin.export.program_sizes import Sizes
from pippin.v1 import export_pb2 as pb

_FEW = 2  # tokens that a program in float16 decodes


def parities(
    package: Path, model: Bundle, sizes: Sizes, steps: int, in_float32: Path | None = None
) -> list[pb.ExportParity]:
    """How far a saved program is from its model: a prompt in two parts, and greedy decoding.

    Args:
        package: the program.
        model: whose weights it has.
        sizes: of the program.
        steps: to decode, fewer where the caches are small.
        in_float32: the same operations computed in float32, where those of the program are in float16, of which Linux
            computes so few a second that a prompt would take hours: these are run whole, and then a few steps of the
            program itself.
    """
    prompt, steps = prompt_and_steps(model, sizes.prefill_length, sizes.context_length, steps)
    reference = stored_reference(model, len(prompt) + steps)
    if in_float32 is None:
        return [_parity(package, reference, prompt, steps, "coreai")]
    whole = _parity(in_float32, reference, prompt, steps, "coreai, in float32")
    return [whole, _parity(package, reference, prompt[:1], min(steps, _FEW), "coreai")]


def _parity(
    package: Path, reference: JaxReference, prompt: Sequence[int], steps: int, runtime: str
) -> pb.ExportParity:
    with CoreAIModel(package) as program:
        written, logits = program.greedy(list(prompt), steps + 1)
    want = reference.logits([*prompt, *written[:-1]])
    error = np.abs(want - logits)
    choices = want[len(prompt) - 1 : -1].argmax(axis=-1)
    return pb.ExportParity(
        max_logit_error=np.inf if np.isnan(error).any() else float(error.max()),
        tokens_equal=int((choices == written[:-1]).sum()),
        decode_steps=steps,
        runtime=runtime,
    )
