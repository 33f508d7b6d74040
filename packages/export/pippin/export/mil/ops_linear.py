"""Products of matrices, and what is made of them: linear maps, attention, convolutions.

All sums are in the working type, and rounded once at the end.
"""

import math

import numpy as np

from pippin.export.mil.errors import PackageError
from pippin.export.mil.ops_activation import softmax
from pippin.export.mil.registry import Tensor, is_set, operation, same_dtype


@operation("linear")
def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    dtype = same_dtype(x, weight, *([] if bias is None else [bias]))
    rows = x.values.reshape(-1, x.values.shape[-1])
    result = rows @ weight.values.T
    if bias is not None and bias.values.any():
        result = result + bias.values
    return Tensor(result.reshape(*x.values.shape[:-1], weight.values.shape[0]), dtype)


@operation("matmul")
def _matmul(
    x: Tensor, y: Tensor, transpose_x: Tensor | None = None, transpose_y: Tensor | None = None
) -> Tensor:
    a = np.swapaxes(x.values, -1, -2) if is_set(transpose_x) else x.values
    b = np.swapaxes(y.values, -1, -2) if is_set(transpose_y) else y.values
    return Tensor(a @ b, same_dtype(x, y))


@operation("einsum")
def _einsum(values: list[Tensor], equation: Tensor) -> Tensor:
    dtype = same_dtype(*values)
    return Tensor(np.einsum(equation.item(), *(v.values for v in values), optimize=True), dtype)


@operation("scaled_dot_product_attention")
def _attention(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None) -> Tensor:
    dtype = same_dtype(query, key, value)
    q = query.values
    scores = q @ np.swapaxes(key.values, -1, -2) * q.dtype.type(q.shape[-1] ** -0.5)
    if attn_mask is not None and attn_mask.dtype == "bool":
        scores = np.where(attn_mask.values, scores, -np.inf)
    elif attn_mask is not None:
        scores = scores + attn_mask.values
    return Tensor(softmax(scores) @ value.values, dtype)


@operation("conv")
def _conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    strides: Tensor | None = None,
    pad_type: Tensor | None = None,
    pad: Tensor | None = None,
    dilations: Tensor | None = None,
    groups: Tensor | None = None,
) -> Tensor:
    dims = weight.values.ndim - 2
    stride = strides.ints() if strides is not None else [1] * dims
    dilation = dilations.ints() if dilations is not None else [1] * dims
    count = int(groups.item()) if groups is not None else 1
    sizes = [(k - 1) * d + 1 for k, d in zip(weight.values.shape[2:], dilation, strict=True)]
    margins = _margins(pad_type, pad, x.values.shape[2:], sizes, stride)
    padded = np.pad(x.values, [(0, 0), (0, 0), *margins])
    axes = tuple(range(2, 2 + dims))
    windows = np.lib.stride_tricks.sliding_window_view(padded, sizes, axis=axes)
    picks = [slice(None)] * 2 + [slice(None, None, s) for s in stride]
    windows = windows[tuple(picks + [slice(None, None, d) for d in dilation])]
    batch, _, *places = windows.shape[: 2 + dims]
    outputs = []
    for maps, kernel in zip(
        np.split(windows, count, axis=1), np.split(weight.values, count, axis=0), strict=True
    ):
        # [batch, places, channels in x window] times [channels in x window, channels out]
        order = (0, *range(2, 2 + dims), 1, *range(2 + dims, 2 + 2 * dims))
        rows = maps.transpose(order).reshape(batch * math.prod(places), -1)
        outputs.append((rows @ kernel.reshape(kernel.shape[0], -1).T).reshape(batch, *places, -1))
    result = np.moveaxis(np.concatenate(outputs, axis=-1), -1, 1)
    if bias is not None:
        result = result + bias.values.reshape(-1, *[1] * dims)
    return Tensor(result, same_dtype(x, weight))


def _margins(
    pad_type: Tensor | None, pad: Tensor | None, shape: tuple[int, ...], sizes: list[int], stride: list[int]
) -> list[tuple[int, int]]:
    """How many zeros a convolution sees before and behind its input, for each dim."""
    kind = "valid" if pad_type is None else pad_type.item()
    if kind == "valid":
        return [(0, 0)] * len(sizes)
    if kind == "custom" and pad is not None:
        numbers = pad.ints()
        return list(zip(numbers[::2], numbers[1::2], strict=True))
    if kind in ("same", "same_lower"):
        margins = []
        for n, size, step in zip(shape, sizes, stride, strict=True):
            total = max((math.ceil(n / step) - 1) * step + size - n, 0)
            less, more = total // 2, total - total // 2
            margins.append((less, more) if kind == "same" else (more, less))
        return margins
    raise PackageError(f"its pad_type is {kind!r}; known are valid, same, same_lower, and custom with pad.")
