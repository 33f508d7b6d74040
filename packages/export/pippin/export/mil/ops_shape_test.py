"""Operations that move values, as coremltools writes them, against NumPy: bit for bit."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pippin.export.mil.errors import PackageError
from pippin.export.mil.registry import RULES, Tensor
from pippin.export.mil.testing import Case, check_cases

X = np.arange(24, dtype=np.float16).reshape(2, 3, 4)
Y = X + np.float16(100)


def test_shapes(tmp_path):
    cases = [
        Case("reshape", {"x": X}, X.reshape(4, 6), {"shape": [4, 6]}),
        Case("reshape", {"x": X}, X.reshape(2, 12), {"shape": [2, -1]}),
        Case("transpose", {"x": X}, X.transpose(2, 0, 1), {"perm": [2, 0, 1]}),
        Case("expand_dims", {"x": X}, X[None, :, None], {"axes": [0, 2]}),
        Case("squeeze", {"x": X[:, :1]}, X[:, 0], {"axes": [1]}),
        Case("shape", {"x": X}, np.array([2, 3, 4])),
        Case("identity", {"x": X}, X),
        Case("tile", {"x": X}, np.tile(X, (2, 1, 3)), {"reps": [2, 1, 3]}),
        Case("reverse", {"x": X}, X[:, ::-1, ::-1], {"axes": [1, 2]}),
    ]
    check_cases(tmp_path, cases)


def test_parts_and_wholes(tmp_path):
    both = {"values": ("a", "b")}
    interleaved = np.stack([X, Y], axis=2).reshape(2, 6, 4)
    cases = [
        Case("concat", {"a": X, "b": Y}, np.concatenate([X, Y], 1), {**both, "axis": 1}),
        Case("concat", {"a": X, "b": Y}, interleaved, {**both, "axis": 1, "interleave": True}),
        Case("stack", {"a": X, "b": Y}, np.stack([X, Y], 1), {**both, "axis": 1}),
        Case("split", {"x": X}, [X[..., :2], X[..., 2:]], {"axis": 2, "num_splits": 2}),
        Case("split", {"x": X}, [X[..., :1], X[..., 1:]], {"axis": -1, "split_sizes": [1, 3]}),
    ]
    check_cases(tmp_path, cases)


def test_slices(tmp_path):
    masks = {"begin_mask": [True, False, False], "end_mask": [False, False, True]}
    update = np.full((1, 2, 4), 7, np.float16)
    written = X.copy()
    written[1:2, 0:2] = 7
    where = {"begin": [1, 0, 0], "end": [2, 2, 4]}
    cases = [
        Case("slice_by_index", {"x": X}, X[0:1, 1:3, 2:], {"begin": [9, 1, 2], "end": [1, 3, 0], **masks}),
        Case(
            "slice_by_index",
            {"x": X},
            X[:, -2:, ::2],
            {"begin": [0, -2, 0], "end": [2, 3, 4], "stride": [1, 1, 2]},
        ),
        Case(
            "slice_by_index",
            {"x": X},
            X[1, :, 2],
            {"begin": [1, 0, 2], "end": [0, 3, 0], "squeeze_mask": [True, False, True]},
        ),
        Case("slice_by_size", {"x": X}, X[1:2, :, 1:3], {"begin": [1, 0, 1], "size": [1, -1, 2]}),
        Case("slice_update", {"x": X, "update": update}, written, where),
    ]
    check_cases(tmp_path, cases)


def test_paddings(tmp_path):
    cases = [
        Case(
            "pad",
            {"x": X},
            np.pad(X, ((0, 0), (1, 2), (0, 1)), constant_values=5),
            {"pad": [1, 2, 0, 1], "constant_val": np.float16(5)},
        ),
        Case(
            "pad",
            {"x": X},
            np.pad(X, ((0, 0), (0, 0), (2, 1)), mode="reflect"),
            {"pad": [2, 1], "mode": "reflect"},
        ),
        Case(
            "pad",
            {"x": X},
            np.pad(X, ((0, 0), (0, 0), (2, 1)), mode="edge"),
            {"pad": [2, 1], "mode": "replicate"},
        ),
    ]
    check_cases(tmp_path, cases)


def test_tensors_that_are_made_up(tmp_path):
    square = np.arange(16, dtype=np.float16).reshape(1, 4, 4)
    cases = [
        Case("fill", {"shape": np.array([2, 3], np.int32)}, np.full((2, 3), 1.5), {"value": np.float16(1.5)}),
        Case("range_1d", {"end": np.array(9, np.int32)}, np.arange(1, 9, 2), {"start": 1, "step": 2}),
        Case("band_part", {"x": square}, np.tril(square), {"lower": -1, "upper": 0}),
        Case("band_part", {"x": square}, np.triu(np.tril(square, 1), -2), {"lower": 2, "upper": 1}),
    ]
    # Of inputs that only a run knows, their shapes are not: the table is asked itself.
    for case in cases[:2]:
        given = {k: Tensor(np.asarray(v), "int32") for k, v in case.inputs.items()}
        known = {
            k: Tensor(np.asarray(v), "float16" if k == "value" else "int32")
            for k, v in case.parameters.items()
        }
        rule = RULES[case.operation]
        work = {"work": np.dtype(np.float32)} if rule.takes_work else {}
        np.testing.assert_array_equal(rule.function(**given, **known, **work).values, case.results[0])
    check_cases(tmp_path, cases[2:])


def ints(values: list[int]) -> Tensor:
    return Tensor(np.array(values, np.int32), "int32")


@given(st.data())
def test_a_slice_that_is_written_is_read_back(data):
    shape = data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=4))
    begin = [data.draw(st.integers(0, n - 1)) for n in shape]
    end = [data.draw(st.integers(b + 1, n)) for b, n in zip(begin, shape, strict=True)]
    x = Tensor(np.random.default_rng(0).normal(size=shape), "float16")
    update = Tensor(np.ones([e - b for b, e in zip(begin, end, strict=True)]), "float16")
    where = {"begin": ints(begin), "end": ints(end)}
    written = RULES["slice_update"].function(x, update, **where)
    assert (RULES["slice_by_index"].function(written, **where).values == 1).all()
    outside = np.ones(shape, bool)
    outside[tuple(slice(b, e) for b, e in zip(begin, end, strict=True))] = False
    np.testing.assert_array_equal(written.values[outside], x.values[outside])


def test_an_update_of_another_shape_is_refused():
    x, update = Tensor(X, "float16"), Tensor(X[:1, :1], "float16")
    with pytest.raises(PackageError, match=r"it writes \(1, 1, 4\) over a slice of \(1, 2, 4\)"):
        RULES["slice_update"].function(x, update, begin=ints([0, 0, 0]), end=ints([1, 2, 4]))


def test_sizes_that_do_not_add_up_are_refused():
    with pytest.raises(PackageError, match="split_sizes add up to 3, not to 4"):
        RULES["split"].function(Tensor(X, "float16"), axis=ints([2]), split_sizes=ints([1, 2]))


def test_a_slice_beyond_the_end_is_refused():
    with pytest.raises(PackageError, match="it takes 3:6 of 4 values"):
        RULES["slice_by_size"].function(Tensor(X[0, 0], "float16"), begin=ints([3]), size=ints([3]))
