"""A program as an .mlpackage: the same tree and weights give the same bytes. Import it late: see `coreml_tools`."""

from __future__ import annotations

import json
import uuid
from pathlib import Path
from typing import Any

from pippin.core import manifest
from pippin.export.coreml_tools import load_program
from pippin.export.lower import Lowered
from pippin.export.output import Places, library_writes

_SPECIFICATION = 9  # of iOS 18
_DATA = Path("Data", "com.apple.CoreML")
_MODEL, _WEIGHTS = "model.mlmodel", "weights"

_DESCRIPTIONS = {
    "inputIds": "The ids of tokens that follow each other. Fill up a last, shorter part of a prompt with any id.",
    "position": "The position of the first of these tokens: how many came before.",
    "causalMask": "0 where a token may attend to a slot of the caches, -infinity elsewhere; the token at a position sees the slots up to it.",
    "adapter": "The matrices of a low-rank adapter, one after the other as the manifest lists them. Zeros: none.",
    "keyCache": "The keys of all tokens so far: a slot for each position.",
    "valueCache": "The values of all tokens so far: a slot for each position.",
    "logits": "The logits of the token after each token.",
}


def write_package(places: Places, lowered: Lowered, metadata: dict[str, str], description: str) -> None:
    """Writes a program as a package, with its weights.

    Args:
        places: of the export that is being written.
        lowered: the program.
        metadata: what the package says of itself to who opens it.
        description: of the model, in a line.

    Raises:
        CheckpointError: the disk does not take the weights.
    """
    data = places.package / _DATA
    (data / _WEIGHTS).mkdir(parents=True)
    with library_writes(places.package):
        spec = load_program(
            lowered.program, weights_dir=str(data / _WEIGHTS), specification_version=_SPECIFICATION
        )
    _describe(spec, metadata, description)
    manifest.write_file(data / _MODEL, spec.SerializeToString(deterministic=True))
    manifest.write_file(places.package / "Manifest.json", _manifest())
    for path in (data / _WEIGHTS).iterdir():
        manifest.sync(path)


def _describe(spec: Any, metadata: dict[str, str], description: str) -> None:
    facts = spec.description.metadata
    facts.Clear()
    facts.shortDescription = description
    facts.userDefined.update(metadata)
    for function in spec.description.functions:
        for feature in (*function.input, *function.output, *function.state):
            feature.shortDescription = _DESCRIPTIONS[feature.name]


def _manifest() -> bytes:
    """Of the package's two parts, under ids that are the same in all packages."""
    ids = {name: str(uuid.uuid5(uuid.NAMESPACE_URL, f"pippin/{name}")) for name in (_MODEL, _WEIGHTS)}
    what = {_MODEL: "CoreML Model Specification", _WEIGHTS: "CoreML Model Weights"}
    entries = {
        ids[name]: {
            "author": _DATA.name,
            "description": what[name],
            "name": name,
            "path": f"{_DATA.name}/{name}",
        }
        for name in ids
    }
    value = {
        "fileFormatVersion": "1.0.0",
        "itemInfoEntries": entries,
        "rootModelIdentifier": ids[_MODEL],
    }
    return (json.dumps(value, indent=4) + "\n").encode()
