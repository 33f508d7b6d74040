"""Whole packages: a tiny Llama against NumPy in float64, states, types that are checked, errors."""

import numpy as np
import pytest

from pippin.export.coreml_tools import Builder as mb
from pippin.export.mil import testing_llama as llama
from pippin.export.mil.errors import PackageError
from pippin.export.mil.interpreter import Interpreter, Mode, State
from pippin.export.mil.messages import model_messages
from pippin.export.mil.program import Program
from pippin.export.mil.spec import load_program
from pippin.export.mil.testing import save_package, state, tensor

IDS = [3, 17, 42, 5, 9, 60, 11, 2, 33, 8, 21, 50]
WEIGHTS = llama.tiny_weights()


@pytest.fixture(scope="module")
def program(tmp_path_factory) -> Program:
    return load_program(llama.save_tiny_llama(tmp_path_factory.mktemp("p") / "tiny.mlpackage", WEIGHTS))


def call(interpreter: Interpreter, ids: list[int], position: int, state: State) -> np.ndarray:
    """The logits after some tokens; a call of eight is filled up with zeros."""
    length = 1 if len(ids) == 1 else llama.PREFILL
    padded = np.array([ids + [0] * (length - len(ids))], np.int32)
    inputs = {
        "inputIds": padded,
        "position": np.array([position], np.int32),
        "causalMask": llama.mask(position, length),
    }
    return interpreter.run("decode" if length == 1 else "prefill", inputs, state)["logits"][0, : len(ids)]


def test_prefill_and_decode_are_the_model(program):
    reference = llama.Reference(WEIGHTS)
    want = np.concatenate([reference.extend(ids) for ids in (IDS[:8], *([token] for token in IDS[8:]))])
    for mode, bound in ((Mode.EXACT, 1e-9), (Mode.FLOAT16, 2e-2)):
        interpreter = Interpreter(program, mode)
        state = interpreter.make_state()
        got = [call(interpreter, IDS[:8], 0, state)]
        got += [call(interpreter, [token], 8 + i, state) for i, token in enumerate(IDS[8:])]
        assert np.abs(np.concatenate(got) - want).max() < bound
        assert np.array_equal(np.concatenate(got).argmax(-1), want.argmax(-1))


def test_chunks_that_are_filled_up_leave_the_same_state_behind(program):
    """Padding is written past the end of the prompt, and overwritten before anything may see it."""
    interpreter = Interpreter(program, Mode.EXACT)
    whole, steps = interpreter.make_state(), interpreter.make_state()
    call(interpreter, IDS[:8], 0, whole)
    last = call(interpreter, IDS[8:], 8, whole)[-1]
    for i, token in enumerate(IDS):
        logits = call(interpreter, [token], i, steps)[-1]
    # What a call keeps for the next is rounded, so that keys differ by a unit in the last place here and there.
    np.testing.assert_allclose(last, logits, atol=2e-3)
    for name in whole:
        there = np.s_[..., : len(IDS), :]
        np.testing.assert_allclose(whole[name][there], steps[name][there], rtol=2e-3, atol=1e-3)
        assert whole[name].dtype == np.float16


def test_a_small_cache_of_weights_gives_the_same_bits(program):
    large, small = Interpreter(program), Interpreter(program, max_cached_bytes=1 << 13)
    one, two = (call(i, IDS[:8], 0, i.make_state()) for i in (large, small))
    np.testing.assert_array_equal(one, two)
    assert small._cache.num_bytes <= 1 << 13 < large._cache.num_bytes


def test_functions_share_weights_that_are_stored_once(tmp_path):
    def body(x):
        weight = mb.const(val=np.arange(64, dtype=np.float16))
        weight.op.weight_id = "the one"
        return mb.add(x=x, y=weight, name="y")

    specs = {"x": tensor("float16", 64)}
    program = load_program(save_package(tmp_path / "p.mlpackage", {"a": (specs, body), "b": (specs, body)}))
    interpreter = Interpreter(program)
    for name in ("a", "b"):
        interpreter.run(name, {"x": np.zeros(64, np.float16)}, {})
        assert interpreter._cache.num_bytes == 64 * 4
    assert len(program.blobs) == 1


def test_inputs_are_those_declared(program):
    interpreter = Interpreter(program)
    right = {
        "inputIds": np.zeros((1, 1), np.int32),
        "position": np.zeros(1, np.int32),
        "causalMask": llama.mask(0, 1),
    }
    with pytest.raises(PackageError, match="takes causalMask, inputIds, position, and got inputIds"):
        interpreter.run("decode", {"inputIds": right["inputIds"]}, {})
    for name, wrong in (("inputIds", np.zeros((1, 2), np.int32)), ("position", np.zeros(1, np.int64))):
        with pytest.raises(PackageError, match=rf"the input '{name}' of 'decode' is int32\[1"):
            interpreter.run("decode", {**right, name: wrong}, {})
    with pytest.raises(PackageError, match="has no function 'encode'. Run one of: decode, prefill"):
        interpreter.run("encode", right, {})
    with pytest.raises(PackageError, match=r"the state 'keyCache' is float16\[2, 1, 2, 32, 8\]"):
        interpreter.run("decode", right, {})


def test_a_state_is_what_was_written_last(tmp_path):
    def body(x, s):
        mb.coreml_update_state(state=s, value=mb.add(x=mb.read_state(input=s), y=x))
        return mb.identity(x=mb.read_state(input=s), name="y")

    path = save_package(
        tmp_path / "p.mlpackage", {"main": ({"x": tensor("float16", 3), "s": state(3)}, body)}
    )
    third = np.full(3, 1 / 3, np.float16)
    for mode in Mode:
        interpreter = Interpreter(load_program(path), mode)
        held = interpreter.make_state()
        totals = [interpreter.run("main", {"x": third}, held)["y"] for _ in range(3)]
        want, one = [], np.float16(0)
        for _ in totals:  # rounded each time that it is stored, in both modes
            one = np.float16(one + third[0])
            want.append(one)
        assert [t[0] for t in totals] == want and held["s"].dtype == np.float16


def test_rounding_is_what_tells_the_modes_apart(tmp_path):
    def body(x):
        return mb.sub(x=mb.add(x=x, y=np.float16(1)), y=np.float16(1), name="y")

    path = save_package(tmp_path / "p.mlpackage", {"main": ({"x": tensor("float16", 1)}, body)})
    tiny = {"x": np.array([2.0**-12], np.float16)}
    results = {mode: Interpreter(load_program(path), mode).run("main", tiny, {})["y"][0] for mode in Mode}
    assert results == {Mode.FLOAT16: 0.0, Mode.EXACT: 2.0**-12}


def edited(path, change) -> Program:
    """The package at a path, its model changed."""
    file = path / "Data" / "com.apple.CoreML" / "model.mlmodel"
    model = model_messages().Model()
    model.ParseFromString(file.read_bytes())
    function = model.mlProgram.functions["main"]
    change(function.block_specializations[function.opset].operations)
    file.write_bytes(model.SerializeToString())
    return load_program(path)


@pytest.fixture
def added(tmp_path):
    def body(x):
        return mb.add(x=x, y=np.float16(1), name="y")

    return save_package(tmp_path / "p.mlpackage", {"main": ({"x": tensor("float16", 2, 3)}, body)})


X = {"x": np.zeros((2, 3), np.float16)}


def test_a_declared_shape_that_is_not_computed_is_refused(added):
    def change(operations):
        operations[-1].outputs[0].type.tensorType.dimensions[1].constant.size = 4

    program = edited(added, change)
    with pytest.raises(
        PackageError, match=r"add 'y' is declared float16\[2, 4\], and computes float16\[2, 3\]"
    ):
        Interpreter(program).run("main", X, {})


def test_a_declared_type_that_is_not_computed_is_refused(added):
    def change(operations):
        operations[-1].outputs[0].type.tensorType.dataType = 11

    program = edited(added, change)
    with pytest.raises(PackageError, match=r"is declared float32\[2, 3\], and computes float16\[2, 3\]"):
        Interpreter(program).run("main", X, {})


def test_an_unknown_operation_is_named_with_those_that_are_known(added):
    def change(operations):
        operations[-1].type = "fold_time"

    program = edited(added, change)
    with pytest.raises(PackageError, match="'fold_time' is not interpreted; these are: abs, acos, add,"):
        Interpreter(program)


def test_inputs_that_an_operation_does_not_take_are_named(added):
    def change(operations):
        operations[-1].type = "relu"

    program = edited(added, change)
    with pytest.raises(PackageError, match="relu 'y' has x, y; as iOS 18 defines it, it takes x"):
        Interpreter(program)


def test_a_value_before_it_is_there_is_named(added):
    def change(operations):
        operations[-1].inputs["x"].arguments[0].name = "later"

    with pytest.raises(PackageError, match="'main' uses 'later' in add 'y' before it is computed"):
        edited(added, change)


def test_what_cannot_be_computed_names_its_operation(tmp_path):
    def body(x, i):
        return mb.gather(x=x, indices=i, axis=0, name="y")

    specs = {"x": tensor("float16", 3), "i": tensor("int32", 1)}
    program = load_program(save_package(tmp_path / "p.mlpackage", {"main": (specs, body)}))
    inputs = {"x": np.zeros(3, np.float16), "i": np.array([3], np.int32)}
    with pytest.raises(
        PackageError, match="in the function 'main', gather 'y': it takes place 3 of 3 values"
    ):
        Interpreter(program).run("main", inputs, {})


def test_a_compressed_constant_of_what_only_a_run_knows_is_refused(added):
    def change(operations):
        operations[-1].type = "constexpr_cast"
        operations[-1].inputs["source_val"].CopyFrom(operations[-1].inputs["x"])
        operations[-1].inputs["output_dtype"].CopyFrom(operations[-1].inputs["y"])
        del operations[-1].inputs["x"], operations[-1].inputs["y"]

    program = edited(added, change)
    with pytest.raises(PackageError, match="constexpr_cast 'y' takes 'x', which only a run knows"):
        Interpreter(program)
