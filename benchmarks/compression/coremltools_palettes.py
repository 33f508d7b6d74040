"""The peer: palettes of coremltools' own optimiser, of the same matrices and the same groups."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from pippin.core.quantized_array import Palettized

GROUP = 16  # outputs that share a table


def palettes(
    matrices: Mapping[str, np.ndarray], bits: int, palettize: Callable[..., Any]
) -> dict[str, Palettized]:
    """Each matrix in lookup tables of so many bits, by k-means.

    Args:
        matrices: name -> [inputs, outputs].
        bits: of a weight.
        palettize: what turns a program into one with tables; `kmeans`, but in tests.
    """
    names = {f"matrix_{i}": name for i, name in enumerate(matrices)}
    model = _program({label: matrices[name].T for label, name in names.items()})
    found = {}
    for op in (
        palettize(model, bits)._mil_program.functions["main"].find_ops(op_type="constexpr_lut_to_dense")
    ):
        indices, luts = op.indices.val, op.lut.val[..., 0]
        label = next(label for label in names if op.name.startswith(f"{label}_weight"))
        found[names[label]] = Palettized(
            np.ascontiguousarray(indices.astype(np.uint8).T),
            np.ascontiguousarray(luts.astype(np.float16).transpose(1, 0, 2)),
            bits,
        )
    return found


def kmeans(model: Any, bits: int) -> Any:
    """A Core ML model with its weights palettised as coremltools' guide says."""
    import coremltools.optimize as cto

    config = cto.coreml.OpPalettizerConfig(
        mode="kmeans",
        nbits=bits,
        granularity="per_grouped_channel",
        group_size=GROUP,
        weight_threshold=0,
    )
    return cto.coreml.palettize_weights(model, cto.coreml.OptimizationConfig(global_config=config))


def _program(weights: Mapping[str, np.ndarray]) -> Any:
    """A Core ML model of one linear map for each matrix [outputs, inputs]."""
    import coremltools as ct
    from coremltools.converters.mil import Builder as mb
    from coremltools.converters.mil.mil import types

    widest = max(w.shape[1] for w in weights.values())

    @mb.program(input_specs=[mb.TensorSpec((1, widest), types.fp16)], opset_version=ct.target.iOS18)
    def program(x: Any) -> Any:
        return tuple(
            mb.linear(
                x=mb.slice_by_index(x=x, begin=[0, 0], end=[1, w.shape[1]]),
                weight=mb.const(val=w.astype(np.float16), name=f"{label}_weight"),
                name=label,
            )
            for label, w in weights.items()
        )

    return ct.convert(
        program,
        source="milinternal",
        convert_to="mlprogram",
        minimum_deployment_target=ct.target.iOS18,
        compute_precision=ct.precision.FLOAT32,
        skip_model_load=True,
    )
