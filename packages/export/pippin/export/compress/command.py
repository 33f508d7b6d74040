"""The command `bazel run //packages/export:compress`, and `pippin-compress`: a model with its weights compressed."""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pippin.core.command_line import run_command
from pippin.core.config_tree import override
from pippin.core.errors import CheckpointError, ConfigError
from pippin.export.compress.config import MixedPaletteConfig, RecipeConfig
from pippin.export.compress.recipes import RECIPES, recipe
from pippin.export.table import aligned

if TYPE_CHECKING:  # importing JAX takes seconds, which --help and --list need not
    from pippin.core.batch import Batch
    from pippin.core.bundle import Bundle
    from pippin.export.compress.compress import Compressed, CompressedWeight
    from pippin.export.compress.progress import Bars


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    args = _parser().parse_args(argv)

    def told() -> int:
        print(_listing() if args.list else _run(args))
        return 0

    return run_command(told)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="compress", description="Writes a bundle of a model with its weights compressed."
    )
    parser.add_argument(
        "--model",
        metavar="DIR",
        help="a training run, one of its steps, a bundle, a Hugging Face folder, a GGUF file, or a model's name",
    )
    parser.add_argument("--recipe", metavar="NAME", help="how to compress; --list tells which there are")
    parser.add_argument("--out", type=Path, metavar="BUNDLE", help="a new folder")
    parser.add_argument("--bits-per-weight", type=float, metavar="BITS", help="the average of a mixed recipe")
    parser.add_argument(
        "--calibration",
        type=Path,
        metavar="FILE",
        help="text to measure the model on (default: half of Python's documentation)",
    )
    parser.add_argument(
        "--evaluation",
        type=Path,
        metavar="FILE",
        help="text to tell the perplexity of (default: the other half)",
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="PATH=VALUE",
        help="change a field of the recipe, such as linear.group_size=32; repeatable",
    )
    parser.add_argument("--no-evaluation", action="store_true", help="measure no perplexity")
    parser.add_argument("--list", action="store_true", help="list the recipes")
    return parser


def _listing() -> str:
    lines = []
    for name, cfg in RECIPES.items():
        parts = {part: getattr(cfg, part) for part in ("linear", "embedding")}
        shown = ", ".join(
            f"{part} {type(p).__name__.removesuffix('Config')}{_fields(p)}" for part, p in parts.items()
        )
        lines.append(f"{name:16}{shown}")
    return "\n".join(lines)


def _fields(cfg: Any) -> str:
    fields = [
        f.name
        for f in dataclasses.fields(cfg)
        if f.name in ("bits", "bits_per_weight", "choices", "block_size")
    ]
    shown = [f"{name}={getattr(cfg, name)}" for name in fields if getattr(cfg, name) is not None]
    return f"({', '.join(shown)})"


def _configured(args: argparse.Namespace) -> RecipeConfig:
    """The recipe that was asked for, with what was changed of it."""
    changes: dict[str, Any] = {}
    for text in args.set:
        path, equals, value = text.partition("=")
        if not equals:
            raise ConfigError(f"--set {text!r} has no '='. Write PATH=VALUE, such as linear.group_size=32.")
        changes[path] = value
    for part in ("calibration", "evaluation"):
        if getattr(args, part) is not None:
            changes[f"{part}.file"] = str(getattr(args, part))
    cfg = recipe(args.recipe)
    if args.bits_per_weight is not None:
        if not isinstance(cfg.linear, MixedPaletteConfig):
            mixed = [name for name, other in RECIPES.items() if isinstance(other.linear, MixedPaletteConfig)]
            raise ConfigError(
                f"--bits-per-weight is for recipes that allocate bits, and {args.recipe} does not. Use {' or '.join(mixed)}."
            )
        changes["linear.bits_per_weight"] = args.bits_per_weight
    return override(cfg, changes)


def _run(args: argparse.Namespace) -> str:
    """Compresses a model and writes it; returns what to tell of it."""
    absent = [name for name in ("model", "recipe", "out") if getattr(args, name) is None]
    if absent:
        raise ConfigError(
            f"--{absent[0]} is not given. A model, a recipe and a place for the result are needed."
        )
    started = time.monotonic()
    cfg = _configured(args)
    if args.out.exists():
        raise CheckpointError(
            f"{args.out} is there already. Remove it, or write the bundle to another folder."
        )

    from pippin.core.bundle import save_bundle
    from pippin.core.manifest import provenance
    from pippin.export.compress.compress import compress, needs_calibration
    from pippin.export.compress.progress import Bars
    from pippin.export.compress.text import batches, calibration_text, evaluation_text
    from pippin.layers.named_models import find_model

    model = _opened(find_model(args.model))
    tokenizer = _tokenizer(model, cfg)
    # What is wrong with a text is told before anything long.
    text = batches(cfg.calibration, calibration_text(), tokenizer) if needs_calibration(cfg) else []
    evaluation = []
    if tokenizer is not None and not args.no_evaluation:
        evaluation = batches(cfg.evaluation, evaluation_text(), tokenizer)
    params = model.params()
    with Bars() as bars:
        result = compress(model.component, params, cfg, text, bars)  # type: ignore[arg-type]
        seconds = time.monotonic() - started
        measured = "perplexity: not measured"
        if evaluation:
            measured = _perplexities(evaluation, model, params, result, bars)
    made_of = model.provenance
    save_bundle(
        args.out,
        result.component,
        result.params,
        tokenizer=model.tokenizer,
        provenance=provenance(made_of.recipe, made_of.step, str(args.model)),
        quantization_recipe=args.recipe,
    )
    return f"{table(result.weights)}\n{measured}\n{seconds:.0f} s, without the measuring of perplexity\n{args.out.absolute()}"


def _opened(path: Path) -> Bundle:
    from pippin.layers.causal_lm_config import CausalLMConfig
    from pippin.layers.model_files import open_model

    model = open_model(path)
    if not isinstance(model.component, CausalLMConfig):
        raise CheckpointError(
            f"{path} holds a {type(model.component).__name__}, which is no language model. Give another."
        )
    if len(model.quantized):
        raise CheckpointError(
            f"{path} is compressed already, by {model.quantization_recipe or 'no recipe'}. Give the model that it was made of."
        )
    return model


def _tokenizer(model: Bundle, cfg: RecipeConfig) -> Any:
    from pippin.core.tokenizer import load_tokenizer
    from pippin.export.compress.compress import needs_calibration

    if model.tokenizer is None and needs_calibration(cfg):
        other = "" if isinstance(cfg.linear, MixedPaletteConfig) else ", or --set linear.weighting=none"
        raise CheckpointError(
            f"{model.directory} has no tokenizer, and the recipe measures the model on text. Write the bundle with one, or use "
            f"a recipe that measures nothing: int8 or float16{other}."
        )
    return None if model.tokenizer is None else load_tokenizer(model.tokenizer)


def _perplexities(text: Sequence[Batch], model: Bundle, params: Any, result: Compressed, bars: Bars) -> str:
    from pippin.export.compress.compress import floats
    from pippin.export.compress.evaluate import Evaluator
    from pippin.layers.quant.settle import settled

    evaluator = Evaluator(result.component, text)
    _, before = settled(model.component, params)  # type: ignore[arg-type]
    found = []
    for what, of in (("before", floats(before)), ("after", result.floats())):
        done = 0

        def advance(what: str = what) -> None:
            nonlocal done
            done += 1
            bars(f"perplexity {what}", done, len(evaluator))

        found.append(evaluator.perplexity(of, advance))
    return f"perplexity: {found[0]:.3f} before, {found[1]:.3f} after, of {evaluator.tokens:,} tokens"


def table(weights: Sequence[CompressedWeight]) -> str:
    """What became of a model's weights, by kind of layer."""
    kinds = list(dict.fromkeys(weight.kind for weight in weights))
    rows = [("layers", "weights", "bits/weight", "MB", "stored as (matrices)")]
    for kind in [*kinds, "all"]:
        of = [w for w in weights if kind in (w.kind, "all")]
        count, nbytes = sum(w.count for w in of), sum(w.nbytes for w in of)
        forms = Counter(f"{w.scheme} {w.bits}" if w.scheme != "float16" else w.scheme for w in of)
        stored = ", ".join(f"{form} ({n})" for form, n in sorted(forms.items())) if kind != "all" else ""
        rows.append((kind, f"{count:,}", f"{8 * nbytes / count:.3f}", f"{nbytes / 1e6:.2f}", stored))
    return "\n".join(aligned(rows, words=(0, 4)))


if __name__ == "__main__":
    sys.exit(main())
