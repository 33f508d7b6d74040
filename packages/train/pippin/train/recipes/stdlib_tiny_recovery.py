"""Accuracy-recovery adapters of a compressed model, and adapters for a task that start from them."""

from pippin.layers.linear_config import lora
from pippin.train.input.config import MixtureConfig, StdlibConfig, TaskConfig, TokenizerFilesConfig
from pippin.train.learner.config import RuleConfig
from pippin.train.recipe import recipe
from pippin.train.recipes.stdlib_tiny import stdlib_tiny
from pippin.train.trainer_config import TrainerConfig

_COMPRESSED = "compressed/stdlib_tiny"
_RECOVERED = "runs/stdlib_tiny_recovery"


def recovery(base: TrainerConfig, compressed: str) -> TrainerConfig:
    """The config that trains a LoRA of rank 16 on a compressed model, which stays as it is.

    Args:
        base: the model that was compressed, and all else of the training: its tokenizer is that of the bundle.
        compressed: the bundle; it has no loops over layers, so that each matrix has its own bits.
    """
    # It takes NumPy, which a list of recipes need not.
    from pippin.layers.unrolled import unrolled_config

    rules = (
        RuleConfig(component="causal_lm", frozen=True),
        RuleConfig(component="pippin.layers.LoRALinear", direct=True),
    )
    return base.set(
        model=lora(rank=16, alpha=16.0)(unrolled_config(base.model)),  # type: ignore[arg-type]
        init_from=compressed,
        learner=base.learner.set(rules=rules),
    )


@recipe
def stdlib_tiny_recovery() -> TrainerConfig:
    """A LoRA of rank 16 that wins back what compression lost of stdlib_tiny, on the text that it was trained on.

    Compress the run first: `bazel run //packages/export:compress -- --model runs/stdlib_tiny --recipe palettize_2bit
    --out compressed/stdlib_tiny`; `--set init_from=BUNDLE` and `--set input.tokenizer.directory=BUNDLE/tokenizer` take
    another. `bazel run //packages/layers:adapter` makes an adapter of the run.

    Source:   AFM, arXiv:2407.21075, section 5 (accuracy-recovery adapters, rank 16); the learning rate is ours.
    Hardware: anything; 2 CPU cores are enough.
    Expect:   a held-out perplexity of about 100 a token, where the compressed model has 107, and stdlib_tiny 99.
    Time:     about 3 minutes on 2 CPU cores.
    """
    base = stdlib_tiny()
    tokenizer = TokenizerFilesConfig(directory=f"{_COMPRESSED}/tokenizer")
    base = base.set(
        input=base.input.set(tokenizer=tokenizer), learner=base.learner.set(learning_rate=2e-3), steps=210
    )
    return recovery(base, _COMPRESSED)


@recipe
def stdlib_tiny_feature() -> TrainerConfig:
    """A LoRA for Python's own tests, on the same compressed model: it starts from the recovery adapter.

    Train stdlib_tiny_recovery first; `--set init_from=DIR` and `--set input.tokenizer.directory=DIR/tokenizer` take another
    run.

    Source:   AFM, arXiv:2407.21075, section 5 (feature adapters start from the recovery adapter).
    Hardware: anything; 2 CPU cores are enough.
    Expect:   a held-out perplexity of about 89 a token on that text; stdlib_tiny_lora takes the float model's from 122 to 91.
    Time:     about 3 minutes on 2 CPU cores.
    """
    cfg = stdlib_tiny_recovery()
    tests = MixtureConfig(tasks=(TaskConfig(name="tests", source=StdlibConfig(include_tests=True)),))
    tokenizer = TokenizerFilesConfig(directory=f"{_RECOVERED}/tokenizer")
    return cfg.set(init_from=_RECOVERED, input=cfg.input.set(mixture=tests, tokenizer=tokenizer))
