"""What a run changes on which hardware: rules that map an accelerator to modifiers. No JAX.

A recipe describes the model and its training. All that depends on hardware is in its
mesh rules: the first rule whose pattern matches the accelerator's name has its modifiers applied.
Source: Lee et al. 2025, arXiv:2507.05411, section 4 (mesh rules and config modifiers).
"""

from __future__ import annotations

import dataclasses
import fnmatch
from typing import Any

from pippin.core.config import Config, field_hints
from pippin.core.config_tree import diff, show, transform
from pippin.core.errors import ConfigError
from pippin.core.hardware.accelerator import Target
from pippin.core.mesh_config import MESH_AXES
from pippin.core.registry import component_name
from pippin.layers.linear_config import quantize_matmuls
from pippin.train.hardware.mesh_rules_config import (
    MeshRuleConfig,
    SetAccumulationConfig,
    SetMeshConfig,
    SetPipelineConfig,
    SetPrecisionConfig,
    SetRematConfig,
)


@dataclasses.dataclass(frozen=True)
class Applied:
    """A config for some hardware, and how it came about."""

    cfg: Any
    rule: MeshRuleConfig | None  # None: the config has no rules, and is as it was written
    changes: tuple[tuple[str, tuple[str, ...]], ...]  # of each modifier: its name, and the lines of the diff


def apply_mesh_rules(cfg: Any, target: Target) -> Applied:
    """A trainer's config with the modifiers of the first rule that fits an accelerator.

    Raises:
        ConfigError: it has rules, and none fits; or the rule would undo a mesh that was set by hand.
    """
    if not cfg.mesh_rules:
        return Applied(cfg, None, ())
    rule = next((r for r in cfg.mesh_rules if fnmatch.fnmatchcase(target.name, r.accelerators)), None)
    if rule is None:
        raise ConfigError(
            f"no mesh rule fits {target.name}. The rules are for {', '.join(r.accelerators for r in cfg.mesh_rules)}. Add "
            "one to the recipe, or leave the rules out (--set 'mesh_rules=()') and set mesh.* yourself."
        )
    changes = []
    for modifier in rule.modifiers:
        before, cfg = cfg, modifier.build()(cfg, target)
        changes.append((component_name(type(modifier)), tuple(diff(before, cfg))))
    return Applied(cfg, rule, tuple(changes))


class SetMesh:
    """Gives a run the sizes of the mesh's axes. Each of several slices has this mesh, and other rows: `data` crosses them."""

    Config = SetMeshConfig

    def __init__(self, cfg: SetMeshConfig):
        self._cfg = cfg

    def __call__(self, cfg: Any, target: Target) -> Any:
        """The config on the new mesh.

        Raises:
            ConfigError: a size of the mesh was set by hand.
        """
        sizes = {axis: getattr(self._cfg, axis) for axis in MESH_AXES}
        if sizes["data"] != -1:
            sizes["data"] *= target.num_slices
        for axis, size in sizes.items():
            _require_free(cfg.mesh, axis, size, f"mesh.{axis}", target)
        return cfg.set(mesh=cfg.mesh.set(**sizes))


class SetRemat:
    """Gives every stack of layers a remat policy."""

    Config = SetRematConfig

    def __init__(self, cfg: SetRematConfig):
        self._cfg = cfg

    def __call__(self, cfg: Any, target: Target) -> Any:
        """The config with the policy wherever one can be set."""
        return _set_everywhere(cfg, "remat", self._cfg.remat, target)


class SetPrecision:
    """Gives the model the type of its activations and of its matrix products."""

    Config = SetPrecisionConfig

    def __init__(self, cfg: SetPrecisionConfig):
        self._cfg = cfg

    def __call__(self, cfg: Any, target: Target) -> Any:
        """The config with these types."""
        cfg = _set_everywhere(cfg, "activation_dtype", self._cfg.activation_dtype, target)
        if self._cfg.matmul is None:
            return cfg
        return cfg.set(model=quantize_matmuls(self._cfg.matmul)(cfg.model))


class SetPipeline:
    """Gives every stack of layers its schedule on a pipeline of devices."""

    Config = SetPipelineConfig

    def __init__(self, cfg: SetPipelineConfig):
        self._cfg = cfg

    def __call__(self, cfg: Any, target: Target) -> Any:
        """The config with the schedule wherever one can be set.

        Raises:
            ConfigError: no stack of the model can be a pipeline.
        """
        changed = _set_everywhere(cfg, "pipeline", self._cfg.pipeline, target)
        if changed == cfg:
            raise ConfigError(
                f"SetPipeline: the mesh rule for {target.name} makes a pipeline, and the model's decoder has no Repeat that "
                "could be one. Leave the modifier out of the rule."
            )
        return changed


class SetAccumulation:
    """Splits the batch so that it fits the devices."""

    Config = SetAccumulationConfig

    def __init__(self, cfg: SetAccumulationConfig):
        self._cfg = cfg

    def __call__(self, cfg: Any, target: Target) -> Any:
        """The config with as many microbatches as are needed."""
        shape = cfg.mesh.shape(target.num_devices)
        rows = cfg.input.batch_size // cfg.mesh.ways("batch", shape)
        # A pipeline takes its microbatches of what the learner gives it, and has a few of them at a time.
        most = self._cfg.rows_per_device * (_pipeline_microbatches(cfg) if shape["pipeline"] > 1 else 1)
        microbatches = next((n for n in range(1, rows + 1) if rows % n == 0 and rows // n <= most), 1)
        _require_free(cfg.learner, "microbatches", microbatches, "learner.microbatches", target)
        return cfg.set(learner=cfg.learner.set(microbatches=microbatches))


def _pipeline_microbatches(cfg: Any) -> int:
    pipeline = getattr(cfg.model.decoder, "pipeline", None)
    return 1 if pipeline is None else pipeline.microbatches


def _set_everywhere(cfg: Any, field: str, value: Any, target: Target) -> Any:
    def change(part: Config) -> Config:
        if field not in field_hints(type(part)):
            return part
        _require_free(part, field, value, f"{field} of {component_name(type(part))}", target)
        return part.set(**{field: value})

    return cfg.set(model=transform(cfg.model, change))


def _require_free(part: Config, field: str, value: Any, name: str, target: Target) -> None:
    """Raises `ConfigError` if a field was set to something else than what a rule sets it to."""
    old = getattr(part, field)
    if field in part.chosen and old != value:
        raise ConfigError(
            f"{name} was set to {show(old)}, and the mesh rule for {target.name} sets it to {show(value)}. Leave out "
            "yours, or train without rules: --set 'mesh_rules=()'."
        )
