"""Ring attention on four devices, against the reference kernel in float64, and what it holds and sends.

The test's target sets XLA_FLAGS=--xla_force_host_platform_device_count=4.
"""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pippin.core.errors import ConfigError
from pippin.core.sharding import MeshConfig, use_mesh
from pippin.layers.context import Context, KeyValues
from pippin.layers.kernel import Logits
from pippin.layers.kernel_config import ReferenceKernelConfig, RingKernelConfig
from pippin.layers.position_config import ALiBiConfig
from pippin.layers.testing import assert_exact, float64_fixture, normal, positions

pytestmark = pytest.mark.skipif(
    jax.device_count() < 4, reason="needs XLA_FLAGS=--xla_force_host_platform_device_count=4"
)
float64 = float64_fixture()

_B, _T, _N, _K, _H = 2, 48, 4, 2, 4
_SEGMENTS = np.repeat(np.array([[1, 2, 0], [1, 1, 1]], np.int32), [20, 22, 6], axis=1)
_RESTARTED = np.stack([np.r_[0:20, 0:22, np.full(6, -1)], np.r_[0:48]]).astype(np.int32)


def _gradients(kernel: Any, *, packed: bool, window: int | None, soft_cap: float | None, sinks: bool) -> Any:
    """A function of queries, keys, values and sinks: a sum of the results with random weights, and its gradients."""
    built = kernel.build()
    at = _RESTARTED if packed else positions(_B, _T)
    segments = jnp.asarray(_SEGMENTS) if packed else None
    weights = normal(_B, _T, _N, _H, seed=5) * (at >= 0)[:, :, None, None]

    def total(q: Any, k: Any, v: Any, of_sinks: Any) -> Any:
        kv = KeyValues(k, v, jnp.asarray(at), segments, aligned=True)
        logits = Logits(_H**-0.5, window, soft_cap, None, of_sinks if sinks else None)
        out = built(q, kv, Context(kv.positions, segments), logits)
        return jnp.sum(out * jnp.asarray(weights, q.dtype))

    return jax.jit(jax.value_and_grad(total, argnums=(0, 1, 2, 3)))


_ARGS = (*(normal(_B, _T, n, _H, seed=i) for i, n in enumerate((_N, _K, _K))), normal(_N, seed=4))
_MESHES = {
    "four in a ring": MeshConfig(data=1, sequence=4),
    "two rows and two in a ring": MeshConfig(data=2, sequence=2),
    "two heads and two in a ring": MeshConfig(data=1, sequence=2, tensor=2),
}
CASES: dict[str, dict[str, Any]] = {
    "causal": {},
    "window": {"window": 10},
    "packed": {"packed": True},
    "all of them": {"packed": True, "window": 9, "soft_cap": 2.0, "sinks": True},
}


@pytest.mark.parametrize(
    ("case", "mesh"),
    [(case, "four in a ring") for case in CASES] + [("all of them", mesh) for mesh in list(_MESHES)[1:]],
)
def test_a_ring_computes_what_one_device_does(case: str, mesh: str):
    options = {"packed": False, "window": None, "soft_cap": None, "sinks": False} | CASES[case]
    expected = _gradients(ReferenceKernelConfig(), **options)(*_ARGS)
    cfg = _MESHES[mesh]
    with use_mesh(cfg, cfg.make(jax.devices()[:4])):
        got = _gradients(RingKernelConfig(block_size=4), **options)(*_ARGS)
    jax.tree.map(assert_exact, got, expected)


def test_no_device_holds_all_keys_or_all_logits():
    q = jax.ShapeDtypeStruct((1, 1024, 2, 8), jnp.float32)
    k = jax.ShapeDtypeStruct((1, 1024, 1, 8), jnp.float32)
    cfg = MeshConfig(data=1, sequence=4)

    def out(q: Any, k: Any, v: Any) -> Any:
        at = jnp.asarray(positions(1, 1024))
        kv = KeyValues(k, v, at, None, aligned=True)
        return jnp.sum(RingKernelConfig(block_size=32).build()(q, kv, Context(at), Logits(1.0)) ** 2)

    with use_mesh(cfg, mesh := cfg.make(jax.devices()[:4])):
        split = cfg.sharding(mesh, ("batch", "sequence", None, None), q.shape)
        program = (
            jax.jit(jax.grad(out, argnums=(0, 1, 2)), in_shardings=(split,) * 3).lower(q, k, k).compile()
        )
    text = program.as_text()
    assert "collective-permute" in text
    # Sums over axes of one device are left in the program of a CPU, and send nothing.
    sums = [line for line in text.splitlines() if "all-reduce(" in line and "{'pipeline'}" not in line]
    assert "all-gather" not in text and not sums
    floats = re.findall(r"f32\[([\d,]+)\]", text)
    # Of 256 tokens a device and 32 queries at a time: 32 x 128 logits of two heads are as many as the accumulators'.
    assert max(np.prod([int(n) for n in shape.split(",")]) for shape in floats) <= 2 * 32 * 128


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"position": ALiBiConfig(num_heads=_N, head_dim=_H)}, "adds no bias to logits"),
        ({"length": 12}, "12 tokens are no multiple of 8, twice the devices of a ring"),
        ({"mesh": MeshConfig()}, "no mesh splits the sequences"),
    ],
)
def test_what_it_does_not_support_is_refused(changes: dict[str, Any], message: str):
    length = changes.get("length", _T)
    q, k = jnp.zeros((4, length, _N, _H)), jnp.zeros((4, length, _K, _H))
    at = jnp.asarray(positions(4, length))
    bias = changes["position"].build().bias if "position" in changes else None
    cfg = changes.get("mesh", _MESHES["four in a ring"])
    with use_mesh(cfg, cfg.make(jax.devices()[:4])), pytest.raises(ConfigError, match=message):
        RingKernelConfig().build()(
            q, KeyValues(k, k, at, None, aligned=True), Context(at), Logits(1.0, bias=bias)
        )
