"""The mesh rules of the recipes: what they change on which accelerator."""

from pippin.train.hardware.mesh_rules_config import (
    MeshRuleConfig,
    SetAccumulationConfig,
    SetMeshConfig,
    SetPrecisionConfig,
    SetRematConfig,
)

# A model that fits any device: every device has all of it, and a part of the batch.
SMALL = (
    MeshRuleConfig(accelerators="cpu-*"),
    MeshRuleConfig(accelerators="gpu-*", modifiers=(SetPrecisionConfig(),)),
    MeshRuleConfig(accelerators="tpu-*", modifiers=(SetPrecisionConfig(),)),
)

# A model of billions of parameters. Its state is split over all devices of a TPU slice, and over the eight GPUs of
# a node, between which links are fast; activations are computed again, and are in bfloat16.
LARGE = (
    # To try a small cousin of it: as it is.
    MeshRuleConfig(accelerators="cpu-*"),
    MeshRuleConfig(
        accelerators="tpu-v5e-*",  # 16 GiB a chip: a row at a time
        modifiers=(
            SetMeshConfig(fsdp=-1),
            SetRematConfig(),
            SetPrecisionConfig(),
            SetAccumulationConfig(rows_per_device=1),
        ),
    ),
    MeshRuleConfig(
        accelerators="tpu-*",
        modifiers=(
            SetMeshConfig(fsdp=-1),
            SetRematConfig(),
            SetPrecisionConfig(),
            SetAccumulationConfig(rows_per_device=4),
        ),
    ),
    MeshRuleConfig(
        accelerators="gpu-*",
        modifiers=(
            SetMeshConfig(data=-1, fsdp=8),
            SetRematConfig(),
            SetPrecisionConfig(),
            SetAccumulationConfig(rows_per_device=4),
        ),
    ),
)
