import math

import pytest

from pippin.serve.engine.suspects import Suspects


@pytest.mark.parametrize(("num", "bad"), [(32, {17}), (32, {0, 31}), (31, {5, 6, 30}), (2, {1}), (5, set())])
def test_those_that_break_steps_are_found_in_few_steps(num, bad):
    names = [str(i) for i in range(num)]
    broken, suspects, found, failures = {str(i) for i in bad}, Suspects(), set(), 1
    suspects.split(names)
    while (group := suspects.group) is not None:
        if not broken & set(group):
            for name in list(group):
                suspects.remove(name)
            continue
        failures += 1
        if len(group) == 1:
            found.add(group[0])
            suspects.remove(group[0])
        else:
            suspects.split(list(group))
    assert found == broken
    assert failures <= 1 + len(bad) * math.ceil(math.log2(num))


def test_those_without_a_part_in_the_step_that_failed_stay_suspected():
    suspects = Suspects()
    suspects.split(["a", "b", "c", "d"])  # [a b] [c d]
    suspects.split(["a"])
    assert suspects.group == ["a"]
    suspects.remove("a")
    assert suspects.group == ["b"]
    suspects.remove("b")
    assert suspects.group == ["c", "d"]
    suspects.clear()
    assert suspects.group is None
