"""Saved programs for Core AI, run by Apple's runtime in tests."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from pippin.export.coreai_runtime import CoreAIModel


def run(
    path: Path, tokens: Sequence[int], *, prompt: int, adapter: np.ndarray | None = None
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """The logits after each token, of which `decode` reads those behind the prompt, and the states at the end."""
    with CoreAIModel(path) as program:
        program.use_adapter(adapter)
        logits = [program.extend(tokens[:prompt]), *(program.extend([token]) for token in tokens[prompt:])]
        return np.concatenate(logits).astype(np.float64), program.states()
