"""The files of adapters beside an export, X/adapters/NAME.bin, of which a program takes one as an input."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from pippin.core.adapter import LowRank
from pippin.core.bundle import Bundle
from pippin.core.errors import CheckpointError
from pippin.core.manifest import write_file
from pippin.core.module import unflatten_params
from pippin.export.adapter_layout import adapter_file, open_adapter, packed_adapter, require_base
from pippin.export.output import Places
from pippin.layers.adapter import unrolled_maps
from pippin.layers.causal_lm_config import CausalLMConfig
from pippin.v1 import export_pb2 as pb

FOLDER = "adapters"

Maps = Mapping[str, LowRank]  # by the path of the linear map that they are for


def adapter_path(places: Places, name: str) -> Path:
    """Where the adapter of a name lies."""
    return places.folder / FOLDER / f"{name}.bin"


def write_adapters(
    places: Places, directories: Sequence[Path], base: Bundle, layout: pb.AdapterLayout
) -> None:
    """Writes adapters beside a program that is being exported; raises as `packed_files` does.

    Args:
        places: of the export.
        directories: of the adapters.
        base: the model that is exported.
        layout: of the program's input.
    """
    for name, data in packed_files(directories, layout, of_bundle(base)).items():
        path = adapter_path(places, name)
        path.parent.mkdir(exist_ok=True)
        write_file(path, data)


def of_bundle(base: Bundle) -> Callable[[Maps], Maps]:
    """What gives maps of a model's adapter as those of the model without stacks."""
    cfg, params = base.component, unflatten_params(base.weights)
    assert isinstance(cfg, CausalLMConfig)  # or it would not have been opened
    return lambda maps: unrolled_maps(cfg, params, maps)


def packed_files(
    directories: Sequence[Path], layout: pb.AdapterLayout, of_layers: Callable[[Maps], Maps]
) -> dict[str, bytes]:
    """The contents of the files of adapters, by their names: those of their directories.

    Args:
        directories: of the adapters.
        layout: of the program's input.
        of_layers: gives maps of the model that the adapters were trained on as those of the same model without stacks.

    Raises:
        DamageError: a file of an adapter is absent or damaged.
        CheckpointError: a directory holds no adapter, one was trained on another model or does not fit, or two have one name.
    """
    files: dict[str, bytes] = {}
    for directory in directories:
        adapter = open_adapter(directory)
        name = adapter.directory.name
        if name in files:
            raise CheckpointError(
                f"two of the adapters are called {name}, as their directories are, and so would be their files. Rename a "
                "directory."
            )
        require_base(adapter, layout)
        files[name] = adapter_file(packed_adapter(adapter, of_layers(adapter.maps()), layout), layout)
    return files
