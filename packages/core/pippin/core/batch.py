"""The batch that inputs make and models train on."""

from typing import Any, TypedDict


class Batch(TypedDict):
    """One batch of packed documents: NumPy or JAX arrays of shape [B, T]."""

    tokens: Any  # int32: inputs
    targets: Any  # int32: the token after each input
    positions: Any  # int32: from 0 in each document
    segment_ids: Any  # int32: documents of a row from 1; 0 is padding
    loss_weights: Any  # float32: 1 where the target counts, else 0
