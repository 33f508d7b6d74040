"""Writes the Swift package of sample code beside an exported model: X/swift/. It was never compiled on Linux."""

from __future__ import annotations

import string
from collections.abc import Iterable
from pathlib import Path

from pippin.core import manifest
from pippin.core.chat_template import chat_template_source
from pippin.core.tokenizer import load_tokenizer
from pippin.export.output import TOKENIZER, Places
from pippin.v1 import export_pb2 as pb

FOLDER = "swift"

_TEMPLATE = Path(__file__).parent / "template"
# The others are the same for every model, and Swift has a use of its own for "$".
_FILLED = ("README.md", "Sources/PippinModel/ModelFacts.swift")


def write_swift_package(places: Places, exported: pb.ExportManifest) -> None:
    """Writes the package, with the sizes of this model. Call it before the manifest is written, which lists its files.

    Args:
        places: of the export that is being written, its tokenizer included.
        exported: what is known of it.
    """
    facts = _facts(places, exported)
    for source in sorted(p for p in _TEMPLATE.rglob("*") if p.is_file()):
        relative = source.relative_to(_TEMPLATE)
        text = source.read_text(encoding="utf-8")
        if relative.as_posix() in _FILLED:
            text = string.Template(text).substitute(facts)
        target = places.folder / FOLDER / relative
        target.parent.mkdir(parents=True, exist_ok=True)
        manifest.write_file(target, text.encode())


def _facts(places: Places, exported: pb.ExportManifest) -> dict[str, str]:
    """What the templates leave open."""
    logits = next(o for f in exported.functions for o in f.outputs if o.name == "logits")
    stop_ids: Iterable[int] = ()
    start_ids: Iterable[int] = ()
    folder, chat = places.folder / TOKENIZER, False
    if folder.is_dir():
        tokenizer = load_tokenizer(folder)
        stop_ids, start_ids = tokenizer.eos_ids, tokenizer.start_ids
        chat = chat_template_source(folder) is not None
    length = exported.adapter.length
    room = (
        f"of rank {exported.adapter.rank} at most, {length:,} numbers"
        if length
        else "none: it was exported without"
    )
    return {
        "package": places.package.name,
        "name": places.folder.name,
        "context": str(exported.context_length),
        "prefill": str(exported.prefill_length),
        "vocab": str(logits.shape[-1]),
        "adapter": str(length),
        "adapters": room,
        "chat": "the model's" if chat else "none: `--chat` and `Chat` say so",
        "stop_ids": ", ".join(map(str, sorted(stop_ids))),
        "start_ids": ", ".join(map(str, start_ids)),
        "signature": exported.model_signature,
        "signature_short": exported.model_signature[:12],
    }
