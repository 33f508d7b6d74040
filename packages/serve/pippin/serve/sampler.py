"""The choice of the next token of each row, in one program for all rows."""

import dataclasses
import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from pippin.serve.engine.request import CONSTRAINT_FAILED, MAX_LOGPROBS, NO_TOKEN, Sampled, Sampling
from pippin.serve.engine.scheduler import Row
from pippin.serve.errors import ConstraintError

_log = logging.getLogger(__name__)


def compiler_options(platform: str | None = None) -> dict[str, str]:
    """What XLA needs to be told so that a row's numbers do not depend on how many rows there are.

    On CPUs, it would leave sums along rows to a library where an array has 4,096 numbers or more, and not where it has
    fewer: in another order. Products are left to the library in any case.

    Args:
        platform: what the program is for, by JAX's name; None: this machine.
    """
    on_cpu = {"xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT"}
    return on_cpu if (platform or jax.default_backend()) == "cpu" else {}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Controls:
    """What each of S rows asks for."""

    # Any: JAX takes it apart, and puts it together again of what stands for arrays.

    seed: Any  # [S, 2]: its lower and its upper 32 bits
    step: Any  # [S]: tokens of the output so far
    temperature: Any  # [S]
    top_k: Any  # [S]: at least 1
    top_p: Any  # [S]
    min_p: Any  # [S]
    repetition_penalty: Any  # [S]
    wants_top: Any  # [S]: whether it is told the most likely tokens
    seen: Any  # [S, V]: tokens that the repetition penalty is for
    bias: Any  # [S, V]
    allowed: Any  # [S, V / 32]: a bit for each token


class Sampler:
    """Chooses tokens. What a row gets depends on no other row.

    Source: Holtzman et al. 2019, arXiv:1904.09751, section 3.1 (top-p); Nguyen et al. 2024, arXiv:2407.01082 (min-p);
    Keskar et al. 2019, arXiv:1909.05858, section 4.1 (the repetition penalty).
    """

    def __init__(self, vocab_size: int):
        self._vocab_size = vocab_size
        self._num_top = min(MAX_LOGPROBS, vocab_size)
        self._greedy = jax.jit(_greedy)
        self._sample = jax.jit(_sample, static_argnums=2, compiler_options=compiler_options())

    def __call__(self, logits: Float[Array, "S V"], rows: Sequence[Row | None]) -> list[Sampled | None]:
        """The next token of each row that asks for one; the logits of a row that is None are of nobody."""
        asking = [row for row in rows if row is not None and row.sampling is not None]
        if not asking:
            return [None] * len(rows)
        if not any(_needs_more_than_the_likeliest(row) for row in asking):
            return [_told(row, token) for row, token in zip(rows, self._greedy(logits).tolist(), strict=True)]
        controls, failed = self._controls(rows)
        sampled = [a.tolist() for a in jax.device_get(self._sample(logits, controls, self._num_top))]
        results = [_told(row, *of_row) for row, *of_row in zip(rows, *sampled, strict=True)]
        return [failed.get(i, result) for i, result in enumerate(results)]

    def warm_up(self, logits: Float[Array, "S V"]) -> None:
        """Compiles the programs for so many rows."""
        controls, _ = self._controls([None] * logits.shape[0])
        jax.block_until_ready((self._greedy(logits), self._sample(logits, controls, self._num_top)))

    def _controls(self, rows: Sequence[Row | None]) -> tuple[_Controls, dict[int, Sampled]]:
        """What rows ask for, and what those get, by index, whose constraint failed."""
        count, vocab = len(rows), self._vocab_size
        controls = _Controls(
            seed=np.zeros((count, 2), np.uint32),
            step=np.zeros(count, np.int32),
            temperature=np.zeros(count, np.float32),
            top_k=np.full(count, vocab, np.int32),
            top_p=np.ones(count, np.float32),
            min_p=np.zeros(count, np.float32),
            repetition_penalty=np.ones(count, np.float32),
            wants_top=np.zeros(count, bool),
            seen=np.zeros((count, vocab), bool),
            bias=np.zeros((count, vocab), np.float32),
            allowed=np.full((count, -(-vocab // 32)), -1, np.int32),
        )
        failed: dict[int, Sampled] = {}
        for i, row in enumerate(rows):
            if row is not None and row.sampling is not None:
                instead = _fill(controls, i, row, row.sampling)
                if instead is not None:
                    failed[i] = Sampled(instead)
        return controls, failed


def _needs_more_than_the_likeliest(row: Row) -> bool:
    s = row.sampling
    return row.constraint is not None or s != Sampling(temperature=0.0, seed=s.seed if s else 0)


def _fill(controls: _Controls, i: int, row: Row, sampling: Sampling) -> int | None:
    """Writes what a row asks for at its index; the result is what it gets where its constraint failed."""
    vocab = controls.bias.shape[1]
    controls.seed[i] = sampling.seed & 0xFFFF_FFFF, sampling.seed >> 32 & 0xFFFF_FFFF
    controls.step[i] = len(row.history) - row.num_prompt
    controls.temperature[i] = sampling.temperature
    controls.top_k[i] = min(sampling.top_k or vocab, vocab)
    controls.top_p[i], controls.min_p[i] = sampling.top_p, sampling.min_p
    controls.wants_top[i] = bool(sampling.logprobs)
    for token, value in sampling.logit_bias.items():
        controls.bias[i, token] = value
    if sampling.repetition_penalty != 1.0:
        controls.repetition_penalty[i] = sampling.repetition_penalty
        controls.seen[i, np.asarray(row.history)] = True
    if sampling.frequency_penalty or sampling.presence_penalty:
        counts = np.bincount(np.asarray(row.history[row.num_prompt :], np.int64), minlength=vocab)
        penalty = sampling.frequency_penalty * counts + sampling.presence_penalty * (counts > 0)
        controls.bias[i] -= penalty.astype(np.float32)
    if row.constraint is None:
        return None
    try:
        row.constraint.write_mask(controls.allowed[i])
    except ConstraintError as error:
        _log.warning("the constraint of request %s failed: %s", row.request_id, error)
        return CONSTRAINT_FAILED
    except Exception:  # noqa: BLE001  made of what a client sent: it must not end the step of others
        _log.exception("the constraint of request %s failed", row.request_id)
        return NO_TOKEN
    return None


def _told(
    row: Row | None,
    token: int,
    logprob: float = 0.0,
    top_ids: Sequence[int] = (),
    top_logprobs: Sequence[float] = (),
) -> Sampled | None:
    """What a row is told of its token."""
    if row is None or row.sampling is None:
        return None
    if (count := row.sampling.logprobs) is None or token < 0:
        return Sampled(token)
    return Sampled(token, logprob, tuple(zip(top_ids[:count], top_logprobs[:count], strict=True)))


def _greedy(logits: Float[Array, "S V"]) -> Int[Array, " S"]:
    """The most likely tokens; -1 where logits are not finite."""
    highest = jnp.max(logits, axis=-1, keepdims=True)
    # Not by argmax, whose pairs of a value and an index are not vectorised on CPUs.
    ids = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 1)
    first = jnp.min(jnp.where(logits == highest, ids, logits.shape[1]), axis=-1)
    return jnp.where(jnp.isfinite(highest[:, 0]), first, -1)


def _sample(
    logits: Float[Array, "S V"], controls: _Controls, num_top: int
) -> tuple[Int[Array, " S"], Float[Array, " S"], Int[Array, "S top"], Float[Array, "S top"]]:
    """The tokens (-1 where there is none), their log-probabilities, and the most likely tokens with theirs."""
    choose = partial(_choose, num_top=num_top)
    if jax.default_backend() == "cpu":
        # Row by row, and what a row does not ask for is left out. Sums over rows of a batch would have an order that
        # depends on how many there are.
        return jax.lax.map(lambda row: choose(*row), (logits, controls))
    return jax.vmap(choose)(logits, controls)


def _choose(
    logits: Float[Array, " V"], c: _Controls, num_top: int
) -> tuple[Int[Array, ""], Float[Array, ""], Int[Array, " top"], Float[Array, " top"]]:
    """What `_sample` gives for one row."""
    logits = logits.astype(jnp.float32)
    logprobs = jax.nn.log_softmax(logits)
    penalty = c.repetition_penalty
    adjusted = jnp.where(c.seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)
    adjusted = jnp.where(_bits(jnp.asarray(c.allowed), logits.shape[0]), adjusted + c.bias, -jnp.inf)
    token = jax.lax.cond(c.temperature > 0, lambda: _draw(adjusted, c), lambda: jnp.argmax(adjusted))
    # Not finite by the model's fault, or nothing is allowed.
    fine = jnp.isfinite(jnp.max(logits)) & jnp.isfinite(jnp.max(adjusted))
    top_logprobs, top_ids = jax.lax.cond(
        c.wants_top,
        lambda: tuple(jax.lax.top_k(logprobs, num_top)),
        lambda: (logprobs[:num_top], jnp.zeros((num_top,), jnp.int32)),
    )
    return jnp.where(fine, token, -1), logprobs[token], top_ids, top_logprobs


def _draw(logits: Float[Array, " V"], c: _Controls) -> Int[Array, ""]:
    """A token of the distribution, of what top-k, then top-p, then min-p leave of it."""
    scaled = logits / jnp.maximum(c.temperature, 1e-6)
    p = jax.nn.softmax(scaled)
    filtered = (c.top_k < p.shape[0]) | (c.top_p < 1)
    kept = jax.lax.cond(filtered, lambda: _filter(p, c), lambda: p > 0)
    kept &= p >= c.min_p * jnp.max(p)
    key = jax.random.fold_in(jax.random.key(c.seed[0]), c.seed[1])
    noise = jax.random.gumbel(jax.random.fold_in(key, c.step), p.shape)
    return jnp.argmax(jnp.where(kept, scaled + noise, -jnp.inf))


def _filter(p: Float[Array, " V"], c: _Controls) -> Bool[Array, " V"]:
    """The tokens that top-k and then top-p keep. Tokens as likely as the last one kept stay too."""
    # A probability's bits, read as an integer, are in the order of the probabilities: nothing is sorted.
    bits = jax.lax.bitcast_convert_type(p, jnp.int32)
    of_k = bits >= _largest(lambda t: jnp.sum(bits >= t) >= c.top_k)
    p = jnp.where(of_k, p, 0.0)
    mass = jnp.sum(p) * c.top_p
    of_p = bits >= _largest(lambda t: jnp.sum(jnp.where(bits >= t, p, 0.0)) >= mass)
    return of_k & (of_p | (c.top_p >= 1)) & (p > 0)


def _largest(holds: Callable[[Array], Array]) -> Int[Array, ""]:
    """The largest t below the bits of 2.0 for which a condition holds that holds for 0 and up to some number."""

    def halve(_: Any, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bounds
        middle = (low + high) // 2
        fits = holds(middle)
        return jnp.where(fits, middle, low), jnp.where(fits, high, middle)

    bounds = jnp.zeros((), jnp.int32), jnp.full((), 1 << 30, jnp.int32)
    return jax.lax.fori_loop(0, 30, halve, bounds)[0]


def _bits(words: Int[Array, " W"], count: int) -> Bool[Array, " V"]:
    """The first bits of some words, lowest first."""
    shifts = jnp.broadcast_to(jnp.arange(32, dtype=jnp.int32)[None], (words.shape[0], 32))
    bits = jax.lax.shift_right_logical(jnp.broadcast_to(words[:, None], shifts.shape), shifts) & 1
    return (bits != 0).reshape(-1)[:count]
