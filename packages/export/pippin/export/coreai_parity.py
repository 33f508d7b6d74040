"""A saved .aimodel, run by Apple's runtime, beside its model in JAX. Import it late: it takes JAX."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from pippin.core.bundle import Bundle
from pippin.export.coreai_runtime import CoreAIModel
from pippin.export.export_package import Measured
from pippin.export.jax_reference import JaxReference, stored_reference
from pippin.export.measure import prompt_and_steps
from pippin.export.program_sizes import Sizes
from pippin.export.verification import PUBLISHED_UNITS, bound
from pippin.v1 import export_pb2 as pb

_FEW = 2  # tokens that a program in float16 decodes
_PRODUCTS = 10**9  # that it computes in half a minute on a core


def measured(
    package: Path, model: Bundle, sizes: Sizes, steps: int, in_float32: Path | None = None
) -> list[Measured]:
    """How far a saved program is from its model: a prompt in two parts, and greedy decoding.

    Args:
        package: the program.
        model: whose weights it has.
        sizes: of the program.
        steps: to decode, fewer where the caches are small.
        in_float32: the same operations computed in float32, where those of the program are in float16, of which Linux
            computes so few a second that a prompt may take hours: these are run whole, and then a few steps of the
            program itself, and its `prefill` where that takes less than a minute.
    """
    prompt, steps = prompt_and_steps(model, sizes.prefill_length, sizes.context_length, steps)
    reference = stored_reference(model, len(prompt) + steps)
    if in_float32 is None:
        return [_measured(package, reference, prompt, steps, "coreai")]
    whole = _measured(in_float32, reference, prompt, steps, "coreai, in float32")
    # `decode` reads a prompt of one token, and `prefill` one of two, in as long as it takes for a whole part.
    products = 2 * sizes.prefill_length * sum(math.prod(tensor.shape) for tensor in model.weights.values())
    few = prompt[: 2 if products < _PRODUCTS else 1]
    return [whole, _measured(package, reference, few, min(steps, _FEW), "coreai, in float16")]


def _measured(
    package: Path, reference: JaxReference, prompt: Sequence[int], steps: int, runtime: str
) -> Measured:
    with CoreAIModel(package) as program:
        written, logits = program.greedy(list(prompt), steps + 1)
    want = reference.logits([*prompt, *written[:-1]])
    error = np.abs(want - logits)
    choices = want[len(prompt) - 1 : -1].argmax(axis=-1)
    parity = pb.ExportParity(
        max_logit_error=np.inf if np.isnan(error).any() else float(error.max()),
        tokens_equal=int((choices == written[:-1]).sum()),
        decode_steps=steps,
        runtime=runtime,
    )
    return Measured(parity, bound(float(np.abs(want).max()), PUBLISHED_UNITS))
