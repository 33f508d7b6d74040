"""Which kernel serves a call, and what each one that cannot says."""

import dataclasses
import logging
import types
import typing
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pippin.core.config import Config
from pippin.core.errors import ConfigError
from pippin.core.sharding import MESH_AXES, MeshConfig, use_mesh
from pippin.layers import kernel_select
from pippin.layers.context import Context, KeyValues
from pippin.layers.kernel import Logits, attention_shape
from pippin.layers.kernel_config import (
    AttentionShape,
    BlockwiseKernelConfig,
    CuDNNKernelConfig,
    ReferenceKernelConfig,
    RingKernelConfig,
    SelectKernelConfig,
    SplashKernelConfig,
    TritonKernelConfig,
    choose,
)
from pippin.layers.position_config import ALiBiConfig, RoPEConfig
from pippin.layers.testing import assert_close, normal, positions

_TPU = AttentionShape(
    platform="tpu",
    query_length=1024,
    key_length=1024,
    num_heads=8,
    num_kv_heads=2,
    head_dim=128,
    dtype="bfloat16",
    aligned=True,
)
_GPU = dataclasses.replace(_TPU, platform="gpu")


def _because(shape: AttentionShape, change: dict[str, Any], cfg: Any) -> str:
    return cfg.supports(dataclasses.replace(shape, **change))


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"platform": "cpu"}, "it runs on TPUs, and this is a cpu"),
        ({"aligned": False}, "keys are not those of the queries' tokens, as with a cache"),
        ({"query_length": 1}, "1 queries meet 1024 keys, and it masks by index"),
        ({"query_length": 1000, "key_length": 1000}, "1000 tokens are no multiple of 128"),
        ({"dtype": "float64"}, "it computes in float32 or bfloat16, not float64"),
        ({"head_dim": 512}, "head_dim (512) is above 256"),
        ({"has_bias": True}, "it adds no bias to logits"),
        ({"sequence_shards": 4}, "the mesh splits sequences 4 ways, which RingKernel is for"),
        ({"head_shards": 2}, "the mesh splits query heads 2 ways and key heads 1 ways"),
    ],
)
def test_splash_says_what_it_cannot_serve(change, reason):
    assert _because(_TPU, {}, SplashKernelConfig()) == ""
    assert _because(_TPU, change, SplashKernelConfig()) == reason


def test_splash_has_windows_caps_and_sinks_and_any_small_head():
    change = {"window": 3, "soft_cap": 2.0, "has_sinks": True, "head_dim": 16, "dtype": "float32"}
    assert _because(_TPU, change, SplashKernelConfig()) == ""


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"platform": "tpu"}, "it runs on NVIDIA GPUs, and this is a tpu"),
        ({"dtype": "float32"}, "it computes in float16 or bfloat16, not float32"),
        ({"head_dim": 256}, "head_dim (256) is no multiple of 8 up to 128"),
        ({"head_dim": 4}, "head_dim (4) is no multiple of 8 up to 128"),
        ({"aligned": False}, "keys are not those of the queries' tokens, as with a cache"),
        ({"query_length": 2}, "2 queries meet 1024 keys"),
        ({"query_length": 7, "key_length": 7}, "7 tokens are an odd number"),
        (
            {"query_length": 32_768, "key_length": 32_768},
            "32768 tokens are more than max_length (16384)",
        ),
        ({"soft_cap": 2.0}, "it has no soft cap"),
        ({"has_bias": True}, "a bias for each head would fill T times S of memory"),
        ({"has_sinks": True}, "it has no sinks"),
        ({"sequence_shards": 2}, "the mesh splits sequences 2 ways, which RingKernel is for"),
    ],
)
def test_cudnn_says_what_it_cannot_serve(change, reason):
    assert _because(_GPU, {"window": 3}, CuDNNKernelConfig()) == ""
    assert _because(_GPU, change, CuDNNKernelConfig()) == reason


_ALL = ["SplashKernel", "CuDNNKernel", "TritonKernel", "RingKernel"]


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"platform": "cpu"}, "it runs on NVIDIA GPUs, and this is a cpu"),
        ({"aligned": False}, "keys are not those of the queries' tokens, as with a cache"),
        ({"query_length": 16}, "16 queries meet 1024 keys, and it masks by index"),
        ({"query_length": 1000, "key_length": 1000}, "1000 tokens are no multiple of 16"),
        ({"dtype": "float64"}, "it computes in float16, bfloat16 or float32, not float64"),
        ({"head_dim": 320}, "head_dim (320) is above 256"),
        ({"has_bias": True}, "it adds no bias to logits"),
        ({"sequence_shards": 4}, "the mesh splits sequences 4 ways, which RingKernel is for"),
        ({"head_shards": 2}, "the mesh splits query heads 2 ways and key heads 1 ways"),
    ],
)
def test_triton_says_what_it_cannot_serve(change, reason):
    all_features = {"window": 3, "soft_cap": 2.0, "has_sinks": True, "head_dim": 256, "dtype": "float32"}
    assert _because(_GPU, all_features, TritonKernelConfig()) == ""
    assert _because(_GPU, change, TritonKernelConfig()) == reason


@pytest.mark.parametrize(
    "change, expected, passed_over",
    [
        ({}, SplashKernelConfig, []),
        ({"platform": "gpu"}, CuDNNKernelConfig, ["SplashKernel"]),
        ({"platform": "cpu"}, BlockwiseKernelConfig, _ALL),
        ({"aligned": False}, BlockwiseKernelConfig, _ALL),
        ({"sequence_shards": 2}, RingKernelConfig, ["SplashKernel", "CuDNNKernel", "TritonKernel"]),
        ({"platform": "gpu", "soft_cap": 2.0}, TritonKernelConfig, ["SplashKernel", "CuDNNKernel"]),
        ({"platform": "gpu", "head_dim": 256}, TritonKernelConfig, ["SplashKernel", "CuDNNKernel"]),
        ({"platform": "gpu", "dtype": "float32"}, TritonKernelConfig, ["SplashKernel", "CuDNNKernel"]),
    ],
)
def test_the_first_kernel_that_supports_the_call_is_chosen(change, expected, passed_over):
    chosen, reasons = choose(SelectKernelConfig(), dataclasses.replace(_TPU, **change))
    assert isinstance(chosen, expected)
    assert [name for name, _ in reasons] == passed_over
    assert all(reason for _, reason in reasons)


def test_a_choice_within_a_choice_names_all_that_were_passed_over():
    inner = SelectKernelConfig(kernels=(CuDNNKernelConfig(), ReferenceKernelConfig()))
    chosen, reasons = choose(SelectKernelConfig(kernels=(SplashKernelConfig(), inner)), _because_cpu())
    assert chosen == ReferenceKernelConfig()
    assert [name for name, _ in reasons] == ["SplashKernel", "CuDNNKernel"]


def _because_cpu() -> AttentionShape:
    return dataclasses.replace(_TPU, platform="cpu")


def test_a_kernel_by_itself_is_its_own_choice_and_refuses_what_it_cannot_serve():
    assert choose(BlockwiseKernelConfig(), _TPU) == (BlockwiseKernelConfig(), ())
    with pytest.raises(ConfigError, match="SplashKernel: it runs on TPUs, and this is a cpu"):
        choose(SplashKernelConfig(), _because_cpu())


def test_where_no_kernel_serves_the_call_all_reasons_are_named():
    cfg = SelectKernelConfig(kernels=(SplashKernelConfig(), CuDNNKernelConfig()))
    message = (
        r"no attention kernel supports 1024 queries of 8 heads of 128 on cpu: SplashKernel: it runs on TPUs, and "
        r"this is a cpu; CuDNNKernel: it runs on NVIDIA GPUs, and this is a cpu\. Add BlockwiseKernel"
    )
    with pytest.raises(ConfigError, match=message):
        choose(cfg, _because_cpu())
    assert cfg.supports(_because_cpu()).startswith("SplashKernel: it runs on TPUs")
    assert cfg.supports(_GPU) == ""


class _Silent(Config, implementation="pippin.layers.kernel:ReferenceKernel", provides="attention_kernel"):
    """A kernel that does not say what it supports."""


def test_kernels_to_choose_from_must_say_what_they_support():
    with pytest.raises(ConfigError, match="_Silent cannot say what it supports. Derive its config from"):
        SelectKernelConfig(kernels=(_Silent(),))
    with pytest.raises(ConfigError, match="kernels is empty. Name the kernels"):
        SelectKernelConfig(kernels=())
    assert choose(_Silent(), _TPU) == (_Silent(), ())


@pytest.mark.parametrize(
    "cfg, match",
    [
        (
            lambda: SplashKernelConfig(block_size=100),
            r"block_size \(100\) must be a positive multiple of 128",
        ),
        (
            lambda: TritonKernelConfig(block_size=48),
            r"block_size \(48\) must be a power of two from 16 on",
        ),
        (lambda: CuDNNKernelConfig(max_length=0), r"max_length \(0\) must be at least 1"),
    ],
)
def test_sizes_that_mean_nothing_are_refused(cfg, match):
    with pytest.raises(ConfigError, match=match):
        cfg()


@pytest.mark.parametrize(
    "length, row_bytes, block", [(1024, 256, 64), (1024, 1024, 32), (80, 128, 16), (96, 64, 32)]
)
def test_the_blocks_of_triton_divide_the_sequence_and_fit_into_memory(length, row_bytes, block):
    assert TritonKernelConfig().block(length, row_bytes) == block


def test_the_blocks_of_splash_divide_the_sequence():
    sizes = {length: SplashKernelConfig().block(length) for length in (128, 384, 640, 1024, 1280, 4096)}
    assert sizes == {128: 128, 384: 384, 640: 128, 1024: 512, 1280: 256, 4096: 512}


# The component


_Q = jnp.asarray(normal(2, 6, 4, 8), jnp.float32)
_KV = KeyValues(_Q[:, :, :2], _Q[:, :, 2:], jnp.asarray(positions(2, 6)), None, aligned=True)
_CTX = Context(_KV.positions)


def test_the_choice_computes_what_its_kernel_computes():
    assert_close(
        SelectKernelConfig().build()(_Q, _KV, _CTX, Logits(0.3)),
        ReferenceKernelConfig().build()(_Q, _KV, _CTX, Logits(0.3)),
    )


@pytest.mark.parametrize("position, biased", [(RoPEConfig, False), (ALiBiConfig, True)])
def test_a_call_is_described_without_looking_at_a_value(position, biased):
    bias = position(num_heads=4, head_dim=8).build().bias
    seen = []
    jax.eval_shape(lambda q: seen.append(attention_shape(q, _KV, _CTX, Logits(0.3, 3, 2.0, bias))), _Q)
    assert seen == [
        AttentionShape(
            platform="cpu",
            query_length=6,
            key_length=6,
            num_heads=4,
            num_kv_heads=2,
            head_dim=8,
            dtype="float32",
            aligned=True,
            window=3,
            soft_cap=2.0,
            has_bias=biased,
        )
    ]


@pytest.mark.parametrize("platform, name", [("tpu", "tpu"), ("cuda", "gpu")])
def test_the_platform_is_that_of_the_mesh_whose_devices_need_not_be_here(platform, name):
    devices = np.array([types.SimpleNamespace(platform=platform)])
    mesh = types.SimpleNamespace(devices=devices, shape=dict.fromkeys(MESH_AXES, 2))
    with use_mesh(MeshConfig(), typing.cast(Any, mesh)):
        shape = attention_shape(_Q, _KV, _CTX, Logits(0.3))
    assert (shape.platform, shape.sequence_shards) == (name, 2)


def test_the_reference_is_never_chosen_in_silence(caplog):
    cfg = SelectKernelConfig(kernels=(SplashKernelConfig(), CuDNNKernelConfig(), ReferenceKernelConfig()))
    kernel_select._warn.cache_clear()
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            cfg.build()(_Q, _KV, _CTX, Logits(0.3))
        SelectKernelConfig().build()(_Q, _KV, _CTX, Logits(0.3))
        ReferenceKernelConfig().build()(_Q, _KV, _CTX, Logits(0.3))
    (record,) = caplog.records
    assert record.getMessage() == (
        "attention is computed by ReferenceKernel, which is slow on this platform. SplashKernel: it runs on TPUs, and "
        "this is a cpu; CuDNNKernel: it runs on NVIDIA GPUs, and this is a cpu."
    )
