"""How well a model predicts text with the weights that an export holds. Import it late: it takes JAX."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from pippin.core.module import unflatten_params
from pippin.core.tokenizer import load_tokenizer
from pippin.export.compress.config import TextConfig
from pippin.export.compress.evaluate import Evaluator
from pippin.export.compress.text import batches, evaluation_text
from pippin.export.model_source import ModelSource


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
    text = TextConfig(tokens=tokens, sequence_length=min(512, tokens))
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


def _numbers(values: object, stored: bool) -> np.ndarray:
    if isinstance(values, np.ndarray):
        return values.astype(np.float16) if stored else values
    return values.dequantized()  # type: ignore[attr-defined]
