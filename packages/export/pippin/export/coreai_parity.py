"""A saved .aimodel, run by Apple's runtime, beside its model in JAX. Import it late: it takes JAX."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from pippin.core.bundle import Bundle
from pippin.export.coreai_runtime import CoreAIModel
from pippin.export.jax_reference import JaxReference, stored_reference
from pippin.export.measure import verified_prompt
from pippin.export.program_sizes import Sizes
from pippin.export.verification import PUBLISHED_UNITS, Comparison, compare

FEW = 2  # tokens that a program in float16 decodes
_PRODUCTS = 10**9  # that it computes in half a minute on a core


def measured(
    package: Path, model: Bundle, sizes: Sizes, steps: int, in_float32: Path | None = None
) -> dict[str, Comparison]:
    """How far a saved program is from its model, by what it computes in: a prompt in two parts, and greedy decoding.

    Args:
        package: the program.
        model: whose weights it has.
        sizes: of the program.
        steps: to decode, half of what the caches hold at most.
        in_float32: the same operations computed in float32, where those of the program are in float16, of which Linux
            computes so few a second that a prompt may take hours: these are run whole, and then a few steps of the
            program itself, and its `prefill` where that takes less than a minute.
    """
    prompt = verified_prompt(model, sizes.prefill_length, sizes.context_length, steps)
    reference = stored_reference(model, len(prompt) + steps)
    if in_float32 is None:
        return {"coreai": _compared(package, reference, prompt, steps)}
    # `decode` reads a prompt of one token, and `prefill` one of two, in as long as it takes for a whole part.
    few = prompt[: 2 if prefill_is_quick(model, sizes.prefill_length) else 1]
    return {
        "coreai, in float32": _compared(in_float32, reference, prompt, steps),
        "coreai, in float16": _compared(package, reference, few, min(steps, FEW)),
    }


def prefill_is_quick(model: Bundle, prefill_length: int) -> bool:
    """Whether Linux computes a part of a prompt in float16 in less than a minute."""
    weights = sum(math.prod(tensor.shape) for tensor in model.weights.values())
    return 2 * prefill_length * weights < _PRODUCTS


def _compared(package: Path, reference: JaxReference, prompt: Sequence[int], steps: int) -> Comparison:
    with CoreAIModel(package) as program:
        return compare("coreai", program, reference, prompt, steps, units=PUBLISHED_UNITS)
