"""The pre-training of AFM on-device in its three stages, and the same in miniature.

Each stage starts from the parameters of the one before it: run them in order.
What is not published (see the models' files, too) is a default here, and says so.

Source: Gunter et al. 2024, arXiv:2407.21075, section 3; the optimizer's details are those of AXLearn's
`honeycrisp`. Apple distils its on-device model in the core stage (the target is 0.9 of the teacher's
first choice and 0.1 of the text's token); here it learns from the text alone.
"""

from pippin.core.checkpoint_config import CheckpointerConfig
from pippin.core.config_tree import override
from pippin.layers.models.afm_on_device_2024 import afm_on_device_2024
from pippin.train.input.config import (
    FilesConfig,
    MixtureConfig,
    SentencePieceConfig,
    TaskConfig,
    TextInputConfig,
)
from pippin.train.learner.config import AfmOptimizerConfig, CosineScheduleConfig, LearnerConfig, MuPConfig
from pippin.train.recipe import recipe
from pippin.train.recipes.mesh_rules import LARGE, SMALL
from pippin.train.trainer_config import PerplexityConfig, TrainerConfig

# The base of RoPE that lengthens the context to 32,768 tokens.
LONG_CONTEXT_THETA = 6_315_089.0
# The width of the miniature, where muP changes nothing: 768 would raise the rate of so narrow a model.
_TINY_DIM = 96


def _learner(
    learning_rate: float,
    warmup_steps: int,
    final_ratio: float,
    weight_decay: float = 3.16e-4,
    base_dim: int = 768,
) -> LearnerConfig:
    """The optimizer of AFM: clip at 1, skip at 100, simple muP from a width of 768."""
    return LearnerConfig(
        learning_rate=learning_rate,
        optimizer=AfmOptimizerConfig(weight_decay=weight_decay),
        schedule=CosineScheduleConfig(warmup_steps=warmup_steps, final_ratio=final_ratio),
        mup=MuPConfig(base_dim=base_dim),
        clip_norm=1.0,
        skip_norm=100.0,
    )


def _input(batch_size: int, sequence_length: int) -> TextInputConfig:
    # Apple's mixture is not published: give your own text with --data.
    return TextInputConfig(
        mixture=MixtureConfig(tasks=(TaskConfig(name="text", source=FilesConfig()),)),
        tokenizer=SentencePieceConfig(vocab_size=49_152),
        batch_size=batch_size,
        sequence_length=sequence_length,
    )


@recipe
def afm_on_device_2024_core() -> TrainerConfig:
    """AFM on-device (2.7B), stage 1 of 3: 6.3T tokens at a context of 4,096.

    Source:   arXiv:2407.21075, section 3.1. The batch of 2,048 rows is honeycrisp's.
    Hardware: Apple used 2,048 TPU v5p. Text of your own: --data.
    Expect:   unknown; Apple publishes no loss.
    """
    return TrainerConfig(
        model=afm_on_device_2024(),
        input=_input(batch_size=2048, sequence_length=4096),
        learner=_learner(0.01, warmup_steps=5000, final_ratio=0.005),
        mesh_rules=LARGE,
        checkpointer=CheckpointerConfig(every_steps=5000),
        evaluators=(PerplexityConfig(every_steps=5000, max_batches=64),),
        steps=750_000,
    )


@recipe
def afm_on_device_2024_continued() -> TrainerConfig:
    """AFM on-device, stage 2 of 3: 1T tokens at a context of 8,192.

    Source:   arXiv:2407.21075, section 3.2. The batch is not published: 8M tokens, as in stage 1.
    Hardware: as stage 1, whose run it starts from.
    Expect:   unknown.
    """
    return afm_on_device_2024_core().set(
        input=_input(batch_size=1024, sequence_length=8192),
        learner=_learner(3e-4, warmup_steps=1000, final_ratio=0.001, weight_decay=1e-5),
        steps=119_000,
        init_from="runs/afm_on_device_2024_core",
    )


@recipe
def afm_on_device_2024_context() -> TrainerConfig:
    """AFM on-device, stage 3 of 3: 100B tokens at a context of 32,768, with a larger base of RoPE.

    Source:   arXiv:2407.21075, section 3.3. Batch and learning rate are not published: those of stage 2.
    Hardware: as stage 1.
    Expect:   unknown.
    """
    cfg = afm_on_device_2024_continued().set(
        input=_input(batch_size=256, sequence_length=32_768),
        steps=11_900,
        init_from="runs/afm_on_device_2024_continued",
    )
    return _lengthen(cfg)


def _lengthen(cfg: TrainerConfig) -> TrainerConfig:
    return override(cfg, {"model.decoder.layer.attention.position.theta": LONG_CONTEXT_THETA})


@recipe
def afm_on_device_2024_tiny_core() -> TrainerConfig:
    """The three stages in miniature, 1 of 3: a context of 64, on the Python standard library.

    Source:   arXiv:2407.21075, section 3.1; sizes are ours.
    Hardware: anything.
    Time:     under a minute on 2 CPU cores.
    """
    return TrainerConfig(
        model=afm_on_device_2024(
            vocab_size=2048,
            dim=_TINY_DIM,
            num_layers=2,
            num_heads=3,
            num_kv_heads=1,
            head_dim=32,
            hidden_dim=256,
        ),
        input=_tiny_input(batch_size=16, sequence_length=64),
        learner=_learner(0.01, warmup_steps=20, final_ratio=0.005, base_dim=_TINY_DIM),
        mesh_rules=SMALL,
        evaluators=(PerplexityConfig(every_steps=100, max_batches=4),),
        checkpointer=CheckpointerConfig(every_steps=100),
        steps=200,
    )


def _tiny_input(batch_size: int, sequence_length: int) -> TextInputConfig:
    tokenizer = SentencePieceConfig(vocab_size=2048)
    return TextInputConfig(tokenizer=tokenizer, batch_size=batch_size, sequence_length=sequence_length)


@recipe
def afm_on_device_2024_tiny_continued() -> TrainerConfig:
    """The three stages in miniature, 2 of 3: a context of 128, from the run of stage 1.

    Source:   arXiv:2407.21075, section 3.2; sizes are ours.
    Hardware: anything.
    Time:     under a minute on 2 CPU cores.
    """
    return afm_on_device_2024_tiny_core().set(
        input=_tiny_input(batch_size=8, sequence_length=128),
        learner=_learner(3e-4, warmup_steps=10, final_ratio=0.001, weight_decay=1e-5, base_dim=_TINY_DIM),
        steps=100,
        init_from="runs/afm_on_device_2024_tiny_core",
    )


@recipe
def afm_on_device_2024_tiny_context() -> TrainerConfig:
    """The three stages in miniature, 3 of 3: a context of 512, with the larger base of RoPE.

    Source:   arXiv:2407.21075, section 3.3; sizes are ours.
    Hardware: anything.
    Time:     under a minute on 2 CPU cores.
    """
    cfg = afm_on_device_2024_tiny_continued().set(
        input=_tiny_input(batch_size=2, sequence_length=512),
        steps=50,
        init_from="runs/afm_on_device_2024_tiny_continued",
    )
    return _lengthen(cfg)
