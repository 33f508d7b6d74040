"""All configs of this package in one place, without JAX.

from pippin.layers import configs as L

moe = replace(model, L.FeedForwardConfig, L.MoEConfig(num_experts=8))
"""

from pippin.layers.attention_config import (
    GroupedQueryAttentionConfig,
    QKNormOrder,
    SharedKVAttentionConfig,
)
from pippin.layers.cache_config import FullCacheConfig, PagedCacheConfig, SlidingWindowCacheConfig
from pippin.layers.causal_lm_config import CausalLMConfig, FloatType
from pippin.layers.feed_forward_config import Activation, FeedForwardConfig
from pippin.layers.kernel_config import (
    AttentionKernelConfig,
    BlockwiseKernelConfig,
    CuDNNKernelConfig,
    ReferenceKernelConfig,
    RingKernelConfig,
    SelectKernelConfig,
    SplashKernelConfig,
    TritonKernelConfig,
)
from pippin.layers.kernel_paged_config import (
    PAGED_KERNELS,
    PagedBlockwiseKernelConfig,
    PagedTPUKernelConfig,
    PagedTritonKernelConfig,
    paged,
)
from pippin.layers.linear_config import (
    EmbeddingConfig,
    FanInInitConfig,
    GroupedLinearConfig,
    Int8EmbeddingConfig,
    Int8LinearConfig,
    LinearConfig,
    LoRALinearConfig,
    MatmulType,
    MultiLoRALinearConfig,
    NormalInitConfig,
    QuantizedLinearConfig,
    lora,
    multi_lora,
    quantize_matmuls,
)
from pippin.layers.moe_config import MoEConfig, TopKRouterConfig
from pippin.layers.norm_config import RMSNormConfig
from pippin.layers.position_config import ALiBiConfig, Llama3ScalingConfig, NoPEConfig, RoPEConfig
from pippin.layers.quant.fake_quant_config import (
    FakeQuantEmbeddingConfig,
    FakeQuantKVKernelConfig,
    FakeQuantLinearConfig,
    fake_quantized,
)
from pippin.layers.stack_config import (
    ParallelTracksConfig,
    PipelineConfig,
    PipelineSchedule,
    Remat,
    RepeatConfig,
    SequenceConfig,
    SharedKVStackConfig,
    TransformerLayerConfig,
)

__all__ = [
    "PAGED_KERNELS",
    "ALiBiConfig",
    "Activation",
    "AttentionKernelConfig",
    "BlockwiseKernelConfig",
    "CausalLMConfig",
    "CuDNNKernelConfig",
    "EmbeddingConfig",
    "FakeQuantEmbeddingConfig",
    "FakeQuantKVKernelConfig",
    "FakeQuantLinearConfig",
    "FanInInitConfig",
    "FeedForwardConfig",
    "FloatType",
    "FullCacheConfig",
    "GroupedLinearConfig",
    "GroupedQueryAttentionConfig",
    "Int8EmbeddingConfig",
    "Int8LinearConfig",
    "LinearConfig",
    "Llama3ScalingConfig",
    "LoRALinearConfig",
    "MatmulType",
    "MoEConfig",
    "MultiLoRALinearConfig",
    "NoPEConfig",
    "NormalInitConfig",
    "PagedBlockwiseKernelConfig",
    "PagedCacheConfig",
    "PagedTPUKernelConfig",
    "PagedTritonKernelConfig",
    "ParallelTracksConfig",
    "PipelineConfig",
    "PipelineSchedule",
    "QKNormOrder",
    "QuantizedLinearConfig",
    "RMSNormConfig",
    "ReferenceKernelConfig",
    "Remat",
    "RepeatConfig",
    "RingKernelConfig",
    "RoPEConfig",
    "SelectKernelConfig",
    "SequenceConfig",
    "SharedKVAttentionConfig",
    "SharedKVStackConfig",
    "SlidingWindowCacheConfig",
    "SplashKernelConfig",
    "TopKRouterConfig",
    "TransformerLayerConfig",
    "TritonKernelConfig",
    "fake_quantized",
    "lora",
    "multi_lora",
    "paged",
    "quantize_matmuls",
]
