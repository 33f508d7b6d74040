"""A recipe of your own, in a file: the LoRA that wins back what compression lost of SmolLM2 135M.

Compress the model, and train on text of yours:

    bazel run //packages/export:compress -- --model smollm2-135m-instruct --recipe mixed_3_7 --out compressed/smollm2
    bazel run //packages/train:launch -- --recipe-file benchmarks/smollm2_recovery.py --data 'text/*.txt'
"""

from pippin.core.checkpoint_config import CheckpointerConfig
from pippin.layers.causal_lm_config import CausalLMConfig
from pippin.layers.models.llama import smollm2_135m
from pippin.train.input.config import TextInputConfig, TokenizerFilesConfig
from pippin.train.learner.config import AdamWConfig, CosineScheduleConfig, LearnerConfig
from pippin.train.recipe import recipe
from pippin.train.recipes.stdlib_tiny_recovery import recovery
from pippin.train.trainer_config import PerplexityConfig, TrainerConfig


def adapter_over(model: CausalLMConfig, compressed: str, steps: int = 80) -> TrainerConfig:
    """A LoRA of rank 16 over a bundle, by 1,024 tokens a step.

    Args:
        model: that was compressed.
        compressed: the bundle, with its tokenizer.
        steps: of training.
    """
    base = TrainerConfig(
        model=model,
        input=TextInputConfig(
            batch_size=4,
            sequence_length=256,
            tokenizer=TokenizerFilesConfig(directory=f"{compressed}/tokenizer"),
        ),
        learner=LearnerConfig(
            learning_rate=1e-3,
            optimizer=AdamWConfig(),
            schedule=CosineScheduleConfig(warmup_steps=10, final_ratio=0.05),
        ),
        evaluators=(PerplexityConfig(every_steps=50, max_batches=4),),
        checkpointer=CheckpointerConfig(every_steps=50, keep_last=1),
        steps=steps,
    )
    return recovery(base, compressed)


@recipe
def smollm2_recovery() -> TrainerConfig:
    """A LoRA of rank 16 that wins back what compression lost of SmolLM2 135M."""
    return adapter_over(smollm2_135m(), "compressed/smollm2")
