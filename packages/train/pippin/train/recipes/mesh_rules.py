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


def _split(gpus: SetMeshConfig) -> tuple[MeshRuleConfig, ...]:
    """State split over all devices of a TPU slice, and over GPUs as given; activations in bfloat16, computed again."""
    less = (SetRematConfig(), SetPrecisionConfig())
    few_rows, one_row = SetAccumulationConfig(rows_per_device=4), SetAccumulationConfig(rows_per_device=1)
    tpus = SetMeshConfig(fsdp=-1)
    return (
        MeshRuleConfig(accelerators="cpu-*"),  # to try a small cousin of the model: as it is
        MeshRuleConfig(accelerators="tpu-v5e-*", modifiers=(tpus, *less, one_row)),  # 16 GiB a chip
        MeshRuleConfig(accelerators="tpu-*", modifiers=(tpus, *less, few_rows)),
        MeshRuleConfig(accelerators="gpu-*", modifiers=(gpus, *less, few_rows)),
    )


# A model of a few billions of parameters: its state fits the eight GPUs of a node, between which links are fast.
LARGE = _split(SetMeshConfig(data=-1, fsdp=8))

# A larger one, whose state needs all GPUs.
HUGE = _split(SetMeshConfig(fsdp=-1))
