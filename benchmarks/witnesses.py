"""Three programs of one compressed model, beside each other: JAX, Apple's Core AI, and the interpreter of the .mlpackage.

They read a prompt and the greedy tokens that Core AI writes behind it. Where two that know nothing of each other agree, what
was lowered is right in both.

    bazel run //packages/export:coreml -- --model smollm2-135m-instruct --out S.mlpackage
    bazel run //packages/export:coreai -- --model S/compressed --precision float32 --out SAI.aimodel
    bazel run //benchmarks:witnesses -- --model S/compressed --mlpackage S.mlpackage --aimodel SAI.aimodel
"""

from __future__ import annotations

import argparse
import itertools
import sys
from pathlib import Path

import numpy as np

from pippin.core.command_line import run_command
from pippin.core.errors import CheckpointError


def compare(model: Path, mlpackage: Path, aimodel: Path, prompt_tokens: int, steps: int) -> str:
    """A table of the differences of logits, by pairs.

    Args:
        model: the bundle that both packages were made of.
        mlpackage: of Core ML.
        aimodel: of Core AI.
        prompt_tokens: how long the prompt is.
        steps: how many tokens are written behind it.

    Raises:
        PippinError: one of them cannot be opened, or was made of other weights.
    """
    from pippin.export.compress.text import evaluation_text
    from pippin.export.coreai_runtime import CoreAIModel
    from pippin.export.jax_reference import stored_reference
    from pippin.export.mil.interpreter import Interpreter, Mode
    from pippin.export.mil.spec import load_program
    from pippin.export.model_source import open_source
    from pippin.export.output import Places, read_manifest
    from pippin.export.package_runner import PackageRunner
    from pippin.export.verification import prompt_ids

    source = open_source(model)
    for package in (mlpackage, aimodel):
        exported = read_manifest(Places.of(package))
        if exported.model_signature != source.signature:
            raise CheckpointError(
                f"{package} was made of the model with the signature {exported.model_signature[:12]}, and {model} has "
                f"{source.signature[:12]}. Give three of the same weights."
            )
    bundle = source.bundle
    prompt = prompt_ids(bundle, evaluation_text(), prompt_tokens)
    _say("Core AI")
    with CoreAIModel(aimodel) as apple:
        written, logits = apple.greedy(prompt, steps + 1)
    ids = [*prompt, *written[:-1]]
    _say("JAX")
    found = {"JAX": stored_reference(bundle, len(ids)).logits(ids), "Core AI": logits}
    program = load_program(mlpackage)
    for mode in (Mode.EXACT, Mode.FLOAT16):
        _say(f".mlpackage, {mode.value}")
        runner = PackageRunner(Interpreter(program, mode))
        parts = [runner.extend(prompt), *(runner.extend([i]) for i in written[:-1])]
        found[f".mlpackage, {mode.value}"] = np.concatenate(parts)
    return table(found, len(prompt))


def table(found: dict[str, np.ndarray], prompt_tokens: int) -> str:
    """Of logits [T, V] by who computed them, each pair's differences as lines."""
    lines = [f"{'':44}{'largest':>10}{'rms':>10}  likeliest tokens that are equal, of them greedy ones"]
    for (one, a), (other, b) in itertools.combinations(found.items(), 2):
        apart = a.astype(np.float64) - b
        same = a.argmax(-1) == b.argmax(-1)
        greedy = same[prompt_tokens - 1 :]
        lines.append(
            f"{f'{one} and {other}':44}{np.abs(apart).max():10.1e}{np.sqrt((apart**2).mean()):10.1e}"
            f"  {same.sum()} of {same.size}, {greedy.sum()} of {greedy.size}"
        )
    most = max(float(np.abs(logits).max()) for logits in found.values())
    return "\n".join([*lines, f"logits up to {most:.1f}"])


def _say(what: str) -> None:
    print(what, file=sys.stderr, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True, help="the bundle that both were made of")
    parser.add_argument("--mlpackage", type=Path, required=True)
    parser.add_argument("--aimodel", type=Path, required=True)
    parser.add_argument("--prompt-tokens", type=int, default=96)
    parser.add_argument("--steps", type=int, default=32)
    args = parser.parse_args()

    def told() -> int:
        print(compare(args.model, args.mlpackage, args.aimodel, args.prompt_tokens, args.steps))
        return 0

    return run_command(told)


if __name__ == "__main__":
    sys.exit(main())
