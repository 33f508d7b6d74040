"""Weights as packages of every kind store them."""

from __future__ import annotations

import numpy as np

from pippin.core.errors import CheckpointError
from pippin.core.quantized_array import Palettized, QuantizedArray, Scaled
from pippin.v1 import export_pb2 as pb

# What to do about weights that are not finite.
SOUND_WEIGHTS = (
    "Take an earlier step of its training, from before its weights grew so, or another copy of the model."
)

_MAX_FLOAT16 = float(np.finfo(np.float16).max)


def as_float16(name: str, values: np.ndarray) -> np.ndarray:
    """Values rounded to float16.

    Raises:
        CheckpointError: one is NaN or infinite, or beyond what float16 holds.
    """
    with np.errstate(over="ignore"):
        rounded = values.astype(np.float16)
    finite = np.isfinite(rounded)
    if not finite.all():
        where = tuple(int(i) for i in np.argwhere(~finite)[0])
        raise CheckpointError(
            f"{name}{list(where)} is {values[where]}; a package holds finite numbers up to {_MAX_FLOAT16:g}, the largest "
            f"of float16. {SOUND_WEIGHTS}"
        )
    return rounded


def described(name: str, values: np.ndarray | QuantizedArray) -> pb.ExportedWeight:
    """What a manifest says of a weight: floats are stored as float16."""
    match values:
        case Palettized():
            scheme, bits, size = "palettized", values.bits, values.nbytes
        case Scaled():
            scheme, bits, size = "scaled", values.bits, values.nbytes
        case _:
            scheme, bits, size = "float16", 16, 2 * values.size
    count = int(np.prod(values.shape))
    return pb.ExportedWeight(name=name, scheme=scheme, bits=bits, bytes=size, count=count)
