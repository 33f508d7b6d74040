"""The transformer layer and stacks of layers against NumPy in float64, with and without caches."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from pippin.core.config import Config
from pippin.core.config_tree import replace
from pippin.core.errors import ConfigError
from pippin.core.module import merge, parameter_infos, split
from pippin.core.outputs import Outputs, collect
from pippin.layers import reference
from pippin.layers.attention_config import GroupedQueryAttentionConfig, SharedKVAttentionConfig
from pippin.layers.cache_config import SlidingWindowCacheConfig
from pippin.layers.context import Context
from pippin.layers.feed_forward import FeedForward
from pippin.layers.feed_forward_config import FeedForwardConfig
from pippin.layers.moe_config import MoEConfig, TopKRouterConfig
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
from pippin.layers.testing import (
    Parts,
    assert_exact,
    check_gradients,
    float64_fixture,
    normal,
    parts,
    positions,
)

_float64 = float64_fixture()

_D, _T, _H = 4, 6, 4
_X = normal(2, _T, _D)
_HEADS: dict[str, Any] = {"num_heads": 2, "num_kv_heads": 1, "head_dim": _H}

_ATTENTION = GroupedQueryAttentionConfig(**_HEADS, qk_norm=RMSNormConfig())
_LAYER = TransformerLayerConfig(
    input_dim=_D, attention=_ATTENTION, feed_forward=FeedForwardConfig(hidden_dim=5)
)
_LOCAL = _LAYER.set(attention=_ATTENTION.set(window=2, cache=SlidingWindowCacheConfig()))
_GLOBAL = _LAYER.set(attention=_ATTENTION.set(position=NoPEConfig()))
_READER = _LAYER.set(attention=SharedKVAttentionConfig(**_HEADS, qk_norm=RMSNormConfig()))
_MOE = replace(
    _LAYER,
    FeedForwardConfig,
    MoEConfig(num_experts=3, top_k=2, router=TopKRouterConfig(balance_loss=0.5, z_loss=0.25)),
)

_REPEAT = RepeatConfig(input_dim=_D, layer=_LAYER, num_layers=3)
_PATTERN = SequenceConfig(input_dim=_D, layers=(_LOCAL, _GLOBAL))
_SHARED = SharedKVStackConfig(input_dim=_D, layer=_LAYER, num_layers=3, reader=_READER, num_readers=2)
_TRACKS = ParallelTracksConfig(input_dim=_D, layer=_LAYER, num_tracks=2)

STACKS: dict[str, Config] = {
    "layer": _LAYER,
    "repeat": _REPEAT,
    "pattern": _PATTERN,
    "repeated pattern": _REPEAT.set(layer=_PATTERN, num_layers=2),
    "shared kv": _SHARED,
    "shared kv, then a layer": SequenceConfig(input_dim=_D, layers=(_SHARED, _LAYER)),
    "repeated shared kv": _REPEAT.set(layer=_SHARED, num_layers=2),
    "tracks of patterns": _TRACKS.set(layer=_PATTERN),
    "shared kv in tracks": _TRACKS.set(layer=_SHARED),
}


@functools.cache
def _stack(name: str) -> Parts:
    return parts(STACKS[name])


def _context(start: int = 0, stop: int = _T, **fields: Any) -> Context:
    return Context(jnp.asarray(positions(2, _T)[:, start:stop]), **fields)


def _run(m: Parts, x: Any = _X, **fields: Any) -> Any:
    return m.call(m.params, x, _context(**fields)).x


def _layers(p: Any, x: np.ndarray, count: int, **kwargs: Any) -> np.ndarray:
    """A repeated layer by the reference."""
    for i in range(count):
        x, _ = reference.transformer_layer(
            reference.layer_of(p, i), x, positions(*x.shape[:2]), head_dim=_H, **kwargs
        )
    return x


def test_a_layer_adds_attention_and_a_feed_forward_each_behind_a_norm():
    m = _stack("layer")
    expected, _ = reference.transformer_layer(m.params, _X, positions(2, _T), head_dim=_H)
    assert_exact(_run(m), expected)


def test_a_layer_has_the_gradient_of_its_differences():
    m, ctx = _stack("layer"), Context(jnp.asarray(positions(1, 2)))
    check_gradients(lambda p, x: m.call(p, x, ctx).x, m.params, _X[:1, :2])


@pytest.mark.parametrize("count, unroll", [(1, 1), (3, 1), (3, 2), (3, 3)])
def test_repeat_equals_its_layers_one_after_the_other(count, unroll):
    m = parts(_REPEAT.set(num_layers=count, unroll=unroll))
    assert_exact(_run(m), _layers(m.params["layer"], _X, count))


def _loss(m: Parts) -> Any:
    return lambda p: jnp.sum(jnp.square(m.call(p, _X, _context()).x))


@pytest.mark.parametrize("cfg", [_REPEAT, _SHARED])
def test_remat_does_not_change_what_is_computed(cfg):
    plain, full = (parts(cfg.set(remat=remat)) for remat in (Remat.NONE, Remat.FULL))
    jax.tree.map(assert_exact, *(jax.jit(jax.value_and_grad(_loss(m)))(m.params) for m in (full, plain)))


@pytest.mark.parametrize("cfg", [_REPEAT, _REPEAT.set(num_layers=2, unroll=2), _SHARED])
def test_remat_keeps_less_for_the_backward_pass(cfg):
    def kept(remat: Remat) -> int:
        m = parts(cfg.set(remat=remat))
        # What is kept are the leaves of the function that vjp returns.
        pull = jax.eval_shape(lambda p: jax.vjp(_loss(m), p)[1], m.params)
        return sum(leaf.size for leaf in jax.tree.leaves(pull))

    assert kept(Remat.FULL) < kept(Remat.SAVE_MATMULS) < kept(Remat.NONE)


@pytest.mark.parametrize("cfg", [_REPEAT, _SHARED.set(remat=Remat.FULL), _REPEAT.set(layer=_TRACKS)])
def test_the_program_does_not_grow_with_the_number_of_layers(cfg):
    def size(num_layers: int) -> int:
        deep = cfg.set(num_layers=num_layers)
        definition, params = split(nnx.eval_shape(lambda: deep.build(rngs=nnx.Rngs(0))))

        def loss(p, x):
            return jnp.sum(merge(definition, p)(x, _context()).x)

        return len(jax.jit(jax.grad(loss)).lower(params, jnp.zeros(_X.shape, jnp.float32)).as_text())

    # Some digits: 5 becomes 16 wherever a stacked shape is written. Loops over fewer might share functions with another
    # loop that is as long, such as that over two tracks.
    assert size(16) < 1.02 * size(5)


def test_a_pattern_runs_local_and_global_layers_in_turn():
    m = _stack("repeated pattern")
    x = _X
    for i in range(2):
        p = reference.layer_of(m.params["layer"]["layers"], i)
        x, _ = reference.transformer_layer(p["0"], x, positions(2, _T), head_dim=_H, window=2)
        x, _ = reference.transformer_layer(p["1"], x, positions(2, _T), head_dim=_H, theta=None)
    assert_exact(_run(m), x)


def test_a_sequence_hands_on_the_last_keys_and_values_that_were_made():
    cfg = SequenceConfig(input_dim=_D, layers=(_LAYER, _READER, _REPEAT.set(num_layers=1), _READER))
    m = parts(cfg)
    at, p = positions(2, _T), m.params["layers"]
    x, kv = reference.transformer_layer(p["0"], _X, at, head_dim=_H)
    x, _ = reference.transformer_layer(p["1"], x, at, head_dim=_H, kv=kv)
    x = _layers(p["2"]["layer"], x, 1)  # a scan keeps its keys and values to itself
    x, _ = reference.transformer_layer(p["3"], x, at, head_dim=_H, kv=kv)
    assert_exact(_run(m), x)


def test_block_2_reads_the_keys_and_values_of_the_last_layer_of_block_1():
    m = _stack("shared kv")
    x = _layers(m.params["first"]["layer"], _X, 2)
    x, kv = reference.transformer_layer(m.params["source"], x, positions(2, _T), head_dim=_H)
    assert_exact(_run(m), _layers(m.params["readers"]["layer"], x, 2, kv=kv))


def test_a_shared_kv_stack_has_the_gradient_of_its_differences():
    m = parts(_SHARED.set(num_layers=2, num_readers=1))
    ctx = Context(jnp.asarray(positions(1, 2)))
    check_gradients(lambda p, x: m.call(p, x, ctx).x, m.params, _X[:1, :2])


@pytest.mark.parametrize("name", [name for name in STACKS if "shared" in name])
def test_prefill_for_the_last_position_alone_gives_what_the_whole_gives_there(name):
    m = _stack(name)
    segments = jnp.asarray(np.array([[1] * _T, [1, 1, 2, 2, 2, 2]], np.int32))
    whole = _run(m, segment_ids=segments)
    last = _run(m, segment_ids=segments, last_only=True)
    assert_exact(last[:, -1], whole[:, -1])
    # The bypass: block 2 made one position, unless a later layer reads them all.
    assert (last.shape[1] == 1) == (name in ("shared kv", "shared kv in tracks"))


def test_tracks_are_averaged():
    m = parts(_TRACKS)
    tracks = [
        reference.transformer_layer(
            reference.layer_of(m.params["track"], i), _X, positions(2, _T), head_dim=_H
        )
        for i in range(2)
    ]
    assert_exact(_run(m), (tracks[0][0] + tracks[1][0]) / 2)


def test_one_track_is_its_layer():
    m = parts(_TRACKS.set(num_tracks=1))
    expected, _ = reference.transformer_layer(
        reference.layer_of(m.params["track"], 0), _X, positions(2, _T), head_dim=_H
    )
    assert_exact(_run(m), expected)


def test_tracks_have_the_gradient_of_their_differences():
    m, ctx = parts(_TRACKS), Context(jnp.asarray(positions(1, 2)))
    check_gradients(lambda p, x: m.call(p, x, ctx).x, m.params, _X[:1, :2])


@pytest.mark.parametrize("name", STACKS)
def test_a_stack_by_parts_through_its_cache_equals_the_whole(name):
    m = _stack(name)
    cache = m.method("init_cache", batch_size=2, max_len=_T, dtype=jnp.dtype(jnp.float64))(m.params)
    outs = []
    for start, stop in ((0, 4), (4, 5), (5, 6)):  # prefill, and decode
        out = m.call(m.params, _X[:, start:stop], _context(start, stop), cache)
        cache = out.cache
        outs.append(out.x)
    assert_exact(np.concatenate(outs, axis=1), _run(m))


def _report(m: Parts, x: Any) -> tuple[Any, Outputs]:
    @jax.jit
    def run(p: Any, x: Any) -> Any:
        with collect() as outputs:
            out = merge(m.definition, p)(x, _context())
        return out.x, outputs

    return run(m.params, x)


@pytest.mark.parametrize(
    "cfg, stack_of",
    [
        (_REPEAT.set(layer=_MOE, num_layers=2, remat=Remat.FULL), "layer"),
        (_TRACKS.set(layer=_MOE), "track"),
    ],
)
def test_losses_of_the_layers_of_a_stack_add_up_and_metrics_are_averaged(cfg, stack_of):
    m, one = parts(cfg), parts(_MOE)
    _, outputs = _report(m, _X)
    x, losses, shares = _X, 0.0, []
    for i in range(2):
        layer = Parts(one.definition, reference.layer_of(m.params[stack_of], i), one.call)
        y, reported = _report(layer, x)
        x = y if stack_of == "layer" else x
        losses += sum(float(v) for v in reported.losses.values())
        shares.append(float(reported.sums["moe/largest_share"]))
    assert_exact(sum(float(v) for v in outputs.losses.values()), losses)
    assert_exact(outputs.sums["moe/largest_share"], sum(shares))
    assert_exact(outputs.counts["moe/largest_share"], 2)


def test_the_source_layer_of_a_shared_kv_stack_reports_too():
    cfg = _SHARED.set(layer=_MOE, num_layers=2, num_readers=1, remat=Remat.FULL)
    assert_exact(_report(parts(cfg), _X)[1].counts["moe/largest_share"], 2)


def test_stacked_parameters_name_their_stacks_first():
    cfg = RepeatConfig(input_dim=_D, layer=_TRACKS, num_layers=3)
    infos = parameter_infos(nnx.eval_shape(lambda: cfg.build(rngs=nnx.Rngs(0))))
    info = infos["layer"]["track"]["attention"]["q_proj"]["weight"]
    assert (info.shape, info.axes) == ((3, 2, _D, 8), ("layers", "tracks", "embed", "heads"))
    assert info.stacked == 2


def test_layers_of_a_stack_start_with_values_of_their_own():
    weights = parts(_REPEAT, seed=0).definition, split(_REPEAT.build(rngs=nnx.Rngs(0)))[1]
    q = np.asarray(weights[1]["layer"]["attention"]["q_proj"]["weight"])
    assert len({row.tobytes() for row in q}) == 3


@pytest.mark.parametrize(
    "make, match",
    [
        (lambda: RepeatConfig(num_layers=0), r"Repeat: num_layers \(0\) must be at least 1"),
        (lambda: RepeatConfig(unroll=0), r"Repeat: unroll \(0\) must be at least 1"),
        (lambda: SharedKVStackConfig(num_layers=1), r"SharedKVStack: num_layers \(1\) must be at least 2"),
        (lambda: SharedKVStackConfig(num_readers=0), r"num_readers \(0\) must be at least 1"),
        (lambda: ParallelTracksConfig(num_tracks=0), r"ParallelTracks: num_tracks \(0\) must be at least 1"),
    ],
)
def test_stacks_of_too_few_are_refused(make, match):
    with pytest.raises(ConfigError, match=match):
        make()


def test_layers_of_a_sequence_that_are_alike_are_traced_once():
    traced = []

    class Counting(FeedForward):
        class Config(FeedForwardConfig, provides="feed_forward"):
            pass

        def __call__(self, x):
            traced.append(x.shape)
            return super().__call__(x)

    alike = _LAYER.set(feed_forward=Counting.Config(hidden_dim=5))
    model = SequenceConfig(input_dim=_D, layers=(alike, alike, alike, _LOCAL, alike)).build(rngs=nnx.Rngs(0))
    definition, params = split(model)
    ctx = Context(jnp.asarray(positions(2, _T)))
    jax.jit(lambda params, x: merge(definition, params)(x, ctx).x)(params, jnp.asarray(_X, jnp.float32))
    # The first, and one of those that are told of keys of a layer before.
    assert traced == [_X.shape] * 2


def test_a_shared_kv_stack_of_layers_without_keys_says_what_to_put_there():
    m = parts(_SHARED.set(layer=_REPEAT, num_layers=2))
    with pytest.raises(ConfigError, match="gave no keys and values.*Make it a TransformerLayer"):
        _run(m)


def test_a_layer_of_a_pattern_that_lacks_a_size_is_named_by_its_path():
    cfg = SequenceConfig(input_dim=_D, layers=(_LAYER, TransformerLayerConfig()))
    with pytest.raises(ConfigError, match=r"layers\.1\.attention\.num_heads of SequenceConfig is required"):
        cfg.build(rngs=nnx.Rngs(0))
