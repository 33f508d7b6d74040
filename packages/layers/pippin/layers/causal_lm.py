"""The causal language model: what is trained, served and exported."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from pippin.core.batch import Batch
from pippin.core.module import Module, merge, split
from pippin.core.outputs import add_collected, collect
from pippin.core.sharding import constrain, num_shards
from pippin.layers.causal_lm_config import CausalLMConfig
from pippin.layers.context import Cache, Context
from pippin.layers.loss import chunked_cross_entropy
from pippin.layers.pipeline_1f1b import Finish
from pippin.layers.stack import Repeat
from pippin.layers.stack_config import PipelineSchedule


class CausalLM(Module):
    """Predicts each next token from those before it.

    Source: Radford et al. 2019; the tied head as in Press and Wolf 2016, arXiv:1608.05859.
    """

    Config = CausalLMConfig

    def __init__(self, cfg: CausalLMConfig, *, rngs: nnx.Rngs):
        self.embedding = cfg.embedding.set(vocab_size=cfg.vocab_size, dim=cfg.dim).build(rngs=rngs)
        self.decoder = cfg.decoder.set(input_dim=cfg.dim).build(rngs=rngs)
        self.norm = cfg.norm.set(dim=cfg.dim).build(rngs=rngs)
        ends = {"input_dim": cfg.dim, "output_dim": cfg.vocab_size, "output_axis": "vocab"}
        # In one assignment: nnx fixes at the first whether an attribute holds parameters.
        self.head = None if cfg.head is None else cfg.head.set(**ends).build(rngs=rngs)
        self.logit_soft_cap, self.z_loss = cfg.logit_soft_cap, cfg.z_loss
        self.dtype = jnp.dtype(cfg.activation_dtype.value)
        self.loss_chunk_tokens = cfg.loss_chunk_tokens

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
    ) -> Float[Array, "B T V"]:
        """The logits of the token after each token. Positions count from 0 unless given."""
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32)[None], tokens.shape)
        decoded = self.decoder(self._embedded(tokens), Context(positions, segment_ids)).x
        return self._logits(self._head(), self.norm(decoded))

    def loss(self, batch: Batch) -> tuple[Float[Array, ""], dict[str, Array]]:
        """The mean loss of a batch over the weight of its targets, in nats, and metrics.

        The loss is the sum of cross-entropy, z-loss, and what layers report through
        `pippin.core.outputs`. Metrics: `cross_entropy`, `z_loss`, `accuracy`, `weight` (how
        many targets count), and those that layers report. Where no target counts, the
        first three are 0; what layers report is of all tokens, padding included.
        """
        ctx = Context(batch["positions"], batch["segment_ids"])
        weight = jnp.sum(batch["loss_weights"])
        divisor = jnp.where(weight > 0, weight, 1.0)
        finish, params = self._finish()
        with collect() as outputs:
            embedded = self._embedded(batch["tokens"])
            if self._schedule() is PipelineSchedule.ONE_F_ONE_B:
                of_tokens = batch["targets"], batch["loss_weights"] / divisor
                loss, sums, reports = self.decoder.loss(embedded, ctx, finish, params, of_tokens)
                loss += outputs.total_loss().astype(loss.dtype)  # so far the embedding's
                add_collected(reports)
            else:
                decoded = self.decoder(embedded, ctx).x
                total, sums = finish(params, decoded, (batch["targets"], batch["loss_weights"]))
                loss = total / divisor + outputs.total_loss().astype(total.dtype)
                sums = jax.tree.map(lambda s: s / divisor, sums)
        metrics = {
            "cross_entropy": sums.cross_entropy,
            "z_loss": self.z_loss * sums.squared_normaliser,
            "accuracy": sums.correct,
            "weight": weight,
            **outputs.means(),
        }
        return loss, metrics

    def init_cache(self, batch_size: int, max_len: int) -> Cache:
        """An empty cache for sequences of up to `max_len` tokens."""
        lengths = jnp.zeros((batch_size,), jnp.int32)
        return {"lengths": lengths, "decoder": self.decoder.init_cache(batch_size, max_len, self.dtype)}

    def extend(
        self, tokens: Int[Array, "B T"], cache: Cache, *, last_only: bool = False
    ) -> tuple[Float[Array, "B T_out V"], Cache]:
        """The logits after each new token (the last one alone, if `last_only`), and the cache with all of them.

        Prefill is `extend` of an empty cache, and decoding `extend` by one token.
        Tokens beyond the cache's `max_len` are not kept: the caller sees to it.
        """
        steps = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
        positions = cache["lengths"][:, None] + steps
        ctx = Context(positions, last_only=last_only)
        out = self.decoder(self._embedded(tokens), ctx, cache["decoder"])
        decoded = out.x[:, -1:] if last_only else out.x
        cache = {"lengths": cache["lengths"] + tokens.shape[1], "decoder": out.cache}
        return self._logits(self._head(), self.norm(decoded)), cache

    def extend_at(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        cache: Cache,
        read: Int[Array, " B"],
    ) -> tuple[Float[Array, "B V"], Cache]:
        """The logits after token `read[i]` of each row i, and the cache with all tokens.

        For callers that know where each row's tokens stand, -1 for padding, as of a cache in pages: the lengths in the cache
        are neither read nor changed.
        """
        decoded, cache = self._extended_at(tokens, positions, cache)
        return self._logits_at(decoded, read), cache

    def extend_and_sum_at(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        cache: Cache,
        read: Int[Array, " B"],
    ) -> tuple[Float[Array, "B V"], Float[Array, "B D"], Cache]:
        """What `extend_at` gives, and for each row the sum of its tokens' hidden states, of which logits are made.

        These are float32, behind the last norm, and those of padding are left out.
        """
        decoded, cache = self._extended_at(tokens, positions, cache)
        hidden = jnp.where(positions[..., None] >= 0, self.norm(decoded).astype(jnp.float32), 0.0)
        return self._logits_at(decoded, read), jnp.sum(hidden, axis=1), cache

    def _extended_at(
        self, tokens: Int[Array, "B T"], positions: Int[Array, "B T"], cache: Cache
    ) -> tuple[Float[Array, "B T D"], Cache]:
        out = self.decoder(self._embedded(tokens), Context(positions), cache["decoder"])
        return out.x, {"lengths": cache["lengths"], "decoder": out.cache}

    def _logits_at(self, decoded: Float[Array, "B T D"], read: Int[Array, " B"]) -> Float[Array, "B V"]:
        decoded = jnp.take_along_axis(decoded, read[:, None, None], axis=1)
        return self._logits(self._head(), self.norm(decoded))[:, 0]

    def _embedded(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        return constrain(self.embedding(tokens, self.dtype), "batch", "sequence", None)

    def _finish(self) -> tuple[Finish, Any]:
        """What makes a loss of the decoder's result, as a pure function, and its parameters.

        Its other argument is (targets, weights). Losses and sums are of all tokens, each times its weight.
        """
        (norm, norm_params), (head, head_params) = split(self.norm), split(self._head())

        def logits(params: Any, hidden: Array) -> Array:
            return self._logits(merge(head, params), hidden)

        def finish(params: Any, decoded: Array, of_tokens: tuple[Array, Array]) -> Any:
            # Asked here: on a device of a pipeline, its tokens are what there is.
            shards = num_shards("batch", "sequence") * (num_shards("layers") if self._schedule() else 1)
            return chunked_cross_entropy(
                logits,
                params[1],
                merge(norm, params[0])(decoded),
                *of_tokens,
                chunk=self.loss_chunk_tokens * shards,
                z_loss=self.z_loss,
            )

        return finish, (norm_params, head_params)

    def _schedule(self) -> PipelineSchedule | None:
        return self.decoder.schedule if isinstance(self.decoder, Repeat) else None

    def _head(self) -> Module:
        return self.embedding if self.head is None else self.head

    def _logits(self, head: Any, hidden: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        logits = head.attend(hidden) if self.head is None else head(hidden)
        cap = self.logit_soft_cap
        return logits if cap is None else cap * jnp.tanh(logits / cap)
