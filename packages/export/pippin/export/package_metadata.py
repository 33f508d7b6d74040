"""What a package says of itself to who opens it."""

from __future__ import annotations

import numpy as np

from pippin.export.model_source import ModelSource
from pippin.v1 import export_pb2 as pb


def one_line(source: ModelSource) -> str:
    """The model that a package holds, in a line."""
    count = sum(int(np.prod(values.shape)) for values in source.params.values())
    return f"{source.name}: a causal language model of {count / 1e6:,.1f} million parameters, by pippin."


def user_metadata(exported: pb.ExportManifest, name: str) -> dict[str, str]:
    """What is known of a package, by the keys that users of Core ML look for; `name` is the model's."""
    return {
        "co.huggingface.exporters.name": name,
        "co.huggingface.exporters.task": "text-generation",
        "co.huggingface.exporters.framework": "jax",
        "contextLength": str(exported.context_length),
        "prefillLength": str(exported.prefill_length),
        "bitsPerWeight": f"{exported.bits_per_weight:.4f}",
        "quantScheme": ", ".join(sorted({_scheme(weight) for weight in exported.weights})),
        "modelSignature": exported.model_signature,
        "adapterLength": str(exported.adapter.length),
    }


def _scheme(weight: pb.ExportedWeight) -> str:
    return weight.scheme if weight.scheme == "float16" else f"{weight.scheme} {weight.bits}"
