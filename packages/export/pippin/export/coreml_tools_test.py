"""Core ML's library is imported without what it would import beside it."""

import subprocess
import sys


def test_tensorflow_is_left_alone_and_nothing_is_said():
    program = (
        "import sys; from pippin.export import coreml_tools as c; "
        "assert c.ct.__version__ and 'tensorflow' not in sys.modules and 'torch' not in sys.modules, sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_what_was_imported_before_stays():
    program = (
        "import sys, types; there = sys.modules['torch'] = types.ModuleType('torch'); "
        "from pippin.export import coreml_tools; assert sys.modules['torch'] is there"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
