"""Hypothesis strategies that make valid config trees, for tests."""

import typing
from typing import Any

from hypothesis import strategies as st

from pippin.core.config import Config, field_hints, lookup, providers
from pippin.core.config_field import REQUIRED, RequiredType, enum_of, item_hint, slot_of, union_members
from pippin.core.errors import PippinError

_SCALARS: dict[Any, st.SearchStrategy[Any]] = {
    bool: st.booleans(),
    int: st.integers(-(2**63), 2**63 - 1) | st.integers(1, 16),
    float: st.floats(allow_nan=False) | st.floats(0.001, 1.0),
    str: st.text(st.characters(exclude_categories=["Cs"]), max_size=8),
    type(None): st.none(),
    RequiredType: st.just(REQUIRED),
}


def values(hint: Any, depth: int) -> st.SearchStrategy[Any]:
    """Values that an annotation allows; below `depth` configs, trees have their defaults."""
    members = union_members(hint)
    if len(members) > 1:
        return st.one_of([values(member, depth) for member in members])
    slot, kind = slot_of(hint), enum_of(hint)
    if slot is not None:
        return st.sampled_from(providers(slot.interface)).flatmap(
            lambda name: configs(lookup(name), depth - 1)
        )
    if typing.get_origin(hint) is typing.Annotated:
        return values(hint.__origin__, depth)
    if typing.get_origin(hint) is tuple:
        return st.lists(values(item_hint(hint), depth), max_size=3).map(tuple)
    if kind is not None:
        return st.sampled_from(list(kind))
    return _SCALARS[hint] if hint in _SCALARS else configs(hint, depth - 1)


@st.composite
def configs(draw: Any, cls: type[Config], depth: int = 3) -> Config:
    """Configs of a class, with some fields drawn. What the class refuses stays as it was before."""
    cfg = cls()
    if depth <= 0:
        return cfg
    hints = field_hints(cls)
    for name in draw(st.lists(st.sampled_from(list(hints)), unique=True)) if hints else []:
        try:
            cfg = cfg.set(**{name: draw(values(hints[name], depth))})
        except PippinError:
            continue
    return cfg
