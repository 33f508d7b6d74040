"""A model's weights, compressed by a recipe."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from flax import nnx

from pippin.core.batch import Batch
from pippin.core.errors import ConfigError
from pippin.core.module import ParameterInfo, Params, flatten_params, parameter_infos, unflatten_params
from pippin.core.quantized_array import Palettized, QuantizedArray, Scaled
from pippin.export.compress.allocate import allocate
from pippin.export.compress.calibrate import LinearStatistics, calibrate
from pippin.export.compress.config import (
    Float16Config,
    MixedPaletteConfig,
    PaletteConfig,
    RecipeConfig,
    ScaleConfig,
    Weighting,
)
from pippin.export.compress.palettize import require_float16, require_groups
from pippin.export.compress.scaled import Scaler, require_blocks
from pippin.export.compress.sensitivity import importance, options
from pippin.layers.causal_lm_config import CausalLMConfig
from pippin.layers.quant.settle import settled

Progress = Callable[[str, int, int], None]  # (what is done, how far, of how much)

EMBEDDING, HEAD, OTHER = "embedding", "head", "other"


@dataclasses.dataclass(frozen=True)
class CompressedWeight:
    """What became of a parameter."""

    name: str
    kind: str  # of the layer that it is in: "attention", "feed_forward", "embedding", "head", "other"
    scheme: str  # "palette", "scale", "float16"
    bits: int
    count: int  # of its numbers
    nbytes: int


@dataclasses.dataclass(frozen=True)
class Compressed:
    """A compressed model."""

    component: CausalLMConfig  # without stacks
    params: Params  # of QuantizedArrays and float16 arrays
    weights: Sequence[CompressedWeight]

    def floats(self) -> Params:
        """The parameters as the floats that they stand for."""
        return floats(self.params)


def floats(params: Mapping[str, Any]) -> Params:
    """Parameters with the floats that compressed weights stand for."""
    flat = flatten_params(params)
    return unflatten_params({n: v.dequantized() if _is_stored(v) else v for n, v in flat.items()})


def needs_calibration(recipe: RecipeConfig) -> bool:
    """Whether a recipe asks what goes through the linear maps."""
    linear = recipe.linear
    if isinstance(linear, MixedPaletteConfig):
        return True
    return not isinstance(linear, Float16Config) and linear.weighting is not Weighting.NONE


def compress(
    cfg: CausalLMConfig,
    params: Mapping[str, Any],
    recipe: RecipeConfig,
    batches: Sequence[Batch] = (),
    progress: Progress = lambda *_: None,
) -> Compressed:
    """A model with its weights compressed. Weights that were rounded in training stay what they were rounded to.

    Args:
        cfg: the model's config, as it is stored.
        params: its parameters, of floats but for those that are compressed already, which stay as they are.
        recipe: how.
        batches: of calibration text, where the recipe needs it.
        progress: told of each step.

    Raises:
        ConfigError: the recipe cannot be met.
        QuantizationError: a weight cannot be compressed so.
    """
    for name, values in flatten_params(params).items():
        if not _is_stored(values):
            require_float16(name, np.asarray(values))
    component, tree = settled(cfg, params)
    flat = {
        name: values if _is_stored(values) else np.asarray(values)
        for name, values in flatten_params(tree).items()
    }
    infos = flatten_params(parameter_infos(nnx.eval_shape(lambda: component.build(rngs=nnx.Rngs(0)))))
    roles = {name: _role(infos[name]) for name in flat}
    for name, role in roles.items():
        if not _is_stored(flat[name]):
            _require_fit(name, flat[name].shape, _of_role(recipe, role), role)
    statistics = {}
    if needs_calibration(recipe):
        statistics = _calibrated(cfg, floats(params), batches, progress)
    chosen = _chosen(recipe, roles, flat, statistics, progress)
    result, weights = {}, []
    for i, (name, values) in enumerate(flat.items()):
        progress("compressing", i, len(flat))
        result[name] = _compressed(name, values, chosen[name], roles[name], statistics)
        weights.append(_described(name, result[name], roles[name], infos[name]))
    progress("compressing", len(flat), len(flat))
    return Compressed(component, unflatten_params(result), weights)


def _calibrated(
    cfg: CausalLMConfig, params: Mapping[str, Any], batches: Sequence[Batch], progress: Progress
) -> dict[str, LinearStatistics]:
    if not batches:
        raise ConfigError(
            "the recipe weights errors, or allocates bits, by what goes through the model: give it text."
        )
    done = 0
    progress("calibrating", done, len(batches))

    def advance() -> None:
        nonlocal done
        done += 1
        progress("calibrating", done, len(batches))

    return calibrate(cfg, params, batches, advance)


def _role(info: ParameterInfo) -> str:
    """Which part of a recipe a parameter falls under: "linear", "embedding", "head", or "other"."""
    is_matrix = len(info.shape) - info.stacked >= 2 and info.path.endswith(".weight")
    if is_matrix and info.provides[-1] == "embedding":
        return EMBEDDING
    if is_matrix and info.provides[-1] in ("linear", "grouped_linear") and "router" not in info.provides:
        # Of the model itself, not of a layer of it.
        return HEAD if set(info.provides[:-1]) <= {"causal_lm", "linear"} else "linear"
    return OTHER


def _is_stored(values: Any) -> bool:
    """Whether a weight is compressed already."""
    return isinstance(values, Palettized | Scaled)


def _of_role(recipe: RecipeConfig, role: str) -> Any:
    """The config of a recipe for the parameters of a role."""
    of_role = {"linear": recipe.linear, EMBEDDING: recipe.embedding, HEAD: recipe.head}
    return of_role.get(role, Float16Config())


def _require_fit(name: str, shape: Sequence[int], cfg: Any, role: str) -> None:
    """Raises QuantizationError where groups or blocks do not fit: before the model is measured, which takes long."""
    match cfg:
        case PaletteConfig():
            require_groups(name, shape, cfg, role)
        case MixedPaletteConfig():
            require_groups(name, shape, cfg.palette, f"{role}.palette")
        case ScaleConfig():
            require_blocks(name, shape, cfg, rows=role == EMBEDDING, path=role)


def _kind(info: ParameterInfo, role: str) -> str:
    for kind in ("attention", "feed_forward", "router"):
        if kind in info.provides:
            return kind if role != OTHER else OTHER
    return role


def _chosen(
    recipe: RecipeConfig,
    roles: Mapping[str, str],
    flat: Mapping[str, Any],
    statistics: Mapping[str, LinearStatistics],
    progress: Progress,
) -> dict[str, Any]:
    """The config that each parameter is compressed by."""
    linear = recipe.linear
    chosen = {name: _of_role(recipe, role) for name, role in roles.items()}
    names = [name for name, role in roles.items() if role == "linear" and not _is_stored(flat[name])]
    if not isinstance(linear, MixedPaletteConfig) or not names:
        return chosen
    found = {}
    for i, name in enumerate(names):
        progress("measuring", i, len(names))
        of_map = statistics.get(name.removesuffix(".weight"))
        if of_map is None:
            raise ConfigError(
                f"{name} is of a linear map of a kind that is not measured, so no bits can be allocated. Use a recipe with "
                "the same bits for all."
            )
        found[name] = options(name, flat[name], of_map, linear.palette, linear.choices)
    progress("measuring", len(names), len(names))
    budget = int(sum(flat[name].size for name in names) * linear.bits_per_weight / 8)
    allocated = allocate(found, budget)
    return chosen | {name: linear.palette.set(bits=option.bits) for name, option in allocated.items()}


def _compressed(
    name: str, values: Any, cfg: Any, role: str, statistics: Mapping[str, LinearStatistics]
) -> QuantizedArray | np.ndarray:
    of_map = statistics.get(name.removesuffix(".weight"))
    if _is_stored(values):
        return values
    match cfg:
        case PaletteConfig():
            return cfg.build().compress(name, values, importance(of_map, cfg.weighting))
        case ScaleConfig():
            return Scaler(cfg).compress(
                name, values, importance(of_map, cfg.weighting), rows=role == EMBEDDING
            )
        case _:
            return values.astype(np.float16)


def _described(
    name: str, stored: QuantizedArray | np.ndarray, role: str, info: ParameterInfo
) -> CompressedWeight:
    scheme, bits = "float16", 16
    if isinstance(stored, Palettized | Scaled):
        scheme, bits = ("palette" if isinstance(stored, Palettized) else "scale"), stored.bits
    return CompressedWeight(name, _kind(info, role), scheme, bits, int(np.prod(stored.shape)), stored.nbytes)
