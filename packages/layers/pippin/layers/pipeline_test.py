"""Pipelines over four devices train what one device trains, whatever the schedule.

The test's target sets XLA_FLAGS=--xla_force_host_platform_device_count=4.
"""

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from pippin.core.config_tree import override, replace
from pippin.core.errors import ConfigError
from pippin.core.module import flatten_params, merge, parameter_infos, split, unflatten_params
from pippin.core.sharding import MeshConfig, use_mesh
from pippin.layers import configs
from pippin.layers.pipeline_moves import moves
from pippin.layers.stack_config import PipelineConfig, PipelineSchedule, Remat
from pippin.layers.testing import assert_exact, equations, float64_fixture, parts, positions

pytestmark = pytest.mark.skipif(
    jax.device_count() < 4, reason="needs XLA_FLAGS=--xla_force_host_platform_device_count=4"
)

float64 = float64_fixture()

_V, _B, _T = 24, 16, 8
_LAYER = configs.TransformerLayerConfig(
    attention=configs.GroupedQueryAttentionConfig(num_heads=2, num_kv_heads=1, head_dim=4),
    feed_forward=configs.FeedForwardConfig(hidden_dim=8),
)
_TOKENS = np.random.default_rng(0).integers(0, _V, (_B, _T)).astype(np.int32)
_BATCH = {
    "tokens": _TOKENS,
    "targets": np.roll(_TOKENS, -1, axis=1),
    "positions": positions(_B, _T),
    "segment_ids": np.ones((_B, _T), np.int32),
    # Rows weigh different amounts, so that a mean of microbatches' means would be another number.
    "loss_weights": np.linspace(0.0, 1.0, _B * _T).reshape(_B, _T),
}


def _model(
    num_layers: int, pipeline: PipelineConfig | None = None, layer: Any = _LAYER, **fields: Any
) -> configs.CausalLMConfig:
    stack = configs.RepeatConfig(layer=layer, num_layers=num_layers, pipeline=pipeline, **fields)
    return configs.CausalLMConfig(vocab_size=_V, dim=8, decoder=stack, loss_chunk_tokens=8, z_loss=0.01)


def _gradients(cfg: Any) -> tuple[Any, Any]:
    """A function of parameters and batch, `((loss, metrics), gradients)` in float64; and parameters."""
    m = parts(cfg)

    def loss(params: Any, batch: Any) -> Any:
        model = merge(m.definition, params)
        model.dtype = jnp.dtype(jnp.float64)  # configs have float32 and bfloat16 alone
        return model.loss(batch)

    return jax.jit(jax.value_and_grad(loss, has_aux=True)), m.params


@functools.cache
def _alone(cfg: Any) -> Any:
    run, params = _gradients(cfg)
    return run(params, _BATCH)


def _on_mesh(cfg: Any, mesh_config: MeshConfig) -> Any:
    run, params = _gradients(cfg)
    mesh = mesh_config.make(jax.devices()[:4])

    def place(value: Any, axes: Any) -> Any:
        return jax.device_put(value, jax.sharding.NamedSharding(mesh, mesh_config.spec(axes)))

    infos = parameter_infos(nnx.eval_shape(lambda: cfg.build(rngs=nnx.Rngs(0))))
    params = jax.tree.map(lambda info, value: place(value, info.axes), infos, params)
    batch = {name: place(value, ("batch", "sequence")) for name, value in _BATCH.items()}
    with use_mesh(mesh_config, mesh):
        return run(params, batch)


_GPIPE, _1F1B = PipelineSchedule.GPIPE, PipelineSchedule.ONE_F_ONE_B


@pytest.mark.parametrize(
    ("schedule", "rounds", "microbatches", "mesh"),
    [
        (_GPIPE, 1, 4, MeshConfig(pipeline=4)),
        (_GPIPE, 2, 4, MeshConfig(pipeline=2, data=2)),
        (_1F1B, 1, 8, MeshConfig(pipeline=4)),
        (_1F1B, 2, 4, MeshConfig(pipeline=4)),
        (_1F1B, 4, 4, MeshConfig(pipeline=2, fsdp=2)),
    ],
)
def test_a_pipeline_trains_what_one_device_trains(schedule, rounds, microbatches, mesh):
    pipeline = PipelineConfig(schedule=schedule, rounds=rounds, microbatches=microbatches)
    (loss, metrics), gradients = _on_mesh(_model(8, pipeline), mesh)
    (expected, expected_metrics), expected_gradients = _alone(_model(8))
    assert_exact(loss, expected)
    jax.tree.map(assert_exact, metrics, expected_metrics)
    jax.tree.map(assert_exact, gradients, expected_gradients)


_COMPOSED = {
    "low-rank maps": configs.lora(rank=2)(_LAYER),
    "keys and values of another layer": configs.SharedKVStackConfig(
        layer=_LAYER,
        num_layers=2,
        reader=_LAYER.set(attention=configs.SharedKVAttentionConfig(num_heads=2, num_kv_heads=1, head_dim=4)),
        num_readers=1,
        remat=Remat.FULL,
    ),
    "tracks that are computed again": configs.ParallelTracksConfig(
        layer=_LAYER, num_tracks=2, remat=Remat.FULL
    ),
}


@pytest.mark.parametrize("schedule", PipelineSchedule)
@pytest.mark.parametrize("layer", _COMPOSED)
def test_layers_of_other_layers_train_in_a_pipeline_what_they_train_on_one_device(
    layer: str, schedule: PipelineSchedule
):
    pipeline = PipelineConfig(schedule=schedule, rounds=2, microbatches=4)
    mesh = MeshConfig(data=1, pipeline=2, fsdp=2)
    (loss, metrics), gradients = _on_mesh(_model(4, pipeline, _COMPOSED[layer]), mesh)
    (expected, expected_metrics), expected_gradients = _alone(_model(4, layer=_COMPOSED[layer]))
    assert_exact(loss, expected)
    jax.tree.map(assert_exact, metrics, expected_metrics)
    jax.tree.map(assert_exact, gradients, expected_gradients)


def test_1f1b_makes_gradients_of_what_is_trained_alone():
    cfg = _model(4, PipelineConfig(microbatches=4), _COMPOSED["low-rank maps"])
    m = parts(cfg)
    infos = flatten_params(parameter_infos(nnx.eval_shape(lambda: cfg.build(rngs=nnx.Rngs(0)))))
    params = flatten_params(m.params)
    trained = {path: p for path, p in params.items() if infos[path].owners[-1].endswith("LoRALinear")}
    assert 0 < len(trained) < len(params)

    def loss(trained: Any) -> Any:
        model = merge(m.definition, unflatten_params(params | trained))
        model.dtype = jnp.dtype(jnp.float64)
        return model.loss({name: jnp.asarray(value) for name, value in _BATCH.items()})[0]

    mesh = MeshConfig(data=1, pipeline=4)
    with use_mesh(mesh, mesh.make(jax.devices()[:4])):
        got = jax.jit(jax.grad(loss))(trained)
        program = jax.make_jaxpr(jax.grad(loss))(trained)
    expected = flatten_params(_alone(_model(4, layer=_COMPOSED["low-rank maps"]))[1])
    assert got.keys() == trained.keys()
    for path, gradient in got.items():
        assert_exact(gradient, expected[path])
    # From tick to tick, a device keeps gradients of these alone, of its one stage of one layer, and none of the input.
    kept = {
        out.aval.shape
        for equation in equations(program.jaxpr)
        if equation.primitive.name == "scan" and equation.params["length"] in (3, 4)
        for out in equation.outvars
    }
    shapes = {path: (1, 1, *p.shape[1:]) for path, p in params.items() if path.startswith("decoder.")}
    assert {shapes[path] for path in trained} <= kept
    assert not {shape for path, shape in shapes.items() if path not in trained} & kept
    assert (4, _B // 4, _T, 8) not in kept


def test_what_layers_report_is_the_mean_of_microbatches():
    model = replace(
        _model(4, PipelineConfig(schedule=_GPIPE, microbatches=4)),
        configs.FeedForwardConfig,
        configs.MoEConfig(num_experts=4),
    )
    mesh = MeshConfig(data=2, pipeline=2)
    (loss, metrics), gradients = _on_mesh(model, mesh)
    early = model.set(decoder=model.decoder.set(pipeline=PipelineConfig(microbatches=4, rounds=2)))
    (other_loss, other_metrics), other_gradients = _on_mesh(early, mesh)
    jax.tree.map(assert_exact, (loss, metrics, gradients), (other_loss, other_metrics, other_gradients))
    run, params = _gradients(model)
    each = [run(params, {name: value[i::4] for name, value in _BATCH.items()})[0][1] for i in range(4)]
    for name in ("moe/balance_loss", "moe/largest_share"):
        assert_exact(metrics[name], np.mean([m[name] for m in each]))


def test_1f1b_keeps_less_and_both_send_activations_alone():
    compiled = {}
    for schedule in PipelineSchedule:
        cfg = _model(16, PipelineConfig(schedule=schedule, microbatches=16), remat=Remat.FULL)
        (run, params), mesh_config = _gradients(cfg.set(loss_chunk_tokens=64)), MeshConfig(pipeline=4)
        mesh = mesh_config.make(jax.devices()[:4])
        infos = parameter_infos(nnx.eval_shape(lambda cfg=cfg: cfg.build(rngs=nnx.Rngs(0))))
        params = jax.tree.map(
            lambda info, p, mesh=mesh, cfg=mesh_config: jax.ShapeDtypeStruct(
                p.shape, p.dtype, sharding=cfg.sharding(mesh, info.axes, p.shape)
            ),
            infos,
            params,
        )
        batch = {n: jax.ShapeDtypeStruct((16, 256), a.dtype) for n, a in _BATCH.items()}
        with use_mesh(mesh_config, mesh):
            compiled[schedule] = run.lower(params, batch).compile()
    early, late = (compiled[s].memory_analysis().temp_size_in_bytes for s in (_1F1B, _GPIPE))
    # 7 inputs of stages, and not those of all 19 ticks.
    assert late - early > (19 - 7) * 256 * 8 * 8, (early, late)
    for program in compiled.values():
        # Parameters stay where they are, and each device computes the loss of its tokens: what is gathered is at most the
        # gradient of the last device's activations.
        gathered = re.findall(r"= f64\[([\d,]+)\]\S* all-gather\(", program.as_text())
        assert all(shape.endswith("1,256,8") for shape in gathered) and len(gathered) <= 1


@pytest.mark.parametrize("remat", [Remat.NONE, Remat.FULL])
def test_gpipe_keeps_no_copy_of_the_parameters_for_each_tick(remat: Remat):
    run, params = _gradients(
        _model(8, PipelineConfig(schedule=_GPIPE, microbatches=4, rounds=2), remat=remat)
    )
    mesh = MeshConfig(data=2, pipeline=2)
    with use_mesh(mesh, mesh.make(jax.devices()[:4])):
        program = jax.make_jaxpr(run)(params, _BATCH)
    copies = {(9, 2, *a.shape[1:]) for a in jax.tree.leaves(params["decoder"])}  # of a stage of two layers
    kept = [
        out.aval.shape
        for equation in equations(program.jaxpr)
        if equation.primitive.name == "scan" and equation.params["length"] == 4 * 2 + 1
        for out in equation.outvars
    ]
    assert kept and not copies & set(kept)


@pytest.mark.parametrize("schedule", PipelineSchedule)
def test_bfloat16_activations_that_are_computed_again_train_alike(schedule: PipelineSchedule):
    pipeline = PipelineConfig(schedule=schedule, rounds=2, microbatches=4)
    cfg = _model(8, pipeline, remat=Remat.FULL).set(activation_dtype=configs.FloatType.BFLOAT16)
    mesh_config = MeshConfig(data=1, pipeline=2, tensor=2)
    cfg = override(cfg, {"decoder.layer.attention.num_kv_heads": 2})
    batch = {n: jnp.asarray(a, jnp.float32 if a.dtype == np.float64 else a.dtype) for n, a in _BATCH.items()}

    def step(cfg: Any) -> Any:
        definition, params = split(cfg.build(rngs=nnx.Rngs(0)))
        return jax.jit(jax.value_and_grad(lambda p, b: merge(definition, p).loss(b)[0]))(params, batch)

    exact, alone = step(cfg.set(activation_dtype=configs.FloatType.FLOAT32)), step(cfg)
    with use_mesh(mesh_config, mesh_config.make(jax.devices()[:4])):
        got = step(cfg)
    np.testing.assert_allclose(got[0], exact[0], rtol=0.01)
    # The roundings are others, and as many: the gradient errs by no more than half as much again as one device's.
    for ours, one, true in zip(*map(jax.tree.leaves, (got[1], alone[1], exact[1])), strict=True):
        assert ours.dtype == jnp.float32
        assert np.linalg.norm(ours - true) < 1.5 * np.linalg.norm(one - true)


@pytest.mark.parametrize(
    ("layers", "config", "message"),
    [
        (
            4,
            {"microbatches": 4, "rounds": 2},
            r"4 layers cannot be 8 stages of one size \(4 devices on the pipeline axis, 2 rounds\)",
        ),
        (8, {"microbatches": 6}, r"pipeline\.microbatches \(6\) must be a multiple of 4"),
        (
            8,
            {"microbatches": 12},
            r"16 rows cannot be 12 microbatches that 1 devices share: .* a multiple of 12 rows\. To train, .* To evaluate,",
        ),
    ],
)
def test_what_cannot_be_shared_is_refused(layers: int, config: dict[str, int], message: str):
    with pytest.raises(ConfigError, match=message):
        _on_mesh(_model(layers, PipelineConfig(**config)), MeshConfig(pipeline=4))


def test_without_a_schedule_a_pipeline_s_mesh_computes_a_row_alone():
    (run, params), mesh = _gradients(_model(4)), MeshConfig(data=1, pipeline=4)
    row = {name: value[:1] for name, value in _BATCH.items()}
    with use_mesh(mesh, mesh.make(jax.devices()[:4])):
        got = run(params, row)
    jax.tree.map(assert_exact, got, _gradients(_model(4))[0](params, row))


def test_without_a_pipeline_axis_the_config_changes_nothing():
    with_pipeline = _gradients(_model(4, PipelineConfig(microbatches=3)))[0]
    without, params = _gradients(_model(4))
    assert str(with_pipeline.lower(params, _BATCH).as_text()) == without.lower(params, _BATCH).as_text()


@pytest.mark.parametrize(("stages", "rounds"), [(2, 1), (2, 2), (4, 2), (4, 6), (6, 4), (3, 5), (8, 3)])
def test_every_stage_gets_to_its_device(stages: int, rounds: int):
    held = {device: [device * rounds + i for i in range(rounds)] for device in range(stages)}
    got: dict[int, dict[int, int]] = {device: {} for device in range(stages)}
    for move in moves(stages, rounds):
        assert sorted(move.to) == list(range(stages))
        for device, receiver in enumerate(move.to):
            got[receiver][move.round[receiver]] = held[device][move.block[device]]
    assert got == {d: {r: r * stages + d for r in range(rounds)} for d in range(stages)}
