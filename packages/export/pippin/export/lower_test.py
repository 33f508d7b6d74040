"""A program computes what its model does, component by component, and is of the form that Core ML keeps to."""

import dataclasses

import numpy as np
import pytest

from pippin.core.config_tree import override, replace
from pippin.core.errors import CheckpointError, ConfigError
from pippin.core.quantized_array import Palettized, Scaled
from pippin.export import lower_testing as t
from pippin.export.lower import Sizes, lower
from pippin.export.mil.spec import load_program
from pippin.layers import configs as c
from pippin.layers.models.llama import with_qk_norm

# Keys and values are float16 between calls, and so are the tables of angles; logits are about 5.
TOLERANCE = 1.2e-2

_ATTENTION = "decoder.layer.attention"
_READER = c.SharedKVAttentionConfig(
    num_heads=4, num_kv_heads=2, head_dim=16, position=c.RoPEConfig(theta=10_000.0)
)


def changed(**fields):
    return override(t.TINY, {f"{_ATTENTION}.{name}": value for name, value in fields.items()})


MODELS = {
    "llama": t.TINY,
    "untied, capped logits": override(t.TINY, {"head": c.LinearConfig(), "logit_soft_cap": 5.0}),
    "biases": replace(t.TINY, c.LinearConfig, c.LinearConfig(bias=True)),
    "lora": c.lora(4, 8.0)(t.TINY),
    "norm before rotation": with_qk_norm(t.TINY),
    "norm after rotation": changed(
        qk_norm=c.RMSNormConfig(), qk_norm_order=c.QKNormOrder.AFTER_ROTATION, window=9
    ),
    "slower rotations": changed(position=c.RoPEConfig(scaling=c.Llama3ScalingConfig(original_context=16))),
    "no positions": changed(position=c.NoPEConfig()),
    "alibi": changed(position=c.ALiBiConfig()),
    "window": changed(window=7),
    "window that slides": changed(window=7, cache=c.SlidingWindowCacheConfig()),
    "window beyond the context": changed(window=500),
    "capped attention": changed(soft_cap=2.0),
    "sinks": changed(sinks=True),
    "gelu": override(t.TINY, {"decoder.layer.feed_forward.activation": c.Activation.GELU}),
    "relu": override(t.TINY, {"decoder.layer.feed_forward.activation": c.Activation.RELU}),
    "one layer": override(t.TINY, {"decoder.num_layers": 1}),
    "shared keys": t.SHARED_KEYS,
    "a mixed sequence": t.TINY.set(
        decoder=c.SequenceConfig(
            layers=(
                changed(window=5).decoder,
                changed(window=9).decoder.layer,
                t.TINY.decoder.layer.set(attention=_READER),
            )
        )
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_program_computes_what_its_model_does(tmp_path, name):
    made, tokens = t.model(MODELS[name]), t.some_tokens(62)
    package, _ = t.save(tmp_path, made.flat_cfg, made.flat)
    expected = t.reference(made.cfg, made.params, tokens)
    np.testing.assert_allclose(t.run(package, tokens, prompt=58), expected, atol=TOLERANCE)


def test_compressed_weights_go_in_as_they_are(tmp_path):
    made, rng = t.model(t.TINY), np.random.default_rng(3)

    def palette(shape, bits, groups):
        luts = 0.2 * rng.standard_normal((*groups, 2**bits))
        indices = rng.integers(0, 2**bits, shape).astype(np.uint8)
        return Palettized(indices, luts.astype(np.float16), bits)

    def scaled(shape, bits, blocks):
        most = 2 ** (bits - 1) - 1
        scales = rng.uniform(0.1, 0.3, blocks) / most
        return Scaled(rng.integers(-most, most + 1, shape).astype(np.int8), scales.astype(np.float16), bits)

    params: dict = dict(made.flat)
    for layer in "01":
        for name, make in {
            "attention.q_proj": lambda s: palette(s, 4, (1, s[1] // 16)),
            "attention.k_proj": lambda s: palette(s, 2, (s[0] // 16, 1)),
            "attention.v_proj": lambda s: palette(s, 3, (1, 1)),
            "attention.o_proj": lambda s: scaled(s, 4, (s[0] // 32, s[1])),
            "feed_forward.gate_proj": lambda s: palette(s, 6, (1, 2)),
            "feed_forward.up_proj": lambda s: palette(s, 8, (1, 1)),
            "feed_forward.down_proj": lambda s: scaled(s, 8, (1, s[1])),
        }.items():
            path = f"decoder.layers.{layer}.{name}.weight"
            params[path] = make(params[path].shape)
    params["embedding.weight"] = scaled((96, 64), 8, (96, 1))
    package, lowered = t.save(tmp_path, made.flat_cfg, params)
    floats = {n: v if isinstance(v, np.ndarray) else v.dequantized() for n, v in params.items()}
    tokens = t.some_tokens(30)
    expected = t.reference(made.flat_cfg, floats, tokens)
    np.testing.assert_allclose(t.run(package, tokens, prompt=26), expected, atol=TOLERANCE)
    claimed = {w.name: (w.scheme, w.bits, w.bytes) for w in lowered.weights}
    assert claimed["decoder.layers.0.attention.q_proj.weight"] == ("palettized", 4, 64 * 64 // 2 + 4 * 16 * 2)
    assert claimed["embedding.weight"] == ("scaled", 8, 96 * 64 + 96 * 2)
    # Nothing of it stands there as floats too: beside weights there are tables of angles, zeros and ranges.
    blobs = next(iter(load_program(package).weight_files.values()))
    assert blobs.path.stat().st_size < 1.15 * sum(w.bytes for w in lowered.weights)


def test_weights_lie_in_the_package_once(tmp_path):
    made = t.model(t.TINY)
    package, lowered = t.save(tmp_path, made.flat_cfg, made.flat)
    size = (package / "Data" / "com.apple.CoreML" / "weights" / "weight.bin").stat().st_size
    assert sum(w.bytes for w in lowered.weights) == 2 * sum(v.size for v in made.flat.values())
    assert size < 1.1 * sum(w.bytes for w in lowered.weights)
    program = load_program(package)
    of = [
        {f.constants[n].value for n in f.constants if n.endswith("_weight")}
        for f in program.functions.values()
    ]
    assert of[0] == of[1] and len(of[0]) == 15


def test_a_program_has_the_form_that_core_ml_keeps_to(tmp_path):
    made = t.model(t.TINY)
    package, lowered = t.save(tmp_path, made.flat_cfg, made.flat)
    program = load_program(package)
    assert program.functions.keys() == {"prefill", "decode"}
    for name, tokens in (("prefill", 24), ("decode", 1)):
        function = program.functions[name]
        assert {n: str(k) for n, k in function.inputs.items()} == {
            "inputIds": f"int32[1, {tokens}]",
            "position": "int32[1]",
            "causalMask": f"float16[1, 1, {tokens}, 64]",
        }
        assert {n: str(k) for n, k in function.states.items()} == dict.fromkeys(
            ("keyCache", "valueCache"), "float16[2, 1, 2, 64, 16]"
        )
        assert {n: str(k) for n, k in function.outputs.items()} == {"logits": f"float16[1, {tokens}, 96]"}
        types = [operation.type for operation in function.operations]
        assert types.count("read_state") == 2 and types.count("write_state") == 2
        assert not {"slice_update", "scaled_dot_product_attention", "tile"} & set(types)
        results = {kind.dtype for operation in function.operations for _, kind in operation.outputs}
        assert results <= {"float16", "int32", "bool"}
    described = {f.name: [i.name for i in f.inputs] for f in lowered.functions}
    names = ["inputIds", "position", "causalMask"]
    assert described == {"prefill": names, "decode": names}


def test_a_component_without_a_rule_is_named():
    made = t.model(replace(t.TINY, c.FeedForwardConfig, c.MoEConfig(num_experts=2, top_k=1)))
    expected = r"no rule that writes MoE \(at decoder\.layers\.0\.feed_forward and 1 more\).*Rules are there for ALiBi, CausalLM"
    with pytest.raises(ConfigError, match=expected):
        lower(made.flat_cfg, made.flat, t.SIZES)


def test_layers_with_caches_of_several_sizes_are_refused():
    layer = changed(num_kv_heads=1).decoder.layer
    made = t.model(t.TINY.set(decoder=c.SequenceConfig(layers=(t.TINY.decoder.layer, layer))))
    with pytest.raises(
        ConfigError, match=r"keys and values of 1 heads of 16 and 2 heads of 16.*same num_kv_heads"
    ):
        lower(made.flat_cfg, made.flat, t.SIZES)


def test_a_reader_before_any_keys_is_refused():
    reader = t.TINY.decoder.layer.set(attention=_READER)
    cfg = t.TINY.set(decoder=c.SequenceConfig(layers=(reader, t.TINY.decoder.layer)))
    made = t.model(t.TINY)
    layers = {
        n.replace("layers.0", "layers.1") if n.startswith("decoder.layers.0") else n: v
        for n, v in made.flat.items()
    }
    reading = {n: v for n, v in made.flat.items() if n.startswith("decoder.layers.0")}
    with pytest.raises(ConfigError, match=r"SharedKVAttention at decoder\.layers\.0\.attention has no keys"):
        lower(cfg, layers | reading, t.SIZES)


@pytest.mark.parametrize("value", [np.nan, np.inf, 70_000.0])
def test_a_weight_that_float16_cannot_hold_is_named(value):
    made = t.model(t.TINY)
    weight = made.flat["decoder.layers.1.feed_forward.up_proj.weight"].copy()
    weight[3, 5] = value
    params = made.flat | {"decoder.layers.1.feed_forward.up_proj.weight": weight}
    with pytest.raises(
        CheckpointError, match=r"decoder\.layers\.1\.feed_forward\.up_proj\.weight\[3, 5\] is .*65504"
    ):
        lower(made.flat_cfg, params, t.SIZES)


def test_a_weight_that_is_absent_is_named():
    made = t.model(t.TINY)
    params = {n: v for n, v in made.flat.items() if n != "norm.scale"}
    with pytest.raises(CheckpointError, match=r"no weight norm\.scale"):
        lower(made.flat_cfg, params, t.SIZES)


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ({"context_length": 100}, "context is 100 tokens; it must be a multiple of 32.*Use 128"),
        ({"context_length": 0}, "multiple of 32.*Use 32"),
        ({"prefill_length": 1}, "prefill reads 1 tokens at a time; it must be from 2 to the 512"),
        ({"prefill_length": 513}, "from 2 to the 512"),
        ({"adapter_rank": -1}, "adapter rank is -1"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(sizes, expected):
    with pytest.raises(ConfigError, match=expected):
        dataclasses.replace(Sizes(), **sizes)
