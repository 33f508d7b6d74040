"""Adapters of models that were trained with LoRA; the command `bazel run //packages/layers:adapter` writes one."""

import argparse
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from flax import nnx

from pippin.core.adapter import LowRank, save_adapter
from pippin.core.bundle import Bundle
from pippin.core.command_line import run_command
from pippin.core.config import Config
from pippin.core.errors import CheckpointError
from pippin.core.module import Params, flatten_params, unflatten_params
from pippin.core.stored_tensor import signature
from pippin.layers.causal_lm_config import CausalLMConfig
from pippin.layers.linear import LoRALinear
from pippin.layers.model_files import open_model
from pippin.layers.unrolled import unrolled

_BASE, _DOWN, _UP = ".base.", "down", "up"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    parser = argparse.ArgumentParser(
        prog="adapter",
        description="Writes the adapter of a model that was trained with LoRA, without its base.",
    )
    parser.add_argument(
        "--model", required=True, metavar="DIR", help="a training run, one of its steps, or a bundle"
    )
    parser.add_argument(
        "--out", required=True, metavar="DIR", help="where the adapter is to lie; its last part is its name"
    )
    args = parser.parse_args(argv)
    return run_command(lambda: _write_adapter(args))


def _write_adapter(args: argparse.Namespace) -> int:
    bundle = open_model(args.model)
    maps, base = adapter_of(bundle)
    path = save_adapter(args.out, maps, base, bundle.provenance)
    size = sum(a.size * 4 for pair in maps.values() for a in pair)
    rank = max(pair.down.shape[-1] for pair in maps.values())
    print(
        f"{path}: rank {rank}, {len(maps)} linear maps, {size / 1e6:.1f} MB; it fits the model {base[:12]} only"
    )
    return 0


def adapter_of(bundle: Bundle) -> tuple[dict[str, LowRank], str]:
    """The low-rank maps of a model's LoRA layers by the path of their base, and the signature of the model without them.

    Raises:
        CheckpointError: it has no LoRA layer, or is damaged.
    """
    scales = lora_scales(bundle.component)
    if not scales:
        raise CheckpointError(
            f"{bundle.directory} has no LoRA layers, so there is nothing to make an adapter of. Train one with the "
            "modifier `lora`, such as the recipe stdlib_tiny_lora."
        )
    flat = flatten_params(bundle.params())
    maps = {
        path: LowRank(
            np.asarray(flat.pop(f"{path}.{_DOWN}"), np.float32),
            np.asarray(flat.pop(f"{path}.{_UP}"), np.float32) * np.float32(scale),
        )
        for path, scale in scales.items()
    }
    return maps, signature({without_lora(name, scales): np.asarray(values) for name, values in flat.items()})


def lora_scales(cfg: Config) -> dict[str, float]:
    """alpha / rank of each LoRA layer of a model, by its dotted path."""
    module = nnx.eval_shape(lambda: cfg.build(rngs=nnx.Rngs(0)))
    return {
        ".".join(map(str, path)): node.scale
        for path, node in nnx.iter_graph(module)
        if isinstance(node, LoRALinear)
    }


def without_lora(name: str, lora_paths: Mapping[str, Any]) -> str:
    """The path of a parameter in the same model without LoRA layers."""
    for path in lora_paths:
        if name.startswith(path + _BASE):
            return f"{path}.{name.removeprefix(path + _BASE)}"
    return name


def model_signature(params: Params) -> str:
    """What says which weights a model has; see model.proto."""
    return signature({name: np.asarray(values) for name, values in flatten_params(params).items()})


def unrolled_maps(cfg: CausalLMConfig, params: Params, maps: Mapping[str, LowRank]) -> dict[str, LowRank]:
    """Low-rank maps for a model as maps for the same model without stacks.

    Args:
        cfg: the model's config, as it is stored.
        params: its parameters or what stands for them: only their paths are looked at.
        maps: by the path of the linear map that they are for.

    Raises:
        CheckpointError: the model has no linear map at a path.
    """
    leaves = {name: _Leaf(None) for name in flatten_params(params)}
    for path, pair in maps.items():
        if f"{path}.weight" not in leaves:
            raise CheckpointError(f"the adapter is for a linear map {path}, which the model does not have.")
        leaves[f"{path}.weight"] = _Leaf(pair)
    _, tree = unrolled(cfg, unflatten_params(leaves))
    return {
        name.removesuffix(".weight"): leaf.maps
        for name, leaf in flatten_params(tree).items()
        if leaf.maps is not None
    }


class _Leaf:
    """Stands for a parameter where a stack is taken apart."""

    def __init__(self, maps: LowRank | None):
        self.maps = maps

    def __getitem__(self, index: int) -> "_Leaf":
        return _Leaf(None if self.maps is None else LowRank(self.maps.down[index], self.maps.up[index]))


if __name__ == "__main__":
    sys.exit(main())
