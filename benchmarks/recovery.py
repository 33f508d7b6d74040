"""What an accuracy-recovery adapter wins back, beside its control: the same LoRA over the model that was not compressed.

More steps of training help any model on the text that they are of. So both the compressed model and its floats get the same LoRA, by
the same recipe on the same text (half of Python's documentation), and all four are measured on 8,192 tokens of the other half: what
counts is how far the two are apart, without the LoRA and with it. Run it again, and it goes on where it was stopped.

    bazel run //benchmarks:recovery
    bazel run //benchmarks:recovery -- --model runs/stdlib_tiny --recipe palettize_2bit
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path

from benchmarks.own_process import in_own_process
from benchmarks.smollm2_recovery import adapter_over
from pippin.core.bundle import open_model
from pippin.core.command_line import run_command
from pippin.core.errors import CheckpointError
from pippin.core.tokenizer import load_tokenizer
from pippin.export.compress import command
from pippin.export.compress.evaluate import Evaluator
from pippin.export.compress.recipes import RECIPES
from pippin.export.compress.text import batches, calibration_text, evaluation_text
from pippin.layers.causal_lm_config import CausalLMConfig
from pippin.train.input.config import use_files

_FLOATS = "float16"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2-135m-instruct", help="with a tokenizer")
    parser.add_argument(
        "--recipe", default="mixed_3_7", choices=[name for name in RECIPES if name != _FLOATS]
    )
    parser.add_argument("--steps", type=int, default=80, help="of 1,024 tokens")
    parser.add_argument(
        "--out", type=Path, help="a folder (default: benchmark_recovery/ and the model's name)"
    )
    args = parser.parse_args()
    return run_command(lambda: _compare(args))


def _compare(args: argparse.Namespace) -> int:
    out = (args.out or Path("benchmark_recovery", Path(args.model).name)).absolute()
    found = {name: _measured(args.model, name, args.steps, out) for name in (_FLOATS, args.recipe)}
    print(table(found[_FLOATS], found[args.recipe], args.recipe, args.steps))
    print("\n".join(f"{name} with a LoRA: {_run(out, name) / 'report.html'}" for name in found))
    return 0


def table(floats: tuple[float, float], compressed: tuple[float, float], recipe: str, steps: int) -> str:
    """Perplexities of the two without the LoRA and with it, and what is left of what they are apart."""
    lines = [f"{'perplexity':24}{'float':>9}{recipe:>16}{'apart':>9}{'apart, nats':>13}"]
    apart = [after - before for before, after in zip(floats, compressed, strict=True)]
    nats = [math.log(after / before) for before, after in zip(floats, compressed, strict=True)]
    for i, what in enumerate(("as it is", f"with a LoRA, {steps} steps")):
        lines.append(f"{what:24}{floats[i]:9.2f}{compressed[i]:16.2f}{apart[i]:9.2f}{nats[i]:13.3f}")
    won = [1 - with_it / without for without, with_it in (apart, nats)]
    return "\n".join([*lines, f"{'won back':49}{won[0]:9.0%}{won[1]:13.0%}"])


def _measured(model: str, recipe: str, steps: int, out: Path) -> tuple[float, float]:
    """The perplexity of a model that a recipe compressed, and of the same with a LoRA. Each step has a process of its own."""
    bundle = out / recipe
    if not bundle.exists():
        _say(f"{recipe}: compress")
        in_own_process(_compress, model, recipe, bundle)
    require_made_of(bundle, model)
    _say(f"{recipe}: perplexity")
    before = in_own_process(perplexity, bundle)
    _say(f"{recipe}: train a LoRA")
    in_own_process(_train, bundle, _run(out, recipe), steps)
    _say(f"{recipe}: perplexity with it")
    return before, in_own_process(perplexity, _run(out, recipe))


def require_made_of(bundle: Path, model: str) -> None:
    """Raises CheckpointError where a bundle that is there already is of another model."""
    made_of = open_model(bundle).provenance.source
    if made_of != model:
        raise CheckpointError(
            f"{bundle} was made of {made_of}, not of {model}. Give another --out, or remove it."
        )


def _run(out: Path, recipe: str) -> Path:
    return out / f"{recipe}_lora"


def _compress(model: str, recipe: str, bundle: Path) -> None:
    if command.main(["--model", model, "--recipe", recipe, "--out", str(bundle), "--no-evaluation"]):
        raise CheckpointError(
            f"{model} was not compressed; see above."
        )  # a pool waits forever after SystemExit


def _train(bundle: Path, run: Path, steps: int) -> None:
    from pippin.train.job import run_job

    text = bundle.parent / "text"
    text.mkdir(exist_ok=True)
    (text / "calibration.txt").write_text(calibration_text())
    component = open_model(bundle).component
    assert isinstance(component, CausalLMConfig)  # or it would not have been compressed
    cfg = use_files(str(text / "*.txt"), "text")(adapter_over(component, str(bundle), steps))
    run_job(cfg, run, run.name)  # type: ignore[arg-type]


def perplexity(model: Path) -> float:
    """Of a bundle or a run, on 8,192 tokens of the half of Python's documentation that is not trained on."""
    bundle = open_model(model)
    assert bundle.tokenizer is not None and isinstance(bundle.component, CausalLMConfig)
    text = batches(RECIPES[_FLOATS].evaluation, evaluation_text(), load_tokenizer(bundle.tokenizer))
    return Evaluator(bundle.component, text).perplexity(bundle.params())


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
