"""A tiny exported model for tests: its bundle, compressed in several ways, and its package."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
from flax import nnx

from pippin.core.bundle import save_bundle
from pippin.core.module import flatten_params, split, unflatten_params
from pippin.core.quantized_array import Palettized, QuantizedArray, Scaled
from pippin.export.compress.recipes import NO_RECIPE
from pippin.export.export_coreml import Options, export_coreml
from pippin.export.output import Places
from pippin.layers.causal_lm_config import CausalLMConfig
from pippin.layers.models.llama import llama
from pippin.layers.position_config import RoPEConfig
from pippin.layers.unrolled import unrolled

CONTEXT, PREFILL = 64, 16


@dataclasses.dataclass(frozen=True)
class TinyExport:
    """Where its parts lie."""

    model: Path
    places: Places


def tiny_config() -> CausalLMConfig:
    """A Llama of two layers, tied."""
    return llama(
        vocab_size=96,
        dim=64,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=32,
        hidden_dim=128,
        tied=True,
        position=RoPEConfig(theta=1e4),
    )


def tiny_export(folder: Path, *, compressed: bool, seed: int = 0, adapter_rank: int = 0) -> TinyExport:
    """Writes a model of random weights, and its package."""
    cfg = tiny_config()
    _, params = split(cfg.build(rngs=nnx.Rngs(seed)))
    cfg, params = unrolled(cfg, params)
    flat = {name: np.asarray(values) for name, values in flatten_params(params).items()}
    if compressed:
        flat = {name: _compressed(name, values) for name, values in flat.items()}
    model = save_bundle(folder / "model", cfg, unflatten_params(flat))
    package = folder / "tiny.mlpackage"
    options = Options(
        context_length=CONTEXT, prefill_length=PREFILL, adapter_rank=adapter_rank, recipe=NO_RECIPE
    )
    export_coreml(model, package, options)
    return TinyExport(model, Places.of(package))


def _compressed(name: str, values: np.ndarray) -> np.ndarray | QuantizedArray:
    """The embedding in int8 by rows, maps by tables of four bits for sixteen outputs; norms as they are."""
    if values.ndim < 2:
        return values
    if name.startswith("embedding"):
        scales = (np.abs(values).max(axis=1, keepdims=True) / 127).astype(np.float16)
        return Scaled(np.rint(values / scales).astype(np.int8), scales, 8)
    inputs, outputs = values.shape
    groups = outputs // 16
    blocks = values.reshape(inputs, groups, 16)
    low, high = blocks.min(axis=(0, 2)), blocks.max(axis=(0, 2))
    luts = np.linspace(low, high, 16, axis=-1).astype(np.float16)[None]
    step = ((high - low) / 15)[None, :, None]
    indices = np.rint((blocks - low[None, :, None]) / step).astype(np.uint8)
    return Palettized(indices.reshape(values.shape), luts, 4)
