"""The pre-training of the models that Apple described in 2025.

Their optimizer and batches are not published: these are the core stage's of 2024.

Source: Apple 2025, arXiv:2507.13575.
"""

from pippin.layers.models.afm_on_device_2025 import afm_on_device_2025 as on_device_model
from pippin.layers.models.afm_server_2025 import afm_server_2025 as server_model
from pippin.train.input.config import SentencePieceConfig
from pippin.train.recipe import recipe
from pippin.train.recipes.afm_on_device_2024 import afm_on_device_2024_core
from pippin.train.recipes.mesh_rules import HUGE
from pippin.train.trainer_config import TrainerConfig


def _core(vocab_size: int) -> TrainerConfig:
    cfg = afm_on_device_2024_core()
    return cfg.set(input=cfg.input.set(tokenizer=SentencePieceConfig(vocab_size=vocab_size)))


@recipe
def afm_on_device_2025() -> TrainerConfig:
    """AFM on-device of 2025 (3.1B), whose second block reads the keys and values of the first: 14T tokens.

    Source:   arXiv:2507.13575, section 2; batch and learning rate are those of 2024.
    Hardware: as in 2024, thousands of accelerators. Text of your own: --data.
    Expect:   unknown. Apple then distils the last tenth of the tokens from a sparse teacher; this does not.
    """
    return _core(vocab_size=153_600).set(model=on_device_model(), steps=1_670_000)


@recipe
def afm_server_ptmoe() -> TrainerConfig:
    """The server model of 2025, a parallel-track mixture of experts (148B, 16B active): 13.4T tokens.

    Source:   arXiv:2507.13575, section 2; sizes are those of Apple's published library, which Apple does
              not call its production model's.
    Hardware: Apple used 8,192 TPU v5p. Text of your own: --data.
    Expect:   unknown.
    """
    return _core(vocab_size=153_600).set(model=server_model(), mesh_rules=HUGE, steps=1_600_000)
