"""The command `bazel run //packages/export:huggingface`: a model as a folder that transformers loads."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import math
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from pippin.core.command_line import run_command
from pippin.core.manifest import describe_file
from pippin.core.tokenizer import copy_tokenizer, read_tokenizer_object
from pippin.export.output import require_room
from pippin.export.progress import Advance, bytes_progress, no_progress
from pippin.export.records import export_manifest, require_new, write_export_manifest
from pippin.export.stacked_model import DTYPES, LazyArray, StackedModel, path_of_layer, stacked_model
from pippin.v1 import export_pb2 as pb


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    args = _parser().parse_args(argv)
    return run_command(lambda: _run(args))


def _run(args: argparse.Namespace) -> int:
    from pippin.layers.model_files import open_model
    from pippin.layers.named_models import find_model

    source = find_model(args.model)
    require_new(args.out, "model")
    model = stacked_model(open_model(source))
    total = sum(math.prod(a.shape) * _dtype(a, args.dtype).itemsize for a in model.parameters.values())
    with bytes_progress("writing", total) as advance:
        manifest = export_huggingface(model, args.out, dtype=args.dtype, source=str(source), advance=advance)
    size = sum(weight.bytes for weight in manifest.weights)
    print(f"{args.out.absolute()}: {size / 1e6:,.1f} MB, {manifest.bits_per_weight:g} bits per weight")
    if model.tokenizer is not None and not (args.out / "tokenizer.json").is_file():
        print(
            f"{args.out.absolute()}: no tokenizer.json gives the same tokens as its tokenizer.model; use the latter with sentencepiece"
        )
    return 0


def export_huggingface(
    model: StackedModel,
    out: Path,
    *,
    dtype: str | None = None,
    source: str = "",
    advance: Advance = no_progress,
) -> pb.ExportManifest:
    """Writes safetensors, config.json, the tokenizer's files and a manifest, whole or not at all.

    Args:
        model: of the Llama family.
        out: the folder, which is not there yet.
        dtype: of the tensors; None: as they are.
        source: where the model came from.
        advance: is told of the bytes that are written.

    Raises:
        ConfigError: config.json cannot describe the model; the error says where it differs.
        CheckpointError: the folder is there already, or cannot be written; or a weight is NaN, infinite, or would be.
    """
    from pippin.core.module import unflatten_params
    from pippin.layers.huggingface import save_huggingface

    require_new(out, "model")
    arrays = {path: a.astype(str(_dtype(a, dtype))) for path, a in model.parameters.items()}
    require_room(out, sum(math.prod(a.shape) * a.dtype.itemsize for a in arrays.values()))
    manifest = export_manifest(
        "huggingface",
        signature=model.signature,
        recipe=model.recipe,
        source=source,
        weights=[weight for a in arrays.values() for weight in _described(a)],
    )

    def finish(folder: Path) -> None:
        files = [describe_file(folder, path) for path in folder.iterdir()]
        for file in files:
            file.path = f"{out.name}/{file.path}"
        write_export_manifest(folder, manifest, files)

    watched = {path: _watched(array, advance) for path, array in arrays.items()}
    with _for_transformers(model.tokenizer) as tokenizer:
        save_huggingface(out, model.config, unflatten_params(watched), tokenizer, finish=finish)
    return manifest


@contextlib.contextmanager
def _for_transformers(tokenizer: Path | None) -> Iterator[Path | None]:
    """A folder of a tokenizer's files with what transformers needs: a tokenizer.json, and the ids of special tokens.

    Of SentencePiece's tokenizer.model it would make another tokenizer, and without ids take those of Llama 2. Where no
    tokenizer.json gives the same tokens, the folder has none.
    """
    if tokenizer is None or (
        (tokenizer / "tokenizer.json").is_file()
        and "eos_token_id" in read_tokenizer_object(tokenizer / "config.json")
    ):
        yield tokenizer
        return
    from pippin.export.tokenizer_json import write_special_ids, write_tokenizer_json

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        copy_tokenizer(tokenizer, folder)
        write_special_ids(folder)
        write_tokenizer_json(folder)
        yield folder


def _dtype(array: LazyArray, dtype: str | None) -> np.dtype:
    return np.dtype(dtype or array.dtype)


def _described(array: LazyArray) -> list[pb.ExportedWeight]:
    """A parameter, layer by layer, as the manifest has it."""
    stacked = array.path != path_of_layer(array.path, 0)
    count = math.prod(array.shape[1:] if stacked else array.shape)
    return [
        pb.ExportedWeight(
            name=path_of_layer(array.path, layer if stacked else None),
            scheme=str(array.dtype),
            bits=8 * array.dtype.itemsize,
            bytes=count * array.dtype.itemsize,
            count=count,
        )
        for layer in range(array.shape[0] if stacked else 1)
    ]


def _watched(array: LazyArray, advance: Advance) -> LazyArray:
    """The same array, which tells when it was read."""

    def read(layer: int | None) -> np.ndarray:
        values = array.read(layer)
        advance(values.size * array.dtype.itemsize)
        return values

    return dataclasses.replace(array, read=read)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="huggingface",
        description="Writes a model of the Llama family as a folder that transformers loads.",
    )
    parser.add_argument(
        "--model",
        required=True,
        help="a training run, a bundle, a Hugging Face folder, a GGUF file, or a name",
    )
    parser.add_argument("--out", required=True, type=Path, help="a new folder")
    parser.add_argument("--dtype", choices=DTYPES, help="the type of the weights (default: as they are)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
