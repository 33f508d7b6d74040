"""Our compression beside coremltools' own palettes: bits, perplexity, time and memory, in one run.

Each contender compresses the same model in a process of its own, one after the other; then all are measured on the same text,
by the same program. Embeddings are int8 with a scale for each row, with all of them. "loss" is what a compressed model
loses: its perplexity less that of the model. Time is that of compressing, calibration included, without the reading and
writing of files: on the clock, and of processors, which other work on the machine changes less.

    bazel run //benchmarks:compress -- --model smollm2-135m-instruct
    bazel run //benchmarks:compress -- --model runs/stdlib_tiny --text stdlib
"""

from __future__ import annotations

import argparse
import dataclasses
import html
import itertools
import json
import math
import os
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.own_process import in_own_process
from pippin.core.bundle import Bundle, load_bundle, save_bundle
from pippin.core.config_tree import override
from pippin.core.module import flatten_params, unflatten_params
from pippin.core.tokenizer import load_tokenizer
from pippin.export.compress.compress import compress, needs_calibration
from pippin.export.compress.config import PaletteConfig, RecipeConfig, ScaleConfig, Weighting
from pippin.export.compress.evaluate import Evaluator
from pippin.export.compress.recipes import RECIPES
from pippin.export.compress.text import batches, calibration_text, evaluation_text
from pippin.layers.model_files import open_model
from pippin.layers.named_models import find_model
from pippin.layers.unrolled import unrolled
from pippin.train.input.config import StdlibConfig, TextInputConfig
from pippin.train.input.reading import Split
from pippin.train.input.rejects import Rejects
from pippin.train.input.sources import StdlibSource


@dataclasses.dataclass(frozen=True)
class Contender:
    """A way to compress."""

    name: str
    recipe: RecipeConfig
    peer_bits: int | None = None  # of coremltools' palettes, in place of the recipe's linear maps
    size_of: str = ""  # the contender before it whose bits its recipe is to meet; "": the recipe says itself


@dataclasses.dataclass(frozen=True)
class Row:
    """What became of the model."""

    name: str
    bits_per_weight: float  # of linear maps, tables counted
    model_mb: float
    perplexity: float
    seconds: float | None
    cpu_s: float | None
    peak_gib: float | None


def contenders(peer_bits: list[int]) -> list[Contender]:
    """All, from most bits to fewest."""
    plain = RecipeConfig(linear=PaletteConfig(weighting=Weighting.NONE))
    four, mixed = RECIPES["palettize_4bit"], RECIPES["mixed_3_7"]
    weighted = override(four, {"linear.weighting": Weighting.ACTIVATIONS})
    ours = [
        Contender("float16", RECIPES["float16"]),
        Contender("int8", RECIPES["int8"]),
        Contender("int4, blocks of 32", RECIPES["int4_block32"]),
        Contender("4 bits, not weighted", plain),
        Contender("4 bits, by activations", weighted),
        Contender("4 bits, by the loss", four),
        Contender("allocated, 3.7 bits", RECIPES["mixed_3_7"]),
        Contender("allocated, 3.5 bits", RECIPES["mixed_3_5"]),
        Contender("3 bits, by the loss", override(four, {"linear.bits": 3})),
        Contender("2 bits, by the loss", RECIPES["palettize_2bit"]),
        Contender("allocated, as large as 4 bits", mixed, size_of="4 bits, by the loss"),
        Contender("allocated, as large as 3 bits", mixed, size_of="3 bits, by the loss"),
    ]
    int8_rows = RecipeConfig(linear=RECIPES["float16"].linear, embedding=ScaleConfig())
    return ours + [Contender(f"coremltools, {bits} bits", int8_rows, bits) for bits in peer_bits]


@dataclasses.dataclass(frozen=True)
class Texts:
    """What is read to compress, and what perplexity is measured on."""

    calibration: str
    evaluation: str


def texts(name: str) -> Texts:
    """Python's documentation, half for each ("topics"), or its library, of which a part is held out ("stdlib").

    No model here was trained on the former but those of the standard library, which has it in a module. The latter's part is
    the one that the default recipe holds out.
    """
    if name == "topics":
        return Texts(calibration_text(), evaluation_text())
    source, every = StdlibSource(StdlibConfig()), TextInputConfig().heldout_every
    files = source.files()
    trained, held = (source.parts(files, Split(side, every), Rejects()) for side in (False, True))
    return Texts(*("\n\n".join(part.text for part in itertools.islice(side, 40)) for side in (trained, held)))


def run(model: str, chosen: list[Contender], text_name: str, out: Path) -> list[Row]:
    """Compresses the model in each way, and measures all; rows are written to a file as they come."""
    bundle = open_model(find_model(model))
    component, params = unrolled(bundle.component, bundle.params())  # type: ignore[arg-type]
    read = texts(text_name)
    text = batches(RECIPES["float16"].evaluation, read.evaluation, load_tokenizer(_tokenizer(bundle)))
    evaluator = Evaluator(component, text)
    size = sum(a.nbytes for a in flatten_params(params).values())
    rows = [Row("the model", 32.0, size / 1e6, evaluator.perplexity(params), None, None, None)]
    out.mkdir(parents=True, exist_ok=True)
    with (out / "rows.jsonl").open("w") as file, tempfile.TemporaryDirectory() as folder:
        for i, contender in enumerate(chosen):
            _say(f"{i + 1}/{len(chosen)} {contender.name}")
            place = Path(folder) / str(i)
            if contender.size_of:
                bits = next((row.bits_per_weight for row in rows if row.name == contender.size_of), None)
                if bits is None:
                    _say(f"left out: it has the size of {contender.size_of!r}, which did not run")
                    continue
                met = override(contender.recipe, {"linear.bits_per_weight": bits})
                contender = dataclasses.replace(contender, recipe=met)
            seconds, cpu_s, peak = in_own_process(_compress, model, contender, read.calibration, place)
            compressed = load_bundle(place)
            bits, size = _sizes(compressed)
            perplexity = evaluator.perplexity(compressed.params())
            rows.append(Row(contender.name, bits, size / 1e6, perplexity, seconds, cpu_s, peak))
            file.write(json.dumps(dataclasses.asdict(rows[-1])) + "\n")
            file.flush()
    return rows


def table(rows: list[Row]) -> str:
    """As text, with what each loses."""
    lines = [
        f"{'':32}{'bits/weight':>12}{'MB':>8}{'perplexity':>14}{'loss':>14}{'seconds':>9}{'CPU s':>9}{'peak GiB':>10}"
    ]
    for row in rows:
        timed = "" if row.seconds is None else f"{row.seconds:9.0f}{row.cpu_s:9.0f}{row.peak_gib:10.1f}"
        lines.append(
            f"{row.name:32}{row.bits_per_weight:12.2f}{row.model_mb:8.1f}{row.perplexity:14,.2f}"
            f"{row.perplexity - rows[0].perplexity:14,.2f}{timed}"
        )
    at = next((row for row in rows if row.name == "allocated, 3.7 bits"), None)
    if at is not None and (peer := peer_loss(rows, at.bits_per_weight)) is not None:
        ours = at.perplexity - rows[0].perplexity
        lines.append(
            f"at {at.bits_per_weight:.2f} bits coremltools loses {peer:.2f} (between its sizes, on a line of log loss): "
            f"the allocated model loses {ours / peer:.2f} times that"
        )
    return "\n".join(lines)


def peer_loss(rows: list[Row], bits: float) -> float | None:
    """What coremltools' palettes would lose at a size between two of theirs; None outside of them."""
    peers = sorted((r for r in rows if r.name.startswith("coremltools")), key=lambda r: r.bits_per_weight)
    for low, high in itertools.pairwise(peers):
        if low.bits_per_weight <= bits <= high.bits_per_weight:
            share = (bits - low.bits_per_weight) / (high.bits_per_weight - low.bits_per_weight)
            losses = [math.log(r.perplexity - rows[0].perplexity) for r in (low, high)]
            return math.exp(losses[0] + share * (losses[1] - losses[0]))
    return None


def page(rows: list[Row], text: str) -> str:
    """HTML that needs no other file."""
    import base64
    import io

    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(9, 5), dpi=110, layout="constrained")
    for row in rows[1:]:
        peer = row.name.startswith("coremltools")
        axis.plot(row.bits_per_weight, row.perplexity, "s" if peer else "o", color="C1" if peer else "C0")
        axis.annotate(row.name, (row.bits_per_weight, row.perplexity), fontsize=7)
    axis.axhline(rows[0].perplexity, color="gray", linestyle=":")
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set_xlabel("bits a weight of linear maps")
    axis.set_ylabel("perplexity")
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    pyplot.close(figure)
    encoded = base64.b64encode(picture.getvalue()).decode()
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><title>compression benchmark</title>'
        f'<h1>Compression</h1><img alt="perplexity by bits" src="data:image/png;base64,{encoded}">'
        f"<pre>{html.escape(text)}</pre></html>\n"
    )


def _compress(model: str, contender: Contender, calibration: str, place: Path) -> tuple[float, float, float]:
    """Writes the compressed model; returns seconds, those of processors, and GiB of memory at the peak."""
    bundle = open_model(find_model(model))
    params = bundle.params()
    text = []
    if needs_calibration(contender.recipe):
        text = batches(contender.recipe.calibration, calibration, load_tokenizer(_tokenizer(bundle)))
    matrices = {}
    if contender.peer_bits is not None:
        _, tree = unrolled(bundle.component, params)  # type: ignore[arg-type]
        matrices = {
            name: values
            for name, values in flatten_params(tree).items()
            if name.endswith(".weight") and values.ndim == 2 and not name.startswith("embedding")
        }
    start, cpu_start = time.monotonic(), time.process_time()
    result = compress(bundle.component, params, contender.recipe, text)  # type: ignore[arg-type]
    flat: dict[str, Any] = flatten_params(result.params)
    if contender.peer_bits is not None:
        from benchmarks.compression.coremltools_palettes import kmeans, palettes

        start, cpu_start = time.monotonic(), time.process_time()
        flat |= palettes(matrices, contender.peer_bits, kmeans)
    seconds, cpu_s = time.monotonic() - start, time.process_time() - cpu_start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 << 20)
    save_bundle(place, result.component, unflatten_params(flat))
    return seconds, cpu_s, peak


def _sizes(bundle: Bundle) -> tuple[float, int]:
    """Bits a weight of the linear maps, and the bytes of all weights, those that are float16 as such."""
    count = linear = size = 0
    for name, tensor in bundle.weights.items():
        numbers = math.prod(tensor.shape)
        stored = bundle.quantized.get(name)
        nbytes = 2 * numbers if stored is None else stored.nbytes
        size += nbytes
        if len(tensor.shape) == 2 and not name.startswith("embedding"):
            linear, count = linear + nbytes, count + numbers
    return 8 * linear / count, size


def _tokenizer(bundle: Bundle) -> Path:
    if bundle.tokenizer is None:
        raise SystemExit(
            f"{bundle.directory} has no tokenizer, so no text can be measured. Give another model."
        )
    return bundle.tokenizer


def _say(what: str) -> None:
    print(what, file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument(
        "--text",
        choices=("topics", "stdlib"),
        default="topics",
        help="Python's documentation, or its library with the part that the default recipe holds out (default: %(default)s)",
    )
    parser.add_argument(
        "--peer-bits", nargs="*", type=int, default=[4, 3, 2], help="of coremltools' palettes"
    )
    parser.add_argument("--only", nargs="*", help="contenders by the start of their names")
    parser.add_argument("--out", type=Path, default=Path("benchmark_compress"))
    args = parser.parse_args()
    os.chdir(os.environ.get("BUILD_WORKING_DIRECTORY", "."))
    chosen = contenders(args.peer_bits)
    if args.only is not None:
        chosen = [c for c in chosen if c.name.startswith(tuple(args.only))]
    rows = run(args.model, chosen, args.text, args.out)
    text = table(rows)
    (args.out / "report.html").write_text(page(rows, text))
    print(f"{text}\n{(args.out / 'report.html').absolute()}")


if __name__ == "__main__":
    main()
