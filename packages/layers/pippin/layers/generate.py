"""Text continuation: greedy or sampled, one token a step, through the model's cache."""

import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from pippin.core.errors import ConfigError
from pippin.core.module import merge, split


def generate(
    model: nnx.Module,
    prompt: list[int],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    stop_ids: frozenset[int] = frozenset(),
) -> Iterator[int]:
    """The ids that continue a prompt, up to a stop id (left out) or `max_new_tokens`.

    Args:
        model: provides "causal_lm".
        prompt: at least one id.
        max_new_tokens: ids to yield at most.
        temperature: 0 takes the most likely token.
        top_p: samples among the fewest tokens whose probabilities reach this sum.
        seed: the same seed gives the same ids.
        stop_ids: ids that end the text.

    Raises:
        ConfigError: the prompt is empty, or a number is out of range.
    """
    if not prompt:
        raise ConfigError(
            "generate got an empty prompt. Start it with one id at least, such as the tokenizer's bos."
        )
    if max_new_tokens < 0:
        raise ConfigError(
            f"generate got max_new_tokens={max_new_tokens}: it must not be negative. Give the ids to yield at most."
        )
    # Written so that NaN is refused too.
    if not 0 <= temperature < math.inf or not 0 < top_p <= 1:
        raise ConfigError(
            f"generate got temperature={temperature} and top_p={top_p}: the temperature must be finite and not "
            "negative, and top_p must lie in (0, 1]. Use temperature=0 for the most likely token."
        )
    sampling = (np.float32(temperature), np.float32(top_p))
    return _continue(model, prompt, max_new_tokens, sampling, jax.random.key(seed), stop_ids)


def _continue(
    model: nnx.Module,
    prompt: list[int],
    max_new_tokens: int,
    sampling: tuple[np.float32, np.float32],
    key: Array,
    stop_ids: frozenset[int],
) -> Iterator[int]:
    definition, params = split(model)
    cache = _empty_cache(definition, params, len(prompt) + max_new_tokens)
    token_ids = jnp.asarray([prompt], jnp.int32)
    for _ in range(max_new_tokens):
        key, this = jax.random.split(key)
        token, cache = _step(definition, params, token_ids, cache, this, *sampling)
        if int(token) in stop_ids:
            return
        yield int(token)
        token_ids = token[None, None]


@partial(jax.jit, static_argnums=(0, 2))
def _empty_cache(definition: Any, params: Any, max_len: int) -> Any:
    return merge(definition, params).init_cache(1, max_len)


@partial(jax.jit, static_argnums=0, donate_argnums=3)
def _step(
    definition: Any, params: Any, token_ids: Array, cache: Any, key: Array, temperature: Array, top_p: Array
) -> tuple[Array, Any]:
    logits, cache = merge(definition, params).extend(token_ids, cache, last_only=True)
    return sample(logits[0, -1], key, temperature, top_p), cache


def sample(logits: Float[Array, " V"], key: Array, temperature: Array, top_p: Array) -> Array:
    """One id: the most likely at temperature 0, else drawn from the nucleus of mass `top_p`.

    Source: Holtzman et al. 2019, arXiv:1904.09751, section 3.1 (nucleus sampling).
    """
    logits = logits.astype(jnp.float32)
    greedy = jnp.argmax(logits)
    scaled = logits / jnp.maximum(temperature, 1e-6)
    order = jnp.argsort(-scaled)
    probabilities = jax.nn.softmax(scaled[order])
    # A token is left out if those before it already reach the mass.
    outside = jnp.cumsum(probabilities) - probabilities >= top_p
    drawn = order[jax.random.categorical(key, jnp.where(outside, -jnp.inf, scaled[order]))]
    return jnp.where(temperature > 0, drawn, greedy).astype(jnp.int32)
