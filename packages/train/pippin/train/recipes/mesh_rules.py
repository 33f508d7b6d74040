"""The mesh rules of the recipes: what they change on which accelerator."""

from pippin.layers.stack_config import Remat
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


_TPUS = SetMeshConfig(fsdp=-1)
_NODES = SetMeshConfig(
    data=-1, fsdp=8
)  # state split over the eight GPUs of a node, between which links are fast
_FULL, _SAVED = SetRematConfig(), SetRematConfig(remat=Remat.SAVE_MATMULS)
_BF16 = SetPrecisionConfig()


def _split(gpus: SetMeshConfig, roomy: SetRematConfig, *, rows: int) -> tuple[MeshRuleConfig, ...]:
    """State split over all devices of a TPU slice, and over GPUs as given; activations in bfloat16, computed again.

    Args:
        gpus: the mesh of GPUs.
        roomy: what is computed again where a device has 80 GB or more.
        rows: how many a device has room for there.
    """
    few_rows = SetAccumulationConfig(rows_per_device=rows)
    one_row = SetAccumulationConfig(rows_per_device=1)
    return (
        MeshRuleConfig(accelerators="cpu-*"),  # to try a small cousin of the model: as it is
        MeshRuleConfig(accelerators="tpu-v5e-*", modifiers=(_TPUS, _FULL, _BF16, one_row)),  # 16 GiB
        MeshRuleConfig(accelerators="tpu-v6e-*", modifiers=(_TPUS, _FULL, _BF16, few_rows)),  # 32 GiB
        MeshRuleConfig(accelerators="tpu-*", modifiers=(_TPUS, roomy, _BF16, few_rows)),
        MeshRuleConfig(accelerators="gpu-*", modifiers=(gpus, roomy, _BF16, few_rows)),
    )


# A model of a few billions of parameters: there is room for what the matmuls of four rows of 4,096 tokens make.
LARGE = _split(_NODES, _SAVED, rows=4)
LARGE_8K = _split(_NODES, _SAVED, rows=2)  # rows of 8,192 tokens

# A larger one: its state needs all GPUs, and nothing of its layers is kept.
HUGE = _split(SetMeshConfig(fsdp=-1), _FULL, rows=4)
