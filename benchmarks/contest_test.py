import dataclasses
import json
import sys

import pytest

from benchmarks.contest import Contender, Result, spread
from benchmarks.shapes import depth_shape


def test_our_contender_trains_as_it_is_told() -> None:
    shape = json.dumps(dataclasses.asdict(depth_shape(2)))
    with Contender("pippin", [sys.executable, "-P", "-m", "benchmarks.pippin_contender", shape]) as contender:
        contender.train(3, record=True)
    result = contender.result
    assert result.facts["params"] > 0 and result.facts["compile_s"] > 0
    assert len(result.seconds) == 1 and result.seconds[0] > 0 and result.peak_bytes > 0


def test_a_contender_that_ends_is_told_with_its_last_words() -> None:
    with pytest.raises(RuntimeError, match=r"broken ended with 3:\n.*no such luck"):
        Contender(
            "broken",
            [sys.executable, "-c", "import sys; print('no such luck', file=sys.stderr); sys.exit(3)"],
        )


def test_ratios_are_of_rounds() -> None:
    ours, theirs = Result("a", {}, [1.0, 2.0, 1.0]), Result("b", {}, [2.0, 2.0, 3.0])
    assert ours.ratios_to(theirs) == [2.0, 1.0, 3.0]
    assert spread(ours.ratios_to(theirs)) == "2.00 (1.00 to 3.00)"
