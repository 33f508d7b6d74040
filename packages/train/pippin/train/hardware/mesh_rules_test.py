import math

import jax
import pytest
from flax import nnx

from pippin.core.config_tree import override
from pippin.core.errors import ConfigError
from pippin.core.hardware.accelerator import parse_target
from pippin.core.mesh_config import MESH_AXES
from pippin.core.module import parameter_infos
from pippin.layers.causal_lm_config import FloatType
from pippin.layers.linear_config import MatmulType
from pippin.layers.stack_config import PipelineConfig, Remat
from pippin.train.hardware.mesh_rules import apply_mesh_rules
from pippin.train.hardware.mesh_rules_config import (
    MeshRuleConfig,
    SetAccumulationConfig,
    SetMeshConfig,
    SetPipelineConfig,
    SetPrecisionConfig,
    SetRematConfig,
)
from pippin.train.recipe import all_recipes
from pippin.train.toy import toy_config
from pippin.train.trainer_config import TrainerConfig

_RULES = (
    MeshRuleConfig(accelerators="cpu-*"),
    MeshRuleConfig(
        accelerators="tpu-v5e-*",
        modifiers=(
            SetMeshConfig(data=2, fsdp=-1),
            SetRematConfig(),
            SetPrecisionConfig(),
            SetAccumulationConfig(rows_per_device=1),
        ),
    ),
    MeshRuleConfig(accelerators="tpu-*"),
)


def _cfg() -> TrainerConfig:
    return toy_config(batch_size=16).set(mesh_rules=_RULES)


def test_the_first_rule_that_fits_is_applied() -> None:
    cfg = apply_mesh_rules(_cfg(), parse_target("tpu-v5e-4")).cfg
    assert (cfg.mesh.data, cfg.mesh.fsdp) == (2, -1)
    assert cfg.mesh.rules == _cfg().mesh.rules
    assert cfg.model.decoder.remat is Remat.FULL
    assert cfg.model.activation_dtype is FloatType.BFLOAT16
    assert cfg.learner.microbatches == 4  # 16 rows over 4 devices, one at a time
    assert apply_mesh_rules(_cfg(), parse_target("tpu-v6e-4")).cfg == _cfg()


def test_the_mesh_of_a_rule_is_that_of_each_slice() -> None:
    cfg = apply_mesh_rules(_cfg(), parse_target("tpu-v5e-4x3")).cfg
    assert cfg.mesh.shape(12) == dict.fromkeys(MESH_AXES, 1) | {"data": 6, "fsdp": 2}
    all_of_them = MeshRuleConfig(accelerators="tpu-*", modifiers=(SetMeshConfig(data=-1, fsdp=2),))
    cfg = apply_mesh_rules(_cfg().set(mesh_rules=(all_of_them,)), parse_target("tpu-v5e-4x3")).cfg
    assert (cfg.mesh.data, cfg.mesh.fsdp) == (-1, 2)


def test_what_each_modifier_changed_is_told() -> None:
    applied = apply_mesh_rules(_cfg(), parse_target("tpu-v5e-4"))
    assert dict(applied.changes) == {
        "SetMesh": ("mesh.data: -1 -> 2", "mesh.fsdp: 1 -> -1"),
        "SetRemat": ("model.decoder.remat: none -> full",),
        "SetPrecision": ("model.activation_dtype: float32 -> bfloat16",),
        "SetAccumulation": ("learner.microbatches: 1 -> 4",),
    }


def test_an_accelerator_without_a_rule_is_refused_with_the_rules() -> None:
    with pytest.raises(
        ConfigError, match=r"no mesh rule fits gpu-h100-8. The rules are for cpu-\*, tpu-v5e-\*, tpu-\*"
    ):
        apply_mesh_rules(_cfg(), parse_target("gpu-h100-8"))


def test_a_mesh_that_was_set_by_hand_is_not_undone() -> None:
    cfg = override(_cfg(), {"mesh.tensor": 2})
    with pytest.raises(
        ConfigError, match=r"mesh.tensor was set to 2, and the mesh rule for tpu-v5e-4 sets it to 1"
    ):
        apply_mesh_rules(cfg, parse_target("tpu-v5e-4"))


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("model.activation_dtype", "float32"),
        ("model.decoder.remat", "save_matmuls"),
        ("learner.microbatches", 2),
    ],
)
def test_a_rule_does_not_undo_what_was_set_by_hand(path: str, value: object) -> None:
    field = path.rpartition(".")[2]
    with pytest.raises(
        ConfigError, match=rf"{field}.* was set to {value}, and the mesh rule for tpu-v5e-4 sets it to"
    ):
        apply_mesh_rules(override(_cfg(), {path: value}), parse_target("tpu-v5e-4"))


def test_a_rule_makes_a_pipeline_and_8_bit_products_without_new_parameters() -> None:
    pipeline = PipelineConfig(microbatches=8, rounds=2)
    rule = MeshRuleConfig(
        accelerators="tpu-*",
        modifiers=(
            SetMeshConfig(fsdp=-1, pipeline=2),
            SetPipelineConfig(pipeline=pipeline),
            SetPrecisionConfig(matmul=MatmulType.INT8),
        ),
    )
    cfg = _cfg().set(mesh_rules=(rule,))
    applied = apply_mesh_rules(cfg, parse_target("tpu-v5e-4"))
    assert applied.cfg.model.decoder.pipeline == pipeline
    changes = dict(applied.changes)
    assert any(
        line.startswith("model.decoder.pipeline") and "8" in line for line in changes["SetPipeline"]
    ), changes
    assert any("QuantizedLinear" in line for line in changes["SetPrecision"])
    before, after = (
        jax.tree.map(
            lambda i: (i.path, i.shape),
            parameter_infos(nnx.eval_shape(lambda c=c: c.build(rngs=nnx.Rngs(0)))),
        )
        for c in (cfg.model, applied.cfg.model)
    )
    assert before == after


def test_a_pipeline_takes_its_microbatches_of_what_accumulation_leaves() -> None:
    modifiers = (
        SetMeshConfig(data=2, pipeline=2),
        SetPipelineConfig(pipeline=PipelineConfig(microbatches=4)),
        SetAccumulationConfig(rows_per_device=1),
    )
    rule = MeshRuleConfig(accelerators="tpu-*", modifiers=modifiers)
    cfg = apply_mesh_rules(toy_config(batch_size=16).set(mesh_rules=(rule,)), parse_target("tpu-v5e-4")).cfg
    assert cfg.learner.microbatches == 2  # 8 rows a device, 4 microbatches of one row at a time


def test_a_pipeline_of_a_model_that_cannot_be_one_is_refused() -> None:
    rule = MeshRuleConfig(
        accelerators="tpu-*", modifiers=(SetPipelineConfig(pipeline=PipelineConfig(microbatches=4)),)
    )
    cfg = all_recipes()["afm_on_device_2025"].make().set(mesh_rules=(rule,))
    with pytest.raises(ConfigError, match="decoder has no Repeat that could be one"):
        apply_mesh_rules(cfg, parse_target("tpu-v5p-512"))


def test_without_rules_a_config_is_for_any_hardware_as_it_is() -> None:
    applied = apply_mesh_rules(toy_config(), parse_target("gpu-b200-64"))
    assert (applied.cfg, applied.rule) == (toy_config(), None)


@pytest.mark.parametrize(
    "target", ["cpu-1", "tpu-v5e-256", "tpu-v5p-512", "tpu-v6e-256", "gpu-h100-256", "gpu-b200-64"]
)
@pytest.mark.parametrize("name", all_recipes())
def test_every_recipe_has_a_rule_for_every_accelerator(name: str, target: str) -> None:
    assert apply_mesh_rules(all_recipes()[name].make(), parse_target(target)).rule is not None


@pytest.mark.parametrize("target", ["tpu-v5e-256", "tpu-v5p-1024", "gpu-h100-512"])
@pytest.mark.parametrize("name", all_recipes())
def test_every_recipe_s_state_fits_half_of_the_memory_that_its_rule_splits_it_over(
    name: str, target: str
) -> None:
    # The mixture's state needs more devices than 256 of the smallest.
    larger = {"tpu-v5e-256": "tpu-v5p-4096"} if name == "afm_server_ptmoe" else {}
    cfg, on = all_recipes()[name].make(), parse_target(larger.get(target, target))
    model = nnx.eval_shape(lambda: cfg.model.build(rngs=nnx.Rngs(0)))
    parameters = sum(
        info.shape and math.prod(info.shape) or 1 for info in jax.tree.leaves(parameter_infos(model))
    )
    shape = apply_mesh_rules(cfg, on).cfg.mesh.shape(on.num_devices)
    # Float32 parameters, and two numbers of each for the optimizer.
    assert 12 * parameters / shape["fsdp"] < on.device.memory_bytes / 2
