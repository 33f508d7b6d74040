"""Whole config trees: overridden, replaced, transformed, compared, printed."""

import enum
from typing import Annotated, Any

import pytest

from pippin.core.config import REQUIRED, Config, Configurable, Required, Slot
from pippin.core.config_tree import (
    chain,
    config_text,
    diff,
    inherit,
    override,
    parse_value,
    replace,
    transform,
    traverse,
)
from pippin.core.errors import ConfigError


class Mood(enum.StrEnum):
    CALM = "calm"
    WILD = "Wild"


class TreeNormConfig(Config, implementation="pippin.core.nowhere:Norm", provides="norm"):
    dim: Required[int] = REQUIRED
    eps: float = 1e-5


class ScaledNormConfig(Config, implementation="pippin.core.nowhere:ScaledNorm", provides="norm"):
    dim: Required[int] = REQUIRED
    eps: float = 1e-3
    power: int = 2


class TreePositionConfig(Config, implementation="pippin.core.nowhere:Position", provides="position"):
    head_dim: Required[int] = REQUIRED
    num_heads: Required[int] = REQUIRED


class HeadsConfig(Config):
    num_heads: int = 8
    num_groups: int = 4

    def validate(self) -> None:
        if self.num_heads % self.num_groups:
            raise ConfigError(
                f"Heads: num_heads ({self.num_heads}) must be a multiple of num_groups ({self.num_groups})."
            )


class LayerConfig(Config):
    heads: HeadsConfig = HeadsConfig()
    norm: Annotated[Config, Slot("norm")] = TreeNormConfig()
    extra_norm: Annotated[Config, Slot("norm")] | None = None
    dropout: float = 0.0
    name: str = "layer"
    title: str | None = None
    mood: Mood = Mood.CALM
    debug: bool = False
    limit: int | float | None = None
    sizes: tuple[int, ...] = (1, 2)
    labels: tuple[str, ...] = ()
    grid: tuple[tuple[int, ...], ...] = ()
    norms: tuple[Annotated[Config, Slot("norm")], ...] = ()


class ModelConfig(Config):
    first: LayerConfig = LayerConfig()
    layers: tuple[LayerConfig, ...] = (LayerConfig(name="a"), LayerConfig(name="b"))
    final_norm: Annotated[Config, Slot("norm")] = TreeNormConfig()


BASE = ModelConfig()


# override


def test_override_sets_values_by_path_and_leaves_the_base_unchanged():
    before = config_text(BASE)
    new = override(BASE, {"first.heads.num_heads": 16, "layers.1.dropout": 0.5, "final_norm.eps": 1})
    assert (new.first.heads.num_heads, new.layers[1].dropout, new.final_norm.eps) == (16, 0.5, 1.0)
    assert new.layers[0] == BASE.layers[0]
    assert config_text(BASE) == before


def test_a_star_stands_for_every_index():
    new = override(BASE, {"layers.*.norm.eps": 0.5, "layers.0.norm.eps": 0.25})
    assert [layer.norm.eps for layer in new.layers] == [0.25, 0.5]


def test_values_of_one_component_are_set_together():
    new = override(BASE, {"first.heads.num_heads": 9, "first.heads.num_groups": 3})
    assert new.first.heads == HeadsConfig(num_heads=9, num_groups=3)
    with pytest.raises(ConfigError, match=r"num_heads \(9\) must be a multiple of num_groups \(4\)"):
        override(BASE, {"first.heads.num_heads": 9})


def test_a_component_and_a_field_of_it_are_set_in_either_order():
    for changes in (
        {"first.norm": ScaledNormConfig(), "first.norm.power": 3},
        {"first.norm": "ScaledNorm", "first.norm.power": "3"},
    ):
        assert override(BASE, changes).first.norm.power == 3


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (
            "frist.dropout",
            1,
            r"ModelConfig has no field 'frist' \(did you mean 'first'\?\)\. Its fields are first, layers",
        ),
        (
            "first.heads.num_haeds",
            1,
            r"HeadsConfig has no field 'first\.heads\.num_haeds' \(did you mean 'num_heads'\?\)",
        ),
        (
            "first.dropout.rate",
            1,
            r"first\.dropout is 0\.0, which has no fields, so first\.dropout\.rate leads nowhere",
        ),
        (
            "first.extra_norm.eps",
            1,
            r"first\.extra_norm is None, which has no fields.* Set first\.extra_norm itself",
        ),
        (
            "layers.dropout",
            1,
            r"layers\.dropout leads nowhere: layers has 2 items\. Use an index from 0 to 1, or \*\.",
        ),
        ("layers.2.dropout", 1, r"layers\.2 leads nowhere: layers has 2 items\. Use an index from 0 to 1"),
        ("layers.-1.dropout", 1, r"layers\.-1 leads nowhere"),
        (
            "first.norms.*.eps",
            1,
            r"first\.norms\.\* leads nowhere: .* has 0 items\. Set it to a tuple with items first",
        ),
        ("first.sizes.0.x", 1, r"first\.sizes\.0 is 1, which has no fields"),
        ("", 1, r"ModelConfig has no field ''\."),
        ("first.", 1, r"LayerConfig has no field 'first\.'"),
        ("first..name", 1, r"LayerConfig has no field 'first\.'"),
        ("first.debug", 1, r"^first\.debug got 1, which is not a bool"),
        ("layers.0.heads.num_heads", 1.5, r"^layers\.0\.heads\.num_heads got 1\.5, which is not an int"),
        ("layers.0", 3, r"^layers\.0 got 3, which is not a LayerConfig"),
        (
            "first.norm",
            TreePositionConfig(),
            r"^first\.norm got a TreePositionConfig, which provides 'position'; the slot",
        ),
        (
            "first.norm",
            "TreePosition",
            r"^first\.norm got a TreePositionConfig, which provides 'position'; the slot",
        ),
        ("first.norm", "ScaledNrom", r"no component type 'ScaledNrom' \(did you mean 'ScaledNorm'\?\)"),
        ("first.norm", "none", r"^first\.norm got 'none', which is no config"),
        (
            "first.mood",
            "clam",
            r"^first\.mood got 'clam', which is not one of 'calm', 'Wild' \(did you mean 'calm'\?\)",
        ),
        (
            "first.heads.num_heads",
            "8.5",
            r"^first\.heads\.num_heads got '8\.5', which is not an int\. Give it an int\.",
        ),
        ("first.heads.num_heads", "9" * 5000, r"num_heads got '999.*\.\.\., which is not an int"),
        ("first.dropout", "nan", r"^first\.dropout got nan, which is no number"),
        ("first.dropout", "lots", r"^first\.dropout got 'lots', which is not a float"),
        ("first.debug", "yes", r"^first\.debug got 'yes', which is not a bool"),
        ("first.sizes", "1,x", r"^first\.sizes\.1 got 'x', which is not an int"),
        ("first.sizes", "[1, 2.5]", r"^first\.sizes got at \[1\] 2\.5, which is not an int"),
        ("first.sizes", "[1, ", r"^first\.sizes got '\[1, ', which is not a tuple"),
        ("first.sizes", "[" * 100_000, r"^first\.sizes got '\[\[.*\.\.\., which is not a tuple"),
    ],
)
def test_a_wrong_path_or_value_is_named(path: str, value: Any, message: str):
    with pytest.raises(ConfigError, match=message):
        override(BASE, {path: value})


@pytest.mark.parametrize(
    ("path", "text", "value"),
    [
        ("heads.num_heads", "1_024", 1024),
        ("dropout", "1", 1.0),
        ("dropout", "1e-3", 0.001),
        ("debug", "True", True),
        ("debug", "false", False),
        ("name", "none", "none"),
        ("name", "3", "3"),
        ("title", "None", None),
        ("title", "nonesuch", "nonesuch"),
        ("mood", "wild", Mood.WILD),
        ("limit", "3", 3),
        ("limit", "3.5", 3.5),
        ("limit", "none", None),
        ("sizes", "4", (4,)),
        ("sizes", "4,5", (4, 5)),
        ("sizes", "(4, 5)", (4, 5)),
        ("sizes", "[4, 5]", (4, 5)),
        ("sizes", "", ()),
        ("sizes", "[]", ()),
        ("labels", "a, b", ("a", "b")),
        ("labels", '["a,b", "c"]', ("a,b", "c")),
        ("grid", "[[1, 2], [], [3]]", ((1, 2), (), (3,))),
        ("extra_norm", "none", None),
        ("extra_norm", "ScaledNorm", ScaledNormConfig()),
        ("extra_norm", ScaledNormConfig.TYPE, ScaledNormConfig()),
        ("norms", "Norm,ScaledNorm", None),
        ("heads", "Heads", HeadsConfig()),
    ],
)
def test_text_is_read_as_the_field_has_it(path: str, text: str, value: Any):
    if path == "norms":
        text, value = f"{TreeNormConfig.TYPE},ScaledNorm", (TreeNormConfig(), ScaledNormConfig())
    new = override(LayerConfig(), {path: text})
    *above, last = path.split(".")
    at: Any = new
    for step in above:
        at = getattr(at, step)
    assert getattr(at, last) == value
    assert type(getattr(at, last)) is type(value)


def test_a_component_typed_by_name_takes_over_what_it_shares_with_the_old_one():
    new = override(BASE, {"final_norm.eps": 0.5, "final_norm": "ScaledNorm"})
    assert new.final_norm == ScaledNormConfig(eps=0.5)


def test_parse_value_names_what_it_reads_for():
    with pytest.raises(ConfigError, match=r"^--steps got 'many', which is not an int"):
        parse_value("--steps", "many", int)


# replace


def test_replace_swaps_every_component_of_a_kind_and_keeps_shared_fields():
    base = override(BASE, {"layers.*.norm.eps": 0.5, "layers.*.norm.dim": 3})
    new = replace(base, TreeNormConfig, ScaledNormConfig(power=4))
    assert [layer.norm for layer in new.layers] == [ScaledNormConfig(dim=3, eps=0.5, power=4)] * 2
    assert new.final_norm == ScaledNormConfig(eps=1e-5, power=4)
    assert base.layers[0].norm == TreeNormConfig(dim=3, eps=0.5)


def test_replace_keeps_what_was_set_on_the_new_component_even_at_its_default():
    assert replace(BASE, TreeNormConfig, ScaledNormConfig(eps=0.25)).final_norm.eps == 0.25
    assert replace(BASE, TreeNormConfig, ScaledNormConfig(eps=1e-3)).final_norm.eps == 1e-3
    assert replace(BASE, TreeNormConfig, ScaledNormConfig().set(eps=0.125)).final_norm.eps == 0.125


def test_replace_takes_a_function_from_old_to_new():
    new = replace(BASE, TreeNormConfig, lambda old: old.set(eps=old.eps * 2))
    assert new.final_norm.eps == 2e-5


def test_replace_takes_a_component_class_with_a_config():
    class Wide(Configurable):
        class Config(TreeNormConfig):
            pass

    base = BASE.set(final_norm=Wide.Config(dim=7))
    new = replace(base, Wide, ScaledNormConfig())
    assert (new.final_norm, new.first.norm) == (ScaledNormConfig(dim=7, eps=1e-5), TreeNormConfig())


def test_a_replacement_that_holds_the_kind_it_replaces_is_put_in_once():
    class WrapConfig(Config):
        inner: Annotated[Config, Slot("norm")] = TreeNormConfig()

    class HolderConfig(Config):
        child: TreeNormConfig | WrapConfig = TreeNormConfig()

    assert replace(HolderConfig(), TreeNormConfig, lambda old: WrapConfig(inner=old)).child == WrapConfig()


@pytest.mark.parametrize(
    ("kind", "new", "message"),
    [
        (
            ScaledNormConfig,
            TreeNormConfig(),
            r"holds no ScaledNormConfig, so nothing would change\. It is composed of Heads",
        ),
        (TreeNormConfig, TreePositionConfig(), r"\.norm got a TreePositionConfig, which provides 'position'"),
        (
            TreeNormConfig,
            ScaledNormConfig,
            r"replace got <class .*ScaledNormConfig'> as new\. Give it a config",
        ),
        (int, TreeNormConfig(), r"replace got <class 'int'> as the kind"),
        (TreeNormConfig, lambda old: None, r"returned None, which is no config\. Return the changed tree"),
    ],
)
def test_a_replacement_that_makes_no_sense_is_refused(kind: Any, new: Any, message: str):
    with pytest.raises(ConfigError, match=message):
        replace(BASE, kind, new)


def test_inherit_skips_fields_whose_type_differs():
    class OddConfig(Config):
        eps: str = "small"
        dim: int | None = None

    assert inherit(OddConfig(), TreeNormConfig(eps=1.0, dim=3)) == OddConfig(dim=3)
    assert inherit(OddConfig(), TreeNormConfig(eps=1.0)) == OddConfig()  # an unset field is not taken over


# transform and modifiers


def test_transform_visits_children_first_and_leaves_what_is_chosen():
    seen: list[str] = []

    def visit(cfg: Config) -> Config:
        seen.append(type(cfg).__name__)
        return cfg.set(dim=3) if isinstance(cfg, TreeNormConfig) else cfg

    new = transform(LayerConfig(name="x"), visit)
    assert seen == ["HeadsConfig", "TreeNormConfig", "LayerConfig"]
    assert new.norm.dim == 3
    assert new.chosen == {"name"}


def test_transform_returns_the_same_tree_where_nothing_changes():
    assert transform(BASE, lambda cfg: cfg) is BASE


def test_modifiers_chain_in_order():
    def double(cfg: ModelConfig) -> ModelConfig:
        return override(cfg, {"first.heads.num_heads": cfg.first.heads.num_heads * 2})

    def to_twelve(cfg: ModelConfig) -> ModelConfig:
        return override(cfg, {"first.heads.num_heads": 12})

    assert chain(double, to_twelve)(BASE).first.heads.num_heads == 12
    assert chain(to_twelve, double)(BASE).first.heads.num_heads == 24
    assert chain()(BASE) is BASE
    with pytest.raises(ConfigError, match=r"the modifier .*forgets returned None, which is no config"):

        def forgets(cfg: ModelConfig) -> Any:
            override(cfg, {"first.debug": True})

        chain(double, forgets)(BASE)


# reading trees


def test_traverse_gives_every_config_with_its_path():
    paths = {path: type(cfg).__name__ for path, cfg in traverse(BASE)}
    assert paths[""] == "ModelConfig"
    assert paths["layers.1.norm"] == "TreeNormConfig"
    assert list(paths)[:3] == ["", "first", "first.heads"]


def test_diff_names_each_path_that_differs():
    new = override(BASE, {"first.mood": "wild", "layers.1.norm.dim": 3, "final_norm": "ScaledNorm"})
    assert diff(BASE, BASE) == []
    assert diff(BASE, new) == [
        "first.mood: calm -> Wild",
        "layers.1.norm.dim: REQUIRED -> 3",
        f"final_norm: {TreeNormConfig.TYPE!r} -> {ScaledNormConfig.TYPE!r}",
        "final_norm.power: (absent) -> 2",
    ]


def test_config_text_shows_every_field():
    assert config_text(LayerConfig(norms=(TreeNormConfig(dim=2),), grid=((1,), ()))) == (
        f"""\
config: {LayerConfig.TYPE}
  heads: {HeadsConfig.TYPE}
    num_heads: 8
    num_groups: 4
  norm: {TreeNormConfig.TYPE}
    dim: REQUIRED
    eps: 1e-05
  extra_norm: None
  dropout: 0.0
  name: 'layer'
  title: None
  mood: calm
  debug: False
  limit: None
  sizes: (1, 2)
  labels: ()
  grid: ((1,), ())
  norms:
    0: {TreeNormConfig.TYPE}
      dim: 2
      eps: 1e-05
"""
    )
