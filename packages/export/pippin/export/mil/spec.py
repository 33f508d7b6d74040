"""Reads saved .mlpackages: their manifest, their model.mlmodel and, where constants say so, their weight files."""

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from google.protobuf.message import DecodeError

from pippin.export.mil import dtypes
from pippin.export.mil.blob import BlobFile
from pippin.export.mil.errors import PackageError
from pippin.export.mil.messages import mil_messages, model_messages
from pippin.export.mil.program import (
    BlobPlace,
    Constant,
    Function,
    Operation,
    Program,
    TensorType,
)

_DATA = "Data"
_MODEL_PATH = "@model_path"
# Of iOS 18 and 26, whose operations mean the same.
_OPSETS = ("CoreML8", "CoreML9")
_MAX_JSON_BYTES = 1 << 20
_MAX_CONSTANT_VALUES = 1 << 24  # of those that lie in the program itself


def load_program(path: str | Path) -> Program:
    """The program of a package.

    Args:
        path: of the .mlpackage.

    Raises:
        PackageError: it is damaged, of another kind, or holds what is not supported.
    """
    path = Path(path).absolute()
    model_path = _model_path(path)
    model = model_messages().Model()
    try:
        model.ParseFromString(model_path.read_bytes())
    except (DecodeError, OSError) as e:
        raise PackageError(
            f"the model {model_path} cannot be read: {e}. Copy the whole package again."
        ) from None
    kind = model.WhichOneof("Type")
    if kind != "mlProgram":
        raise PackageError(
            f"{path} holds a model of the kind {kind}, not an mlProgram. Only these are interpreted: convert it for "
            "iOS 18 or macOS 15."
        )
    reader = _Reader(model_path.parent)
    functions = {
        name: reader.function(name, message) for name, message in sorted(model.mlProgram.functions.items())
    }
    if not functions:
        raise PackageError(f"{path} has no function. Export it again.")
    return Program(path, functions, reader.files, dict(model.description.metadata.userDefined))


def _model_path(path: Path) -> Path:
    """Where the package's manifest says that the model lies."""
    manifest = path / "Manifest.json"
    if not manifest.is_file():
        raise PackageError(
            f"{path} is no package: it has no Manifest.json. Give the folder whose name ends in .mlpackage."
        )
    try:
        if manifest.stat().st_size > _MAX_JSON_BYTES:
            raise ValueError(f"it has more than {_MAX_JSON_BYTES} bytes")
        content = json.loads(manifest.read_bytes())
        relative = content["itemInfoEntries"][content["rootModelIdentifier"]]["path"]
    except (ValueError, KeyError, TypeError, RecursionError, OSError) as e:
        raise PackageError(
            f"{manifest} does not name the model: {type(e).__name__} {e}. Copy the whole package again."
        ) from None
    return _inside(path / _DATA, relative, "Manifest.json")


def _inside(folder: Path, relative: object, who: str) -> Path:
    """A path in a folder.

    Raises:
        PackageError: it leaves the folder.
    """
    if isinstance(relative, str) and relative:
        pure = PurePosixPath(relative)
        path = folder / pure
        if (
            not pure.is_absolute()
            and ".." not in pure.parts
            and path.resolve().is_relative_to(folder.resolve())
        ):
            return path
    raise PackageError(f"{who} names {relative!r}, which is no path in {folder}. Do not use this package.")


class _Reader:
    """Reads the functions of a model."""

    def __init__(self, folder: Path):
        self._folder = folder
        self.files: dict[str, BlobFile] = {}

    def function(self, name: str, message: Any) -> Function:
        if message.opset not in _OPSETS or message.opset not in message.block_specializations:
            raise PackageError(
                f"the function {name!r} is for the operations {message.opset!r}; those of iOS 18 are interpreted "
                f"({', '.join(_OPSETS)}). Export it with minimum_deployment_target=iOS18."
            )
        block = message.block_specializations[message.opset]
        inputs, states = {}, {}
        for entry in message.inputs:
            kind = entry.type.WhichOneof("type")
            if kind == "stateType":
                states[entry.name] = _tensor_type(entry.type.stateType.wrappedType, entry.name)
            else:
                inputs[entry.name] = _tensor_type(entry.type, entry.name)
        constants: dict[str, Constant] = {}
        operations = []
        for operation in block.operations:
            if operation.type == "const":
                names = [output.name for output in operation.outputs]
                if len(names) != 1 or names[0] in constants:
                    raise PackageError(
                        f"the function {name!r} has a constant named {names}. Export it again."
                    )
                constants[names[0]] = self._constant(operation.attributes["val"], names[0])
            else:
                operations.append(self._operation(operation))
        _check_names(name, [*inputs, *states, *constants], operations, block.outputs)
        types = {n: t for o in operations for n, t in o.outputs} | {n: c.type for n, c in constants.items()}
        outputs = {n: (types | inputs)[n] for n in block.outputs}
        return Function(name, inputs, states, constants, tuple(operations), outputs)

    def _operation(self, message: Any) -> Operation:
        label = f"{message.type} {message.outputs[0].name!r}" if message.outputs else message.type
        if message.blocks:
            raise PackageError(
                f"the operation {label} has blocks of its own, as loops and conditions have; they are not interpreted. "
                "Export functions without them."
            )
        inputs = {}
        for parameter, argument in message.inputs.items():
            inputs[parameter] = tuple(
                self._constant(binding.value, f"{label}.{parameter}")
                if binding.WhichOneof("binding") == "value"
                else binding.name
                for binding in argument.arguments
            )
        outputs = tuple((o.name, _tensor_type(o.type, o.name)) for o in message.outputs)
        return Operation(message.type, inputs, outputs)

    def _constant(self, message: Any, name: str) -> Constant:
        kind = _tensor_type(message.type, name)
        match message.WhichOneof("value"):
            case "blobFileValue":
                place = BlobPlace(message.blobFileValue.fileName, message.blobFileValue.offset)
                self._check_blob(place, kind, name)
                return Constant(kind, place)
            case "immediateValue" if message.immediateValue.WhichOneof("value") == "tensor":
                return Constant(kind, _immediate(message.immediateValue.tensor, kind, name))
        raise PackageError(
            f"the constant {name!r} is neither a tensor in the program nor one in a weight file. It is not supported: "
            "export the model without it."
        )

    def _check_blob(self, place: BlobPlace, kind: TensorType, name: str) -> None:
        if place.file not in self.files:
            head, _, relative = place.file.partition("/")
            if head != _MODEL_PATH:
                raise PackageError(
                    f"the constant {name!r} lies in {place.file!r}, which does not start with {_MODEL_PATH}/. Do not "
                    "use this package."
                )
            self.files[place.file] = BlobFile(_inside(self._folder, relative, f"the constant {name!r}"))
        blob = self.files[place.file].blob(place.offset)
        if blob.dtype.name != kind.dtype or blob.count != math.prod(kind.shape):
            raise PackageError(
                f"the constant {name!r} is declared {kind}, but the blob at {place.offset} of {place.file} holds "
                f"{blob.count} values of {blob.dtype.name}. The package is damaged: copy it again."
            )


def _tensor_type(message: Any, name: str) -> TensorType:
    if message.WhichOneof("type") != "tensorType":
        raise PackageError(
            f"the value {name!r} is a {message.WhichOneof('type')}; only tensors are interpreted. Export it without."
        )
    tensor = message.tensorType
    shape = []
    for dim in tensor.dimensions:
        if dim.WhichOneof("dimension") != "constant":
            raise PackageError(
                f"the value {name!r} has a dim of unknown size; only fixed shapes are interpreted. Export functions "
                "of fixed shapes."
            )
        shape.append(int(dim.constant.size))
    if tensor.rank != len(shape):
        raise PackageError(
            f"the value {name!r} has the rank {tensor.rank} and {len(shape)} dims. It is damaged."
        )
    return TensorType(_dtype_name(tensor.dataType, name), tuple(shape))


def _dtype_name(number: int, name: str) -> str:
    values = mil_messages().DataType.DESCRIPTOR.values_by_number
    text = values[number].name.lower() if number in values else str(number)
    if text not in dtypes.BY_NAME:
        raise PackageError(
            f"the value {name!r} is of the type {text}, which is not interpreted; known are {', '.join(dtypes.BY_NAME)}. "
            "Export it as one of these."
        )
    return text


def _immediate(tensor: Any, kind: TensorType, name: str) -> np.ndarray | str:
    """The values that lie in the program itself."""
    count = math.prod(kind.shape)
    field = tensor.WhichOneof("value")
    if field is None or count > _MAX_CONSTANT_VALUES:
        raise PackageError(
            f"the constant {name!r} is declared {kind} and has {field or 'no values'}. Export it again."
        )
    values = getattr(tensor, field).values
    if field == "bytes":
        flat = dtypes.decode(values, dtypes.BY_NAME[kind.dtype], count)
    else:
        if len(values) != count:
            raise PackageError(
                f"the constant {name!r} is declared {kind} and has {len(values)} values. Export it again."
            )
        if kind.dtype == "string":
            if kind.shape:
                raise PackageError(f"the constant {name!r} is a tensor of strings, which is not supported.")
            return str(values[0])
        flat = np.array(values, dtypes.BY_NAME[kind.dtype].storage)
    return flat.reshape(kind.shape)


def _check_names(
    function: str, known: Iterable[str], operations: Iterable[Operation], outputs: Iterable[str]
) -> None:
    """Every value has one name, and is there before it is used."""
    seen = set(known)
    for operation in operations:
        _check_known(function, operation.name, operation.inputs, seen)
        for name, _ in operation.outputs:
            if name in seen:
                raise PackageError(
                    f"the function {function!r} has two values named {name!r}. Export it again."
                )
            seen.add(name)
    _check_known(function, "its end", {"output": tuple(outputs)}, seen)


def _check_known(
    function: str, who: str, inputs: Mapping[str, tuple[str | Constant, ...]], seen: set[str]
) -> None:
    for values in inputs.values():
        for value in values:
            if isinstance(value, str) and value not in seen:
                raise PackageError(
                    f"the function {function!r} uses {value!r} in {who} before it is computed. Export it again."
                )
