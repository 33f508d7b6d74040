"""The LoRA modifier on config trees."""

import pytest

from pippin.core.config import Config
from pippin.core.config_tree import chain, traverse
from pippin.core.errors import ConfigError
from pippin.layers.attention_config import GroupedQueryAttentionConfig
from pippin.layers.causal_lm_config import CausalLMConfig
from pippin.layers.linear_config import LinearConfig, LoRALinearConfig, lora
from pippin.layers.moe_config import MoEConfig
from pippin.layers.norm_config import RMSNormConfig
from pippin.layers.stack_config import RepeatConfig, SequenceConfig, TransformerLayerConfig

_LAYER = TransformerLayerConfig(attention=GroupedQueryAttentionConfig(q_proj=LinearConfig(bias=True)))
_LM = CausalLMConfig(
    decoder=RepeatConfig(
        layer=SequenceConfig(layers=(_LAYER, TransformerLayerConfig(feed_forward=MoEConfig())))
    )
)


def _loras(cfg: Config) -> list[str]:
    prefix = "decoder.layer.layers."
    return [p.removeprefix(prefix) for p, c in traverse(cfg) if isinstance(c, LoRALinearConfig)]


_ATTENTIONS = [f"{i}.attention.{p}_proj" for i in (0, 1) for p in "qkvo"]
_FEED_FORWARDS = [f"0.feed_forward.{p}_proj" for p in ("gate", "up", "down")] + ["1.feed_forward.router.proj"]


@pytest.mark.parametrize(
    "modifier, wrapped",
    [
        (lora(), _ATTENTIONS + _FEED_FORWARDS),
        (lora(only="attention"), _ATTENTIONS),
        (lora(only="pippin.layers.FeedForward"), _FEED_FORWARDS[:3]),
        (lora(only="layer"), _ATTENTIONS + _FEED_FORWARDS),  # layers in layers
        (chain(lora(only="attention"), lora()), _ATTENTIONS + _FEED_FORWARDS),
    ],
    ids=["all", "attention", "a type", "nested", "one after the other"],
)
def test_lora_wraps_each_linear_map_once(modifier, wrapped):
    tuned = modifier(_LM)
    assert sorted(_loras(tuned)) == sorted(wrapped)
    assert not any(
        isinstance(c.base, LoRALinearConfig) for _, c in traverse(tuned) if isinstance(c, LoRALinearConfig)
    )


def test_lora_keeps_what_it_wraps_and_takes_over_its_dims():
    map_of_own_size = LinearConfig(input_dim=4, output_dim=3, output_axis="mlp", bias=True)
    tuned = lora(rank=2, alpha=5.0)(map_of_own_size)
    assert tuned == LoRALinearConfig(
        input_dim=4, output_dim=3, output_axis="mlp", base=map_of_own_size, rank=2, alpha=5.0
    )


def test_lora_keeps_a_lora_that_is_there():
    tuned = chain(lora(rank=2, only="attention"), lora(rank=4))(_LM)
    assert tuned.decoder.layer.layers[0].attention.q_proj.rank == 2
    assert tuned.decoder.layer.layers[0].feed_forward.up_proj.rank == 4


@pytest.mark.parametrize(
    "modifier, cfg, match",
    [
        (
            lora(only="atention"),
            _LM,
            r"no linear map without a LoRA inside 'atention'.*attention, attention_kernel",
        ),
        (lora(), RMSNormConfig(), r"RMSNormConfig holds no linear map"),
        (chain(lora(), lora()), _LM, r"no linear map without a LoRA, so nothing would change"),
    ],
)
def test_lora_that_would_change_nothing_is_refused(modifier, cfg, match):
    with pytest.raises(ConfigError, match=match):
        modifier(cfg)
