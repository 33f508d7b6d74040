"""GGUF files made in a test, by the library that llama.cpp's own tools write them with."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np


def write_gguf(
    path: Path,
    metadata: Mapping[str, Any],
    tensors: Mapping[str, np.ndarray] | None = None,
    types: Mapping[str, str] | None = None,
) -> Path:
    """Writes a file and returns its path.

    Args:
        path: where.
        metadata: key -> str, bool, int (as uint32), float (as float32), NumPy scalar, or list of one of these.
        tensors: name -> float32 values, the last dim the fastest.
        types: name -> type to quantise to, where it is not F32.
    """
    writer = gguf.GGUFWriter(path, arch="", use_temp_file=False)
    writer.kv_data[0].clear()  # the architecture, which is among the metadata
    for key, value in metadata.items():
        if isinstance(value, list):
            writer.add_array(key, value)
        else:
            writer.add_key_value(key, value, _type(value))
    for name, values in (tensors or {}).items():
        kind = gguf.GGMLQuantizationType[(types or {}).get(name, "F32")]
        writer.add_tensor(name, gguf.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _type(value: Any) -> gguf.GGUFValueType:
    if isinstance(value, np.generic):
        return gguf.GGUFValueType[value.dtype.name.upper()]
    kinds = {str: "STRING", bool: "BOOL", int: "UINT32", float: "FLOAT32"}
    return gguf.GGUFValueType[kinds[type(value)]]
