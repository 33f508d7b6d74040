"""Mixtures of experts against a loop over tokens in float64."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pippin.core.errors import ConfigError
from pippin.core.module import merge
from pippin.core.outputs import Outputs, collect
from pippin.layers import reference
from pippin.layers.feed_forward_config import Activation, FeedForwardConfig
from pippin.layers.moe_config import MoEConfig, TopKRouterConfig
from pippin.layers.testing import (
    Parts,
    assert_exact,
    check_gradients,
    equations,
    float64_fixture,
    normal,
    parts,
)

_float64 = float64_fixture()

_D, _F, _E = 4, 3, 4
_X = normal(2, 5, _D)


def _moe(top_k: int = 2, num_experts: int = _E, **router: Any) -> MoEConfig:
    return MoEConfig(
        input_dim=_D,
        hidden_dim=_F,
        num_experts=num_experts,
        top_k=top_k,
        router=TopKRouterConfig(**router),
    )


def _report(m: Parts, params: Any, x: Any) -> tuple[Any, Outputs]:
    """What the mixture returns, and what it reports."""

    @jax.jit
    def run(params: Any, x: Any) -> Any:
        with collect() as outputs:
            y = merge(m.definition, params)(x)
        return y, outputs

    return run(params, x)


@pytest.mark.parametrize(
    "cfg, options",
    [
        (_moe(1), {"top_k": 1}),
        (_moe(2), {"top_k": 2}),
        (_moe(_E), {"top_k": _E}),
        (_moe(2, normalise_chosen=False), {"top_k": 2, "normalise": False}),
        (_moe(2, soft_cap=0.5), {"top_k": 2, "soft_cap": 0.5}),
    ],
    ids=["top 1", "top 2", "all experts", "weights of all", "capped router"],
)
def test_every_token_visits_its_experts(cfg, options):
    m = parts(cfg)
    expected, _ = reference.moe(m.params, _X.reshape(-1, _D), **options)
    assert_exact(m.call(m.params, _X), expected.reshape(_X.shape))


def test_no_token_is_dropped_where_all_go_to_one_expert():
    m = parts(_moe(1))
    router = np.zeros((_D, _E))
    router[:, 2] = 10.0
    m.params["router"]["proj"]["weight"] = jnp.asarray(router)
    x = np.abs(_X)
    expert = {name: {"weight": m.params[name]["weight"][2]} for name in ("gate_proj", "up_proj", "down_proj")}
    y, outputs = _report(m, m.params, x)
    assert_exact(y, reference.feed_forward(expert, x))
    assert_exact(outputs.sums["moe/largest_share"], 1.0)


def test_one_expert_of_one_token_is_a_feed_forward():
    m, plain = parts(_moe(1, num_experts=1)), parts(FeedForwardConfig(input_dim=_D, hidden_dim=_F))
    for name in ("gate_proj", "up_proj", "down_proj"):
        plain.params[name]["weight"] = m.params[name]["weight"][0]
    assert_exact(m.call(m.params, _X[:1, :1]), plain.call(plain.params, _X[:1, :1]))


def test_reported_losses_are_those_of_the_papers():
    m = parts(_moe(2, balance_loss=0.25, z_loss=0.125))
    _, outputs = _report(m, m.params, _X)
    _, logits = reference.moe(m.params, _X.reshape(-1, _D), top_k=2)
    chosen = np.argsort(-logits, axis=-1)[:, :2]
    share = np.array([(chosen == e).sum() for e in range(_E)]) / chosen.size
    balance = _E * sum(share[e] * reference.softmax(logits)[:, e].mean() for e in range(_E))
    assert_exact(outputs.losses["moe/balance_loss"], 0.25 * balance)
    assert_exact(outputs.losses["moe/router_z_loss"], 0.125 * (reference.logsumexp(logits) ** 2).mean())
    assert_exact(outputs.sums["moe/largest_share"], share.max())


def test_balance_loss_is_least_for_an_even_router_and_its_count_for_a_collapsed_one():
    m = parts(_moe(1, balance_loss=1.0))
    # Token i goes to expert i; then all go to expert 0.
    even, collapsed = 50 * np.eye(_D), np.zeros((_D, _E))
    collapsed[:, 0] = 50.0
    for router, expected in ((even, 1.0), (collapsed, float(_E))):
        m.params["router"]["proj"]["weight"] = jnp.asarray(router)
        _, outputs = _report(m, m.params, np.eye(_D)[None])
        assert_exact(outputs.losses["moe/balance_loss"], expected)


@pytest.mark.parametrize("activation", [Activation.SILU, Activation.GELU])
def test_mixture_has_the_gradient_of_its_differences(activation):
    m = parts(_moe(2, soft_cap=2.0).set(activation=activation))

    def total(params, x):
        y, outputs = _report(m, params, x)
        return y, outputs.losses

    check_gradients(total, m.params, _X[:1, :3])


def test_no_sum_of_the_gradient_is_in_an_open_order():
    # A scatter-add over equal indices is summed in any order on a GPU, and a resumed run would differ in its bits.
    m = parts(_moe(2).set(input_dim=6))
    gradient = jax.make_jaxpr(jax.grad(lambda p, x: jnp.sum(m.call(p, x))))(m.params, normal(2, 5, 6))
    scatters = [e for e in equations(gradient.jaxpr) if e.primitive.name == "scatter-add"]
    open_order = [e.invars[0].aval for e in scatters if not e.params["unique_indices"]]
    # Beside the count of visits, in integers, the gradient of top_k: one value for each logit that it chose.
    assert [a.shape for a in open_order if jnp.issubdtype(a.dtype, jnp.floating)] == [(2, 5, _E)]
    assert len(scatters) > len(open_order)


def test_mixture_keeps_bfloat16_and_routes_in_float32():
    m = parts(_moe(2), dtype=jnp.float32)
    y, outputs = _report(m, m.params, jnp.asarray(_X, jnp.bfloat16))
    assert y.dtype == jnp.bfloat16
    assert outputs.losses["moe/balance_loss"].dtype == jnp.float32


@pytest.mark.parametrize(
    "make, match",
    [
        (lambda: MoEConfig(num_experts=4, top_k=5), r"top_k \(5\) must lie between 1 and num_experts \(4\)"),
        (lambda: MoEConfig(top_k=0), r"top_k \(0\) must lie between 1"),
        (lambda: TopKRouterConfig(soft_cap=-1.0), r"soft_cap \(-1.0\) must be positive"),
    ],
)
def test_routes_that_cannot_be_are_refused(make, match):
    with pytest.raises(ConfigError, match=match):
        make()
