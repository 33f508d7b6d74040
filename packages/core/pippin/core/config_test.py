"""Configs: what is checked when one is declared, made, set and built."""

import copy
import enum
import pickle
import subprocess
import sys
from typing import Annotated, Any, ClassVar

import numpy as np
import pytest

from pippin.core.config import REQUIRED, Config, Configurable, Required, Slot, providers
from pippin.core.errors import ConfigError


class Shape(enum.StrEnum):
    ROUND = "round"
    SQUARE = "square"


class Built:
    """What the toy configs below build: it builds its children, and keeps its config."""

    def __init__(self, cfg: Config, **kwargs: object):
        self.cfg, self.kwargs = cfg, kwargs


HERE = f"{__name__}:"


class ToyNormConfig(Config, implementation=f"{HERE}Built", provides="norm"):
    dim: Required[int] = REQUIRED
    eps: float = 1e-5


class OtherNormConfig(Config, implementation=f"{HERE}Built", provides="norm"):
    dim: Required[int] = REQUIRED


class ToyPositionConfig(Config, implementation=f"{HERE}Built", provides="position"):
    head_dim: Required[int] = REQUIRED
    num_heads: Required[int] = REQUIRED


class LeafConfig(Config, implementation=f"{HERE}Built"):
    needed: Required[int] = REQUIRED
    flag: bool = False
    count: int = 1
    ratio: float = 0.5
    name: str = "x"
    shape: Shape = Shape.ROUND
    maybe: int | None = None
    sizes: tuple[int, ...] = ()
    ratios: tuple[float, ...] = ()
    norm: Annotated[Config, Slot("norm")] | None = None
    either: int | str = 0


def test_fields_take_what_their_annotations_allow():
    norm = ToyNormConfig(dim=3)
    cfg = LeafConfig(
        needed=3, flag=True, ratio=2.5, name="é", shape=Shape.SQUARE, maybe=2, sizes=(1, 2), norm=norm
    )
    assert (cfg.needed, cfg.shape, cfg.sizes, cfg.norm) == (3, Shape.SQUARE, (1, 2), norm)
    assert cfg.set(maybe=None, norm=None, either="text").either == "text"


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("needed", 3.0, r"LeafConfig\.needed got 3\.0, which is not an int\. Give it an int\."),
        ("needed", True, r"got True, which is not an int\."),
        ("needed", None, r"got None, which is not an int\."),
        ("needed", np.int64(3), r"got np\.int64\(3\), which is not an int\."),
        (
            "needed",
            2**63,
            r"got 9223372036854775808, which needs more than 64 bits\. Give it a smaller int\.",
        ),
        ("flag", 1, r"got 1, which is not a bool\."),
        ("count", "1", r"got '1', which is not an int\."),
        ("ratio", "0.5", r"got '0\.5', which is not a float\."),
        ("ratio", True, r"got True, which is not a float\."),
        ("ratio", float("nan"), r"got nan, which is no number\. Give it a number\."),
        ("ratio", 10**309, r"which no float holds exactly\. Write it as a float\."),
        ("ratio", 2**53 + 1, r"got 9007199254740993, which no float holds exactly\."),
        ("name", 3, r"got 3, which is not a str\."),
        ("name", Shape.ROUND, r"got <Shape\.ROUND: 'round'>, which is not a str\."),
        ("name", "\udc80", r"which is not valid Unicode\. Give it text\."),
        ("shape", "square", r"got 'square', which is a str\. Give it Shape\.SQUARE\."),
        (
            "shape",
            "sqare",
            r"which is not one of 'round', 'square' \(did you mean 'square'\?\)\. Give it one of",
        ),
        ("maybe", "none", r"got 'none', which is not an int or None\. Give it an int or None\."),
        ("sizes", [1, 2], r"got \[1, 2\], which is a list and can change\. Write \(1, 2\)\."),
        ("sizes", 1, r"got 1, which is not a tuple\. Write \(1,\) for a tuple of one\."),
        ("sizes", (1, "2"), r"got at \[1\] '2', which is not an int\."),
        ("sizes", (1, True), r"got at \[1\] True, which is not an int\."),
        ("either", 1.5, r"got 1\.5, which is not an int or a str\."),
        (
            "norm",
            "ToyNorm",
            r"got 'ToyNorm', which is no config; the slot takes a component that provides 'norm'",
        ),
        ("norm", ToyNormConfig, r"got the class ToyNormConfig, which is no config.* give it an instance"),
        ("norm", REQUIRED, r"got REQUIRED, which is no config"),
        ("name", "y" * 1000 + "\udc80", r"y\.\.\., which is not valid Unicode"),
    ],
)
def test_a_value_of_another_type_is_refused(field: str, value: Any, message: str):
    with pytest.raises(ConfigError, match=message):
        LeafConfig(**{field: value})
    with pytest.raises(ConfigError, match=message):
        LeafConfig().set(**{field: value})


def test_a_slot_names_what_it_takes_what_it_got_and_what_would_fit():
    with pytest.raises(ConfigError) as error:
        LeafConfig(norm=ToyPositionConfig())
    assert "LeafConfig.norm got a ToyPositionConfig, which provides 'position'" in str(error.value)
    assert "the slot takes a component that provides 'norm'" in str(error.value)
    for provider in providers("norm"):
        assert provider in str(error.value)
    with pytest.raises(ConfigError, match="got a LeafConfig, which provides no interface"):
        LeafConfig(norm=LeafConfig())


def test_an_int_for_a_float_becomes_one():
    cfg = LeafConfig(ratio=2, ratios=(1, 2.5))
    assert (type(cfg.ratio), type(cfg.ratios[0])) == (float, float)
    assert type(LeafConfig(ratio=np.float64(0.25)).ratio) is float
    assert cfg.ratios == (1.0, 2.5)
    assert LeafConfig(ratio=float("inf")).ratio == float("inf")


def test_unknown_fields_name_the_nearest():
    with pytest.raises(
        ConfigError,
        match=r"LeafConfig has no field 'shap' \(did you mean 'shape'\?\)\. Its fields are needed,",
    ):
        LeafConfig(shap=Shape.ROUND)  # type: ignore[call-arg]
    with pytest.raises(ConfigError, match=r"no field 'ratoi' \(did you mean 'ratio'\?\)"):
        LeafConfig().set(ratoi=1.0)
    with pytest.raises(ConfigError, match=r"no field 'zzz'\. Its fields are"):
        LeafConfig().set(zzz=1)
    with pytest.raises(ConfigError, match="got 1 values without a name. Write field=value"):
        LeafConfig(3)  # type: ignore[misc]
    with pytest.raises(ConfigError, match="Config itself describes nothing"):
        Config()


def test_configs_cannot_be_changed():
    cfg = LeafConfig(needed=1)
    with pytest.raises(AttributeError):
        cfg.needed = 2  # type: ignore[misc]
    changed = cfg.set(needed=2)
    assert (cfg.needed, changed.needed) == (1, 2)
    assert changed != cfg
    assert changed == LeafConfig(needed=2)
    assert hash(changed) == hash(LeafConfig(needed=2))


def test_copies_are_equal_and_remember_what_was_chosen():
    cfg = LeafConfig(needed=1, norm=ToyNormConfig(eps=1.0))
    for twin in (copy.copy(cfg), copy.deepcopy(cfg), pickle.loads(pickle.dumps(cfg))):
        assert twin == cfg
        assert twin.chosen == {"needed", "norm"}


def test_chosen_fields_are_those_given_or_set():
    assert LeafConfig().chosen == frozenset()
    assert LeafConfig(needed=1).set(name="y").chosen == {"needed", "name"}


def test_the_repr_shows_what_differs_from_the_defaults():
    assert (
        repr(LeafConfig(needed=1, norm=ToyNormConfig(dim=2)))
        == "LeafConfig(needed=1, norm=ToyNormConfig(dim=2))"
    )


class PairConfig(Config):
    low: Required[int] = REQUIRED
    high: int = 10

    def validate(self) -> None:
        if self.low is not REQUIRED and self.low > self.high:
            raise ConfigError(f"Pair: low ({self.low}) must not be above high ({self.high}). Lower it.")


def test_fields_that_do_not_fit_each_other_are_refused_when_made_and_when_set():
    assert PairConfig().low is REQUIRED
    with pytest.raises(ConfigError, match=r"low \(11\) must not be above high \(10\)"):
        PairConfig(low=11)
    with pytest.raises(ConfigError, match=r"low \(5\) must not be above high \(4\)"):
        PairConfig(low=5).set(high=4)


# Building, and the paths of what is not set.


class Parent:
    def __init__(self, cfg: Any):
        self.norm = cfg.norm.set(dim=4).build()
        self.leaf = cfg.leaf.build()
        self.more = [c.build() for c in cfg.more]


class ParentConfig(Config, implementation=f"{HERE}Parent"):
    norm: Annotated[Config, Slot("norm")] = ToyNormConfig()
    leaf: LeafConfig = LeafConfig()
    more: tuple[LeafConfig, ...] = ()


class RootConfig(Config, implementation=f"{HERE}Root"):
    parent: ParentConfig = ParentConfig()


class Root:
    def __init__(self, cfg: RootConfig):
        self.parent = cfg.parent.build()


class WrappingConfig(Config, implementation=f"{HERE}Wrapping"):
    leaf: LeafConfig = LeafConfig()


class Wrapping:
    """Builds a config of its own making, around a child's."""

    def __init__(self, cfg: WrappingConfig):
        RootConfig(parent=ParentConfig(leaf=cfg.leaf.set(name="mine"))).build()


class LoneConfig(Config, implementation=f"{HERE}Lone"):
    pass


class Lone:
    def __init__(self, cfg: LoneConfig):
        LeafConfig().build()


def test_build_makes_the_implementation_and_passes_arguments_on():
    built = LeafConfig(needed=1).build(rngs="key")
    assert isinstance(built, Built)
    assert built.kwargs == {"rngs": "key"}
    root = RootConfig(parent=ParentConfig(leaf=LeafConfig(needed=1))).build()
    assert root.parent.norm.cfg.dim == 4


def test_a_required_field_names_its_full_path():
    with pytest.raises(ConfigError, match=r"^needed of LeafConfig is required and was not set"):
        LeafConfig().build()
    with pytest.raises(ConfigError) as error:
        RootConfig().build()
    assert str(error.value).startswith(
        "parent.leaf.needed of RootConfig is required and was not set: LeafConfig "
    )
    assert "override(cfg, {'parent.leaf.needed': ...})" in str(error.value)


def test_a_required_field_in_a_tuple_names_its_index():
    leaf = LeafConfig(needed=1)
    root = RootConfig(parent=ParentConfig(leaf=leaf, more=(leaf, LeafConfig())))
    with pytest.raises(ConfigError, match=r"^parent\.more\.1\.needed of RootConfig is required"):
        root.build()


def test_a_required_field_below_a_config_that_its_parent_made_names_where_the_child_stands():
    with pytest.raises(ConfigError, match=r"^leaf\.needed of WrappingConfig is required"):
        WrappingConfig().build()


def test_a_required_field_of_a_config_that_is_not_in_the_tree_names_who_made_it():
    with pytest.raises(ConfigError, match=r"^\(LeafConfig\)\.needed of LoneConfig is required"):
        LoneConfig().build()


class MissingModuleConfig(Config, implementation="pippin.core.no_such_module:Thing"):
    pass


class MissingClassConfig(Config, implementation="pippin.core.errors:NoSuchError"):
    pass


def test_an_implementation_that_is_not_there_is_named():
    with pytest.raises(
        ConfigError, match=r"implemented by 'pippin\.core\.no_such_module:Thing', but there is no module"
    ):
        MissingModuleConfig().build()
    with pytest.raises(ConfigError, match=r"but pippin\.core\.errors has no NoSuchError"):
        MissingClassConfig().build()
    with pytest.raises(ConfigError, match="describes no component by itself"):
        PairConfig(low=1).build()


# Classes with a config of their own.


class Own(Configurable):
    class Config(Config, provides="norm"):
        dim: Required[int] = REQUIRED
        power: int = 2

    def __init__(self, cfg: Config):
        self.cfg = cfg


def test_a_class_with_a_nested_config_is_what_it_builds():
    assert isinstance(Own.Config(dim=2).build(), Own)
    assert Own.Config.TYPE.endswith(".Own")
    assert LeafConfig(norm=Own.Config()).norm == Own.Config()


def test_a_nested_config_builds_the_class_that_it_lies_in():
    with pytest.raises(
        ConfigError, match=r"Other has LeafConfig as its Config, which builds .*Built instead"
    ):

        class Other(Configurable):
            Config = LeafConfig


# Declarations.


def test_two_classes_of_one_type_name_are_refused():
    class TwinConfig(Config):
        pass

    first = TwinConfig
    with pytest.raises(
        ConfigError, match=r"would be registered as .*Twin, which is the type name of .*rename one"
    ):
        # Of one name less "Config".
        type(
            "Twin",
            (Config,),
            {"__module__": first.__module__, "__qualname__": first.__qualname__[: -len("Config")]},
        )


def _declare(**body: Any) -> type[Config]:
    annotations = {name: hint for name, (hint, _) in body.items() if hint is not None}
    values = {name: value for name, (_, value) in body.items() if value is not ...}
    namespace = {"__annotations__": annotations, "__module__": __name__, **values}
    return type("DeclaredConfig", (Config,), namespace)


@pytest.mark.parametrize(
    ("name", "hint", "default", "message"),
    [
        (
            "dim",
            int,
            ...,
            r"\.dim has no default\. Give it one, or write `dim: Required\[\.\.\.\] = REQUIRED`",
        ),
        ("dims", tuple[int, ...], [1], r"\.dims has the default \[1\], which can change"),
        ("dim", None, 3, r"sets dim without an annotation, so it is no field\. Write `dim: type = 3`"),
        ("build", int, 3, r"has a field 'build', a name that configs use themselves\. Rename it"),
        ("_hidden", int, 3, r"has a field '_hidden', a name that configs use"),
    ],
)
def test_a_declaration_that_would_be_misunderstood_is_refused(
    name: str, hint: Any, default: Any, message: str
):
    with pytest.raises(ConfigError, match=message):
        _declare(**{name: (hint, default)})


@pytest.mark.parametrize(
    ("hint", "default", "message"),
    [
        (
            dict[str, int],
            None,
            r"DeclaredConfig\.x is annotated dict.* A field holds a bool, int, float, str",
        ),
        (tuple[int, str], (1, "a"), r"\.x is annotated tuple"),
        (complex, 1j, r"\.x is annotated complex"),
        (enum.Enum, None, r"\.x is annotated Enum"),
        (Any, 1, r"\.x is annotated Any"),
        (
            "decimal.Decimal",
            None,
            r"has an annotation with 'decimal', which .* does not define at its top level",
        ),
        (
            Annotated[Config, Slot("nrom")],
            ToyNormConfig(),
            r"x has a Slot for 'nrom': there is no interface 'nrom' \(did you mean 'norm'\?\)\. Use one of attention,",
        ),
    ],
)
def test_an_annotation_that_no_field_may_have_is_refused(hint: Any, default: Any, message: str):
    with pytest.raises(ConfigError, match=message):
        _declare(x=(hint, default))()


def test_class_variables_and_methods_are_no_fields():
    class FreeConfig(Config):
        LIMIT: ClassVar[int] = 3
        dim: int = 1

        @property
        def twice(self) -> int:
            return 2 * self.dim

    assert FreeConfig(dim=4).twice == 8
    with pytest.raises(ConfigError, match="has no field 'LIMIT'"):
        FreeConfig(LIMIT=4)  # type: ignore[call-arg]


def test_an_implementation_is_a_module_and_a_class():
    with pytest.raises(
        ConfigError, match=r"has implementation='pippin\.core'\. Write it as 'package\.module:Class'"
    ):

        class BadConfig(Config, implementation="pippin.core"):
            pass


@pytest.mark.parametrize(
    ("fields", "provides", "message"),
    [
        ({}, "norm", r"provides 'norm', and who holds such a component sets its dim: it has no such field"),
        (
            {"dims": (int, 1)},
            "norm",
            r"no such field \(did you mean 'dims'\?\)\. Add `dim: Required\[int\] = REQUIRED`",
        ),
        (
            {"dim": (str, "")},
            "norm",
            r"sets its dim to an int: the field takes a str\. Write `dim: Required\[int\]",
        ),
        ({"dim": (int, 1)}, "nomr", r"DeclaredConfig provides 'nomr': there is no interface 'nomr'"),
        (
            {"num_kv_heads": (int, 1), "head_dim": (int, 1), "window": (int, 1)},
            "kv_cache",
            r"sets its window to an int or None: the field takes an int\. Write `window: int \| None = None`",
        ),
    ],
)
def test_a_config_has_the_fields_that_holders_of_its_interface_set(
    fields: dict[str, Any], provides: str, message: str
):
    cls = _declare(**fields)
    cls.PROVIDES = provides
    with pytest.raises(ConfigError, match=message):
        cls()


@pytest.mark.parametrize("dim", [0, -3])
def test_the_size_of_a_dim_is_at_least_one(dim: int):
    with pytest.raises(
        ConfigError, match=rf"ToyNormConfig\.dim is {dim}\. Set it to 1 or more: it is the size of a dim"
    ):
        ToyNormConfig(dim=dim)
    with pytest.raises(ConfigError, match="it is the size of a dim"):
        ToyNormConfig().set(dim=dim)


def test_importing_configs_needs_no_jax_and_takes_milliseconds():
    program = """
import sys, time
started = time.process_time()
from pippin.core import checkpoint_config, component, config, config_tree, mesh_config
checkpoint_config.CheckpointerConfig(), mesh_config.MeshConfig()
seconds = time.process_time() - started
heavy = {"jax", "flax", "numpy", "tensorflow", "orbax"} & set(sys.modules)
print(round(1000 * seconds), sorted(heavy))
"""
    times = []
    for _ in range(3):
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
        milliseconds, heavy = done.stdout.split(maxsplit=1)
        assert heavy.strip() == "[]"
        times.append(int(milliseconds))
    print(f"the configs of pippin.core are imported in {min(times)} ms of CPU time")
    assert min(times) < 1000
