"""The hardware of this job, by what JAX finds."""

from __future__ import annotations

from typing import Any

import jax

from pippin.core.hardware.accelerator import target_of
from pippin.core.mesh_config import num_slices
from pippin.train.hardware.mesh_rules import Applied, apply_mesh_rules


def for_this_machine(cfg: Any) -> Applied:
    """A trainer's config for the devices of this job.

    Raises:
        ConfigError: the config has mesh rules, and none fits.
    """
    if not cfg.mesh_rules:
        return Applied(cfg, None, ())
    devices = jax.devices()
    platform = devices[0].platform
    slices = num_slices(devices) if platform == "tpu" else 1
    return apply_mesh_rules(cfg, target_of(devices[0].device_kind, len(devices), platform, slices))
