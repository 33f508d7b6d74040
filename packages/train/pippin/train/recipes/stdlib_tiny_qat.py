"""The default recipe's model, trained on with the 2-bit weights that a device will have."""

from pippin.layers.quant.fake_quant_config import fake_quantized
from pippin.train.input.config import TokenizerFilesConfig
from pippin.train.learner.config import RuleConfig
from pippin.train.recipe import recipe
from pippin.train.recipes.stdlib_tiny import stdlib_tiny
from pippin.train.trainer_config import TrainerConfig

_BASE = "runs/stdlib_tiny"


@recipe
def stdlib_tiny_qat() -> TrainerConfig:
    """The run of stdlib_tiny with weights of 2 bits, an embedding of 4, and keys and values of 8.

    Weights are averaged, and do not decay. `bazel run //packages/export:compress` stores them as they were rounded, whatever
    its recipe. Train stdlib_tiny first; `--set init_from=DIR` and `--set input.tokenizer.directory=DIR/tokenizer` take
    another run.

    Source:   AFM 2025, arXiv:2507.13575 (levels, learned scales, averaged weights); sizes and learning rate are ours.
    Hardware: anything; 2 CPU cores are enough.
    Expect:   a held-out perplexity of about 86 a token, where stdlib_tiny has 99, and 108 before the first step.
    Time:     about 3 minutes on 2 idle CPU cores.
    """
    base = stdlib_tiny()
    return base.set(
        model=fake_quantized(bits=2, embedding_bits=4)(base.model),
        init_from=_BASE,
        input=base.input.set(tokenizer=TokenizerFilesConfig(directory=f"{_BASE}/tokenizer")),
        learner=base.learner.set(
            learning_rate=2e-3,
            rules=(RuleConfig(component="causal_lm", weight_decay_scale=0.0),),
            ema_decay=0.98,
        ),
        steps=280,
    )
