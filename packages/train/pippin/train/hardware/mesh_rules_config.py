"""The configs of mesh rules and of their modifiers."""

from __future__ import annotations

from typing import Annotated

from pippin.core.config import REQUIRED, Config, Required, Slot
from pippin.core.errors import ConfigError
from pippin.layers.causal_lm_config import FloatType
from pippin.layers.linear_config import MatmulType
from pippin.layers.stack_config import PipelineConfig, Remat


class SetMeshConfig(Config, implementation="pippin.train.hardware.mesh_rules:SetMesh", provides="modifier"):
    """The devices as a grid; which axis splits what stays as the run's mesh has it. At most one size is -1.

    Of several TPU slices, the sizes are those of one: the mesh has `data` as many times.
    """

    data: int = 1
    fsdp: int = 1
    expert: int = 1
    sequence: int = 1
    tensor: int = 1
    pipeline: int = 1


class SetRematConfig(Config, implementation="pippin.train.hardware.mesh_rules:SetRemat", provides="modifier"):
    """What every stack of layers computes again in the backward pass, or keeps on the host."""

    remat: Remat = Remat.FULL


class SetPrecisionConfig(
    Config, implementation="pippin.train.hardware.mesh_rules:SetPrecision", provides="modifier"
):
    """The type of activations, and of matrix products. Parameters and the optimizer's state stay float32."""

    activation_dtype: FloatType = FloatType.BFLOAT16
    # Of the linear maps of attention and of feed-forwards; None: of the activations' type.
    matmul: MatmulType | None = None


class SetPipelineConfig(
    Config, implementation="pippin.train.hardware.mesh_rules:SetPipeline", provides="modifier"
):
    """How the devices of the mesh's pipeline axis share every stack of layers; `SetMesh` makes the axis."""

    pipeline: PipelineConfig = PipelineConfig()


class SetAccumulationConfig(
    Config, implementation="pippin.train.hardware.mesh_rules:SetAccumulation", provides="modifier"
):
    """Gradient accumulation: as few microbatches as leave each device at most so many rows at a time.

    In a pipeline, these are the rows of one of its microbatches.
    """

    rows_per_device: int = 1

    def validate(self) -> None:
        if self.rows_per_device < 1:
            raise ConfigError(
                f"SetAccumulation: rows_per_device ({self.rows_per_device}) must be at least 1."
            )


class MeshRuleConfig(Config):
    """What changes on the accelerators whose name fits a pattern, such as `tpu-v5e-*`."""

    accelerators: Required[str] = REQUIRED
    modifiers: tuple[Annotated[Config, Slot("modifier")], ...] = ()
