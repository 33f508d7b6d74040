"""Every model: its full size against the published figures, and a tiny one through one conformance run."""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from pippin.core.component import from_proto, to_proto
from pippin.core.config_tree import override, replace
from pippin.core.errors import ConfigError
from pippin.core.module import ParameterInfo, flatten_params, merge, parameter_infos, split, unflatten_params
from pippin.layers.causal_lm_config import CausalLMConfig
from pippin.layers.models.afm_on_device_2024 import afm_on_device_2024
from pippin.layers.models.afm_on_device_2025 import afm_on_device_2025
from pippin.layers.models.afm_server_2024 import afm_server_2024
from pippin.layers.models.afm_server_2025 import afm_server_2025
from pippin.layers.models.llama import llama2_7b, llama2_70b, llama3_2_1b, llama3_8b, qwen3_0_6b, smollm2_135m
from pippin.layers.position_config import RoPEConfig


@dataclasses.dataclass(frozen=True)
class Model:
    """What the tests know of a model."""

    make: Callable[[], CausalLMConfig]
    parameters: int  # of the full size
    tiny: CausalLMConfig


_TINY = {"vocab_size": 64, "dim": 16, "num_heads": 4, "head_dim": 8}
_TINY_LLAMA = {
    "vocab_size": 64,
    "dim": 16,
    "decoder.num_layers": 2,
    "decoder.layer.attention.num_kv_heads": 2,
    "decoder.layer.attention.num_heads": 4,
    "decoder.layer.attention.head_dim": 8,
    "decoder.layer.feed_forward.hidden_dim": 24,
}

MODELS = {
    "afm_on_device_2024": Model(
        afm_on_device_2024,
        2_737_739_264,
        afm_on_device_2024(**_TINY, num_layers=2, num_kv_heads=2, hidden_dim=24),
    ),
    "afm_on_device_2025": Model(
        afm_on_device_2025,
        3_111_368_064,
        afm_on_device_2025(**_TINY, num_layers=3, num_readers=2, num_kv_heads=2, hidden_dim=24),
    ),
    "afm_server_2024": Model(
        afm_server_2024,
        44_326_477_824,
        afm_server_2024(**_TINY, num_layers=2, num_kv_heads=1, hidden_dim=24),
    ),
    "afm_server_2025": Model(
        afm_server_2025,
        147_803_703_296,
        afm_server_2025(
            **_TINY,
            num_layers=4,
            num_tracks=2,
            window=4,
            hidden_dim=24,
            num_experts=4,
            top_k=2,
            expert_hidden_dim=16,
        ),
    ),
    "smollm2_135m": Model(smollm2_135m, 134_515_008, override(smollm2_135m(), _TINY_LLAMA)),
    "llama2_7b": Model(llama2_7b, 6_738_415_616, override(llama2_7b(), _TINY_LLAMA)),
    "llama2_70b": Model(llama2_70b, 68_976_648_192, override(llama2_70b(), _TINY_LLAMA)),
    "llama3_8b": Model(llama3_8b, 8_030_261_248, override(llama3_8b(), _TINY_LLAMA)),
    "llama3_2_1b": Model(llama3_2_1b, 1_235_814_400, override(llama3_2_1b(), _TINY_LLAMA)),
    "qwen3_0_6b": Model(qwen3_0_6b, 596_049_920, override(qwen3_0_6b(), _TINY_LLAMA)),
}


def _infos(cfg: CausalLMConfig) -> dict[str, ParameterInfo]:
    return flatten_params(parameter_infos(nnx.eval_shape(lambda: cfg.build(rngs=nnx.Rngs(0)))))


def _count(infos: dict[str, ParameterInfo]) -> int:
    return sum(math.prod(info.shape) for info in infos.values())


@pytest.mark.parametrize("name", MODELS)
def test_full_size_has_as_many_parameters_as_published(name: str):
    assert _count(_infos(MODELS[name].make())) == MODELS[name].parameters


def test_afm_on_device_2024_splits_as_published():
    infos = _infos(afm_on_device_2024())
    embedding = math.prod(infos.pop("embedding.weight").shape)
    # Published: 2.58B and 0.15B.
    assert (embedding, _count(infos)) == (150_994_944, 2_586_744_320)
    shapes = {path.removeprefix("decoder.layer."): info.shape for path, info in infos.items()}
    assert shapes == {
        "attention.q_proj.weight": (26, 3072, 3072),
        "attention.k_proj.weight": (26, 3072, 1024),
        "attention.v_proj.weight": (26, 3072, 1024),
        "attention.o_proj.weight": (26, 3072, 3072),
        "attention.q_norm.scale": (26, 128),
        "attention.k_norm.scale": (26, 128),
        "attention_norm.scale": (26, 3072),
        "feed_forward.gate_proj.weight": (26, 3072, 8064),
        "feed_forward.up_proj.weight": (26, 3072, 8064),
        "feed_forward.down_proj.weight": (26, 8064, 3072),
        "feed_forward_norm.scale": (26, 3072),
        "norm.scale": (3072,),
    }


def test_block_2_of_afm_on_device_2025_is_three_eighths_of_the_layers_and_has_no_keys():
    infos = _infos(afm_on_device_2025())
    assert infos["decoder.readers.layer.attention.q_proj.weight"].shape == (21, 2048, 2048)
    assert infos["decoder.first.layer.attention.k_proj.weight"].shape == (34, 2048, 256)
    assert infos["decoder.source.attention.k_proj.weight"].shape == (2048, 256)
    assert not [path for path in infos if "readers" in path and ("k_" in path or "v_" in path)]
    assert 21 / (21 + 34 + 1) == 0.375


def test_afm_server_2025_activates_a_ninth_of_its_parameters():
    infos = _infos(afm_server_2025())
    active = sum(
        math.prod(i.shape) * 2 // 40 if "grouped_linear" in i.provides else math.prod(i.shape)
        for i in infos.values()
    )
    assert active == 15_834_122_240  # given as about 15.8B of 147.8B
    track = {path.removeprefix("decoder.layer.track.layers."): info.shape for path, info in infos.items()}
    assert track["0.attention.q_proj.weight"] == (12, 8, 2048, 512)
    assert track["2.feed_forward.up_proj.weight"] == (12, 8, 2048, 5888)
    assert track["3.feed_forward.up_proj.weight"] == (12, 8, 40, 2048, 2944)
    assert track["3.feed_forward.router.proj.weight"] == (12, 8, 2048, 40)


def test_afm_server_2025_refuses_a_part_of_a_block():
    with pytest.raises(ConfigError, match=r"num_layers \(6\) must be a multiple of 4.*Use 8"):
        afm_server_2025(num_layers=6)


def test_sizes_are_the_only_difference_of_the_tiny_models():
    tiny = afm_on_device_2024(**_TINY, num_layers=2, num_kv_heads=2, hidden_dim=24)
    sizes = {path: value for path, value in _TINY_LLAMA.items()}
    assert override(afm_on_device_2024(), sizes) == tiny


def test_context_lengthening_sets_the_base_of_the_rotation():
    long = override(afm_on_device_2024(), {"decoder.layer.attention.position.theta": 6_315_089.0})
    assert long == replace(afm_on_device_2024(), RoPEConfig, RoPEConfig(theta=6_315_089.0))


# The conformance run.

_RNG = np.random.default_rng(0)
_TOKENS = _RNG.integers(0, 64, (3, 12)).astype(np.int32)


def _random(info: ParameterInfo) -> np.ndarray:
    """Values about as large as those that models start with; compiling their initialisers would take longer."""
    if info.provides[-1] == "norm":
        return _RNG.uniform(0.8, 1.2, info.shape).astype(np.float32)
    fan_in = info.shape[-1] if info.provides[-1] == "embedding" else info.shape[-2]
    return (_RNG.normal(size=info.shape) * fan_in**-0.5).astype(np.float32)


@pytest.mark.parametrize("name", MODELS)
def test_tiny_model_conforms(name: str):
    cfg = MODELS[name].tiny
    assert from_proto(to_proto(cfg)) == cfg
    definition, _ = split(nnx.eval_shape(lambda: cfg.build(rngs=nnx.Rngs(0))))
    params = unflatten_params({path: _random(info) for path, info in _infos(cfg).items()})
    logits = _check_packing(definition, params)
    assert logits.shape == (3, 12, 64) and logits.dtype == jnp.float32
    _check_loss_and_gradients(definition, params, logits)
    _check_cache(definition, params, logits)


def _check_loss_and_gradients(definition, params, logits):
    """The loss is that of the logits, and all parameters learn from it."""
    rows, length = _TOKENS.shape
    batch = {
        "tokens": _TOKENS,
        "targets": np.roll(_TOKENS, -1, axis=1),
        "positions": np.tile(np.arange(length, dtype=np.int32), (rows, 1)),
        "segment_ids": np.ones_like(_TOKENS),
        "loss_weights": np.ones(_TOKENS.shape, np.float32),
    }

    @jax.jit
    def run(params, batch):
        return jax.value_and_grad(lambda p: merge(definition, p).loss(batch), has_aux=True)(params)

    (loss, metrics), gradients = run(params, batch)
    log_p = jax.nn.log_softmax(logits)
    expected = -jnp.take_along_axis(log_p, jnp.asarray(batch["targets"])[..., None], axis=-1).mean()
    np.testing.assert_allclose(metrics["cross_entropy"], expected, rtol=1e-5)
    assert -1e-5 < loss - expected < 0.5  # the rest is z-loss and what routers report
    for path, gradient in flatten_params(gradients).items():
        assert jnp.isfinite(gradient).all() and jnp.any(gradient != 0), path


def _check_packing(definition, params):
    """Two documents of a row see nothing of each other. Returns the logits of the tokens, a document a row."""
    length, first = _TOKENS.shape[1], 7
    tokens = np.stack([_TOKENS[0], _TOKENS[0], np.roll(_TOKENS[0], -first)])
    steps = np.arange(length, dtype=np.int32)
    in_second = steps >= first
    positions = np.stack([np.where(in_second, steps - first, steps), steps, steps])
    segments = np.stack([1 + in_second, ~in_second, steps < length - first]).astype(np.int32)
    positions = np.where(segments == 0, -1, positions).astype(np.int32)

    @jax.jit
    def run(params, *packed):
        model = merge(definition, params)
        return model(jnp.asarray(_TOKENS)), model(*packed)

    logits, (packed, left, right) = run(params, tokens, positions, segments)
    np.testing.assert_allclose(packed[:first], left[:first], atol=2e-5)
    np.testing.assert_allclose(packed[first:], right[: length - first], atol=2e-5)
    return logits


def _check_cache(definition, params, logits):
    """Prefill, extension and decoding give the logits of the whole."""

    @jax.jit
    def run(params):
        model = merge(definition, params)
        tokens = jnp.asarray(_TOKENS)
        empty = cache = model.init_cache(*tokens.shape)
        parts = []
        for part in (slice(0, 6), slice(6, 10), slice(10, 11), slice(11, 12)):
            of_part, cache = model.extend(tokens[:, part], cache)
            parts.append(of_part)
        return jnp.concatenate(parts, axis=1), model.extend(tokens, empty, last_only=True)[0]

    cached, last = run(params)
    np.testing.assert_allclose(cached, logits, atol=2e-5)
    np.testing.assert_allclose(last[:, 0], logits[:, -1], atol=2e-5)
