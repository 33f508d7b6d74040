"""Configs of layers and of stacks of layers. A stack is a layer: they compose freely."""

import enum
from typing import Annotated

from pippin.core.config import REQUIRED, Config, Required, Slot
from pippin.core.errors import ConfigError
from pippin.layers.attention_config import GroupedQueryAttentionConfig, SharedKVAttentionConfig
from pippin.layers.feed_forward_config import FeedForwardConfig
from pippin.layers.norm_config import RMSNormConfig


class TransformerLayerConfig(Config, implementation="pippin.layers.stack:TransformerLayer", provides="layer"):
    """Attention and a feed-forward, each behind a norm and around a residual connection."""

    input_dim: Required[int] = REQUIRED
    attention: Annotated[Config, Slot("attention")] = GroupedQueryAttentionConfig()
    feed_forward: Annotated[Config, Slot("feed_forward")] = FeedForwardConfig()
    norm: Annotated[Config, Slot("norm")] = RMSNormConfig()


class Remat(enum.StrEnum):
    """What of a layer's forward pass the backward pass computes again, or gets from the host, to save memory."""

    NONE = "none"
    FULL = "full"  # everything but the layer's input
    SAVE_MATMULS = "save_matmuls"  # everything but the results of products with weights
    OFFLOAD_MATMULS = "offload_matmuls"  # the same, and these results wait in the host's memory


class PipelineSchedule(enum.StrEnum):
    """In which order the devices of a pipeline work on microbatches."""

    GPIPE = "gpipe"  # all forward, then all backward
    ONE_F_ONE_B = (
        "1f1b"  # backward as soon as a microbatch has gone through: less memory, and stages computed again
    )


class PipelineConfig(Config):
    """How the devices of the mesh's pipeline axis share a stack of layers. Without such an axis, it changes nothing."""

    schedule: PipelineSchedule = PipelineSchedule.ONE_F_ONE_B
    microbatches: Required[int] = REQUIRED  # a multiple of the devices
    rounds: int = 1  # stages a device: more wait less, and send more (interleaved)

    def validate(self) -> None:
        _require_at_least(self, "microbatches", 1)
        _require_at_least(self, "rounds", 1)


class RepeatConfig(Config, implementation="pippin.layers.stack:Repeat", provides="layer"):
    """One layer n times, each with parameters of its own, compiled once by a scan."""

    input_dim: Required[int] = REQUIRED
    layer: Annotated[Config, Slot("layer")] = TransformerLayerConfig()
    num_layers: Required[int] = REQUIRED
    remat: Remat = Remat.NONE
    unroll: int = 1  # how many layers one turn of the scan's loop holds
    pipeline: PipelineConfig | None = None  # None: a pipeline axis of the mesh only splits the parameters

    def validate(self) -> None:
        _require_at_least(self, "num_layers", 1)
        _require_at_least(self, "unroll", 1)


class SequenceConfig(Config, implementation="pippin.layers.stack:Sequence", provides="layer"):
    """Different layers, one after the other: a pattern of local and global attention, say."""

    input_dim: Required[int] = REQUIRED
    layers: tuple[Annotated[Config, Slot("layer")], ...] = ()


class SharedKVStackConfig(Config, implementation="pippin.layers.stack:SharedKVStack", provides="layer"):
    """Two blocks: the layers of the second read the keys and values of the first one's last layer."""

    input_dim: Required[int] = REQUIRED
    layer: Annotated[Config, Slot("layer")] = TransformerLayerConfig()
    num_layers: Required[int] = REQUIRED  # of the first block
    reader: Annotated[Config, Slot("layer")] = TransformerLayerConfig(attention=SharedKVAttentionConfig())
    num_readers: Required[int] = REQUIRED  # layers of the second block
    remat: Remat = Remat.NONE

    def validate(self) -> None:
        _require_at_least(self, "num_layers", 2)
        _require_at_least(self, "num_readers", 1)


class ParallelTracksConfig(Config, implementation="pippin.layers.stack:ParallelTracks", provides="layer"):
    """Several copies of a layer, each with parameters of its own, on one input; the results are averaged."""

    input_dim: Required[int] = REQUIRED
    layer: Annotated[Config, Slot("layer")] = TransformerLayerConfig()
    num_tracks: Required[int] = REQUIRED
    remat: Remat = Remat.NONE

    def validate(self) -> None:
        _require_at_least(self, "num_tracks", 1)


def _require_at_least(cfg: Config, name: str, least: int) -> None:
    value = getattr(cfg, name)
    if isinstance(value, int) and value < least:
        kind = type(cfg).__name__.removesuffix("Config")
        raise ConfigError(
            f"{kind}: {name} ({value}) must be at least {least}. Set {name} to {least} or more."
        )
