"""Mixture of experts: a router, and experts computed by grouped matmul so that no token is dropped."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from pippin.core.module import Module, Params, merge, parameter_infos, split
from pippin.core.outputs import add_loss, add_metric
from pippin.core.sharding import mesh_axes_of, num_shards, on_shards, shard_spec
from pippin.layers.feed_forward import gated
from pippin.layers.moe_config import MoEConfig, TopKRouterConfig
from pippin.layers.precision import at_least_float32


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Routes:
    """The experts of each token, and the weight of each expert's result."""

    experts: Int[Array, "B T k"]
    weights: Float[Array, "B T k"]


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

    def __call__(self, x: Float[Array, "B T D"]) -> Routes:
        logits = self.proj(x.astype(at_least_float32(x.dtype)))
        if self.soft_cap is not None:
            logits = self.soft_cap * jnp.tanh(logits / self.soft_cap)
        probabilities = jax.nn.softmax(logits, axis=-1)
        # By each device for its tokens: the compiler would gather those of all.
        tokens = shard_spec(("batch", "sequence", None))
        top, experts = on_shards(self._top, (tokens,), (tokens, tokens))(logits)
        if self.normalise_chosen:
            weights = jax.nn.softmax(top, axis=-1)
        else:
            weights = jnp.take_along_axis(probabilities, experts, axis=-1)
        chosen = jax.nn.one_hot(experts, self.num_experts, dtype=logits.dtype)
        share = jnp.mean(chosen, axis=(0, 1, 2))
        balance = self.num_experts * jnp.sum(share * jnp.mean(probabilities, axis=(0, 1)))
        add_loss("moe/balance_loss", self.balance_loss * balance)
        add_loss("moe/router_z_loss", self.z_loss * jnp.mean(jnp.square(jax.nn.logsumexp(logits, axis=-1))))
        add_metric("moe/largest_share", jnp.max(share))
        return Routes(experts.astype(jnp.int32), weights.astype(x.dtype))

    def _top(self, logits: Float[Array, "B T E"]) -> tuple[Float[Array, "B T k"], Int[Array, "B T k"]]:
        top, experts = jax.lax.top_k(logits, self.top_k)
        return top, experts


class MoE(Module):
    """Computes `sum over the chosen experts e of weight_e * expert_e(x)`, each a gated feed-forward.

    Dropless: tokens are sorted by expert and multiplied in groups of any size. Each device of a mesh sorts its own. Devices
    that hold different experts gather each other's tokens, compute what is for their experts, and add up the results.

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
        routes = self.router(x)
        experts = mesh_axes_of(shard_spec(("experts",))[0]) if num_shards("experts") > 1 else ()
        over = tuple(a for part in shard_spec(("batch", "sequence")) for a in mesh_axes_of(part))
        over += tuple(a for a in experts if a not in over)
        definitions, params, specs = [], [], []
        for proj in (self.gate_proj, self.up_proj, self.down_proj):
            definition, values = split(proj)
            definitions.append(definition)
            params.append(values)
            specs.append(
                jax.tree.map(
                    lambda info: shard_spec(info.last_axes(len(info.shape)), experts), parameter_infos(proj)
                )
            )
        tokens = shard_spec(("batch", "sequence", None), over)

        def visit(params: list[Params], x: Array, chosen: Array, weights: Array) -> Array:
            projections = [merge(d, p) for d, p in zip(definitions, params, strict=True)]
            return self._visit(projections, experts, x, Routes(chosen, weights))

        return on_shards(visit, (specs, tokens, tokens, tokens), tokens, over)(
            params, x, routes.experts, routes.weights
        )

    def _visit(
        self, projections: list[Any], axes: tuple[str, ...], x: Float[Array, "B T D"], routes: Routes
    ) -> Float[Array, "B T D"]:
        """The results for the tokens of one device, whose experts may lie on all devices along some mesh axes."""
        gate_proj, up_proj, down_proj = projections
        tokens, chosen, weights = (a.reshape(-1, a.shape[-1]) for a in (x, routes.experts, routes.weights))
        num_experts, first = self.num_experts, 0
        if axes:
            tokens, chosen, weights = (
                jax.lax.all_gather(a, axes, tiled=True) for a in (tokens, chosen, weights)
            )
            num_experts //= jax.lax.axis_size(axes)
            first = jax.lax.axis_index(axes) * num_experts
        here = (chosen >= first) & (chosen < first + num_experts)
        # One visit after the other: k of each token. Those of other devices' experts come last, in no group.
        experts = jnp.where(here, chosen - first, num_experts).reshape(-1)
        by_expert = jnp.argsort(experts, stable=True)
        sizes = jnp.bincount(experts, length=num_experts + 1)[:num_experts].astype(jnp.int32)

        def counted(rows: Array) -> Array:
            # What a grouped product makes of rows in no group is left open, and so are their gradients.
            count = jnp.sum(sizes)
            return jnp.where(jnp.arange(rows.shape[0])[:, None] < count, rows, 0.0) if axes else rows

        visits = counted(_permute(jnp.repeat(tokens, self.top_k, axis=0), by_expert))
        hidden = counted(self.gate(gate_proj(visits, sizes), up_proj(visits, sizes)))
        results = _permute(counted(down_proj(hidden, sizes)), jnp.argsort(by_expert))
        out = jnp.einsum("MkD,Mk->MD", results.reshape(*chosen.shape, -1), weights)
        if axes:
            out = jax.lax.psum_scatter(out, axes, tiled=True)
        return out.reshape(x.shape)


def _permute(rows: Float[Array, "M D"], order: Int[Array, " M"]) -> Float[Array, "M D"]:
    # A permutation and never a sum over equal indices, whose order is left open on a GPU: this one
    # is exact both ways, so that a resumed run has the bits of an uninterrupted one.
    return jnp.take(rows, order, axis=0, unique_indices=True)
