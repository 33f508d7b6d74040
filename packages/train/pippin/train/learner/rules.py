"""Which parameter is treated how: the rules and the muP of a learner, resolved for a model's parameters."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from pippin.core.config import nearest
from pippin.core.errors import ConfigError
from pippin.core.module import ParameterInfo, flatten_params
from pippin.train.learner.config import LearnerConfig, MuPConfig, RuleConfig


@dataclasses.dataclass(frozen=True)
class Treatment:
    """What a learner does with one parameter."""

    rule: int | None  # the index of the rule that counts
    mup: float | None  # the factor that muP has put into lr_scale
    lr_scale: float  # times the part of an update that follows the gradient
    weight_decay_scale: float  # times the part that decays the parameter
    frozen: bool
    stacked: int  # how many leading dims are stacks: each index of them is a block of its own


def resolve(cfg: LearnerConfig, infos: Mapping[str, Any]) -> dict[str, Treatment]:
    """The treatment of each parameter, by dotted path.

    Raises:
        ConfigError: a rule that matches no parameter, or that later rules override for all that it
            matches; muP where no model dim or no matrix is found; or every parameter is frozen.
    """
    parameters: dict[str, ParameterInfo] = flatten_params(infos)
    rule_of = _rule_of(cfg.rules, parameters)
    factors = _mup_factors(cfg.mup, parameters) if cfg.mup else {}
    treatments = {}
    for path, info in parameters.items():
        index = rule_of[path]
        rule = RuleConfig() if index is None else cfg.rules[index]
        treatments[path] = Treatment(
            rule=index,
            mup=factors.get(path),
            lr_scale=rule.lr_scale * factors.get(path, 1.0),
            weight_decay_scale=rule.weight_decay_scale,
            frozen=rule.frozen,
            stacked=info.stacked,
        )
    if all(t.frozen for t in treatments.values()):
        raise ConfigError(
            f"LearnerConfig.rules freeze all {len(treatments)} parameters, so there is nothing to learn. "
            "End the rules with one that is not frozen, for the components to train."
        )
    return treatments


def describe_rules(cfg: LearnerConfig, infos: Mapping[str, Any]) -> str:
    """How many parameters and elements each rule, muP and freezing cover, as lines of text.

    Raises:
        ConfigError: as `resolve`.
    """
    treatments = resolve(cfg, infos)
    sizes = {path: math.prod(info.shape) for path, info in flatten_params(infos).items()}

    def line(what: str, covers: Callable[[Treatment], bool]) -> str:
        covered = [sizes[path] for path, t in treatments.items() if covers(t)]
        return f"{what}: {len(covered):,} parameters, {sum(covered):,} elements\n"

    lines = [line("all", lambda t: True)]
    lines += [
        line(f"rules.{i} ({_show(rule)})", lambda t, i=i: t.rule == i) for i, rule in enumerate(cfg.rules)
    ]
    lines.append(line("no rule", lambda t: t.rule is None))
    for factor in sorted({t.mup for t in treatments.values() if t.mup is not None}):
        lines.append(line(f"muP (lr_scale {factor:g})", lambda t, f=factor: t.mup == f))
    lines.append(line("frozen", lambda t: t.frozen))
    return "".join(lines)


def _matches(component: str, direct: bool, info: ParameterInfo) -> bool:
    owners, provides = _holders(direct, info)
    return component in owners or component in provides


def _holders(direct: bool, info: ParameterInfo) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The component types and the interfaces that a rule may name to match a parameter."""
    return (info.owners[-1:], info.provides[-1:]) if direct else (info.owners, info.provides)


def _rule_of(rules: tuple[RuleConfig, ...], parameters: Mapping[str, ParameterInfo]) -> dict[str, int | None]:
    """Dotted path -> the index of the last rule that matches, if any."""
    rule_of: dict[str, int | None] = dict.fromkeys(parameters)
    for i, rule in enumerate(rules):
        matched = [p for p, info in parameters.items() if _matches(rule.component, rule.direct, info)]
        if not matched:
            raise _unmatched(f"LearnerConfig.rules.{i}", rule.component, rule.direct, parameters.values())
        rule_of.update(dict.fromkeys(matched, i))
    for i, rule in enumerate(rules):
        if i not in rule_of.values():
            raise ConfigError(
                f"LearnerConfig.rules.{i} for {rule.component!r} has no effect: later rules match all of its "
                "parameters, and the last that matches counts. Put general rules first, or remove it."
            )
    return rule_of


def _unmatched(where: str, component: str, direct: bool, infos: Iterable[ParameterInfo]) -> ConfigError:
    held = [_holders(direct, info) for info in infos]
    owners = sorted({name for types, _ in held for name in types})
    interfaces = sorted({name for _, provided in held for name in provided if name})
    return ConfigError(
        f"{where} is for {component!r}{nearest(component, [*interfaces, *owners])}. No parameter lies "
        f"{'directly in' if direct else 'in'} such a component. The parameters' interfaces are "
        f"{', '.join(interfaces) or 'none'}; their components are {', '.join(owners) or 'none'}. "
        "Name one of these, or remove the entry."
    )


def _mup_factors(mup: MuPConfig, parameters: Mapping[str, ParameterInfo]) -> dict[str, float]:
    """Dotted path -> factor, of the matrices that muP slows down: no norm's scale and no bias is one."""
    for component in mup.components:
        if not any(_matches(component, False, info) for info in parameters.values()):
            raise _unmatched("LearnerConfig.mup.components", component, False, parameters.values())
    factor = mup.base_dim / (mup.model_dim or _model_dim(parameters.values()))
    return {
        path: factor
        for path, info in parameters.items()
        if len(info.shape) - info.stacked >= 2 and any(_matches(c, False, info) for c in mup.components)
    }


def _model_dim(infos: Iterable[ParameterInfo]) -> int:
    """The dim beside the vocabulary's of every matrix that has a vocabulary's."""
    dims = set()
    for info in infos:
        sizes = list(zip(info.axes, info.shape, strict=True))[info.stacked :]
        if "vocab" in info.axes and len(sizes) == 2:
            dims.update(size for axis, size in sizes if axis != "vocab")
    if len(dims) != 1:
        raise ConfigError(
            "LearnerConfig.mup takes the model dim from the matrices that have a 'vocab' axis, and found "
            f"{sorted(dims) or 'none'}. There must be exactly one such dim. Set mup.model_dim."
        )
    return dims.pop()


def _show(rule: RuleConfig) -> str:
    scales = [
        f"{name} {getattr(rule, name):g}"
        for name in ("lr_scale", "weight_decay_scale")
        if getattr(rule, name) != 1
    ]
    return ", ".join([rule.component, *["direct"] * rule.direct, *["frozen"] * rule.frozen, *scales])
