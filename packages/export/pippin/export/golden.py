"""Golden vectors: what a package's program means, computed without rounding in between, for a check on a device.

X/golden.npz             per call its function, ids, position, mask, and the logits after its last token; of the states
                         at the end the sums of their magnitudes
X/golden_NAME.npz        the same with the adapter X/adapters/NAME.bin
X/verify_on_mac.py       runs the package on a Mac and compares; needs coremltools and NumPy
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from pippin.export.mac import verify_on_mac
from pippin.export.output import REPORT, Places, replace_file, rewriting
from pippin.export.package_runner import ADAPTER, IDS, MASK, POSITION, Call, PackageRunner
from pippin.export.report import report_page
from pippin.v1 import export_pb2 as pb

FILE = "golden.npz"
SCRIPT = "verify_on_mac.py"


def golden_path(places: Places, adapter: str = "") -> Path:
    """Where the vectors of a package lie, or those of the package with an adapter, by its name."""
    return places.folder / (f"golden_{adapter}.npz" if adapter else FILE)


def golden_arrays(calls: Sequence[Call], runner: PackageRunner, adapter: str = "") -> dict[str, np.ndarray]:
    """The vectors by name, as `verify_on_mac.py` reads them.

    Args:
        calls: of the runner.
        runner: of the package, with the adapter.
        adapter: its name; it lies beside the package.
    """
    arrays = {
        "functions": np.array([call.function for call in calls]),
        "tokens": np.array([call.tokens for call in calls], np.int32),
        "position": np.array([call.inputs[POSITION][0] for call in calls], np.int32),
        "adapter": np.array([runner.sizes.adapter], np.int32),
        "states": np.array(sorted(runner.state)),
        "state_magnitudes": np.array(
            [np.abs(runner.state[n]).sum(dtype=np.float64) for n in sorted(runner.state)]
        ),
    }
    if adapter:
        arrays["adapter_name"] = np.array([adapter])
    for i, call in enumerate(calls):
        assert adapter or ADAPTER not in call.inputs or not call.inputs[ADAPTER].any(), (
            "vectors of no adapter"
        )
        arrays[f"ids_{i}"] = call.inputs[IDS]
        arrays[f"mask_{i}"] = call.inputs[MASK]
        arrays[f"logits_{i}"] = call.logits[-1].astype(np.float16)
    return arrays


def record(places: Places, parity: pb.ExportParity, runner: PackageRunner, name: str) -> None:
    """Writes golden vectors and the check for a Mac beside a package, and what was measured into manifest and report.

    Args:
        places: of the package.
        parity: what was measured.
        runner: that read a text in the exact mode, whose calls are recorded.
        name: of the model, as people know it.
    """
    report = places.folder / REPORT
    with rewriting(places, [golden_path(places), places.folder / SCRIPT, report]) as exported:
        if parity.perplexity_after:
            exported.parity.perplexity_before = 0  # of other text
        exported.parity.MergeFrom(parity)  # what was not measured again stays
        write_golden(places, runner)
        replace_file(report, report_page(name, exported).encode())


def record_adapter(places: Places, runner: PackageRunner, adapter: str) -> None:
    """Writes golden vectors of a package with an adapter, and the check for a Mac, beside it.

    Manifest and report say what was measured of the bare model, and go on saying that.

    Args:
        places: of the package.
        runner: that read a text in the exact mode with the adapter, whose calls are recorded.
        adapter: its name; it lies beside the package.
    """
    with rewriting(places, [golden_path(places, adapter), places.folder / SCRIPT]):
        write_golden(places, runner, adapter)


def write_golden(places: Places, runner: PackageRunner, adapter: str = "") -> None:
    """Writes golden vectors and the check for a Mac beside a package; its manifest is someone else's to write.

    Args:
        places: of the package.
        runner: that read a text in the exact mode, whose calls are recorded.
        adapter: the name of that with which it did; it lies beside the package.
    """
    vectors = io.BytesIO()
    np.savez_compressed(vectors, allow_pickle=False, **golden_arrays(runner.calls, runner, adapter))
    replace_file(golden_path(places, adapter), vectors.getvalue())
    replace_file(places.folder / SCRIPT, Path(verify_on_mac.__file__).read_bytes())
