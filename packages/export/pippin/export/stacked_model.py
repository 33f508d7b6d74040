"""Models as formats want them that describe one layer for all of them: layers stacked, read one array at a time. No JAX."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from pippin.core.bundle import Bundle
from pippin.core.config_tree import diff, traverse
from pippin.core.errors import CheckpointError, ConfigError
from pippin.core.quantized_array import Palettized
from pippin.core.stored_tensor import StoredTensor, signature
from pippin.export.stored_weights import SOUND_WEIGHTS
from pippin.layers.causal_lm_config import CausalLMConfig
from pippin.layers.quant.fake_quant_config import (
    FakeQuantEmbeddingConfig,
    FakeQuantKVKernelConfig,
    FakeQuantLinearConfig,
)
from pippin.layers.stack_config import RepeatConfig, SequenceConfig

DTYPES = ("float32", "float16", "bfloat16")

_ROUNDING = (FakeQuantEmbeddingConfig, FakeQuantKVKernelConfig, FakeQuantLinearConfig)

_STACKED, _APART = "decoder.layer.", "decoder.layers.{}."


@dataclasses.dataclass(frozen=True)
class LazyArray:
    """A parameter that is read when it is asked for, whole or a layer of it, and then has another type.

    Raises:
        CheckpointError: what was read holds NaN or infinity, or would in its new type.
    """

    path: str
    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[int | None], np.ndarray]  # of a layer, or whole

    def astype(self, dtype: str) -> LazyArray:
        return dataclasses.replace(self, dtype=np.dtype(dtype))

    def __array__(self, dtype: np.dtype | None = None, copy: bool | None = None) -> np.ndarray:
        values = self._converted(self.read(None))
        return values if dtype is None else values.astype(dtype)

    def __getitem__(self, layer: int) -> np.ndarray:
        return self._converted(self.read(layer))

    def _converted(self, values: np.ndarray) -> np.ndarray:
        # As float32, since not every type has all functions of NumPy.
        if not np.isfinite(values.astype(np.float32, copy=False)).all():
            raise CheckpointError(
                f"{self.path} holds NaN or infinity, which no runtime computes with. {SOUND_WEIGHTS}"
            )
        if values.dtype == self.dtype:
            return values
        with np.errstate(over="ignore"):
            converted = values.astype(self.dtype)
        if not np.isfinite(converted.astype(np.float32, copy=False)).all():
            raise CheckpointError(
                f"{self.path} reaches {np.abs(values.astype(np.float32)).max():g}, which is infinite in {self.dtype}. "
                "Export it as bfloat16 or float32."
            )
        return converted


@dataclasses.dataclass(frozen=True)
class StackedModel:
    """A model whose parameters are those of `config`, each read when it is asked for."""

    config: CausalLMConfig  # its decoder repeats one layer, unless it is of another kind
    parameters: Mapping[str, LazyArray]
    tokenizer: Path | None
    signature: str  # see ModelManifest
    recipe: str  # that its weights were compressed by


def stacked_model(bundle: Bundle) -> StackedModel:
    """The model of a bundle, whether its layers are stacked there or each has arrays of its own.

    Weights that were rounded in training are the floats that they were rounded to.

    Raises:
        ConfigError: it is no language model, or its layers differ.
        CheckpointError: a layer's part of a parameter differs from the others in shape or type.
        DamageError: a weight is not as it was written.
    """
    cfg = bundle.component
    if not isinstance(cfg, CausalLMConfig):
        raise ConfigError(
            f"{bundle.directory} holds a {type(cfg).TYPE}; a {CausalLMConfig.TYPE} can be exported. Give another model."
        )
    weights = bundle.weights
    if any(isinstance(part, _ROUNDING) for _, part in traverse(cfg)):
        cfg, weights = _settled(cfg, bundle)
    apart = isinstance(cfg.decoder, SequenceConfig)
    stacked = one_layer(cfg)
    last = _LastRead()
    parameters = (
        _joined(weights)
        if apart
        else {path: LazyArray(path, t.shape, t.dtype, last.reader(t)) for path, t in weights.items()}
    )
    return StackedModel(
        stacked, parameters, bundle.tokenizer, signature(_Arrays(weights)), bundle.quantization_recipe
    )


def _settled(cfg: CausalLMConfig, bundle: Bundle) -> tuple[CausalLMConfig, dict[str, StoredTensor]]:
    """A model that was trained with rounded weights as what it computes: layers that do not round, of the rounded weights."""
    # They take JAX.
    from pippin.core.module import flatten_params
    from pippin.layers.quant.settle import settled

    cfg, params = settled(cfg, bundle.params())
    return cfg, {path: _stored(values) for path, values in flatten_params(params).items()}


def _stored(values: np.ndarray | Palettized) -> StoredTensor:
    if isinstance(values, Palettized):
        return StoredTensor(values.shape, np.dtype(np.float32), values.dequantized)
    return StoredTensor(values.shape, values.dtype, lambda: np.asarray(values))


def one_layer(cfg: CausalLMConfig) -> CausalLMConfig:
    """The same model with equal layers, one after the other, as one layer that is repeated.

    Raises:
        ConfigError: the layers differ.
    """
    if not isinstance(cfg.decoder, SequenceConfig) or not cfg.decoder.layers:
        return cfg
    first, *others = cfg.decoder.layers
    for i, other in enumerate(others, 1):
        if differences := diff(first, other):
            raise ConfigError(
                f"layers 0 and {i} of the model differ in {'; '.join(differences[:5])}; the format has one description for "
                "all layers. Save a bundle of pippin instead."
            )
    return cfg.set(decoder=RepeatConfig(layer=first, num_layers=len(cfg.decoder.layers)))


def path_of_layer(path: str, layer: int | None) -> str:
    """A parameter's path in the model without stacks."""
    return path if layer is None else path.replace(_STACKED, _APART.format(layer), 1)


class _LastRead:
    """Keeps what was read last: stacked layers are asked for one after the other."""

    def __init__(self) -> None:
        self._tensor: StoredTensor | None = None
        self._values: np.ndarray | None = None

    def reader(self, tensor: StoredTensor) -> Callable[[int | None], np.ndarray]:
        def read(layer: int | None) -> np.ndarray:
            if self._tensor is not tensor or self._values is None:
                self._tensor = self._values = None  # both at one time may be too much
                self._values = np.asarray(tensor.read())
                self._tensor = tensor
            return self._values if layer is None else self._values[layer]

        return read


class _Arrays(Mapping[str, np.ndarray]):
    """Tensors as the arrays that they are, each read when it is looked up."""

    def __init__(self, tensors: Mapping[str, StoredTensor]):
        self._tensors = tensors

    def __getitem__(self, name: str) -> np.ndarray:
        return np.asarray(self._tensors[name].read())

    def __iter__(self):
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def _joined(tensors: Mapping[str, StoredTensor]) -> dict[str, LazyArray]:
    """The parameters of layers of their own, as those of a stack."""
    above = _APART.partition("{}")[0]
    parameters: dict[str, LazyArray] = {}
    layers: dict[str, dict[int, StoredTensor]] = {}  # path in the stack -> layer -> tensor
    for path, tensor in tensors.items():
        if not path.startswith(above):
            parameters[path] = LazyArray(path, tensor.shape, tensor.dtype, _whole(tensor))
            continue
        number, _, name = path.removeprefix(above).partition(".")
        layers.setdefault(_STACKED + name, {})[int(number)] = tensor
    count = max((len(of_layer) for of_layer in layers.values()), default=0)
    for path, of_layer in layers.items():
        first, different = of_layer.get(0), None
        for i in range(count):
            tensor = of_layer.get(i)
            if first is None or tensor is None or tensor.shape != first.shape:
                different = i
                break
        if first is None or different is not None:
            raise CheckpointError(
                f"{path_of_layer(path, different or 0)} is missing, or of another shape than in layer 0; the format has one "
                "description for all layers. Save a bundle of pippin instead."
            )
        dtypes = {tensor.dtype for tensor in of_layer.values()}
        # One type for all layers: of several, the one that has all values.
        dtype = dtypes.pop() if len(dtypes) == 1 else np.dtype(np.float32)
        parameters[path] = LazyArray(path, (count, *first.shape), dtype, _of_layers(of_layer))
    return parameters


def _whole(tensor: StoredTensor) -> Callable[[int | None], np.ndarray]:
    def read(layer: int | None) -> np.ndarray:
        assert layer is None, "a parameter outside the layers has no layers"
        return np.asarray(tensor.read())

    return read


def _of_layers(tensors: Mapping[int, StoredTensor]) -> Callable[[int | None], np.ndarray]:
    def read(layer: int | None) -> np.ndarray:
        if layer is None:
            return np.stack([np.asarray(tensors[i].read()) for i in range(len(tensors))])
        return np.asarray(tensors[layer].read())

    return read
