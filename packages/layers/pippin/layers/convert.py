"""The command `bazel run //packages/layers:convert`, and `pippin-convert`: a model from one form on disk to another."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from pippin.core.command_line import run_command
from pippin.core.errors import ConfigError

_FORMS = ("bundle", "huggingface")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    args = _parser().parse_args(argv)

    def told() -> int:
        convert(args.source, args.target, args.to)
        print(f"{args.target.absolute()}: {args.to}")
        return 0

    return run_command(told)


def convert(source: Path, target: Path, form: str) -> None:
    """Writes a model to a new directory, whole or not at all.

    Args:
        source: a training run, one of its steps, a bundle, a Hugging Face folder, or a GGUF file.
        target: where the new one is to lie; there is nothing there yet.
        form: "bundle" or "huggingface".

    Raises:
        ConfigError: the form is unknown, or cannot express the model.
        CheckpointError: the source holds no model or a damaged one, or the target cannot be written.
    """
    from pippin.core.bundle import save_bundle
    from pippin.layers.huggingface import save_huggingface
    from pippin.layers.model_files import open_model

    if form not in _FORMS:
        raise ConfigError(f"there is no form {form!r}. Choose one of {', '.join(_FORMS)}.")
    model = open_model(source)
    if form == "bundle":
        save_bundle(
            target, model.component, model.params(), tokenizer=model.tokenizer, provenance=model.provenance
        )
    else:
        save_huggingface(target, model.component, model.params(), model.tokenizer)  # type: ignore[arg-type]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="convert", description="Converts a model on disk.")
    parser.add_argument(
        "source",
        type=Path,
        help="a training run, one of its steps, a bundle, a Hugging Face folder or a GGUF file",
    )
    parser.add_argument("target", type=Path, help="a new folder")
    parser.add_argument("--to", choices=_FORMS, default="bundle", help="the form to write (default: bundle)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
