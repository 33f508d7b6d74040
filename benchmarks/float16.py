"""How far float16 takes a model from itself: Hugging Face's SmolLM2 on PyTorch, in float16 and float32.

Both have the same float16 weights, and read a prompt and 32 greedy tokens. What it finds is what a package in float16 can be
asked for (docs/decisions/0020).

    bazel run //benchmarks:float16
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from pippin.core.errors import PippinError
from pippin.export.compress.text import evaluation_text
from pippin.layers.named_models import find_model

_MODEL = "smollm2-135m-instruct"
_TOKENS = 96  # of the prompt, as //packages/export:verify reads
_SCRIPT = Path(__file__).parent / "peers" / "torch_float16.py"


def main() -> int:
    try:
        model = find_model(_MODEL)
    except PippinError as error:
        print(f"float16: {error}", file=sys.stderr)
        return 2
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as text:
        text.write(evaluation_text())
        text.flush()
        command = [os.environ["PIPPIN_PEERS_PYTHON"], "-I", str(_SCRIPT), str(model), text.name, str(_TOKENS)]
        told = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)
    print(
        f"{_MODEL} by transformers in float16, beside itself in float32: the largest error of a logit is "
        f"{told['largest']:.3f}, the root mean square {told['root_mean_square']:.3f}, of logits up to "
        f"{told['largest_logit']:.1f}; {told['tokens_equal']} of {told['steps']} greedy tokens are equal"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
