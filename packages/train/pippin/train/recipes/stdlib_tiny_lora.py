"""A LoRA on the model of the default recipe: the smallest example of an adapter."""

from pippin.layers.linear_config import lora
from pippin.train.input.config import MixtureConfig, StdlibConfig, TaskConfig, TokenizerFilesConfig
from pippin.train.learner.config import RuleConfig
from pippin.train.recipe import recipe
from pippin.train.recipes.stdlib_tiny import stdlib_tiny
from pippin.train.trainer_config import TrainerConfig

_BASE = "runs/stdlib_tiny"


@recipe
def stdlib_tiny_lora() -> TrainerConfig:
    """A LoRA of rank 8 on the run of stdlib_tiny, for Python's own tests.

    `bazel run //packages/layers:adapter` makes an adapter of the run. Train stdlib_tiny first; `--set init_from=DIR` and
    `--set input.tokenizer.directory=DIR/tokenizer` take another run.

    Source:   Hu et al. 2021, arXiv:2106.09685; sizes and learning rate are ours.
    Hardware: anything; 2 CPU cores are enough.
    Expect:   a held-out perplexity of about 91 a token, where the base has 122.
    Time:     about 2 minutes on 2 idle CPU cores.
    """
    base = stdlib_tiny()
    learner = base.learner.set(
        learning_rate=2e-3,
        rules=(
            RuleConfig(component="causal_lm", frozen=True),
            RuleConfig(component="pippin.layers.LoRALinear", direct=True),
        ),
    )
    tests = MixtureConfig(tasks=(TaskConfig(name="tests", source=StdlibConfig(include_tests=True)),))
    return base.set(
        model=lora(rank=8, alpha=16.0)(base.model),
        init_from=_BASE,
        input=base.input.set(mixture=tests, tokenizer=TokenizerFilesConfig(directory=f"{_BASE}/tokenizer")),
        learner=learner,
        steps=210,
    )
