"""The examples of the README print what it says."""

import subprocess
import sys
from pathlib import Path

README = Path(__file__).parents[2] / "README.md"


def test_the_readme_prints_what_it_says(tmp_path: Path):
    # A fence behind an example would be read as what the example prints.
    text = README.read_text().replace("```python", "").replace("```", "")
    assert text.count(">>> ") > 20
    (tmp_path / "README.md").write_text(text)
    # A process of its own: this one has other components, which the errors would name.
    command = [sys.executable, "-m", "doctest", str(tmp_path / "README.md")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
