"""Mixture of experts: a router, and experts computed by grouped matmul so that no token is dropped."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from pippin.core.module import Module
from pippin.core.outputs import add_loss, add_metric
from pippin.layers.feed_forward import gated
from pippin.layers.moe_config import MoEConfig, TopKRouterConfig
from pippin.layers.precision import at_least_float32


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Routes:
    """The experts of each of M tokens, and the weight of each expert's result."""

    experts: Int[Array, "M k"]
    weights: Float[Array, "M k"]


class TopKRouter(Module):
    """Routes each token to the k experts of the largest logits, computed in float32.

    Reports the load-balance loss `E * sum_e f_e p_e` (f_e: the share of the chosen
    slots that go to e; p_e: its mean probability), the z-loss, and the largest share.

    Source: Fedus et al. 2021, arXiv:2101.03961, equation 4; Zoph et al. 2022,
    arXiv:2202.08906, equation 5 (z-loss).
    """

    Config = TopKRouterConfig

    def __init__(self, cfg: TopKRouterConfig, *, rngs: nnx.Rngs):
        self.proj = cfg.proj.set(input_dim=cfg.input_dim, output_dim=cfg.num_experts).build(rngs=rngs)
        self.num_experts, self.top_k = cfg.num_experts, cfg.top_k
        self.normalise_chosen, self.soft_cap = cfg.normalise_chosen, cfg.soft_cap
        self.balance_loss, self.z_loss = cfg.balance_loss, cfg.z_loss

    def __call__(self, x: Float[Array, "M D"]) -> Routes:
        logits = self.proj(x.astype(at_least_float32(x.dtype)))
        if self.soft_cap is not None:
            logits = self.soft_cap * jnp.tanh(logits / self.soft_cap)
        probabilities = jax.nn.softmax(logits, axis=-1)
        top, experts = jax.lax.top_k(logits, self.top_k)
        if self.normalise_chosen:
            weights = jax.nn.softmax(top, axis=-1)
        else:
            weights = jnp.take_along_axis(probabilities, experts, axis=-1)
        chosen = jax.nn.one_hot(experts, self.num_experts, dtype=logits.dtype)
        share = jnp.mean(chosen, axis=(0, 1))
        balance = self.num_experts * jnp.sum(share * jnp.mean(probabilities, axis=0))
        add_loss("moe/balance_loss", self.balance_loss * balance)
        add_loss("moe/router_z_loss", self.z_loss * jnp.mean(jnp.square(jax.nn.logsumexp(logits, axis=-1))))
        add_metric("moe/largest_share", jnp.max(share))
        return Routes(experts.astype(jnp.int32), weights.astype(x.dtype))


class MoE(Module):
    """Computes `sum over the chosen experts e of weight_e * expert_e(x)`, each a gated feed-forward.

    Dropless: tokens are sorted by expert and multiplied in groups of any size.

    Source: Shazeer et al. 2017, arXiv:1701.06538; Gale et al. 2022, arXiv:2211.15841,
    section 5 (dropless by grouped products).
    """

    Config = MoEConfig

    def __init__(self, cfg: MoEConfig, *, rngs: nnx.Rngs):
        dims = {"num_experts": cfg.num_experts, "top_k": cfg.top_k}
        self.router = cfg.router.set(input_dim=cfg.input_dim, **dims).build(rngs=rngs)
        into = {"input_dim": cfg.input_dim, "output_dim": cfg.hidden_dim, "output_axis": "mlp"}
        out_of = {
            "input_dim": cfg.hidden_dim,
            "output_dim": cfg.input_dim,
            "input_axis": "mlp",
            "output_axis": "embed",
        }
        self.gate_proj = cfg.experts.set(num_groups=cfg.num_experts, **into).build(rngs=rngs)
        self.up_proj = cfg.experts.set(num_groups=cfg.num_experts, **into).build(rngs=rngs)
        self.down_proj = cfg.experts.set(num_groups=cfg.num_experts, **out_of).build(rngs=rngs)
        self.gate = gated(cfg.activation)
        self.num_experts, self.top_k = cfg.num_experts, cfg.top_k

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        tokens = x.reshape(-1, x.shape[-1])
        routes = self.router(tokens)
        experts = routes.experts.reshape(-1)  # one visit after the other: k of each token
        by_expert = jnp.argsort(experts, stable=True)
        sizes = jnp.bincount(experts, length=self.num_experts).astype(jnp.int32)
        visits = _permute(jnp.repeat(tokens, self.top_k, axis=0), by_expert)
        hidden = self.gate(self.gate_proj(visits, sizes), self.up_proj(visits, sizes))
        results = _permute(self.down_proj(hidden, sizes), jnp.argsort(by_expert))
        results = results.reshape(*routes.experts.shape, -1)
        return jnp.einsum("MkD,Mk->MD", results, routes.weights).reshape(x.shape)


def _permute(rows: Float[Array, "M D"], order: Int[Array, " M"]) -> Float[Array, "M D"]:
    # A permutation and never a sum over equal indices, whose order is left open on a GPU: this one
    # is exact both ways, so that a resumed run has the bits of an uninterrupted one.
    return jnp.take(rows, order, axis=0, unique_indices=True)
