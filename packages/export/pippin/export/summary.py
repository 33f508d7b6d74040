"""An export in a few lines, for who made it."""

from __future__ import annotations

from pippin.export.output import Places
from pippin.export.table import aligned
from pippin.export.weight_kinds import Cost, by_kind
from pippin.v1 import export_pb2 as pb

_WORDS = (0, 2)  # columns of words
HEADER = ("kind of layer", "weights", "stored as", "bits a weight", "MB")


def cost_rows(exported: pb.ExportManifest) -> list[tuple[str, ...]]:
    """What the weights cost, a row for each kind of layer and one for all."""
    rows = [_row(kind, cost) for kind, cost in by_kind(exported.weights).items()]
    total = Cost(sum(w.count for w in exported.weights), sum(w.bytes for w in exported.weights))
    return [*rows, _row("all", total)]


def measured_rows(exported: pb.ExportManifest) -> list[tuple[str, str]]:
    """What was measured, and what it came to."""
    if not exported.HasField("parity"):
        return []
    parity = exported.parity
    rows = []
    if parity.decode_steps:
        rows.append((f"largest error of a logit, by {parity.runtime}", f"{parity.max_logit_error:.2e}"))
        rows.append(("greedy tokens that are equal", f"{parity.tokens_equal} of {parity.decode_steps}"))
    if parity.perplexity_before:
        rows.append(("perplexity of the model as it was", f"{parity.perplexity_before:.3f}"))
    if parity.perplexity_after:
        rows.append(("perplexity with the package's weights", f"{parity.perplexity_after:.3f}"))
    return rows


def summary_text(exported: pb.ExportManifest, places: Places, model: str, seconds: float) -> str:
    """All of it, as lines."""
    package = sum(f.bytes for f in exported.files if f.path.startswith(f"{places.package.name}/"))
    lines = [*aligned([HEADER, *cost_rows(exported)], _WORDS), ""]
    if measured := measured_rows(exported):
        lines += [*aligned([("measured", ""), *measured], _WORDS), ""]
    room = f", adapters of rank {exported.adapter.rank}" if exported.HasField("adapter") else ""
    what = (
        f"{package / 1e6:,.1f} MB, a context of {exported.context_length} tokens, {exported.prefill_length} of a prompt "
        f"at a time{room}; written in {seconds:.0f} s"
    )
    lines += [
        f"{places.package}: {what}",
        f"{places.folder}: {', '.join(sorted(path.name for path in places.folder.iterdir()))}",
        f"To check it whole: bazel run //packages/export:verify -- {places.package} --model {model}",
    ]
    return "\n".join(lines)


def _row(name: str, cost: Cost) -> tuple[str, ...]:
    schemes = ", ".join(sorted(cost.schemes))
    return name, f"{cost.count:,}", schemes, f"{cost.bits_per_weight:.3f}", f"{cost.num_bytes / 1e6:,.2f}"
