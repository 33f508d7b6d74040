"""The interfaces and structures are whole and agree with each other."""

from collections.abc import Iterator

import pytest

from pippin.core.errors import ConfigError
from pippin.core.interface import interface, interfaces, structure, structures
from pippin.v1 import interface_pb2 as pb

_WITH_DIMS = {pb.DTYPE_FLOAT, pb.DTYPE_FLOAT32, pb.DTYPE_INT32, pb.DTYPE_BOOL, pb.DTYPE_SIZE, pb.DTYPE_SHAPE}


def _tensors(message: pb.Interface) -> Iterator[pb.Tensor]:
    for method in message.methods:
        yield from (*method.inputs, *method.outputs)


def test_the_interfaces_of_a_language_model_are_there():
    assert {"norm", "linear", "attention", "feed_forward", "layer", "causal_lm", "learner", "input"} <= set(
        interfaces()
    )


@pytest.mark.parametrize("name", interfaces())
def test_an_interface_is_named_as_its_file_and_says_what_it_is(name: str):
    message = interface(name)
    assert message.name == name
    assert message.doc.endswith(".")
    assert message.methods
    fields = [s.field for s in message.settings]
    assert len(set(fields)) == len(fields)
    for setting in message.settings:
        assert not (setting.symbol and (setting.type != pb.Setting.INT or setting.optional)), setting.field


@pytest.mark.parametrize("name", [*interfaces(), *structures()])
def test_tensors_say_what_they_are(name: str):
    tensors = list(_tensors(interface(name)) if name in interfaces() else structure(name).fields)
    for tensor in tensors:
        assert tensor.name
        assert tensor.dtype != pb.DTYPE_UNSPECIFIED, tensor.name
        assert not tensor.dims or tensor.dtype in _WITH_DIMS, tensor.name
        assert bool(tensor.structure) == (tensor.dtype == pb.DTYPE_STRUCTURE), tensor.name
        if tensor.structure:
            assert structure(tensor.structure).name == tensor.structure
        assert "..." not in tensor.dims[1:], "the dots stand in front"


def test_unknown_names_name_the_nearest():
    with pytest.raises(
        ConfigError, match=r"no interface 'atention' \(did you mean 'attention'\?\)\. Use one of attention, "
    ):
        interface("atention")
    with pytest.raises(
        ConfigError, match=r"no structure 'Contxt' \(did you mean 'Context'\?\)\. Use one of Batch, "
    ):
        structure("Contxt")
