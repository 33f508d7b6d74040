"""A saved .aimodel as a language model, run by Apple's own runtime, which exists on Linux too.

Import it late: see `coreai_tools`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from pippin.core.errors import CheckpointError
from pippin.export.coreai_tools import AIModelAsset, NDArray
from pippin.export.program_sizes import FUNCTIONS, STATES

PRECISION = "computePrecision"  # by which the metadata of a program say what it computes in


class CoreAIModel:
    """The functions `prefill` and `decode` of a program over states of its own. Use it in a `with` block."""

    def __init__(self, path: str | Path):
        """
        Raises:
            CheckpointError: there is no such program, or it has other functions than those of an export.
        """
        path = Path(path).absolute()
        if not AIModelAsset.is_valid(path):
            raise CheckpointError(f"{path} is no .aimodel. Give one that //packages/export:coreai wrote.")
        self._loop = asyncio.new_event_loop()
        self._asset = AIModelAsset.load(path)
        metadata: Any = self._asset.metadata  # its stub lacks what is read
        self.precision: str = metadata.creator_defined_metadata.get(PRECISION, "float16")
        self._entered = self._asset.executable()

    def __enter__(self) -> CoreAIModel:  # noqa: PYI034  the checks of annotations in tests refuse Self
        model = self._loop.run_until_complete(self._entered.__aenter__())
        self._functions: dict[str, Any] = {name: model.load_function(name) for name in FUNCTIONS}
        desc = self._functions["prefill"].desc
        mask = desc.input_descriptor("causalMask").shape
        self.prefill_length, self.context_length = int(mask[2]), int(mask[3])
        self.vocab_size = int(desc.output_descriptor("logits").shape[-1])
        takes = "adapter" in desc.input_names
        self.adapter_length = int(desc.input_descriptor("adapter").shape[0]) if takes else 0
        self.use_adapter(None)
        self.reset()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        self._functions = {}
        self._loop.run_until_complete(self._entered.__aexit__(kind, error, at))
        self._loop.close()

    def reset(self) -> None:
        """Empties the caches."""
        desc = self._functions["decode"].desc
        shapes = {name: tuple(desc.state_descriptor(name).shape) for name in STATES}
        self._states = {name: NDArray(np.zeros(shape, np.float16)) for name, shape in shapes.items()}
        self._read = 0

    def use_adapter(self, adapter: np.ndarray | None) -> None:
        """From here on the program adds an adapter. The caches stay as they are.

        Args:
            adapter: its flat input, float16 [N]; None is none.

        Raises:
            CheckpointError: the program takes another.
        """
        if adapter is not None and adapter.shape != (self.adapter_length,):
            raise CheckpointError(
                f"the adapter has {list(adapter.shape)} numbers, and the program takes {self.adapter_length}. Export the "
                "program with --adapter-rank, and the adapter with the program."
            )
        flat = np.zeros(self.adapter_length, np.float16) if adapter is None else adapter
        self._adapter = {"adapter": NDArray(flat)} if self.adapter_length else {}

    def states(self) -> dict[str, np.ndarray]:
        """What the caches hold."""
        return {name: np.array(state.numpy()) for name, state in self._states.items()}

    def step(self, ids: list[int], position: int) -> np.ndarray:
        """The logits after each of some tokens, the first of which stands at a position: float16 [T, V].

        Args:
            ids: one, which `decode` reads, or up to `prefill_length`, which `prefill` reads behind padding.
            position: of the first.
        """
        name = "decode" if len(ids) == 1 else "prefill"
        length = 1 if name == "decode" else self.prefill_length
        seen = np.arange(self.context_length)[None, :] <= position + np.arange(length)[:, None]
        inputs = {
            "inputIds": np.array([[*ids, *[0] * (length - len(ids))]], np.int32),
            "position": np.array([position], np.int32),
            "causalMask": np.where(seen, 0, -np.inf).astype(np.float16)[None, None],
        }
        given = {key: NDArray(value) for key, value in inputs.items()} | self._adapter
        outputs = self._loop.run_until_complete(self._functions[name](given, self._states))
        return np.array(outputs["logits"].numpy())[0, : len(ids)]

    def extend(self, ids: Sequence[int]) -> np.ndarray:
        """The logits after each of the next tokens, float16 [T, V].

        Raises:
            CheckpointError: the caches cannot hold them.
        """
        logits = []
        for start in range(0, len(ids), self.prefill_length):
            part = list(ids[start : start + self.prefill_length])
            if self._read + len(part) > self.context_length:  # padding behind them is left out
                raise CheckpointError(
                    f"tokens {self._read} to {self._read + len(part) - 1} do not fit in caches of {self.context_length}. Take "
                    "fewer, or export the program with a larger --context."
                )
            logits.append(self.step(part, self._read))
            self._read += len(part)
        return np.concatenate(logits)

    def greedy(self, prompt: list[int], num_tokens: int) -> tuple[list[int], np.ndarray]:
        """The ids that follow a prompt, and the logits after each token of the prompt and of these but the last.

        The caches are emptied before.
        """
        self.reset()
        logits = [self.extend(prompt)]
        written = [int(logits[-1][-1].argmax())]
        while len(written) < num_tokens:
            logits.append(self.extend(written[-1:]))
            written.append(int(logits[-1][-1].argmax()))
        return written, np.concatenate(logits)
