"""The default: a small model that anyone can train in minutes."""

from pippin.core.checkpoint_config import CheckpointerConfig
from pippin.layers.attention_config import GroupedQueryAttentionConfig
from pippin.layers.causal_lm_config import CausalLMConfig
from pippin.layers.feed_forward_config import FeedForwardConfig
from pippin.layers.norm_config import RMSNormConfig
from pippin.layers.stack_config import RepeatConfig, TransformerLayerConfig
from pippin.train.input.config import TextInputConfig
from pippin.train.learner.config import AdamWConfig, CosineScheduleConfig, LearnerConfig
from pippin.train.recipe import recipe
from pippin.train.trainer_config import PerplexityConfig, TrainerConfig


@recipe
def stdlib_tiny() -> TrainerConfig:
    """A 3M-parameter model of AFM's shape on the Python standard library's source."""
    attention = GroupedQueryAttentionConfig(num_heads=6, num_kv_heads=2, head_dim=32, qk_norm=RMSNormConfig())
    layer = TransformerLayerConfig(attention=attention, feed_forward=FeedForwardConfig(hidden_dim=512))
    return TrainerConfig(
        model=CausalLMConfig(vocab_size=4096, dim=192, decoder=RepeatConfig(layer=layer, num_layers=4)),
        input=TextInputConfig(batch_size=4, sequence_length=256),
        learner=LearnerConfig(
            learning_rate=3e-3,
            optimizer=AdamWConfig(),
            schedule=CosineScheduleConfig(warmup_steps=50, final_ratio=0.05),
        ),
        evaluators=(PerplexityConfig(every_steps=250, max_batches=8),),
        checkpointer=CheckpointerConfig(every_steps=100, keep_last=2),
        steps=500,
    )
