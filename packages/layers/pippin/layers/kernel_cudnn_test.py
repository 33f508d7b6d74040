"""What cuDNN is asked for, against NumPy in float64: computed by XLA's form of the same call, as a CPU has no cuDNN."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pippin.core.errors import ConfigError
from pippin.layers import reference
from pippin.layers.context import Context, KeyValues
from pippin.layers.kernel import Logits
from pippin.layers.kernel_config import CuDNNKernelConfig, ReferenceKernelConfig
from pippin.layers.kernel_cudnn import CuDNNKernel
from pippin.layers.testing import assert_close, normal, positions

_B, _T, _N, _K, _H = 2, 6, 4, 2, 8
_SEGMENTS = np.array([[1, 1, 1, 2, 2, 2], [1, 2, 2, 2, 2, 2]], np.int32)
_RESTARTED = np.array([[0, 1, 2, 0, 1, 2], [0, 0, 1, 2, 3, 4]], np.int32)


@pytest.mark.parametrize("window", [None, 2])
@pytest.mark.parametrize("packed", [False, True])
def test_cudnn_is_asked_for_the_same_attention(window, packed, monkeypatch):
    monkeypatch.setattr(CuDNNKernel, "implementation", "xla")
    monkeypatch.setattr(CuDNNKernelConfig, "supports", lambda cfg, shape: "")
    q, k, v = (normal(_B, _T, n, _H, seed=i) for i, n in enumerate((_N, _K, _K)))
    at, segments = (_RESTARTED, _SEGMENTS) if packed else (positions(_B, _T), None)

    def results(cfg):
        kernel = cfg.build()

        def total(q, k, v):
            ids = None if segments is None else jnp.asarray(segments)
            kv = KeyValues(k, v, jnp.asarray(at), ids, aligned=True)
            out = kernel(q, kv, Context(kv.positions, ids), Logits(_H**-0.5, window))
            return jnp.sum(jnp.square(out)), out

        args = (jnp.asarray(a, jnp.float32) for a in (q, k, v))
        return jax.jit(jax.grad(total, argnums=(0, 1, 2), has_aux=True))(*args)

    gradients, out = results(CuDNNKernelConfig())
    assert_close(out, reference.attend(q, k, v, reference.causal(at, segments, window)))
    jax.tree.map(assert_close, gradients, results(ReferenceKernelConfig())[0])


def test_a_call_that_cudnn_cannot_serve_is_refused():
    q = jnp.zeros((1, 2, 1, 8), jnp.bfloat16)
    kv = KeyValues(q, q, jnp.asarray(positions(1, 2)), None, aligned=True)
    with pytest.raises(ConfigError, match="CuDNNKernel: it runs on NVIDIA GPUs, and this is a cpu"):
        CuDNNKernelConfig().build()(q, kv, Context(kv.positions), Logits(1.0))
