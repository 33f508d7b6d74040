"""Public models of the Llama family, trained from scratch or on from their published weights."""

from pippin.core.checkpoint_config import CheckpointerConfig
from pippin.layers.causal_lm_config import CausalLMConfig
from pippin.layers.models import llama
from pippin.train.hardware.mesh_rules_config import MeshRuleConfig
from pippin.train.input.config import (
    FilesConfig,
    MixtureConfig,
    TaskConfig,
    TextInputConfig,
    TokenizerFilesConfig,
)
from pippin.train.learner.config import AdamWConfig, CosineScheduleConfig, LearnerConfig, RuleConfig
from pippin.train.recipe import recipe
from pippin.train.recipes.mesh_rules import HUGE, LARGE, LARGE_8K
from pippin.train.trainer_config import PerplexityConfig, TrainerConfig


def _train(
    model: CausalLMConfig,
    *,
    batch_size: int,
    sequence_length: int,
    learner: LearnerConfig,
    steps: int,
    rules: tuple[MeshRuleConfig, ...] = LARGE,
) -> TrainerConfig:
    return TrainerConfig(
        model=model,
        input=TextInputConfig(
            mixture=MixtureConfig(tasks=(TaskConfig(name="text", source=FilesConfig()),)),
            tokenizer=TokenizerFilesConfig(),
            batch_size=batch_size,
            sequence_length=sequence_length,
        ),
        learner=learner,
        mesh_rules=rules,
        checkpointer=CheckpointerConfig(every_steps=2000),
        evaluators=(PerplexityConfig(every_steps=2000, max_batches=32),),
        steps=steps,
    )


def _adamw(learning_rate: float, warmup_steps: int, final_ratio: float) -> LearnerConfig:
    return LearnerConfig(
        learning_rate=learning_rate,
        optimizer=AdamWConfig(beta1=0.9, beta2=0.95, weight_decay=0.1),
        schedule=CosineScheduleConfig(warmup_steps=warmup_steps, final_ratio=final_ratio),
        rules=(RuleConfig(component="norm", weight_decay_scale=0.0),),
    )


@recipe
def llama2_7b() -> TrainerConfig:
    """Llama 2 7B at a context of 4,096.

    Source:   arXiv:2307.09288, section 2.2: 2T tokens, 4M a batch, learning rate 3e-4.
    Hardware: hundreds of accelerators. Your text: --data; a tokenizer: --set input.tokenizer.directory=DIR.
    Expect:   unknown for other text than Meta's.
    """
    learner = _adamw(3e-4, warmup_steps=2000, final_ratio=0.1)
    return _train(llama.llama2_7b(), batch_size=1024, sequence_length=4096, learner=learner, steps=476_000)


@recipe
def llama2_70b() -> TrainerConfig:
    """Llama 2 70B at a context of 4,096.

    Source:   arXiv:2307.09288, section 2.2: 2T tokens, 4M a batch, learning rate 1.5e-4.
    Hardware: hundreds of accelerators. Your text: --data; a tokenizer: --set input.tokenizer.directory=DIR.
    Expect:   unknown for other text than Meta's.
    """
    learner = _adamw(1.5e-4, warmup_steps=2000, final_ratio=0.1)
    return _train(
        llama.llama2_70b(), batch_size=1024, sequence_length=4096, learner=learner, steps=476_000, rules=HUGE
    )


@recipe
def llama3_8b() -> TrainerConfig:
    """Llama 3 8B at a context of 8,192.

    Source:   arXiv:2407.21783, table 3 (learning rate 3e-4, 8,000 steps of warm-up); the batch of the
              paper grows to 16M tokens: here it is 8M throughout.
    Hardware: hundreds of accelerators. Your text: --data; a tokenizer: --set input.tokenizer.directory=DIR.
    Expect:   unknown for other text than Meta's.
    """
    learner = _adamw(3e-4, warmup_steps=8000, final_ratio=0.01)
    return _train(
        llama.llama3_8b(),
        batch_size=1024,
        sequence_length=8192,
        learner=learner,
        steps=1_800_000,
        rules=LARGE_8K,
    )


@recipe
def smollm2_135m() -> TrainerConfig:
    """SmolLM2 135M at a context of 2,048.

    Source:   arXiv:2502.02737; the sizes are those of the public config. Learning rate, batch and a cosine in
              place of its last linear decay are ours.
    Hardware: one node of accelerators. Your text: --data; a tokenizer: --set input.tokenizer.directory=DIR.
    Expect:   unknown for other text than its own.
    """
    learner = _adamw(3e-3, warmup_steps=2000, final_ratio=0.01)
    return _train(
        llama.smollm2_135m(), batch_size=512, sequence_length=2048, learner=learner, steps=2_000_000
    )
