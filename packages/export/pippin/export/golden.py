"""Golden vectors: what the interpreter computed, written beside a package for a check on a device.

X/golden.npz             per call its function, ids, position, mask, and the logits after its last token; of the states
                         at the end their sums and their SHA-256
X/verify_on_mac.py       runs the package on a Mac and compares; needs coremltools and NumPy
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from pippin.core import manifest
from pippin.export.mac import verify_on_mac
from pippin.export.output import MANIFEST, Places
from pippin.export.package_runner import ADAPTER, IDS, MASK, POSITION, Call, PackageRunner
from pippin.v1 import export_pb2 as pb

FILE = "golden.npz"


def golden_arrays(calls: Sequence[Call], runner: PackageRunner) -> dict[str, np.ndarray]:
    """The vectors by name, as `verify_on_mac.py` reads them."""
    arrays = {
        "functions": np.array([call.function for call in calls]),
        "tokens": np.array([call.tokens for call in calls], np.int32),
        "position": np.array([call.inputs[POSITION][0] for call in calls], np.int32),
        "adapter": np.array([runner.sizes.adapter], np.int32),
        "states": np.array(sorted(runner.state)),
        "state_sums": np.array([runner.state[n].sum(dtype=np.float64) for n in sorted(runner.state)]),
        "state_magnitudes": np.array(
            [np.abs(runner.state[n]).sum(dtype=np.float64) for n in sorted(runner.state)]
        ),
        "state_sha256": np.array(
            [hashlib.sha256(runner.state[n].tobytes()).hexdigest() for n in sorted(runner.state)]
        ),
    }
    for i, call in enumerate(calls):
        assert ADAPTER not in call.inputs or not call.inputs[ADAPTER].any(), "vectors are of the bare model"
        arrays[f"ids_{i}"] = call.inputs[IDS]
        arrays[f"mask_{i}"] = call.inputs[MASK]
        arrays[f"logits_{i}"] = call.logits[-1].astype(np.float16)
    return arrays


def record(
    places: Places, exported: pb.ExportManifest, parity: pb.ExportParity, runner: PackageRunner
) -> None:
    """Writes golden vectors and the check for a Mac beside a package, and the manifest anew, with them and what was measured.

    The manifest is replaced last, in one step.
    """
    np.savez_compressed(places.folder / FILE, allow_pickle=False, **golden_arrays(runner.calls, runner))
    shutil.copyfile(Path(verify_on_mac.__file__), places.folder / "verify_on_mac.py")
    root = places.package.parent
    new = [manifest.describe_file(root, places.folder / name) for name in (FILE, "verify_on_mac.py")]
    names = {file.path for file in new}
    kept = [file for file in exported.files if file.path not in names]
    del exported.files[:]
    exported.files.extend(sorted([*kept, *new], key=lambda file: file.path))
    exported.parity.CopyFrom(parity)
    manifest.write_manifest(places.folder, exported, MANIFEST)
