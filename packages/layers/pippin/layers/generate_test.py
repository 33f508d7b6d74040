"""Continuations: greedy ones against full forward passes, and the odds of sampled ones."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pippin.core.errors import ConfigError
from pippin.core.module import merge
from pippin.layers.attention_config import GroupedQueryAttentionConfig
from pippin.layers.cache_config import SlidingWindowCacheConfig
from pippin.layers.causal_lm_config import CausalLMConfig
from pippin.layers.feed_forward_config import FeedForwardConfig
from pippin.layers.generate import generate, sample
from pippin.layers.stack_config import RepeatConfig, TransformerLayerConfig
from pippin.layers.testing import Parts, parts

_PROMPT = [3, 1, 4]


@functools.cache
def _parts() -> Parts:
    attention = GroupedQueryAttentionConfig(
        num_heads=2, num_kv_heads=1, head_dim=4, window=3, cache=SlidingWindowCacheConfig()
    )
    layer = TransformerLayerConfig(attention=attention, feed_forward=FeedForwardConfig(hidden_dim=8))
    cfg = CausalLMConfig(vocab_size=17, dim=8, decoder=RepeatConfig(layer=layer, num_layers=2))
    return parts(cfg, dtype=jnp.float32)


def _generate(prompt: list[int] = _PROMPT, max_new_tokens: int = 5, **options: Any) -> list[int]:
    model = merge(_parts().definition, _parts().params)
    return list(generate(model, prompt, max_new_tokens=max_new_tokens, **options))


@functools.cache
def _greedy() -> list[int]:
    """By a full forward pass for each token, on rows of one length: what lies behind is not seen."""
    ids = list(_PROMPT)
    for _ in range(5):
        row = np.zeros((1, 8), np.int32)
        row[0, : len(ids)] = ids
        logits = _parts().call(_parts().params, row)
        ids.append(int(np.argmax(logits[0, len(ids) - 1])))
    return ids[3:]


def test_greedy_takes_the_most_likely_token_of_the_full_forward_pass():
    assert _generate() == _greedy()


def test_a_nucleus_of_one_token_is_greedy():
    assert _generate(temperature=1.0, top_p=1e-6) == _greedy()


def test_a_seed_gives_one_continuation_and_seeds_differ():
    drawn = [_generate(temperature=2.0, seed=seed) for seed in (0, 0, 1, 2)]
    assert drawn[0] == drawn[1]
    assert len({tuple(ids) for ids in drawn}) > 1


def test_a_stop_id_ends_the_text_and_is_left_out():
    stop = _greedy()[2]
    assert _generate(stop_ids=frozenset([stop])) == _greedy()[: _greedy().index(stop)]


def test_no_new_tokens_are_none():
    assert _generate(max_new_tokens=0) == []


def test_a_prompt_of_one_token():
    row = np.zeros((1, 8), np.int32)
    row[0, 0] = 3
    expected = int(np.argmax(_parts().call(_parts().params, row)[0, 0]))
    assert _generate([3], max_new_tokens=1) == [expected]


def _frequencies(logits: list[float], temperature: float, top_p: float) -> np.ndarray:
    keys = jax.random.split(jax.random.key(0), 20_000)
    draw = jax.jit(jax.vmap(sample, in_axes=(None, 0, None, None)))
    ids = draw(jnp.array(logits), keys, jnp.float32(temperature), jnp.float32(top_p))
    return np.bincount(ids, minlength=len(logits)) / len(keys)


@pytest.mark.parametrize(
    "temperature, top_p, expected",
    [
        (1.0, 1.0, [0.5, 0.125, 0.25, 0.125]),
        (0.5, 1.0, [16 / 22, 1 / 22, 4 / 22, 1 / 22]),  # squares
        (1.0, 0.7, [2 / 3, 0.0, 1 / 3, 0.0]),  # the fewest that reach 0.7
        (0.0, 1.0, [1.0, 0.0, 0.0, 0.0]),
    ],
)
def test_tokens_are_drawn_as_often_as_their_probabilities_say(temperature, top_p, expected):
    drawn = _frequencies([math.log(p) for p in (0.5, 0.125, 0.25, 0.125)], temperature, top_p)
    # Four standard deviations of a frequency of 20,000 draws.
    np.testing.assert_allclose(drawn, expected, atol=4 * 0.5 / math.sqrt(20_000))
    assert not np.any(drawn[np.array(expected) == 0])


@pytest.mark.parametrize(
    "options, match",
    [
        ({"prompt": []}, "empty prompt. Start it with one id"),
        ({"temperature": -1.0}, r"temperature=-1.0.*must be finite and not negative"),
        ({"temperature": math.nan}, r"temperature=nan"),
        ({"top_p": 0.0}, r"top_p must lie in \(0, 1\]"),
        ({"top_p": math.nan}, r"top_p=nan"),
        ({"max_new_tokens": -1}, r"max_new_tokens=-1: it must not be negative"),
    ],
)
def test_settings_out_of_range_are_refused_at_once(options, match):
    model = merge(_parts().definition, _parts().params)
    with pytest.raises(ConfigError, match=match):
        generate(model, options.pop("prompt", _PROMPT), **{"max_new_tokens": 1, **options})
