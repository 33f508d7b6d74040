"""The hardware of this job, by what JAX finds."""

from __future__ import annotations

from typing import Any

import jax

from pippin.train.hardware.accelerator import target_of
from pippin.train.hardware.mesh_rules import Applied, apply_mesh_rules


def for_this_machine(cfg: Any) -> Applied:
    """A trainer's config for the devices of this job.

    Raises:
        ConfigError: the config has mesh rules, and none fits.
    """
    if not cfg.mesh_rules:
        return Applied(cfg, None, ())
    first = jax.devices()[0]
    return apply_mesh_rules(cfg, target_of(first.device_kind, jax.device_count(), first.platform))
