"""Position encodings against NumPy in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pippin.core.config import Config
from pippin.core.errors import ConfigError
from pippin.layers import reference
from pippin.layers.position_config import ALiBiConfig, Llama3ScalingConfig, NoPEConfig, RoPEConfig
from pippin.layers.testing import assert_exact, check_gradients, float64_fixture, normal, positions

_float64 = float64_fixture()

_POSITIONS = np.array([[0, 1, 2, 5], [-1, 0, 31_000, 31_001]], np.int32)


def _build(cfg: Config, num_heads: int = 3, head_dim: int = 8):
    return cfg.set(num_heads=num_heads, head_dim=head_dim).build()


def _rotate(position, x, positions):
    return jax.jit(position.rotate)(x, positions)


@pytest.mark.parametrize("theta", [10_000.0, 500_000.0, 6_315_089.0])
def test_rope_turns_pairs_of_dims(theta):
    x = normal(2, 4, 3, 8)
    rotated = _rotate(_build(RoPEConfig(theta=theta)), x, _POSITIONS)
    assert_exact(rotated, reference.rotate(x, _POSITIONS, theta))


def test_rope_of_one_token_of_one_head_of_two_dims():
    rope = _build(RoPEConfig(), num_heads=1, head_dim=2)
    turned = _rotate(rope, np.array([[[[1.0, 0.0]]]]), np.array([[2]], np.int32))
    assert_exact(turned.ravel(), [np.cos(2), np.sin(2)])


def test_rope_makes_products_depend_on_the_distance_alone():
    rope, q, k = _build(RoPEConfig()), normal(1, 1, 3, 8, seed=1), normal(1, 1, 3, 8, seed=2)

    def product(of_query: int, of_key: int):
        turned = [_rotate(rope, x, np.array([[p]], np.int32)) for x, p in ((q, of_query), (k, of_key))]
        return jnp.sum(turned[0] * turned[1], axis=-1)

    assert_exact(product(7, 4), product(1003, 1000))


def test_rope_keeps_bfloat16_and_turns_by_angles_of_float32():
    rope, x = _build(RoPEConfig()), jnp.asarray(normal(2, 4, 3, 8), jnp.bfloat16)
    rotated = _rotate(rope, x, _POSITIONS)
    assert rotated.dtype == jnp.bfloat16
    # bfloat16 has no position above 256 of its own: 31,001 would turn as far as 31,000.
    exact = _rotate(rope, x.astype(jnp.float32), _POSITIONS)
    np.testing.assert_array_equal(rotated, exact.astype(jnp.bfloat16))


def test_rope_has_the_gradient_of_its_differences():
    rope = _build(RoPEConfig(scaling=Llama3ScalingConfig(original_context=16)))
    check_gradients(lambda x: _rotate(rope, x, _POSITIONS), normal(2, 4, 3, 8))


def test_llama3_scaling_slows_long_waves_and_leaves_short_ones():
    cfg = Llama3ScalingConfig(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_context=8192)
    plain = np.array(_build(RoPEConfig(), head_dim=128).frequencies)

    def scaled(frequency: float) -> float:  # as written in the Llama 3.1 model card's code, by cases
        wave_length = 2 * np.pi / frequency
        if wave_length < 8192 / 4.0:
            return frequency
        if wave_length > 8192 / 1.0:
            return frequency / 8.0
        smooth = (8192 / wave_length - 1.0) / (4.0 - 1.0)
        return (1 - smooth) * frequency / 8.0 + smooth * frequency

    expected = [scaled(f) for f in plain]
    assert {1.0, 8.0} < {round(f / e, 6) for f, e in zip(plain, expected, strict=True)}  # all three cases
    assert_exact(_build(RoPEConfig(scaling=cfg), head_dim=128).frequencies, expected)


@pytest.mark.parametrize("cfg", [NoPEConfig(), ALiBiConfig()])
def test_positions_that_do_not_rotate_leave_queries_as_they_are(cfg):
    x = jnp.asarray(normal(2, 4, 3, 8))
    assert _build(cfg).rotate(x, jnp.asarray(_POSITIONS)) is x


@pytest.mark.parametrize("cfg", [NoPEConfig(), RoPEConfig()])
def test_positions_that_do_not_bias_give_no_bias(cfg):
    assert _build(cfg).bias(jnp.asarray(_POSITIONS), jnp.asarray(_POSITIONS)) is None


def test_alibi_slopes_are_the_published_ones():
    assert _build(ALiBiConfig(), num_heads=8).slopes == tuple(2.0**-i for i in range(1, 9))
    assert _build(ALiBiConfig(), num_heads=1).slopes == (2.0**-8,)
    # 12 heads: those of 8, then every other of those of 16.
    of_16 = [2 ** (-i / 2) for i in range(1, 17)]
    np.testing.assert_allclose(_build(ALiBiConfig(), num_heads=12).slopes[8:], of_16[0:8:2], rtol=1e-15)


def test_alibi_bias_falls_with_the_distance():
    bias = np.asarray(jax.jit(_build(ALiBiConfig(), num_heads=2).bias)(positions(1, 3), positions(1, 3)))
    seen = np.tril(np.ones((3, 3)))
    assert_exact(bias[0, 0] * seen, [[0, 0, 0], [-1 / 16, 0, 0], [-2 / 16, -1 / 16, 0]])
    assert_exact(bias[0, 1] * seen, bias[0, 0] * seen / 16)


def test_rope_may_be_traced_without_capturing_arrays():
    rope = _build(RoPEConfig())
    jax.tree.map(lambda leaf: pytest.fail(f"{leaf} is an array"), rope)  # its angles are constants


@pytest.mark.parametrize(
    "make, match",
    [
        (lambda: RoPEConfig(head_dim=5), r"head_dim \(5\) must be even.*Choose"),
        (lambda: RoPEConfig(theta=0.0), r"theta \(0.0\) must be positive"),
        (lambda: Llama3ScalingConfig(factor=0.0), r"factor \(0.0\) must be positive"),
        (
            lambda: Llama3ScalingConfig(low_freq_factor=4.0),
            r"low_freq_factor \(4.0\).*below high_freq_factor",
        ),
    ],
)
def test_settings_that_make_no_rotation_are_refused(make, match):
    with pytest.raises(ConfigError, match=match):
        make()
