"""Golden vectors: what a package's program means, computed without rounding in between, for a check on a device.

X/golden.npz             per call its function, ids, position, mask, and the logits after its last token; of the states
                         at the end their sums and their SHA-256
X/verify_on_mac.py       runs the package on a Mac and compares; needs coremltools and NumPy
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from pippin.core import manifest
from pippin.core.atomic_file import write_atomic
from pippin.export.mac import verify_on_mac
from pippin.export.output import MANIFEST, Places
from pippin.export.package_runner import ADAPTER, IDS, MASK, POSITION, Call, PackageRunner
from pippin.export.report import report_page
from pippin.v1 import export_pb2 as pb

FILE = "golden.npz"
SCRIPT = "verify_on_mac.py"
REPORT = "report.html"


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
    places: Places, exported: pb.ExportManifest, parity: pb.ExportParity, runner: PackageRunner, name: str
) -> None:
    """Writes golden vectors and the check for a Mac beside a package, and what was measured into manifest and report.

    Args:
        places: of the package.
        exported: its manifest, which is written last, whole.
        parity: what was measured.
        runner: that read a text in the exact mode, whose calls are recorded.
        name: of the model, as people know it.
    """
    exported.parity.CopyFrom(parity)
    vectors = io.BytesIO()
    np.savez_compressed(vectors, allow_pickle=False, **golden_arrays(runner.calls, runner))
    write_atomic(places.folder / FILE, vectors.getvalue())
    write_atomic(places.folder / SCRIPT, Path(verify_on_mac.__file__).read_bytes())
    root = places.package.parent
    write_atomic(places.folder / REPORT, report_page(name, exported))
    new = [manifest.describe_file(root, places.folder / name) for name in (FILE, SCRIPT, REPORT)]
    names = {file.path for file in new}
    kept = [file for file in exported.files if file.path not in names]
    del exported.files[:]
    exported.files.extend(sorted([*kept, *new], key=lambda file: file.path))
    manifest.write_manifest(places.folder, exported, MANIFEST)
