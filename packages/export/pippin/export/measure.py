"""What an export comes to: perplexity with its weights, and its logits beside the model's. Import it late: it takes JAX."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from pippin.core.bundle import Bundle
from pippin.core.module import unflatten_params
from pippin.core.tokenizer import load_tokenizer
from pippin.export.compress.config import TextConfig
from pippin.export.compress.evaluate import Evaluator
from pippin.export.compress.text import batches, evaluation_text
from pippin.export.jax_reference import stored_reference
from pippin.export.mil.interpreter import Interpreter, Mode
from pippin.export.mil.spec import load_program
from pippin.export.model_source import ModelSource
from pippin.export.package_runner import PackageRunner, sizes
from pippin.export.program_sizes import prompt_length
from pippin.export.verification import PUBLISHED_UNITS, RUNTIME, Comparison, compare, prompt_ids


def perplexities(
    before: ModelSource,
    after: ModelSource,
    tokens: int,
    progress: Callable[[str, int, int], None] = lambda *_: None,
) -> tuple[float, float]:
    """The perplexity of a model as it was opened, and with the numbers that the export holds.

    Where it was opened compressed, there is no first: it is 0.

    Args:
        before: the model, which has a tokenizer.
        after: the same, compressed or not.
        tokens: of text, at most.
        progress: is told what is done, how far it is, and of how much.
    """
    assert before.tokenizer is not None
    text = TextConfig(tokens=tokens)
    evaluator = Evaluator(after.cfg, batches(text, evaluation_text(), load_tokenizer(before.tokenizer)))

    def measured(what: str, source: ModelSource, *, stored: bool) -> float:
        done = 0

        def advance() -> None:
            nonlocal done
            done += 1
            progress(f"perplexity {what}", done, len(evaluator))

        params = {name: _numbers(values, stored) for name, values in source.params.items()}
        return evaluator.perplexity(unflatten_params(params), advance)

    first = 0.0 if before.recipe else measured("before", before, stored=False)
    return first, measured("after", after, stored=True)


def parity(
    package: Path, model: Bundle, steps: int, progress: Callable[[str, int, int], None] = lambda *_: None
) -> tuple[dict[str, Comparison], PackageRunner]:
    """A saved package beside its model: a prompt in two parts, and greedy decoding, in each mode.

    Args:
        package: which is run by an interpreter that knows nothing of how it was written.
        model: whose weights it has.
        steps: to decode, half of what the caches hold at most.
        progress: is told what is done, how far it is, and of how much.

    Returns:
        The comparisons by the runtime, first the one that rounds as a device does, and what ran the program without rounding in between.
    """
    program = load_program(package)
    size = sizes(program)
    prompt = verified_prompt(model, size.prefill, size.context, steps)
    reference = stored_reference(model, len(prompt) + steps)
    done = 0

    def advance(what: str) -> None:
        nonlocal done
        done += 1
        progress("verify", done, 2 * (steps + 2))

    def run(mode: Mode) -> tuple[Comparison, PackageRunner]:
        runner = PackageRunner(Interpreter(program, mode))
        return compare(
            mode.value, runner, reference, prompt, steps, units=PUBLISHED_UNITS, progress=advance
        ), runner

    rounded = run(Mode.FLOAT16)[0]  # whose runner holds all weights as floats, and goes before the next comes
    exact, runner = run(Mode.EXACT)
    return {RUNTIME: rounded, f"{RUNTIME}, {Mode.EXACT.value}": exact}, runner


def verified_prompt(model: Bundle, prefill: int, context: int, steps: int) -> list[int]:
    """What a package reads to be verified: a prompt of `prompt_length` tokens.

    Args:
        model: with its tokenizer, where it has one.
        prefill: tokens of a prompt that are read at a time.
        context: tokens that the caches hold.
        steps: that are decoded.
    """
    return prompt_ids(model, evaluation_text(), prompt_length(prefill, context, steps))


def _numbers(values: object, stored: bool) -> np.ndarray:
    if isinstance(values, np.ndarray):
        return values.astype(np.float16) if stored else values
    return values.dequantized()  # type: ignore[attr-defined]
