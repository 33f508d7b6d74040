"""What the features are integrated into: 20 model variants by 10 attention variants, and random compositions.

All are made of existing components, tiny in size, without a position encoding
(NoPE) and with dense feed-forwards: what the features of `features.py` replace.

An attention variant is a pattern: the attentions of consecutive layers. A model
variant puts the pattern into a stack, so that each of the 200 is one call:

    MODELS["shared_kv_stack"](ATTENTIONS["local_global"])
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable
from functools import partial

from pippin.core.config import Config
from pippin.core.config_tree import inherit
from pippin.layers.attention_config import GroupedQueryAttentionConfig, QKNormOrder, SharedKVAttentionConfig
from pippin.layers.cache_config import SlidingWindowCacheConfig
from pippin.layers.causal_lm_config import CausalLMConfig, FloatType
from pippin.layers.feed_forward_config import Activation, FeedForwardConfig
from pippin.layers.kernel_config import BlockwiseKernelConfig, ReferenceKernelConfig
from pippin.layers.linear_config import EmbeddingConfig, LinearConfig, NormalInitConfig, lora
from pippin.layers.norm_config import RMSNormConfig
from pippin.layers.position_config import NoPEConfig
from pippin.layers.stack_config import (
    ParallelTracksConfig,
    Remat,
    RepeatConfig,
    SequenceConfig,
    SharedKVStackConfig,
    TransformerLayerConfig,
)

VOCAB_SIZE = 48


@dataclasses.dataclass(frozen=True)
class Heads:
    """The sizes that a model gives to its attention."""

    count: int = 4
    dim: int = 8


Attention = Callable[[Heads], tuple[Config, ...]]
Stack = Callable[[Config, int], Config]  # a layer and how many, put together


def _attention(heads: Heads, kv_heads: int | None = None, **fields: object) -> GroupedQueryAttentionConfig:
    cfg = GroupedQueryAttentionConfig(
        num_heads=heads.count,
        num_kv_heads=kv_heads or heads.count // 2,
        head_dim=heads.dim,
        position=NoPEConfig(),
    )
    return cfg.set(**fields)


def _multi_head(heads: Heads) -> tuple[Config, ...]:
    return (_attention(heads, heads.count, kernel=ReferenceKernelConfig()),)


def _grouped_query(heads: Heads) -> tuple[Config, ...]:
    return (_attention(heads),)


def _multi_query(heads: Heads) -> tuple[Config, ...]:
    return (_attention(heads, 1, kernel=BlockwiseKernelConfig(block_size=4)),)


def _norm_before(heads: Heads) -> tuple[Config, ...]:
    return (_attention(heads, qk_norm=RMSNormConfig(), qk_norm_order=QKNormOrder.BEFORE_ROTATION),)


def _norm_after(heads: Heads) -> tuple[Config, ...]:
    return (_attention(heads, qk_norm=RMSNormConfig(), qk_norm_order=QKNormOrder.AFTER_ROTATION),)


def _biased(heads: Heads) -> tuple[Config, ...]:
    proj = LinearConfig(bias=True)
    return (_attention(heads, q_proj=proj, k_proj=proj, v_proj=proj, o_proj=proj),)


def _soft_cap(heads: Heads) -> tuple[Config, ...]:
    return (_attention(heads, soft_cap=30.0),)


def _sinks(heads: Heads) -> tuple[Config, ...]:
    return (_attention(heads, sinks=True, window=6, cache=SlidingWindowCacheConfig()),)


def _local_global(heads: Heads) -> tuple[Config, ...]:
    return (_attention(heads, window=3, cache=SlidingWindowCacheConfig()), _attention(heads))


def _shared_kv(heads: Heads) -> tuple[Config, ...]:
    source = _attention(heads)
    return (source, inherit(SharedKVAttentionConfig(), source))


ATTENTIONS: dict[str, Attention] = {
    "multi_head": _multi_head,
    "grouped_query": _grouped_query,
    "multi_query": _multi_query,
    "qk_norm_before": _norm_before,
    "qk_norm_after": _norm_after,
    "biased": _biased,
    "soft_cap": _soft_cap,
    "window_and_sinks": _sinks,
    "local_global": _local_global,
    "shared_kv": _shared_kv,
}


def _repeat(layer: Config, count: int, **fields: object) -> Config:
    return RepeatConfig(layer=layer, num_layers=count).set(**fields)


def _in_sequence(layer: Config, count: int) -> Config:
    return SequenceConfig(layers=(layer,) * count)


def _shared_kv_stack(layer: Config, count: int) -> Config:
    return SharedKVStackConfig(layer=layer, num_layers=count, reader=_reader(layer), num_readers=2)


def _tracks(layer: Config, count: int) -> Config:
    return ParallelTracksConfig(layer=_repeat(layer, count), num_tracks=2)


def _tracks_between(layer: Config, count: int) -> Config:
    tracks = ParallelTracksConfig(layer=layer, num_tracks=2)
    return _repeat(SequenceConfig(layers=(layer, tracks)), count)


def _reader(layer: Config) -> Config:
    """A layer that reads the keys and values which `layer`, or its last part, makes or reads itself."""
    last = layer.layers[-1] if isinstance(layer, SequenceConfig) else layer
    assert isinstance(last, TransformerLayerConfig)
    return last.set(attention=inherit(SharedKVAttentionConfig(), last.attention))


def _block(attention: Attention, heads: Heads, feed_forward: Config, norm: Config) -> Config:
    """One layer for each attention of a pattern."""
    layers = tuple(
        TransformerLayerConfig(attention=a, feed_forward=feed_forward, norm=norm) for a in attention(heads)
    )
    return layers[0] if len(layers) == 1 else SequenceConfig(layers=layers)


def _model(
    attention: Attention,
    *,
    heads: Heads = Heads(),
    feed_forward: FeedForwardConfig = FeedForwardConfig(hidden_dim=24),  # noqa: B008  frozen
    norm: Config = RMSNormConfig(),  # noqa: B008  frozen
    stack: Stack = _repeat,
    num_blocks: int = 2,
    dim: int = 16,
    **fields: object,
) -> CausalLMConfig:
    decoder = stack(_block(attention, heads, feed_forward, norm), num_blocks)
    cfg = CausalLMConfig(vocab_size=VOCAB_SIZE, dim=dim, decoder=decoder, norm=norm, loss_chunk_tokens=16)
    return cfg.set(**fields)


def _with_lora(attention: Attention) -> CausalLMConfig:
    return lora(rank=2)(_model(attention))


def _feed_forward(**fields: object) -> FeedForwardConfig:
    return FeedForwardConfig(hidden_dim=24).set(**fields)


_BIASED = LinearConfig(bias=True)

MODELS: dict[str, Callable[[Attention], CausalLMConfig]] = {
    "base": _model,
    "deep": partial(_model, num_blocks=6),
    "wide": partial(_model, dim=40),
    "many_heads": partial(_model, heads=Heads(8, 4)),
    "large_heads": partial(_model, heads=Heads(4, 16)),
    "large_feed_forward": partial(_model, feed_forward=_feed_forward(hidden_dim=64)),
    "gelu": partial(_model, feed_forward=_feed_forward(activation=Activation.GELU)),
    "biased_feed_forward": partial(
        _model, feed_forward=_feed_forward(gate_proj=_BIASED, up_proj=_BIASED, down_proj=_BIASED)
    ),
    "norm_epsilon": partial(_model, norm=RMSNormConfig(eps=1e-6)),
    "untied_head": partial(_model, head=LinearConfig()),
    "logit_cap": partial(_model, logit_soft_cap=30.0, z_loss=1e-4),
    "bfloat16": partial(_model, activation_dtype=FloatType.BFLOAT16),
    "normal_init": partial(_model, embedding=EmbeddingConfig(init=NormalInitConfig(stddev=0.1))),
    "remat": partial(_model, stack=partial(_repeat, remat=Remat.FULL)),
    "unrolled": partial(_model, stack=partial(_repeat, unroll=2)),
    "in_sequence": partial(_model, stack=_in_sequence),
    "shared_kv_stack": partial(_model, stack=_shared_kv_stack),
    "parallel_tracks": partial(_model, stack=_tracks),
    "tracks_between_layers": partial(_model, stack=_tracks_between),
    "lora": _with_lora,
}


def grid() -> dict[tuple[str, str], CausalLMConfig]:
    """Every model variant with every attention variant, by the two names."""
    return {(m, a): model(attention) for m, model in MODELS.items() for a, attention in ATTENTIONS.items()}


def diagonal() -> list[tuple[str, str]]:
    """As few pairs of the grid as hold every model variant and every attention variant."""
    attentions = list(ATTENTIONS)
    return [(model, attentions[i % len(attentions)]) for i, model in enumerate(MODELS)]


def random_models(count: int, seed: int) -> list[CausalLMConfig]:
    """Different valid compositions, the same for the same seed: stacks of stacks of different layers."""
    rng = random.Random(seed)
    models: dict[CausalLMConfig, None] = {}
    while len(models) < count:
        models[_random_model(rng)] = None
    return list(models)


def _random_model(rng: random.Random) -> CausalLMConfig:
    return CausalLMConfig(
        vocab_size=VOCAB_SIZE,
        dim=rng.choice((8, 16, 24, 32)),
        decoder=_random_layer(rng, depth=3),
        norm=RMSNormConfig(eps=rng.choice((1e-5, 1e-6))),
        head=rng.choice((None, LinearConfig(), LinearConfig(bias=True))),
        logit_soft_cap=rng.choice((None, 30.0)),
        activation_dtype=rng.choice(list(FloatType)),
        loss_chunk_tokens=16,
    )


def _random_layer(rng: random.Random, depth: int) -> Config:
    kinds = ("block", "repeat", "sequence", "tracks", "shared_kv") if depth else ("block",)
    match rng.choice(kinds):
        case "repeat":
            return _repeat(_random_layer(rng, depth - 1), rng.randint(1, 3), remat=rng.choice(list(Remat)))
        case "sequence":
            return SequenceConfig(
                layers=tuple(_random_layer(rng, depth - 1) for _ in range(rng.randint(1, 3)))
            )
        case "tracks":
            return ParallelTracksConfig(layer=_random_layer(rng, depth - 1), num_tracks=rng.randint(1, 3))
        case "shared_kv":
            return _shared_kv_stack(_random_block(rng), rng.randint(2, 3))
        case _:
            return _random_block(rng)


def _random_block(rng: random.Random) -> Config:
    feed_forward = _feed_forward(hidden_dim=rng.choice((8, 24, 40)), activation=rng.choice(list(Activation)))
    heads = Heads(rng.choice((2, 4, 6)), rng.choice((4, 8)))
    return _block(rng.choice(list(ATTENTIONS.values())), heads, feed_forward, RMSNormConfig())
