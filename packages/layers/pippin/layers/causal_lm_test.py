"""The language model against NumPy in float64, its loss, its caches, and models changed by modifiers.

The model computes in float32 at most: results are compared within `testing.CLOSE`.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from pippin.core.config_tree import replace
from pippin.core.errors import ConfigError
from pippin.core.module import flatten_params, merge, split, unflatten_params
from pippin.layers import reference
from pippin.layers.attention_config import GroupedQueryAttentionConfig, SharedKVAttentionConfig
from pippin.layers.causal_lm_config import CausalLMConfig, FloatType
from pippin.layers.feed_forward_config import FeedForwardConfig
from pippin.layers.linear_config import LinearConfig, lora
from pippin.layers.moe_config import MoEConfig
from pippin.layers.norm_config import RMSNormConfig
from pippin.layers.stack_config import RepeatConfig, SharedKVStackConfig, TransformerLayerConfig
from pippin.layers.testing import Parts, assert_close, equations, parts, positions

_V, _D, _H, _B, _T = 13, 8, 4, 2, 6
_HEADS: dict[str, Any] = {"num_heads": 2, "num_kv_heads": 1, "head_dim": _H}
_LAYER = TransformerLayerConfig(
    attention=GroupedQueryAttentionConfig(**_HEADS, qk_norm=RMSNormConfig()),
    feed_forward=FeedForwardConfig(hidden_dim=6),
)
_LM = CausalLMConfig(
    vocab_size=_V, dim=_D, decoder=RepeatConfig(layer=_LAYER, num_layers=2), z_loss=0.1, loss_chunk_tokens=4
)
_TOKENS = np.random.default_rng(0).integers(0, _V, (_B, _T)).astype(np.int32)


@functools.cache
def _model(cfg: CausalLMConfig = _LM) -> Parts:
    return parts(cfg, dtype=jnp.float32)


def _batch(**changes: Any) -> dict[str, Any]:
    return {
        "tokens": _TOKENS,
        "targets": np.roll(_TOKENS, -1, axis=1),
        "positions": positions(_B, _T),
        "segment_ids": np.ones((_B, _T), np.int32),
        "loss_weights": np.ones((_B, _T), np.float32),
        **changes,
    }


@functools.cache
def _loss(cfg: CausalLMConfig = _LM) -> Any:
    definition = _model(cfg).definition
    return jax.jit(jax.value_and_grad(lambda p, batch: merge(definition, p).loss(batch), has_aux=True))


def _value(batch: dict[str, Any], cfg: CausalLMConfig = _LM) -> tuple[float, dict[str, float]]:
    (value, metrics), _ = _loss(cfg)(_model(cfg).params, batch)
    return float(value), {name: float(v) for name, v in metrics.items()}


def _reference(cfg: CausalLMConfig = _LM) -> np.ndarray:
    params = jax.tree.map(lambda a: np.asarray(a, np.float64), _model(cfg).params)
    return reference.causal_lm(params, _TOKENS, positions(_B, _T), 2, head_dim=_H)


def test_logits_equal_the_formula():
    assert_close(_model().call(_model().params, _TOKENS), _reference())


def test_an_untied_head_with_capped_logits_equals_the_formula():
    cfg = _LM.set(head=LinearConfig(bias=True), logit_soft_cap=2.0)
    m = _model(cfg)
    table = np.asarray(m.params["embedding"]["weight"], np.float64)
    # The reference's logits are of the tied head: its states are theirs, times the table's pseudo-inverse.
    states = _reference(cfg) @ np.linalg.pinv(table).T
    logits = reference.linear(m.params["head"], states)
    assert_close(m.call(m.params, _TOKENS), 2 * np.tanh(logits / 2))


def test_the_loss_is_cross_entropy_and_z_loss_of_the_tokens_that_count():
    weights = np.array([[1, 1, 0, 1, 0, 1], [0, 0, 1, 1, 1, 0]], np.float32)
    batch = _batch(loss_weights=weights)
    logits, count = _reference(), weights.sum()
    cross_entropy = (weights * reference.cross_entropy(logits, batch["targets"])).sum() / count
    z_loss = 0.1 * (weights * reference.logsumexp(logits) ** 2).sum() / count
    correct = (weights * (logits.argmax(axis=-1) == batch["targets"])).sum() / count
    value, metrics = _value(batch)
    assert_close(value, cross_entropy + z_loss)
    expected = {"cross_entropy": cross_entropy, "z_loss": z_loss, "accuracy": correct, "weight": count}
    assert metrics == pytest.approx(expected, rel=2e-5)


def test_gradients_equal_those_of_the_plain_loss_of_the_logits():
    m, batch = _model(), _batch()

    def plain(params):
        logits = m.call(params, batch["tokens"])
        normaliser = jax.nn.logsumexp(logits, axis=-1)
        target = jnp.take_along_axis(logits, batch["targets"][..., None], axis=-1)[..., 0]
        return jnp.mean(normaliser - target + 0.1 * jnp.square(normaliser))

    jax.tree.map(assert_close, _loss()(m.params, batch)[1], jax.jit(jax.grad(plain))(m.params))


def test_the_loss_is_a_mean_whatever_its_weights_add_up_to():
    value, _ = _value(_batch())
    small, metrics = _value(_batch(loss_weights=np.full((_B, _T), 1 / 64, np.float32)))
    assert_close(small, value)
    assert_close(metrics["weight"], _B * _T / 64)


def test_padding_changes_nothing():
    last_two = np.arange(_T) >= 4
    padded = _batch(
        segment_ids=np.where(last_two, 0, 1) * np.ones((_B, 1), np.int64).astype(np.int32),
        loss_weights=np.where(last_two, 0, 1).astype(np.float32) * np.ones((_B, 1), np.float32),
    )
    other = {**padded, "tokens": np.where(last_two, 0, _TOKENS), "targets": np.where(last_two, 3, _TOKENS)}
    padded["targets"] = np.where(last_two, 5, _TOKENS)
    assert _value(other) == _value(padded)


def test_a_batch_of_padding_alone_has_no_loss_and_no_gradient():
    nothing = np.zeros((_B, _T), np.int32)
    batch = _batch(segment_ids=nothing, loss_weights=nothing.astype(np.float32))
    (value, metrics), gradients = _loss()(_model().params, batch)
    assert value == metrics["cross_entropy"] == metrics["weight"] == 0
    assert not any(np.any(g) for g in jax.tree.leaves(gradients))


def test_packed_documents_have_the_losses_of_separate_ones():
    document = np.array([[1, 1, 1, 1, 2, 2]], np.int32).repeat(2, axis=0)
    at = np.array([[0, 1, 2, 3, 0, 1]], np.int32).repeat(2, axis=0)
    packed, _ = _value(_batch(segment_ids=document, positions=at))
    total = 0.0
    for segment in (1, 2):
        inside = document == segment
        # The other document as padding in front or behind: its own positions, and no weight.
        separate = _batch(
            segment_ids=np.where(inside, 1, 0).astype(np.int32),
            positions=np.where(inside, at, -1).astype(np.int32),
            loss_weights=inside.astype(np.float32),
            tokens=np.where(inside, _TOKENS, 0),
        )
        total += _value(separate)[0] * inside.sum()
    assert_close(packed, total / (_B * _T))


def test_one_token_of_one_row():
    batch = {name: a[:1, :1] for name, a in _batch().items()}
    logits = _model().call(_model().params, batch["tokens"])
    (value, metrics), _ = _loss()(_model().params, batch)
    assert_close(
        metrics["cross_entropy"], reference.cross_entropy(np.asarray(logits), batch["targets"])[0, 0]
    )
    assert_close(value, metrics["cross_entropy"] + metrics["z_loss"])


def test_losses_of_layers_are_added_and_named():
    cfg = replace(_LM, FeedForwardConfig, MoEConfig(num_experts=4))
    value, metrics = _value(_batch(), cfg)
    parts_of_loss = ("cross_entropy", "z_loss", "moe/balance_loss", "moe/router_z_loss")
    assert_close(value, sum(metrics[name] for name in parts_of_loss))
    assert 0.25 <= metrics["moe/largest_share"] <= 0.5  # of the visits, which are two of each token


def test_training_never_holds_the_logits_of_all_tokens():
    cfg = _LM.set(vocab_size=512, loss_chunk_tokens=8)
    definition, params = split(nnx.eval_shape(lambda: cfg.build(rngs=nnx.Rngs(0))))
    batch = {n: jax.ShapeDtypeStruct((_B, 32), a.dtype) for n, a in _batch().items()}
    step = jax.jit(jax.grad(lambda p, b: merge(definition, p).loss(b)[0]))
    traced = step.trace(params, batch)
    results = [v.aval for e in equations(traced.jaxpr.jaxpr) for v in e.outvars]
    # The table's gradient, and the logits of one chunk of eight tokens.
    assert max(aval.size for aval in results if 512 in aval.shape) == 512 * 8
    # And the compiler put none together.
    compiled = traced.lower().compile().as_text() or ""
    assert f"[{_B},32,512]" not in compiled and f"[{_B * 32},512]" not in compiled


def test_bfloat16_activations_give_a_float32_loss_near_that_of_float32():
    cfg = _LM.set(activation_dtype=FloatType.BFLOAT16)
    assert _model(cfg).call(_model(cfg).params, _TOKENS).dtype == jnp.bfloat16
    (value, _), gradients = _loss(cfg)(_model(cfg).params, _batch())
    assert value.dtype == jnp.float32
    assert {g.dtype for g in jax.tree.leaves(gradients)} == {jnp.dtype(jnp.float32)}
    # Eight bits an activation; the loss is a mean of 12 tokens.
    assert float(value) == pytest.approx(_value(_batch())[0], rel=0.02)


def _shared() -> CausalLMConfig:
    reader = _LAYER.set(attention=SharedKVAttentionConfig(**_HEADS, qk_norm=RMSNormConfig()))
    return _LM.set(decoder=SharedKVStackConfig(layer=_LAYER, num_layers=2, reader=reader, num_readers=1))


@pytest.mark.parametrize("cfg", [_LM, _shared()], ids=["repeat", "shared kv"])
def test_extend_by_parts_gives_the_logits_of_the_whole(cfg):
    m = _model(cfg)
    extend, last = m.method("extend"), m.method("extend", last_only=True)
    whole = m.call(m.params, _TOKENS)
    cache = m.method("init_cache", batch_size=_B, max_len=_T)(m.params)
    prefilled, _ = last(m.params, _TOKENS[:, :4], cache)
    assert_close(prefilled, whole[:, 3:4])
    outs = []
    for start, stop in ((0, 4), (4, 5), (5, 6)):
        logits, cache = extend(m.params, _TOKENS[:, start:stop], cache)
        outs.append(logits)
    assert_close(np.concatenate(outs, axis=1), whole)
    assert cache["lengths"].tolist() == [_T, _T]


def test_a_model_with_lora_starts_as_its_base_and_adds_only_loras_parameters():
    base, tuned = _model(), lora(rank=2)(_LM).build(rngs=nnx.Rngs(1))
    definition, params = split(tuned)
    flat = flatten_params(params)
    added = {path: a for path, a in flat.items() if path.rpartition(".")[2] in ("down", "up")}
    kept = {path.replace(".base.", "."): path for path in flat if path not in added}
    assert kept.keys() == flatten_params(base.params).keys()
    assert len(added) == 2 * 7  # of q, k, v, o, gate, up and down

    flat |= {path: flatten_params(base.params)[name] for name, path in kept.items()}
    logits = jax.jit(lambda p: merge(definition, p)(jnp.asarray(_TOKENS)))(unflatten_params(flat))
    np.testing.assert_array_equal(logits, base.call(base.params, _TOKENS))


@pytest.mark.parametrize(
    "make, match",
    [
        (lambda: CausalLMConfig(loss_chunk_tokens=0), r"loss_chunk_tokens \(0\) must be at least 1"),
        (lambda: CausalLMConfig(logit_soft_cap=0.0), r"logit_soft_cap \(0.0\) must be positive"),
        (lambda: CausalLMConfig(decoder=FeedForwardConfig()), r"takes a component that provides 'layer'"),
        (lambda: CausalLMConfig(vocab_size=3).build(rngs=nnx.Rngs(0)), "dim of CausalLMConfig is required"),
    ],
)
def test_models_that_cannot_be_are_refused(make, match):
    with pytest.raises(ConfigError, match=match):
        make()
