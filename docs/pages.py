"""A page for a slot: every component with its purpose, equation, cost, use, settings and source, as its class says them."""

import ast
import inspect
import re
import textwrap
from collections.abc import Iterator
from typing import Any

import niwaki.recipe  # noqa: F401  registers all components
from niwaki.component import REGISTRY, Component, describe
from niwaki.errors import InputError
from niwaki.statistics import Statistic

PAGES = {
    "saliency": "saliencies.md",
    "normalization": "allocations.md",
    "allocation": "allocations.md",
    "compensation": "compensations.md",
    "penalty": "penalties.md",
    "relaxation": "relaxations.md",
    "growth": "growth.md",
    "initial_value": "growth.md",
    "selection": "growth.md",
    "gradient": "growth.md",
}
"""Slots with a page of their own."""

NEEDS = {
    "gradient": "gradients of the loss",
    "score": "learned scores",
    "flops": "FLOPs",
    "scores": "scores",
    "survivors": "what a drop has left",
    "loss": "losses of trials",
    "observe": "weights",
}
READS = {
    "active": "how probably the relaxation's gates or weights are active",
    "divergence": "the divergence of the relaxation's posterior",
    "threshold": "the relaxation's thresholds",
}
"""What penalties read that are of no weight, scale or gate."""

SECTION = re.compile(r"^(Attributes|Source|Raises|Args|Returns):|^>>> ", re.MULTILINE)


def slot(name: str) -> str:
    """Return an overview table of a slot's components, and a section for each."""
    named = dict(sorted(names(name).items(), key=lambda one: _rank(one[0])))
    head = "| name | what it is | what it looks at |\n| --- | --- | --- |\n"
    lines = [f"| [`{known[0]}`](#{anchor(name, known[0])}) | {_cell(describe(cls))} | {looks_at(cls)} |" for cls, known in named.items()]
    return "\n\n".join([head + "\n".join(lines), *(_component(name, cls, known) for cls, known in named.items())])


def names(slot: str) -> dict[type[Component], list[str]]:
    """Return the components of a slot with the names that they go by."""
    found: dict[type[Component], list[str]] = {}
    for name, cls in REGISTRY[slot].items():
        found.setdefault(cls, []).append(name)
    return found


def anchor(slot: str, name: str) -> str:
    """Return the anchor of a component's section."""
    return f"{slot}-{name}"


def _component(slot: str, cls: type[Component], known: list[str]) -> str:
    rows = [
        ("equation", f"`{cls.equation}`"),
        ("cost", cls.effort),
        ("looks at", looks_at(cls)),
        ("when to use it", cls.advice),
        ("settings", "<br>".join(_settings(cls))),
        ("source", cls.source),
    ]
    table = "\n".join(f"| {_cell(what)} | {_cell(said)} |" for what, said in rows if said)
    title = " or ".join(f"`{name}`" for name in known)
    parts = [f"### {title} {{ #{anchor(slot, known[0])} }}", describe(cls), *body(cls), f"| | |\n| --- | --- |\n{table}"]
    return "\n\n".join(part for part in parts if part)


def body(cls: type[Component]) -> list[str]:
    """Return the paragraphs of a docstring between its first line and its sections, as Markdown."""
    text = (inspect.getdoc(cls) or "").partition("\n")[2]
    found = SECTION.search(text)
    text = (text if found is None else text[: found.start()]).strip()
    return [_markdown(" ".join(paragraph.split())) for paragraph in text.split("\n\n") if paragraph.strip()]


def _markdown(text: str) -> str:
    text = re.sub(r":(?:class|func|meth|mod|attr):`~?(?:[\w.]+\.)?(\w+)`", r"`\1`", text)
    return text.replace("``", "`").replace("\\|", "|")


def looks_at(cls: type[Component]) -> str:
    """Return in words what a component has to know besides the weights, in the statistics' own names."""
    try:
        component = cls()
    except InputError:  # a setting has no default, so nobody can say yet
        return "what its settings ask for" if hasattr(cls, "wants") else ""
    asked: list[str] = [NEEDS[need] for need in sorted(component.needs) if need in NEEDS]
    asked += [NEEDS["gradient"]] if getattr(component, "wants_gradient", False) else []
    asked += [READS[component.reads]] if getattr(component, "reads", None) in READS else []
    wanted: frozenset[str] = getattr(component, "wants", frozenset())
    asked += [NEEDS[want] for want in sorted(wanted) if want in NEEDS]
    requests: tuple[Statistic, ...] = getattr(component, "statistics", ())
    asked += [f"{type(request).__name__} ({_source(request)})" for request in requests]
    averages = getattr(component, "averages", None)
    asked += [f"each {averages} by itself"] if averages is not None else []
    return ", ".join(dict.fromkeys(asked)) or "nothing else"


def _rank(cls: type[Component]) -> int:
    """Return where a component stands: first those that look at nothing but weights, last those that look at a training."""
    said = looks_at(cls)
    order = ("nothing else", "without labels", "loss", "steps of the training", "learned")
    return max((place for place, word in enumerate(order) if word in said), default=2)


def _source(request: Statistic) -> str:
    if request.source == "steps":
        return "steps of the training"
    if not request.needs_data:
        return "the model"
    return "data and loss" if request.needs_loss else "data without labels"


def _settings(cls: type[Component]) -> Iterator[str]:
    said = descriptions(cls)
    for name, field in cls.model_fields.items():
        alias = field.alias or name
        default = "" if field.is_required() else f": {_value(field.get_default(call_default_factory=True))}"
        yield f"`{alias}{default}` {_markdown(said.get(alias, said.get(name, '')))}".strip()


def _value(value: Any) -> Any:
    data = value.to_data() if isinstance(value, Component) else value
    if isinstance(data, bool):
        return str(data).lower()
    return "none" if data is None or data == () else data


def descriptions(cls: type[Component]) -> dict[str, str]:
    """Return what the docstring of a class, or those that stand below its fields, say of each field."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if not issubclass(base, Component) or base is Component:
            continue
        found |= _attributes(inspect.cleandoc(base.__dict__.get("__doc__") or ""))
        tree = ast.parse(textwrap.dedent(inspect.getsource(base))).body[0]
        assert isinstance(tree, ast.ClassDef)
        for field, after in zip(tree.body, tree.body[1:], strict=False):
            if not (isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(after, ast.Expr)):
                continue
            if isinstance(after.value, ast.Constant) and isinstance(after.value.value, str):
                found[field.target.id] = " ".join(after.value.value.split())
    return found


def _attributes(doc: str) -> dict[str, str]:
    block = re.search(r"^Attributes:\n((?:    .*\n?|\n)*)", doc + "\n", re.MULTILINE)
    if block is None:
        return {}
    entries = re.split(r"\n(?=    \w)", "\n" + block[1].rstrip())
    pairs = (entry.strip().partition(":") for entry in entries if entry.strip())
    return {name.strip(): " ".join(text.split()) for name, _, text in pairs}


def _cell(text: str) -> str:
    """Escape what would end a cell; between backticks it does not."""
    parts = text.replace("\\|", "|").split("`")
    return "`".join(part if i % 2 else part.replace("|", "\\|") for i, part in enumerate(parts))
