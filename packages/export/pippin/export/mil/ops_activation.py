"""Activations and normalisations."""

from collections.abc import Callable

import numpy as np

from pippin.export.mil.errors import PackageError
from pippin.export.mil.ops_elementwise import erf
from pippin.export.mil.registry import Tensor, operation


def _activation(name: str, compute: Callable[[np.ndarray], np.ndarray], *, rounds: bool = True) -> None:
    def run(x: Tensor) -> Tensor:
        return Tensor(compute(x.values), x.dtype)

    operation(name, rounds=rounds)(run)


def sigmoid(x: np.ndarray) -> np.ndarray:
    """1 / (1 + exp(-x)), without overflow."""
    small = np.exp(-np.abs(x))
    return np.where(x >= 0, 1, small) / (1 + small)


def softmax(x: np.ndarray, axis: int = -1) -> np.ndarray:
    """exp(x) over its sum; where all are -inf, NaN, as the formula says."""
    powers = np.exp(x - x.max(axis=axis, keepdims=True))
    return powers / powers.sum(axis=axis, keepdims=True)


_activation("relu", lambda x: np.maximum(x, 0), rounds=False)
_activation("relu6", lambda x: np.clip(x, 0, 6), rounds=False)
_activation("sigmoid", sigmoid)
_activation("silu", lambda x: x * sigmoid(x))
_activation("softsign", lambda x: x / (1 + np.abs(x)))
_activation("softplus", lambda x: np.logaddexp(x, np.zeros((), x.dtype)))


@operation("gelu")
def _gelu(x: Tensor, mode: Tensor | None = None) -> Tensor:
    name = "EXACT" if mode is None else mode.item()
    v = x.values
    if name == "EXACT":
        return Tensor(0.5 * v * (1 + erf(v * v.dtype.type(0.5**0.5))), x.dtype)
    if name == "TANH_APPROXIMATION":
        inner = v.dtype.type((2 / np.pi) ** 0.5) * (v + v.dtype.type(0.044715) * v**3)
        return Tensor(0.5 * v * (1 + np.tanh(inner)), x.dtype)
    if name == "SIGMOID_APPROXIMATION":
        return Tensor(v * sigmoid(v.dtype.type(1.702) * v), x.dtype)
    raise PackageError(f"its mode is {name!r}; known are EXACT, TANH_APPROXIMATION, SIGMOID_APPROXIMATION.")


@operation("leaky_relu")
def _leaky_relu(x: Tensor, alpha: Tensor) -> Tensor:
    return Tensor(np.where(x.values >= 0, x.values, x.values * _like(alpha, x)), x.dtype)


@operation("elu")
def _elu(x: Tensor, alpha: Tensor) -> Tensor:
    return Tensor(np.where(x.values >= 0, x.values, _like(alpha, x) * np.expm1(x.values)), x.dtype)


@operation("sigmoid_hard")
def _sigmoid_hard(x: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
    return Tensor(np.clip(_like(alpha, x) * x.values + _like(beta, x), 0, 1), x.dtype)


@operation("linear_activation")
def _linear_activation(x: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
    return Tensor(_like(alpha, x) * x.values + _like(beta, x), x.dtype)


@operation("scaled_tanh")
def _scaled_tanh(x: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
    return Tensor(_like(alpha, x) * np.tanh(_like(beta, x) * x.values), x.dtype)


@operation("softmax")
def _softmax(x: Tensor, axis: Tensor | None = None) -> Tensor:
    return Tensor(softmax(x.values, -1 if axis is None else int(axis.item())), x.dtype)


@operation("layer_norm")
def _layer_norm(
    x: Tensor,
    axes: Tensor | None = None,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
    epsilon: Tensor | None = None,
) -> Tensor:
    over = tuple(range(x.values.ndim)) if axes is None else tuple(axes.ints())
    centred = x.values - x.values.mean(axis=over, keepdims=True)
    variance = np.square(centred).mean(axis=over, keepdims=True)
    result = centred / np.sqrt(variance + _epsilon(epsilon, x, 1e-5))
    shape = [n if i in {a % x.values.ndim for a in over} else 1 for i, n in enumerate(x.values.shape)]
    if gamma is not None:
        result = result * gamma.values.reshape(shape)
    if beta is not None:
        result = result + beta.values.reshape(shape)
    return Tensor(result, x.dtype)


@operation("l2_norm")
def _l2_norm(x: Tensor, epsilon: Tensor | None = None) -> Tensor:
    over = tuple(range(max(x.values.ndim - 3, 0), x.values.ndim))
    total = np.square(x.values).sum(axis=over, keepdims=True)
    return Tensor(x.values / np.sqrt(total + _epsilon(epsilon, x, 1e-6)), x.dtype)


def _like(parameter: Tensor, x: Tensor) -> np.ndarray:
    return parameter.values.astype(x.values.dtype)


def _epsilon(epsilon: Tensor | None, x: Tensor, default: float) -> np.ndarray:
    return np.asarray(default if epsilon is None else epsilon.item(), x.values.dtype)
