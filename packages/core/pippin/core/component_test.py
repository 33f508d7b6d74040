"""Config trees as `Component` messages and text, and back."""

import enum
from typing import Annotated, Any

import pytest
from google.protobuf import text_format
from hypothesis import given, settings

from pippin.core.component import from_proto, from_text, to_proto, to_text
from pippin.core.config import REQUIRED, Config, Required, Slot
from pippin.core.config_strategies import configs
from pippin.core.errors import ConfigError
from pippin.v1 import component_pb2 as pb


class Colour(enum.StrEnum):
    RED = "red"
    GREEN = "green"


class ProtoNormConfig(Config, implementation="pippin.core.nowhere:Norm", provides="norm", version=3):
    dim: Required[int] = REQUIRED
    eps: float = 1e-6


class EverythingConfig(Config):
    needed: Required[int] = REQUIRED
    flag: bool = False
    count: int = 1
    ratio: float = 0.1
    name: str = ""
    colour: Colour = Colour.RED
    maybe: float | None = None
    mixed: int | float | str | Colour | None = None
    sizes: tuple[int, ...] = ()
    nested: tuple[tuple[str, ...], ...] = ()
    norm: Annotated[Config, Slot("norm")] | None = ProtoNormConfig()
    norms: tuple[Annotated[Config, Slot("norm")], ...] = ()


class ProtoRootConfig(Config):
    child: EverythingConfig = EverythingConfig()
    children: tuple[EverythingConfig, ...] = ()


# The checks of annotations look at a random item of a tuple.
@pytest.mark.filterwarnings("ignore:Do not use the `random` module inside strategies")
@settings(max_examples=60, deadline=None)
@given(configs(ProtoRootConfig))
def test_any_tree_comes_back_equal_from_a_message_bytes_and_text(cfg: Config):
    message = to_proto(cfg)
    for back in (
        from_proto(message),
        from_proto(pb.Component.FromString(message.SerializeToString())),
        from_text(to_text(cfg)),
    ):
        assert back == cfg
        assert to_proto(back) == message
        assert repr(back) == repr(cfg)  # 1 equals 1.0, but is not stored so


def test_the_text_is_readable_and_names_every_field():
    text = to_text(ProtoNormConfig(dim=2))
    assert text == (
        'type: "pippin.core.ProtoNorm"\nversion: 3\n'
        'fields {\n  name: "dim"\n  value {\n    int_value: 2\n  }\n}\n'
        'fields {\n  name: "eps"\n  value {\n    float_value: 1e-06\n  }\n}\n'
    ).replace("pippin.core.ProtoNorm", ProtoNormConfig.TYPE)


def test_a_field_that_the_message_lacks_takes_its_default():
    assert from_proto(pb.Component(type=ProtoNormConfig.TYPE)) == ProtoNormConfig()


def _component(text: str) -> str:
    return text.replace("NORM", f'type: "{ProtoNormConfig.TYPE}" version: 3')


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("type: 3", r"the text is not a pippin\.v1\.Component: 1:7 .*\. Write it with to_text\."),
        ("kind: 'x'", r"is not a pippin\.v1\.Component: 1:1 .*no field named \"kind\""),
        ("", r"there is no component type ''\. Choose a registered type"),
        ('type: "pippin.core.ProtoNrm"', r"no component type 'pippin\.core\.ProtoNrm'"),
        (
            "NORM".replace("version: 3", "") + " fields { }",
            r"has no field ''\. Rename or remove the field, or use the pippin that wrote it",
        ),
        (
            "NORM fields { name: 'dims' }",
            r"ProtoNorm has no field 'dims' \(did you mean 'dim'\?\)\. Rename or remove",
        ),
        ("NORM fields { name: 'dim' }", r"ProtoNorm\.dim has no value\. Write one, such as none \{\}\."),
        (
            "NORM fields { name: 'dim' value { int_value: 1 } } fields { name: 'dim' value { int_value: 2 } }",
            r"ProtoNorm has the field 'dim' twice\. Remove one of the two\.",
        ),
        ("NORM fields { name: 'dim' value { string_value: '1' } }", r"\.dim got '1', which is not an int"),
        ("NORM fields { name: 'dim' value { float_value: 1 } }", r"\.dim got 1\.0, which is not an int"),
        ("NORM fields { name: 'dim' value { list { } } }", r"\.dim got \(\), which is not an int"),
        (
            "NORM fields { name: 'dim' value { enum_value: 'x' } }",
            r"\.dim got the enum_value 'x'\. It is no enumeration",
        ),
        ("NORM fields { name: 'eps' value { float_value: nan } }", r"\.eps got nan, which is no number"),
        ("NORM fields { name: 'eps' value { required { } } }", r"\.eps got REQUIRED, which is not a float"),
    ],
)
def test_a_text_that_means_nothing_is_refused(text: str, message: str):
    with pytest.raises(ConfigError, match=message):
        from_text(_component(text))


def test_a_member_that_an_enumeration_has_not_names_the_nearest():
    message = pb.Component(type=EverythingConfig.TYPE)
    message.fields.add(name="colour").value.enum_value = "gren"
    with pytest.raises(
        ConfigError,
        match=r"colour got the enum_value 'gren' \(did you mean 'green'\?\)\. Its values are 'red', 'green'",
    ):
        from_proto(message)


def test_a_newer_version_is_refused_and_an_older_one_is_read():
    newer = pb.Component(type=ProtoNormConfig.TYPE, version=4)
    with pytest.raises(
        ConfigError, match=r"written with version 4 .* knows up to version 3\. Upgrade the package"
    ):
        from_proto(newer)
    older = pb.Component(type=ProtoNormConfig.TYPE, version=2)
    assert from_proto(older) == ProtoNormConfig()
    older.fields.add(name="bias").value.bool_value = True
    with pytest.raises(ConfigError, match=r"no field 'bias'\. Version 2 may have had it: remove the field"):
        from_proto(older)


def test_a_text_that_is_nested_too_deeply_is_refused():
    text = "fields { value { component { " * 5000
    with pytest.raises(ConfigError, match=r"is not a pippin\.v1\.Component: it is nested too deeply"):
        from_text(text)


@pytest.mark.parametrize("kind", [f.name for f in pb.Value.DESCRIPTOR.fields])
def test_every_kind_of_value_is_written_or_refused_but_never_lost(kind: str):
    field = pb.Value.DESCRIPTOR.fields_by_name[kind]
    value: Any = {
        "string_value": "x",
        "enum_value": "red",
        "bool_value": True,
        "int_value": 3,
        "float_value": 2.5,
    }
    component = pb.Component(type=EverythingConfig.TYPE)
    written = component.fields.add(name="mixed").value
    if field.message_type is None:
        setattr(written, kind, value[kind])
    else:
        getattr(written, kind).SetInParent()
    try:
        read = from_text(text_format.MessageToString(component))
    except ConfigError:
        assert kind in ("component", "list", "required", "bool_value")
    else:
        assert next(f.value for f in to_proto(read).fields if f.name == "mixed") == written
