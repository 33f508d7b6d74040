"""What a config would run as on this machine: devices, mesh, parameters, rules and kernels."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import jax
import numpy as np

from pippin.core.config import Config, children
from pippin.core.registry import component_name
from pippin.layers.kernel_config import SelectKernelConfig
from pippin.layers.kernel_select import record_choices
from pippin.train.hardware.machine import for_this_machine
from pippin.train.hardware.mesh_rules import Applied
from pippin.train.learner.rules import describe_rules
from pippin.train.trainer import Trainer
from pippin.train.trainer_config import TrainerConfig


def explain(cfg: TrainerConfig) -> str:
    """Several paragraphs for a person. Builds the model's shapes, and none of its values.

    Raises:
        PippinError: the config does not fit this machine or itself.
    """
    applied = for_this_machine(cfg)
    cfg = applied.cfg
    trainer: Trainer = cfg.build(held_out=lambda most, task: ())
    return (
        "\n".join(
            [*_machine(trainer), *_rule(applied), *_parameters(trainer), *_kernels(trainer), *_rules(trainer)]
        )
        + "\n"
    )


def _machine(trainer: Trainer) -> list[str]:
    device = jax.devices()[0]
    sizes = ", ".join(f"{axis} {n}" for axis, n in trainer.mesh.shape.items() if n > 1) or "one device"
    rows, length = trainer.cfg.input.batch_size, trainer.cfg.input.sequence_length
    return [
        f"devices: {jax.device_count()} x {device.device_kind} ({device.platform}), {jax.process_count()} process(es)",
        f"mesh: {sizes}",
        f"batch: {rows} rows of {length} tokens, in {trainer.cfg.learner.microbatches} microbatch(es)",
        f"training: {trainer.cfg.steps:,} steps, {trainer.cfg.steps * rows * length:,} tokens",
        "",
    ]


def _rule(applied: Applied) -> list[str]:
    if applied.rule is None:
        return ["mesh rules: none; the config is used as it is", ""]
    lines = [f"mesh rule: {applied.rule.accelerators}"]
    for name, changes in applied.changes:
        lines += [f"  {name}", *(f"    {line}" for line in changes or ("changes nothing",))]
    return [*lines, ""]


def _parameters(trainer: Trainer) -> list[str]:
    """Elements by the type of the component that holds them, under the interface that it serves."""
    counts: Counter[str] = Counter()
    for info in jax.tree.leaves(trainer.infos):
        served = [p for p in info.provides if p not in ("causal_lm", "layer", "linear", "grouped_linear")]
        counts[f"{info.owners[-1]} in {served[-1]}" if served else info.owners[-1]] += int(
            np.prod(info.shape)
        )
    rows = [f"  {n:>15,}  {name}" for name, n in counts.most_common()]
    bytes_of_state = sum(s.dtype.itemsize * s.size for s in jax.tree.leaves(trainer.template))
    return [
        f"parameters: {trainer.num_params:,} (training state {bytes_of_state / 2**20:,.1f} MiB over all devices)",
        *rows,
        "",
    ]


def _kernels(trainer: Trainer) -> list[str]:
    with record_choices() as choices:
        trainer.trace()
    by_itself = [
        f"  {path}: {name}, as the config sets it" for path, name in _set_kernels("model", trainer.cfg.model)
    ]
    return ["attention kernels:", *(f"  {choice}" for choice in choices), *by_itself, ""]


def _set_kernels(path: str, cfg: Config) -> Iterator[tuple[str, str]]:
    """The kernels that are used without a choice, by their paths."""
    if cfg.PROVIDES == "attention_kernel":
        if not isinstance(cfg, SelectKernelConfig):
            yield path, component_name(type(cfg))
        return
    for step, child in children(cfg):
        yield from _set_kernels(f"{path}.{step}", child)


def _rules(trainer: Trainer) -> list[str]:
    return ["learner:", describe_rules(trainer.cfg.learner, trainer.infos)]  # type: ignore[arg-type]
