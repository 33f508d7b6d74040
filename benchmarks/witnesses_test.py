"""The table of who agrees with whom."""

import numpy as np

from benchmarks.witnesses import table


def test_differences_are_of_each_pair_and_tokens_of_those_that_were_written():
    one = np.eye(4, dtype=np.float32)
    other = one.copy()
    other[0, 3] = 2.0  # of the prompt, whose tokens do not count
    other[2, 0] = 3.0
    text = table({"a": one, "b": other, "c": one}, prompt_tokens=2)
    lines = text.splitlines()
    assert [line.split("  ")[0] for line in lines[1:4]] == ["a and b", "a and c", "b and c"]
    assert "3.0e+00" in lines[1] and lines[1].endswith("2 of 4, 2 of 3")
    assert "0.0e+00" in lines[2] and lines[2].endswith("4 of 4, 3 of 3")
    assert lines[4] == "logits up to 3.0"
