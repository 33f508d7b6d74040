import copy
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pippin.core.config import Config
from pippin.core.config_tree import override, replace
from pippin.core.errors import ConfigError
from pippin.layers.attention_config import GroupedQueryAttentionConfig, QKNormOrder
from pippin.layers.causal_lm_config import FloatType
from pippin.layers.feed_forward_config import FeedForwardConfig
from pippin.layers.huggingface_config import config_from_huggingface, config_to_huggingface
from pippin.layers.linear_config import lora
from pippin.layers.models.afm_on_device_2024 import afm_on_device_2024
from pippin.layers.models.afm_on_device_2025 import afm_on_device_2025
from pippin.layers.models.llama import llama3_2_1b, llama3_8b, qwen3_0_6b, smollm2_135m
from pippin.layers.moe_config import MoEConfig
from pippin.layers.norm_config import RMSNormConfig
from pippin.layers.position_config import ALiBiConfig, RoPEConfig

# What matters of the files that are published with the models, with the keys that each has.
SMOLLM2_135M = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "hidden_act": "silu",
    "hidden_size": 576,
    "initializer_range": 0.041666666666666664,
    "intermediate_size": 1536,
    "is_llama_config": True,
    "max_position_embeddings": 8192,
    "model_type": "llama",
    "num_attention_heads": 9,
    "num_hidden_layers": 30,
    "num_key_value_heads": 3,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_interleaved": False,
    "rope_scaling": None,
    "rope_theta": 100000,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "vocab_size": 49152,
}
LLAMA3_8B = {
    "attention_bias": False,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 8192,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "vocab_size": 128256,
}
LLAMA3_2_1B = {
    "attention_bias": False,
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 16,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 32.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
    "vocab_size": 128256,
}
QWEN3_0_6B = {
    "attention_bias": False,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "max_window_layers": 28,
    "model_type": "qwen3",
    "num_attention_heads": 16,
    "num_hidden_layers": 28,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
_PUBLISHED = [
    (SMOLLM2_135M, smollm2_135m),
    (LLAMA3_8B, llama3_8b),
    (LLAMA3_2_1B, llama3_2_1b),
    (QWEN3_0_6B, qwen3_0_6b),
]


@pytest.mark.parametrize(("raw", "model"), _PUBLISHED)
def test_published_files_give_our_models(raw, model):
    assert config_from_huggingface(raw) == model()


@pytest.mark.parametrize(("raw", "model"), _PUBLISHED)
def test_our_models_give_what_the_published_files_say(raw, model):
    ours = config_to_huggingface(model())
    assert {name: ours[name] for name in raw.keys() & ours.keys()} == {
        name: raw[name] for name in raw.keys() & ours.keys()
    }
    assert config_from_huggingface(ours) == model()


def test_newer_files_have_the_rotation_in_one_object():
    new = {name: value for name, value in LLAMA3_2_1B.items() if not name.startswith("rope")}
    new["rope_parameters"] = LLAMA3_2_1B["rope_scaling"] | {"rope_theta": 500000.0}
    assert config_from_huggingface(new) == llama3_2_1b()
    plain = {name: value for name, value in SMOLLM2_135M.items() if not name.startswith("rope")}
    plain["rope_parameters"] = {"rope_type": "default", "rope_theta": 100000.0}
    assert config_from_huggingface(plain) == smollm2_135m()


def test_absent_values_are_those_of_the_family():
    sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    cfg: Any = config_from_huggingface({"model_type": "llama"} | {name: LLAMA3_8B[name] for name in sizes})
    attention = cfg.decoder.layer.attention
    assert (attention.num_kv_heads, attention.head_dim) == (32, 128)
    assert (attention.position.theta, cfg.norm.eps) == (10_000.0, 1e-6)
    assert cfg.head is not None


def test_biases_come_and_go_together():
    raw = LLAMA3_8B | {"attention_bias": True, "mlp_bias": True}
    cfg: Any = config_from_huggingface(raw)
    assert all(getattr(cfg.decoder.layer.attention, f"{p}_proj").bias for p in "qkvo")
    assert all(getattr(cfg.decoder.layer.feed_forward, f"{p}_proj").bias for p in ("gate", "up", "down"))
    ours = config_to_huggingface(cfg)
    assert ours["attention_bias"] and ours["mlp_bias"]
    with pytest.raises(ConfigError, match=r"differs.*decoder.layer.attention.o_proj.bias: True -> False"):
        config_to_huggingface(override(cfg, {"decoder.layer.attention.o_proj.bias": False}))


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"model_type": "mistral"}, "model_type is 'mistral'.*one of 'llama', 'qwen3'"),
        ({"model_type": None}, "model_type is None"),
        ({"model_type": ["llama"]}, r"model_type is \['llama'\]"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'.*'silu', 'gelu_pytorch_tanh', 'relu'"),
        ({"quantization_config": {"bits": 4}}, "quantization_config.*Dequantise"),
        ({"use_sliding_window": True}, "use_sliding_window is True.*attends to all"),
        ({"layer_types": ["sliding_attention"]}, "layer_types"),
        ({"layer_types": 3}, "layer_types is 3"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ({"rope_interleaved": True}, "rope_interleaved is True.*Permute"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope_type is 'yarn'.*'default', 'llama3'"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor is None"),
        ({"rope_scaling": 3}, "RoPE is 3"),
        ({"rope_parameters": {"full_attention": {}}}, "RoPE is.*the same for all layers"),
        ({"rope_parameters": {"partial_rotary_factor": 0.25}}, "partial_rotary_factor is 0.25"),
        ({"rope_theta": float("nan")}, "rope_theta is nan; it must be a positive number"),
        ({"rope_theta": "10000"}, "rope_theta is '10000'"),
        ({"vocab_size": None}, "vocab_size is None; it must be an integer from 1"),
        ({"num_hidden_layers": 10**12}, "num_hidden_layers is 1000000000000"),
        ({"hidden_size": 4096.0}, "hidden_size is 4096.0"),
        ({"hidden_size": True}, "hidden_size is True"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        ({"num_attention_heads": 30}, "must be a multiple of num_attention_heads"),
        ({"num_key_value_heads": 5}, "num_heads .32. must be a multiple of num_kv_heads .5."),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings is 'no'; it must be true or false"),
    ],
)
def test_what_is_not_supported_is_named(change, problem):
    with pytest.raises(ConfigError, match=problem):
        config_from_huggingface(LLAMA3_8B | change)


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=5), inner, max_size=2),
    max_leaves=4,
)


@settings(deadline=None, max_examples=300)
@given(raw=st.sampled_from([LLAMA3_2_1B, QWEN3_0_6B]), data=st.data())
def test_any_json_is_read_or_refused_by_a_config_error(raw, data):
    raw = copy.deepcopy(raw)
    inner = raw["rope_scaling"] if raw["rope_scaling"] and data.draw(st.booleans()) else raw
    name = data.draw(st.sampled_from([*inner, "rope_parameters", "layer_types", "mlp_bias"]))
    inner[name] = data.draw(_JSON)
    try:
        assert isinstance(config_from_huggingface(raw), Config)
    except ConfigError as e:
        assert len(str(e)) < 1000


def test_what_changes_no_logit_is_left_out():
    cfg = smollm2_135m().set(activation_dtype=FloatType.BFLOAT16, z_loss=1e-4, loss_chunk_tokens=8)
    cfg = override(cfg, {"decoder.unroll": 2, "decoder.layer.attention.kernel": "ReferenceKernel"})
    assert config_to_huggingface(cfg) == config_to_huggingface(smollm2_135m())


@pytest.mark.parametrize(
    ("cfg", "problem"),
    [
        (
            afm_on_device_2024(),
            "differs.*qk_norm_order: before_rotation -> after_rotation.*save a bundle",
        ),
        (afm_on_device_2025(), "decoder is a pippin.layers.SharedKVStack; in the Llama family it is a"),
        (replace(smollm2_135m(), FeedForwardConfig, MoEConfig()), "feed_forward is a pippin.layers.MoE"),
        (replace(smollm2_135m(), RoPEConfig, ALiBiConfig()), "position is a pippin.layers.ALiBi"),
        (lora()(smollm2_135m()), "attention.q_proj: 'pippin.layers.Linear' -> 'pippin.layers.LoRALinear'"),
        (
            override(smollm2_135m(), {"decoder.layer.attention.window": 128}),
            "decoder.layer.attention.window: None -> 128",
        ),
        (override(smollm2_135m(), {"decoder.layer.norm": RMSNormConfig(eps=0.1)}), "layer.norm.eps"),
        (smollm2_135m().set(logit_soft_cap=30.0), "logit_soft_cap: None -> 30.0"),
        (smollm2_135m().set(vocab_size=1 << 30), "vocab_size is 1073741824"),
    ],
)
def test_a_tree_that_config_json_cannot_describe_is_refused(cfg, problem):
    with pytest.raises(ConfigError, match=problem):
        config_to_huggingface(cfg)


def test_norm_before_rotation_is_qwen3():
    norm = {"qk_norm": RMSNormConfig(eps=1e-5), "qk_norm_order": QKNormOrder.BEFORE_ROTATION}
    cfg = replace(smollm2_135m(), GroupedQueryAttentionConfig, lambda old: old.set(**norm))
    assert config_to_huggingface(cfg)["model_type"] == "qwen3"
    assert config_from_huggingface(config_to_huggingface(cfg)) == cfg
