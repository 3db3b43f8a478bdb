"""Which weights of a model a recipe acts on, and what is left out for which reason."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import ClassVar

from torch import nn
from torch.nn.parameter import UninitializedParameter

from niwaki.component import Component
from niwaki.errors import InputError
from niwaki.layout import Layout, is_normalization, layout_of
from niwaki.masks import canonical_name

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
LAYERS = (nn.Linear, *CONVOLUTIONS, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
"""Module classes of which one can be the last layer."""


class Target(Component):
    """Base of the slot ``target``."""

    slot = "target"


class Named(Target):
    """Parameters chosen by name. A base class, itself not registered."""

    what: ClassVar[str]
    """What a parameter is that can be chosen, for error messages."""

    include: tuple[str, ...] | None = None
    exclude: tuple[str, ...] = ()


class Weights(Named):
    """Weights of linear, convolution, attention, recurrent and embedding modules, chosen by name.

    Without ``include``: every weight of a known module except embeddings, the first convolution and the last layer. With it: what
    the patterns match and nothing else, whatever it is. Biases and normalization parameters are never among them.

    Patterns are shell globs on parameter names as ``model.named_parameters()`` has them, case-sensitive, where ``*`` also matches
    dots; the name of a module stands for all weights below it.

    Attributes:
        include: patterns to take; None for the default. The exact name of a parameter with two or more dimensions is taken even if
            its module is of an unknown class (its dimensions are read as output, input, kernel).
        exclude: patterns to leave out.
    """

    name = "weights"
    equation = "W of every layer l in the target; the sparsity counts their elements"
    source = "Evci, Gale, Menick, Castro, Elsen 2020: first convolution dense, biases and normalization not counted"
    what = "weight"


class NormScale(Named):
    """Scales of normalization layers, one number for each channel: their parameter ``weight``. All of them, or some by name.

    Attributes:
        include: patterns to take, as for ``weights``; None for all.
        exclude: patterns to leave out.
    """

    name = "norm_scale"
    equation = "scale of every normalization layer in the target; the sparsity counts their elements"
    source = "Liu, Li, Shen, Huang, Yan, Zhang 2017 (network slimming)"
    what = "normalization scale"


@dataclass(frozen=True, eq=False)
class TargetWeight:
    """A parameter that a recipe acts on.

    Attributes:
        name: canonical name, the first that the model has for it.
        parameter: the model's own Parameter.
        layout: roles of its dimensions; of the whole tensor where the parameter is sharded.
        module_name: path of the module that owns it, as ``model.get_submodule`` takes it.
    """

    name: str
    parameter: nn.Parameter
    layout: Layout
    module_name: str


@dataclass(frozen=True)
class LeftOut:
    """A parameter that a recipe does not act on, and why."""

    name: str
    reason: str


@dataclass
class _Found:
    """One parameter under all its names, with its layout as a weight, and as the scale of a normalization where it is one."""

    parameter: nn.Parameter
    names: list[str]
    module_names: list[str]
    layouts: list[Layout | None]
    scale: Layout | None = None
    last: bool = False
    first_convolution: bool = False

    @property
    def layout(self) -> Layout | None:
        return next((layout for layout in self.layouts if layout is not None), None)

    def layout_for(self, target: Named) -> Layout | None:
        """Return its layout if it is what the target is about."""
        return self.scale if isinstance(target, NormScale) else self.layout

    def matches(self, pattern: str) -> bool:
        pattern = canonical_name(pattern)
        return any(fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*") for name in self.names)

    def default_reason(self) -> str | None:
        """Return why the default target leaves it out, or None when it takes it."""
        if any(layout is not None and layout.embedding for layout in self.layouts):
            return "embedding" if len(self.names) == 1 else "tied to an embedding"
        if self.first_convolution:
            return "first convolution"
        if self.last:
            return "last layer" if len(self.names) == 1 else "tied to the last layer"
        return None


def select_targets(model: nn.Module, target: Target) -> tuple[list[TargetWeight], list[LeftOut]]:
    """Return the weights of ``model`` that ``target`` names, in model order, and all other parameters with the reason.

    Every parameter is in exactly one of the two lists; a tied one is there once, under its first name, and counts as all it is tied to.

    Raises:
        InputError: a pattern matches nothing, nothing is left, or a named parameter cannot be a target.
    """
    if not isinstance(target, Named):
        raise InputError(f"target: {target.name or target!s} does not name weights of a model; choices: norm_scale, weights")
    found = _parameters(model)
    weights = [p for p in found if p.layout_for(target) is not None]
    for field, patterns in (("include", target.include or ()), ("exclude", target.exclude)):
        for pattern in patterns:
            _require_match(target, field, pattern, weights, found)
    chosen: list[TargetWeight] = []
    left_out: list[LeftOut] = []
    for parameter in found:
        layout, reason = _decide(parameter, target)
        name = parameter.names[0]
        if layout is None:
            left_out.append(LeftOut(name, reason))
        else:
            chosen.append(TargetWeight(name, parameter.parameter, layout, parameter.module_names[0]))
    if not chosen:
        reasons = "; ".join(f"{p.name}: {p.reason}" for p in left_out if p.name in {w.names[0] for w in weights})
        raise InputError(
            f"target.{target.name}: no {target.what} is left ({reasons or 'the model has none'}); name what to prune in include"
        )
    return chosen, left_out


def _parameters(model: nn.Module) -> list[_Found]:
    """Return every parameter once, with all its names and layouts, in model order."""
    found: dict[int, _Found] = {}
    owner: dict[str, int] = {}
    first_convolution = last = None
    for module_name, module in model.named_modules(remove_duplicate=False):
        for own_name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            name = canonical_name(f"{module_name}.{own_name}" if module_name else own_name)
            if isinstance(parameter, UninitializedParameter):
                raise InputError(f"{name}: not initialized; run the model once on an example before making it sparse")
            if owner.setdefault(name, id(parameter)) != id(parameter):
                raise InputError(f"{name}: two parameters have this name once wrapper prefixes are dropped; rename the module")
            entry = found.setdefault(id(parameter), _Found(parameter, [], [], []))
            real = parameter.is_floating_point()
            layout = layout_of(module, own_name, parameter.shape) if real else None
            if real and layout is None and own_name == "weight" and is_normalization(module):
                entry.scale = Layout(("output",) * parameter.ndim, tuple(parameter.shape))
            entry.names.append(name)
            entry.module_names.append(module_name)
            entry.layouts.append(layout)
            if layout is not None and isinstance(module, LAYERS):
                last = entry
                if first_convolution is None and isinstance(module, CONVOLUTIONS):
                    first_convolution = entry
    if last is not None:
        last.last = True
    if first_convolution is not None:
        first_convolution.first_convolution = True
    return list(found.values())


def _decide(parameter: _Found, target: Named) -> tuple[Layout | None, str]:
    """Return the layout of a target, or None and the reason why the parameter is none."""
    layout = parameter.layout_for(target)
    include = target.include
    if layout is None and isinstance(target, NormScale):
        return None, f"not a {target.what}"
    named = include is not None and any(canonical_name(pattern) in parameter.names for pattern in include)
    if layout is None:
        if not named:
            return None, "not a weight" if parameter.parameter.ndim < 2 else "module class not known; name it in include to take it"
        layout = _unknown_layout(parameter)
    excluded = next((pattern for pattern in target.exclude if parameter.matches(pattern)), None)
    if excluded is not None:
        return None, f"excluded by {excluded!r}"
    if include is None:
        reason = parameter.default_reason() if isinstance(target, Weights) else None
        return (layout, "") if reason is None else (None, reason)
    if not any(parameter.matches(pattern) for pattern in include):
        return None, "not matched by include"
    return layout, ""


def _unknown_layout(parameter: _Found) -> Layout:
    """Return the layout of a parameter that was named although its module's class is not known."""
    tensor = parameter.parameter
    if tensor.ndim < 2 or not tensor.is_floating_point():
        what = f"{tensor.ndim} dimension(s), {str(tensor.dtype).removeprefix('torch.')}"
        raise InputError(f"target.weights.include: {parameter.names[0]!r} is not a weight ({what}); two or more of real floats are needed")
    return Layout(("output", "input", *["kernel"] * (tensor.ndim - 2)), tuple(tensor.shape))


def _require_match(target: Named, field: str, pattern: str, weights: Sequence[_Found], found: Sequence[_Found]) -> None:
    """Raise InputError with the nearest names when a pattern matches nothing that it could act on."""
    exact = isinstance(target, Weights) and any(canonical_name(pattern) in p.names for p in found)
    candidates = found if field == "exclude" else weights
    if exact or any(p.matches(pattern) for p in candidates):
        return
    names = [name for p in candidates for name in p.names]
    nearest = _nearest(pattern, names) or f"it has no {target.what}s"
    raise InputError(f"target.{target.name}.{field}: pattern {pattern!r} matches no {target.what} of the model; {nearest}")


def _nearest(pattern: str, names: Iterable[str]) -> str:
    known = list(names)
    # Half the pattern is often a glob, so a low cutoff still finds the name that was meant.
    near = difflib.get_close_matches(pattern.strip("*"), known, n=3, cutoff=0.4) or known[:3]
    return f"nearest: {', '.join(near)}" if near else ""
