"""Tiny models for the tests of lowering, as packages and in JAX."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from pippin.core.module import flatten_params, merge, split, unflatten_params
from pippin.core.quantized_array import QuantizedArray
from pippin.export.lower import Lowered, Sizes, lower
from pippin.export.mil.interpreter import Interpreter, Mode
from pippin.export.mil.spec import load_program
from pippin.export.output import Places
from pippin.export.package import write_package
from pippin.layers.causal_lm_config import CausalLMConfig
from pippin.layers.models.afm_on_device_2025 import afm_on_device_2025
from pippin.layers.models.llama import llama
from pippin.layers.position_config import RoPEConfig
from pippin.layers.unrolled import unrolled

# A call of `prefill` neither divides the context nor the prompts of tests: padding falls behind both.
SIZES = Sizes(context_length=64, prefill_length=24)
TINY = llama(
    vocab_size=96,
    dim=64,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    hidden_dim=96,
    tied=True,
    position=RoPEConfig(theta=10_000.0),
)

# Layers of which some read the keys and values of others.
SHARED_KEYS = afm_on_device_2025(
    vocab_size=96,
    dim=64,
    num_layers=3,
    num_readers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    hidden_dim=96,
)


@dataclasses.dataclass(frozen=True)
class Model:
    """A model with stacks, and without."""

    cfg: CausalLMConfig
    params: dict[str, Any]  # nested
    flat_cfg: CausalLMConfig
    flat: dict[str, np.ndarray]  # without stacks


def model(cfg: CausalLMConfig, seed: int = 0) -> Model:
    """A model whose parameters are numbers of float16, none of them as initialised."""
    _, params = split(cfg.build(rngs=nnx.Rngs(seed)))
    rng = np.random.default_rng(seed)

    def moved(values: Any) -> np.ndarray:
        noisy = np.asarray(values) + 0.1 * rng.standard_normal(values.shape)
        return noisy.astype(np.float16).astype(np.float32)

    params = jax.tree.map(moved, params)
    flat_cfg, flat = unrolled(cfg, params)
    return Model(cfg, params, flat_cfg, flatten_params(flat))


def save(
    folder: Path,
    cfg: CausalLMConfig,
    params: Mapping[str, np.ndarray | QuantizedArray],
    sizes: Sizes = SIZES,
    name: str = "tiny",
) -> tuple[Path, Lowered]:
    """A package of a model without stacks, and the program that was written."""
    lowered = lower(cfg, params, sizes, base_signature="b" * 64)
    places = Places.of(folder / f"{name}.mlpackage")
    write_package(places, lowered, {"name": name}, "A tiny model.")
    return places.package, lowered


def run(
    package: Path,
    tokens: Sequence[int],
    *,
    prompt: int,
    mode: Mode = Mode.EXACT,
    adapter: np.ndarray | None = None,
) -> np.ndarray:
    """The logits after each token: of the prompt by `prefill`, a call for each part of it, of the rest by `decode`."""
    interpreter = Interpreter(load_program(package), mode)
    state = interpreter.make_state()
    context, length = SIZES.context_length, SIZES.prefill_length
    logits: list[np.ndarray] = []
    while len(logits) < len(tokens):
        at = len(logits)
        name, size = ("prefill", length) if at < prompt else ("decode", 1)
        part = tokens[at : min(at + size, prompt)] if at < prompt else tokens[at : at + 1]
        queries, slots = at + np.arange(size)[:, None], np.arange(context)[None]
        inputs = {
            "inputIds": np.array([[*part, *[0] * (size - len(part))]], np.int32),
            "position": np.array([at], np.int32),
            "causalMask": np.where(slots <= queries, 0, -np.inf).astype(np.float16)[None, None],
        }
        inputs |= {} if adapter is None else {"adapter": adapter}
        logits += list(interpreter.run(name, inputs, state)["logits"][0, : len(part)])
    return np.stack(logits).astype(np.float64)


def reference(cfg: CausalLMConfig, params: Mapping[str, Any], tokens: Sequence[int]) -> np.ndarray:
    """The same logits by JAX, of a whole text at a time. `params` are nested, or by name."""
    nested = params if any(isinstance(p, Mapping) for p in params.values()) else unflatten_params(params)
    definition, _ = split(nnx.eval_shape(lambda: cfg.build(rngs=nnx.Rngs(0))))
    call = jax.jit(lambda params, ids: merge(definition, params)(ids))
    return np.asarray(call(nested, jnp.asarray([tokens], jnp.int32))[0])


def some_tokens(count: int, vocab_size: int = 96) -> list[int]:
    return np.random.default_rng(1).integers(0, vocab_size, count).tolist()
