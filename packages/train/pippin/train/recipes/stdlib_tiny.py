"""The default recipe: a small model that anyone can train in minutes."""

from pippin.core.checkpoint_config import CheckpointerConfig
from pippin.layers.models.afm_on_device_2024 import afm_on_device_2024
from pippin.train.input.config import SentencePieceConfig, TextInputConfig
from pippin.train.learner.config import AdamWConfig, CosineScheduleConfig, LearnerConfig, RuleConfig
from pippin.train.recipe import recipe
from pippin.train.recipes.mesh_rules import SMALL
from pippin.train.trainer_config import PerplexityConfig, TrainerConfig


@recipe
def stdlib_tiny() -> TrainerConfig:
    """A 2.4M-parameter model of AFM's shape, on the source of the Python standard library.

    Source:   the architecture of AFM on-device, arXiv:2407.21075; sizes and learning rate are ours.
    Hardware: anything; 2 CPU cores are enough.
    Expect:   a held-out perplexity of about 99 a token (untrained 6,751, unigrams 763).
    Time:     about 3 minutes on 2 idle CPU cores.
    """
    return TrainerConfig(
        model=afm_on_device_2024(
            vocab_size=4096, dim=192, num_layers=4, num_heads=6, num_kv_heads=2, head_dim=32, hidden_dim=512
        ),
        input=TextInputConfig(
            tokenizer=SentencePieceConfig(vocab_size=4096), batch_size=8, sequence_length=256
        ),
        learner=LearnerConfig(
            learning_rate=5e-3,
            optimizer=AdamWConfig(),
            schedule=CosineScheduleConfig(warmup_steps=40, final_ratio=0.05),
            rules=(RuleConfig(component="norm", weight_decay_scale=0.0),),
        ),
        evaluators=(PerplexityConfig(every_steps=140, max_batches=8),),
        checkpointer=CheckpointerConfig(every_steps=70, keep_last=2),
        mesh_rules=SMALL,
        steps=420,
    )
