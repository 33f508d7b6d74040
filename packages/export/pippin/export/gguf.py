"""The command `bazel run //packages/export:gguf`: a model as a GGUF file, which llama.cpp and what is made of it run."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pippin.core.command_line import run_command
from pippin.core.errors import CheckpointError, ConfigError
from pippin.core.manifest import describe_file, new_directory, sync
from pippin.export.output import require_room
from pippin.export.progress import Advance, bytes_progress, no_progress
from pippin.export.records import export_manifest, require_new, write_export_manifest
from pippin.export.stacked_model import StackedModel, path_of_layer, stacked_model
from pippin.v1 import export_pb2 as pb

if TYPE_CHECKING:
    from pippin.export.gguf_types import TensorType
    from pippin.layers.huggingface import NamedTensor

SUFFIX = ".gguf"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    args = _parser().parse_args(argv)
    return run_command(lambda: _run(args))


def _run(args: argparse.Namespace) -> int:
    from pippin.layers.model_files import open_model
    from pippin.layers.named_models import find_model

    _require_new(args.out)
    source = find_model(args.model)
    model = stacked_model(open_model(source))
    total = sum(4 * np.prod(a.shape, dtype=np.int64) for a in model.parameters.values())
    with bytes_progress("reading", int(total)) as advance:
        manifest = export_gguf(
            model,
            args.out,
            type_name=args.type,
            name=args.name or source.stem,
            context_length=args.context_length,
            source=str(source),
            advance=advance,
        )
    size = args.out.stat().st_size
    print(f"{args.out.absolute()}: {size / 1e6:,.1f} MB, {manifest.bits_per_weight:.3g} bits per weight")
    return 0


def export_gguf(
    model: StackedModel,
    out: Path,
    *,
    type_name: str = "F16",
    name: str = "",
    context_length: int | None = None,
    source: str = "",
    advance: Advance = no_progress,
) -> pb.ExportManifest:
    """Writes OUT.gguf and, beside it, the folder OUT with its manifest: both whole, or neither.

    A parameter is in memory at one time.

    Args:
        model: of the Llama family.
        out: ends in .gguf; neither it nor the folder is there yet.
        type_name: one of `gguf_types.TYPES`.
        name: of the model, as programs show it.
        context_length: how long texts may be; None: as the tokenizer's files say.
        source: where the model came from.
        advance: is told of the bytes that were read, as float32.

    Raises:
        ConfigError: GGUF cannot express the model or its tokenizer, or has no such type.
        CheckpointError: a file is there already or cannot be written; or a weight is NaN, infinite, or would be.
        DataError: the tokenizer is damaged.
    """
    from pippin.export import gguf_types
    from pippin.export.gguf_metadata import architecture_metadata, context_length_of, rope_factors
    from pippin.export.gguf_vocabulary import vocabulary_metadata

    gguf_types.require_type(type_name)
    if context_length is not None and not 1 <= context_length < 1 << 31:
        raise ConfigError(
            f"the context length ({context_length}) must be at least 1 and below 2^31. Leave it out for the model's own."
        )
    _require_new(out)
    cfg, context = model.config, context_length or context_length_of(model.tokenizer)
    metadata = architecture_metadata(cfg, context)
    metadata |= {"general.name": name or out.stem, "general.file_type": gguf_types.file_type(type_name)}
    if type_name not in ("F32", "F16", "BF16"):
        metadata["general.quantization_version"] = 2
    if model.tokenizer is None:
        raise ConfigError(
            "the model has no tokenizer, and llama.cpp opens no file without one. Give a bundle or a run that has one."
        )
    metadata |= vocabulary_metadata(model.tokenizer, cfg.vocab_size)
    extra = rope_factors(cfg)
    tensors = _tensors(model, str(metadata["general.architecture"]))
    types = {
        tensor: gguf_types.type_of_tensor(tensor, t.tensor.shape, type_name, tied=cfg.head is None)
        for tensor, t in tensors.items()
    }
    require_room(out, sum(types[tensor].nbytes(t.tensor.shape) for tensor, t in tensors.items()))
    manifest = export_manifest(
        "gguf",
        signature=model.signature,
        recipe=model.recipe,
        source=source,
        context_length=context,
        weights=[
            _described(path_of_layer(t.path, t.layer), t.tensor.shape, types[tensor])
            for tensor, t in tensors.items()
        ],
    )
    with _published(out) as (file, folder):
        _write(file, metadata, extra, tensors, types, advance)
        description = describe_file(file.parent, file)
        description.path = out.name
        write_export_manifest(folder, manifest, [description])
    return manifest


def _described(path: str, shape: tuple[int, ...], kind: TensorType) -> pb.ExportedWeight:
    return pb.ExportedWeight(
        name=path, scheme=kind.name, bits=kind.bits, bytes=kind.nbytes(shape), count=int(np.prod(shape))
    )


def _require_new(out: Path) -> None:
    if out.suffix != SUFFIX:
        raise ConfigError(
            f"{out} does not end in {SUFFIX}, by which programs know such files. Write {out}{SUFFIX}."
        )
    require_new(out, "model")
    require_new(out.with_suffix(""), "manifest")


def _tensors(model: StackedModel, arch: str) -> dict[str, NamedTensor]:
    """The model's tensors by the names of GGUF, each read when it is asked for."""
    from pippin.layers.gguf import GGUF_NAMES, in_pairs
    from pippin.layers.huggingface import named_tensors

    tensors = named_tensors(model.config, model.parameters, GGUF_NAMES)
    return in_pairs(model.config, tensors) if arch == "llama" else tensors


@contextlib.contextmanager
def _published(out: Path) -> Iterator[tuple[Path, Path]]:
    """A temporary file and folder, which become OUT.gguf and OUT when the block ends without an error."""
    temporary = out.with_name(f".{out.name}.tmp")
    published = False
    try:
        with new_directory(out.with_suffix("").absolute(), "manifest") as folder:
            try:
                yield temporary, folder
                sync(temporary)
                _require_new(out)  # writing took a while
                temporary.rename(out)
                published = True
            except BaseException:
                temporary.unlink(missing_ok=True)
                raise
    except CheckpointError:
        if published and not out.with_suffix("").exists():
            out.unlink(missing_ok=True)
        raise


def _write(
    path: Path,
    metadata: Mapping[str, Any],
    extra: Mapping[str, np.ndarray],
    tensors: Mapping[str, NamedTensor],
    types: Mapping[str, TensorType],
    advance: Advance,
) -> None:
    import gguf

    writer = gguf.GGUFWriter(path, str(metadata["general.architecture"]))
    for key, value in metadata.items():
        if key != "general.architecture":  # which the writer has added
            _add(writer, key, value)
    for name, values in extra.items():
        writer.add_tensor_info(name, values.shape, values.dtype, values.nbytes, gguf.GGMLQuantizationType.F32)
    for name, named in tensors.items():
        shape, kind = named.tensor.shape, types[name]
        # The dtype that the library asks for is one that it does not make the shape from.
        writer.add_tensor_info(name, shape, np.dtype(np.float32), kind.nbytes(shape), kind.number)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for values in extra.values():
            writer.write_tensor_data(values)
        for name, named in tensors.items():
            values = named.tensor.read()
            writer.write_tensor_data(types[name].encode(values, named.path))
            advance(4 * values.size)
    finally:
        writer.close()


def _add(writer: Any, key: str, value: Any) -> None:
    import gguf

    if isinstance(value, np.ndarray):
        writer.add_array(key, value.tolist())
    elif isinstance(value, list):
        writer.add_array(key, value)
    else:
        kinds = {str: "STRING", bool: "BOOL", int: "UINT32", float: "FLOAT32"}
        writer.add_key_value(key, value, gguf.GGUFValueType[kinds[type(value)]])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="gguf", description="Writes a model of the Llama family as a GGUF file, which llama.cpp runs."
    )
    parser.add_argument(
        "--model",
        required=True,
        help="a training run, a bundle, a Hugging Face folder, a GGUF file, or a name",
    )
    parser.add_argument("--out", required=True, type=Path, help=f"a new file that ends in {SUFFIX}")
    parser.add_argument(
        "--type",
        default="F16",
        help="of the matrices: F32, F16, BF16, Q8_0, Q5_1, Q5_0, Q4_1 or Q4_0 (default: F16)",
    )
    parser.add_argument("--name", help="of the model, as programs show it (default: that of --model)")
    parser.add_argument(
        "--context-length",
        type=int,
        help="how many tokens a text may have (default: what the tokenizer's files say, or else 2048)",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
