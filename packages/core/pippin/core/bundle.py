"""Model bundles: a directory that has all that a model is, for serving and export. No JAX.

    manifest.textproto     the config tree, the weights index, and the SHA-256 of each tensor and file
    model.safetensors      the weights; model-00001-of-00003.safetensors and so on where they are many; of a compressed
                           weight, the integers and what they stand for
    tokenizer/             its files

`open_model` reads a training run's checkpoints in the same way.
"""

from __future__ import annotations

import dataclasses
import logging
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pippin.core import checkpoint_steps, manifest
from pippin.core.checkpoint_steps import CheckpointSteps
from pippin.core.component import from_proto, from_text, to_proto
from pippin.core.config import Config
from pippin.core.errors import CheckpointError
from pippin.core.manifest import DamageError
from pippin.core.quantized_array import Palettized, Scaled
from pippin.core.stored_array import StoredArray
from pippin.core.stored_quantized import (
    QuantizedArrays,
    describe_quantized,
    part_names,
    stored_parts,
    stored_quantized,
)
from pippin.core.stored_tensor import StoredTensor, stored_tensor, write_tensors
from pippin.core.tokenizer import tokenizer_files
from pippin.v1 import model_pb2 as pb

_log = logging.getLogger(__name__)

TOKENIZER_FOLDER = "tokenizer"
CHECKPOINTS_FOLDER = "checkpoints"

Params = dict[str, Any]  # name -> Params or array


@dataclasses.dataclass(frozen=True)
class Bundle:
    """A model on disk. Its small files were checked; a tensor is checked when it is read.

    A compressed weight is in `weights` as the floats that it stands for, and in `quantized` as it is stored.
    """

    directory: Path
    component: Config
    weights: Mapping[str, StoredTensor]  # dotted path of a parameter -> tensor
    tokenizer: Path | None  # the folder
    provenance: pb.Provenance
    quantized: QuantizedArrays = dataclasses.field(default_factory=QuantizedArrays)  # path -> QuantizedArray
    quantization_recipe: str = ""  # that they are of

    def params(self) -> Params:
        """All weights as a nested dict of arrays, read now.

        Raises:
            DamageError: a tensor is not as it was written.
        """
        params: Params = {}
        for path, tensor in self.weights.items():
            *parents, name = path.split(".")
            inner = params
            for parent in parents:
                inner = inner.setdefault(parent, {})
            inner[name] = tensor.read()
        return params


def save_bundle(
    directory: str | Path,
    component: Config,
    params: Mapping[str, Any],
    *,
    tokenizer: str | Path | None = None,
    provenance: pb.Provenance | None = None,
    quantization_recipe: str = "",
    max_file_bytes: int = 4 << 30,
) -> Path:
    """Writes a bundle, whole or not at all.

    Args:
        directory: where it is to lie; there is nothing there yet.
        component: the config tree of the model.
        params: a nested dict of arrays, JAX's or NumPy's, each whole on this process's devices, and of compressed ones.
        tokenizer: the folder of the tokenizer's files, which are copied.
        provenance: where the weights came from; see `pippin.core.manifest.provenance`.
        quantization_recipe: the name of the recipe that weights were compressed by.
        max_file_bytes: weights beyond this go to another file. A file's weights are in
            memory at one time.

    Returns:
        The directory.

    Raises:
        CheckpointError: the directory is there already, or an array cannot be stored.
    """
    directory = Path(directory).absolute()
    with manifest.new_directory(directory, "bundle") as temporary:
        message = pb.ModelManifest(component=to_proto(component))
        message.provenance.CopyFrom(provenance or manifest.provenance())
        arrays: dict[str, Any] = {}
        for name, array in _flatten(params).items():
            if isinstance(array, Palettized | Scaled):
                message.quantization.recipe = quantization_recipe
                message.quantization.weights.append(describe_quantized(name, array))
                arrays |= stored_parts(name, array)
            else:
                arrays[name] = array
        message.weights.extend(
            write_tensors(temporary, "model", dict(sorted(arrays.items())), max_file_bytes)
        )
        files = sorted({weight.file for weight in message.weights})
        message.files.extend(manifest.describe_file(temporary, temporary / name) for name in files)
        if tokenizer is not None:
            message.tokenizer.files.extend(_copy_tokenizer(Path(tokenizer), temporary))
        manifest.write_manifest(temporary, message)
    return directory


def load_bundle(directory: str | Path) -> Bundle:
    """The bundle in a directory.

    Raises:
        CheckpointError: it is no bundle, or needs a newer pippin.
        DamageError: files are absent or not as they were written.
    """
    directory = Path(directory).absolute()
    message = manifest.read_manifest(directory, pb.ModelManifest)
    if message.adapters:
        raise CheckpointError(
            f"{directory} has adapters, which this pippin cannot read. Upgrade pippin-core."
        )
    problems = [p for f in message.files if (p := manifest.size_problem(directory, f.path, f.bytes))]
    problems += manifest.file_problems(directory, message.tokenizer.files)
    if problems:
        raise DamageError(directory, problems)
    tensors = {w.name: stored_tensor(directory, w) for w in message.weights}
    compressed = stored_quantized(directory, message.quantization, tensors)
    parts = part_names(compressed)
    weights = {name: tensor for name, tensor in tensors.items() if name not in parts}
    weights |= {name: stored.dequantized() for name, stored in compressed.items()}
    return Bundle(
        directory=directory,
        component=from_proto(message.component),
        weights=dict(sorted(weights.items())),
        tokenizer=directory / TOKENIZER_FOLDER if message.tokenizer.files else None,
        provenance=message.provenance,
        quantized=QuantizedArrays(compressed),
        quantization_recipe=message.quantization.recipe,
    )


def open_model(directory: str | Path) -> Bundle:
    """The model in a directory: a bundle, a training run, its checkpoints, or one of their steps.

    Of a run it is the newest step whose files are all there; nothing is set aside. Where the run averages its
    parameters, they are the averaged ones: those that it evaluates.

    Args:
        directory: to open.

    Raises:
        CheckpointError: there is no model, or it needs a newer pippin.
        DamageError: files are absent or not as they were written.
    """
    directory = Path(directory).absolute()
    if (directory / manifest.FILE_NAME).exists():
        is_step = (directory / checkpoint_steps.COMPONENT_FILE).exists()
        return _open_step(directory) if is_step else load_bundle(directory)
    for folder in (directory / CHECKPOINTS_FOLDER, directory):
        if steps := CheckpointSteps(folder).steps():
            return _open_newest(folder, steps)
    raise CheckpointError(
        f"{directory} holds no model: neither {manifest.FILE_NAME} nor steps in {CHECKPOINTS_FOLDER}/. "
        "Give the directory of a bundle, of a training run, or of one of its steps."
    )


def _open_newest(folder: Path, steps: Iterable[int]) -> Bundle:
    problems = []
    for step in steps:
        try:
            return _open_step(folder / str(step))
        except DamageError as e:
            _log.warning("%s; an older step is tried", e)
            problems += [f"{step}/{p}" for p in e.problems]
    raise DamageError(folder, problems)


def _open_step(folder: Path) -> Bundle:
    message = checkpoint_steps.read_step(folder)
    arrays = {}
    for place in message.parameters or ("params",):
        prefix = f"{place}."
        arrays |= {
            entry.name.removeprefix(prefix): StoredArray(folder, entry)
            for entry in message.arrays
            if entry.name.startswith(prefix)
        }
    if not arrays:
        there = sorted({entry.name.partition(".")[0] for entry in message.arrays})
        raise CheckpointError(
            f"the state in {folder} has no parameters under {', '.join(message.parameters) or 'params'}; it has "
            f"{', '.join(there)}. Save it with a Checkpointer that is told where they are."
        )
    near = (folder / TOKENIZER_FOLDER, folder.parent.parent / TOKENIZER_FOLDER)
    return Bundle(
        directory=folder,
        component=from_text((folder / checkpoint_steps.COMPONENT_FILE).read_text()),
        weights={name: StoredTensor(a.shape, a.dtype, a.read) for name, a in sorted(arrays.items())},
        tokenizer=next((path for path in near if path.is_dir()), None),
        provenance=message.provenance,
    )


def _flatten(params: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The arrays of a nested dict by dotted path, sorted."""
    flat = {}
    for name, value in params.items():
        if not name or "." in name:
            raise CheckpointError(
                f"{prefix}{name!r} is no name of a parameter: it is empty or has a dot. Rename it."
            )
        flat |= (
            _flatten(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
        )
    return dict(sorted(flat.items()))


def _copy_tokenizer(source: Path, folder: Path) -> list[pb.StoredFile]:
    if not source.is_dir():
        raise CheckpointError(f"{source} is no folder of a tokenizer's files. Give one, or none.")
    # The folder may be that of a whole model: its weights stay there.
    found = tokenizer_files(source)
    if not found:
        raise CheckpointError(
            f"{source} has no file of a tokenizer. Give a folder with tokenizer.json or tokenizer.model."
        )
    copy = folder / TOKENIZER_FOLDER
    copy.mkdir()
    files = sorted(copy / path.name for path in found)
    for path in files:
        shutil.copyfile(source / path.name, path)
        manifest.sync(path)
    return [manifest.describe_file(folder, path) for path in files]
