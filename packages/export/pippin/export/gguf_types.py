"""The types that tensors of a GGUF file have, and which tensor gets which, as llama.cpp's own tools choose them."""

from __future__ import annotations

import dataclasses
import math

import gguf
import numpy as np

from pippin.core.errors import CheckpointError, ConfigError

# The type of a file -> its number in the file. Those that the library quantises to.
_FILE_TYPES = {
    "F32": gguf.LlamaFileType.ALL_F32,
    "F16": gguf.LlamaFileType.MOSTLY_F16,
    "BF16": gguf.LlamaFileType.MOSTLY_BF16,
    "Q8_0": gguf.LlamaFileType.MOSTLY_Q8_0,
    "Q5_1": gguf.LlamaFileType.MOSTLY_Q5_1,
    "Q5_0": gguf.LlamaFileType.MOSTLY_Q5_0,
    "Q4_1": gguf.LlamaFileType.MOSTLY_Q4_1,
    "Q4_0": gguf.LlamaFileType.MOSTLY_Q4_0,
}
TYPES = tuple(_FILE_TYPES)

_FLOATS = ("F32", "F16", "BF16")
_BITS = {"F32": 32, "F16": 16, "BF16": 16, "Q8_0": 8, "Q5_1": 5, "Q5_0": 5, "Q4_1": 4, "Q4_0": 4}
_EMBEDDING, _HEAD = "token_embd.weight", "output.weight"
_HEADS_TYPE = "Q8_0"  # llama.cpp's own tools take Q6_K, which the library does not quantise to


@dataclasses.dataclass(frozen=True)
class TensorType:
    """A type of tensors."""

    name: str

    @property
    def number(self) -> gguf.GGMLQuantizationType:
        return gguf.GGMLQuantizationType[self.name]

    @property
    def bits(self) -> int:
        """Of one float or integer, without scales."""
        return _BITS[self.name]

    def nbytes(self, shape: tuple[int, ...]) -> int:
        """Of a tensor, with scales."""
        per_block, block_bytes = gguf.GGML_QUANT_SIZES[self.number]
        return math.prod(shape) // per_block * block_bytes

    def encode(self, values: np.ndarray, path: str) -> np.ndarray:
        """The values as the file has them, in rows of bytes where they are quantised.

        Raises:
            CheckpointError: some are infinite in this type.
        """
        values = np.asarray(values, np.float32)
        with np.errstate(over="ignore", invalid="ignore"):
            encoded = np.asarray(gguf.quantize(values, self.number), order="C")
        _, block_bytes = gguf.GGML_QUANT_SIZES[self.number]
        # A block starts with its scale, and where its lowest value is one of them (the _1), that comes next.
        count = {"F16": 1, "Q5_1": 2, "Q4_1": 2}.get(self.name, 0 if self.name in _FLOATS else 1)
        scales = encoded.view(np.uint8).reshape(-1, block_bytes)[:, : 2 * count]
        if not np.isfinite(np.ascontiguousarray(scales).view(np.float16)).all():
            raise CheckpointError(
                f"{path} reaches {np.abs(values).max():g}, which {self.name} cannot hold: its numbers and scales are of "
                "float16. Export it as BF16 or F32."
            )
        return encoded


def require_type(name: str) -> None:
    """Raises unless a file of that type can be written."""
    if name not in TYPES:
        raise ConfigError(f"there is no type {name!r} to write. Choose one of {', '.join(TYPES)}.")


def file_type(name: str) -> int:
    """The number that a file has for its type."""
    return int(_FILE_TYPES[name])


def type_of_tensor(name: str, shape: tuple[int, ...], file: str, *, tied: bool) -> TensorType:
    """The type of a tensor in a file of some type.

    Norms and biases stay F32, what makes logits is not quantised below 8 bits, and rows that are no whole blocks are F16.

    Args:
        name: of the tensor.
        shape: the last dim is that of rows.
        file: the file's type.
        tied: the embedding makes the logits.
    """
    if len(shape) == 1:
        return TensorType("F32")
    if file in _FLOATS:
        return TensorType(file)
    makes_logits = name == _HEAD or (tied and name == _EMBEDDING)
    chosen = TensorType(_HEADS_TYPE if makes_logits else file)
    per_block, _ = gguf.GGML_QUANT_SIZES[chosen.number]
    return chosen if shape[-1] % per_block == 0 else TensorType("F16")
