"""Products, attention and convolutions, as coremltools writes them, against NumPy in float64 and JAX."""

import jax
import numpy as np
import pytest

from pippin.export.mil.errors import PackageError
from pippin.export.mil.registry import RULES, Tensor
from pippin.export.mil.testing import Case, check_cases

_RNG = np.random.default_rng(0)


def halves(*shape: int) -> np.ndarray:
    return _RNG.normal(0, 1, shape).astype(np.float16)


def wide(x: np.ndarray) -> np.ndarray:
    return x.astype(np.float64)


def test_products(tmp_path):
    x, weight, bias = halves(2, 3, 8), halves(5, 8), halves(5)
    a, b = halves(2, 1, 3, 4), halves(1, 3, 4, 5)
    cases = [
        Case("linear", {"x": x}, wide(x) @ wide(weight).T + wide(bias), {"weight": weight, "bias": bias}),
        Case("linear", {"x": x}, wide(x) @ wide(weight).T, {"weight": weight}),
        Case("matmul", {"x": a, "y": b}, wide(a) @ wide(b)),
        Case("matmul", {"x": a.swapaxes(2, 3), "y": b}, wide(a) @ wide(b), {"transpose_x": True}),
        Case("matmul", {"x": a, "y": b.swapaxes(2, 3)}, wide(a) @ wide(b), {"transpose_y": True}),
    ]
    check_cases(tmp_path, cases)


def test_einsum(tmp_path):
    a, b = halves(2, 4, 3, 5), halves(2, 5, 3, 6)
    want = np.einsum("nchw,nwhu->nchu", wide(a), wide(b))
    parameters = {"values": ("a", "b"), "equation": "nchw,nwhu->nchu"}
    check_cases(tmp_path, [Case("einsum", {"a": a, "b": b}, want, parameters)])


@pytest.mark.parametrize("kind", ["float", "bool", "none"])
def test_attention(tmp_path, kind):
    q, k, v = halves(1, 2, 3, 8), halves(1, 2, 5, 8), halves(1, 2, 5, 8)
    seen = np.tril(np.ones((1, 1, 3, 5), bool), 2)
    scores = wide(q) @ wide(k).swapaxes(-1, -2) / np.sqrt(8)
    if kind != "none":
        scores = np.where(seen, scores, -np.inf)
    want = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True) @ wide(v)
    mask = seen if kind == "bool" else np.where(seen, 0, -np.inf).astype(np.float16)
    inputs = {"query": q, "key": k, "value": v} | ({} if kind == "none" else {"attn_mask": mask})
    check_cases(tmp_path, [Case("scaled_dot_product_attention", inputs, want)])


@pytest.mark.parametrize(
    ("parameters", "jax_parameters"),
    [
        ({"pad_type": "valid"}, {"window_strides": (1, 1), "padding": "VALID"}),
        ({"pad_type": "same", "strides": [2, 2]}, {"window_strides": (2, 2), "padding": "SAME"}),
        ({"pad_type": "same_lower", "strides": [2, 1]}, {"window_strides": (2, 1), "padding": "SAME_LOWER"}),
        (
            {"pad_type": "custom", "pad": [1, 0, 2, 1], "dilations": [2, 1]},
            {"window_strides": (1, 1), "padding": ((1, 0), (2, 1)), "rhs_dilation": (2, 1)},
        ),
        (
            {"pad_type": "valid", "groups": 2},
            {"window_strides": (1, 1), "padding": "VALID", "feature_group_count": 2},
        ),
    ],
)
def test_convolutions_are_those_of_jax(tmp_path, parameters, jax_parameters):
    groups = parameters.get("groups", 1)
    x, weight, bias = halves(2, 4, 7, 6), halves(6, 4 // groups, 3, 2), halves(6)
    with jax.enable_x64():
        want = np.asarray(jax.lax.conv_general_dilated(wide(x), wide(weight), **jax_parameters))
    want = want + wide(bias)[:, None, None]
    check_cases(tmp_path, [Case("conv", {"x": x}, want, {"weight": weight, "bias": bias, **parameters})])


def test_a_convolution_of_one_place_is_a_linear_map(tmp_path):
    x, weight = halves(1, 8, 1, 5), halves(6, 8, 1, 1)
    want = np.einsum("ncht,oc->noht", wide(x), wide(weight[:, :, 0, 0]))
    check_cases(tmp_path, [Case("conv", {"x": x}, want, {"weight": weight})])


def test_an_unknown_padding_is_named():
    x, weight = Tensor(np.zeros((1, 1, 3)), "float16"), Tensor(np.zeros((1, 1, 1)), "float16")
    with pytest.raises(PackageError, match="its pad_type is 'mirror'"):
        RULES["conv"].function(x, weight, pad_type=Tensor(np.array("mirror", object), "string"))
