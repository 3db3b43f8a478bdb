"""How many architectures can be made really smaller: masks over dependency groups, removal, and what holds afterwards.

For each one, units of every removable group of channels and heads are masked at random (a counter hash, so that everybody masks the
same ones), and taken out. Then the smaller model has to run forward and backward, to compute what the masked model computes on inputs
that neither has seen, and to come back from a file into a fresh model. Torch-Pruning, where it is installed, gets the same networks.
"""

from __future__ import annotations

import copy
import importlib
import signal
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.table import Table
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from niwaki import counter
from niwaki.bench.architectures import Architecture, architectures
from niwaki.dependency import Example, Group, find_groups
from niwaki.dependency.tape import mapped, tensors_in
from niwaki.dependency.trace import arguments
from niwaki.formats import load, save
from niwaki.masks import Masks
from niwaki.structured import Smaller, shrink

KINDS = ("channel", "head")

SPARSITIES = (0.25, 0.5)

DEFINITIONS = (
    "groups: dependency groups of which units can be removed / all that are found. find: seconds of find_groups.",
    "parameters, FLOPs: of the smaller model / of the dense one, with the stated share of the units of every removable group of channels"
    " and heads masked at random (at least one unit stays) and removed.",
    "removed: masked units that are gone / masked units; they stay where the code of the model fixes a width.",
    "checks: forward, backward: the smaller model runs, and every gradient is finite. equal: it computes what the masked model does on"
    " other inputs than the example, to 1000 units in the last place of the largest output (at least 1), in double precision where it can.",
    "replays: saved, loaded into a fresh model of the original shape, and equal to the last bit.",
    "Torch-Pruning: the share of parameters that its MagnitudePruner leaves at the same share, if the model still runs. It gets the output"
    " layers to leave alone, and nothing else that is particular to a model; whether outputs are those of a masked model it does not say.",
)

PATIENCE = 20
"""Seconds that Torch-Pruning has for a network; for some it does not come to an end."""

CHECKS = ("forward", "backward", "equal", "replays")


def run(
    names: Iterable[str] | None = None,
    *,
    sparsities: Sequence[float] = SPARSITIES,
    export: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> list[dict[str, Any]]:
    """Try architectures and return a row for each one and each sparsity.

    Args:
        names: of :func:`niwaki.bench.architectures.architectures`; None for all.
        sparsities: shares of the units of a group.
        export: whether to try ``torch.export`` on each one too.
        progress: called with the number of architectures that are done, and of all.
    """
    known = architectures()
    chosen = list(known) if names is None else list(names)
    rows: list[dict[str, Any]] = []
    for done, name in enumerate(chosen):
        rows += try_one(name, known[name], sparsities, export=export)
        if progress:
            progress(done + 1, len(chosen))
    return rows


def try_one(
    name: str, architecture: Architecture, sparsities: Sequence[float] = SPARSITIES, *, export: bool = False
) -> list[dict[str, Any]]:
    """Try one architecture and return a row for each sparsity. What fails is a sentence in ``failure``."""
    common: dict[str, Any] = {"architecture": name, "source": architecture.source}
    try:
        model, example = _built(architecture, 0), inputs(architecture, 1)
        common |= {"parameters": _parameters(model), "flops": _flops(model, example)}
        begin = time.perf_counter()
        groups = find_groups(model, example)
        common |= {"find_seconds": time.perf_counter() - begin, "groups": len(groups), "removable": len(groups.removable)}
        common["notes"] = groups.notes
    except Exception as error:  # a row says what is wrong, and the others go on
        return [{**common, "sparsity": sparsity, "failure": _sentence(error)} for sparsity in sparsities]
    if export:
        common |= _exported(model, example)
    return [{**common, **_smaller(architecture, model, groups, example, sparsity)} for sparsity in sparsities]


def inputs(architecture: Architecture, seed: int) -> Example:
    """Return arguments for the network in its precision."""
    with _seeded(seed):
        given = architecture.inputs()
    found: Example = mapped(given, lambda tensor: tensor.to(architecture.dtype) if tensor.is_floating_point() else tensor)
    return found


def random_masks(model: nn.Module, groups: Iterable[Group], sparsity: float, kinds: Sequence[str] = KINDS) -> tuple[Masks, int]:
    """Return masks of all parameters that units of removable groups own entries in, and how many units they mask."""
    parameters = dict(model.named_parameters())
    masks: dict[str, Tensor] = {}
    count = 0
    for group in groups:
        if not group.removable or group.kind not in kinds:
            continue
        order = counter.uniform(counter.key(0, 0, group.name), 0, group.size).argsort()
        units = order[: min(round(sparsity * group.size), group.size - 1)]
        count += len(units)
        for member in group.members:
            if member.name in parameters and len(units):
                mask = masks.setdefault(member.name, torch.ones(parameters[member.name].shape, dtype=torch.bool))
                mask.index_fill_(member.dim, member.entries(units), False)
    return Masks(masks), count


def _smaller(architecture: Architecture, model: nn.Module, groups: Sequence[Group], example: Example, sparsity: float) -> dict[str, Any]:
    row: dict[str, Any] = {"sparsity": sparsity, **dict.fromkeys(CHECKS, False)}
    row |= _by_torch_pruning(architecture, groups, sparsity)
    try:
        masks, row["masked_units"] = random_masks(model, groups, sparsity)
        masked = copy.deepcopy(model)
        masks.apply_(masked)
        if not row["masked_units"]:
            reasons = dict.fromkeys(group.reason for group in groups if group.reason and group.kind in KINDS)
            return {**row, "failure": f"no unit can be removed: {'; '.join(reasons)}"}
        other = inputs(architecture, 2)
        expected = _outputs(masked, other)
        begin = time.perf_counter()
        smaller = shrink(model, masks, example, groups=groups)
        row["shrink_seconds"] = time.perf_counter() - begin
        row["left"] = smaller.notes
        row["parameters_after"], row["flops_after"] = _parameters(smaller.model), _flops(smaller.model, example)
        row["removed_units"] = _gone(groups, smaller.removed.tensors)
        found = _outputs(smaller.model, other)
        row["forward"] = True
        row["difference"] = _difference(found, expected)
        row["equal"] = row["difference"] <= 1e3 * torch.finfo(architecture.dtype).eps
        row["replays"] = _replays(architecture, smaller, other, found)
        row["backward"] = _runs_backward(smaller.model, other)
        failed = [check for check in CHECKS if not row[check]]
        row["failure"] = f"not {', '.join(failed)}" if failed else ""
    except Exception as error:
        row["failure"] = _sentence(error)
    return row


def _gone(groups: Iterable[Group], kept: Mapping[str, Mapping[str, Sequence[int]]]) -> int:
    """Return how many units of all groups lost every entry that they had in the first tensor that lost any."""
    count = 0
    for group in groups:
        for member in group.members:
            indices = kept.get(member.name, {}).get(str(member.dim))
            if group.kind in KINDS and group.removable and indices is not None:
                left = set(member.units[torch.tensor(indices, dtype=torch.int64)].tolist())
                count += group.size - len(left - {-1})
                break
    return count


# ---------------------------------------------------------------- models


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def _built(architecture: Architecture, seed: int) -> nn.Module:
    """Return a network of which no bias, scale or statistic has the value that it starts with."""
    with _seeded(seed):
        model = architecture.build().to(architecture.dtype).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.05)
            for name, buffer in model.named_buffers():
                if name.endswith(("running_mean", "running_var")):
                    buffer.add_(torch.rand_like(buffer), alpha=0.1)
    return model


def _outputs(model: nn.Module, example: Example) -> list[Tensor]:
    args, kwargs = arguments(example)
    with torch.no_grad():
        return [tensor for tensor in tensors_in(model(*args, **kwargs)) if tensor.is_floating_point()]


def _difference(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Return the largest difference in units of the largest output (at least 1)."""
    if [a.shape for a in found] != [b.shape for b in expected]:
        return float("inf")
    differences = [float((a - b).abs().max() / b.abs().max().clamp(min=1)) for a, b in zip(found, expected, strict=True) if a.numel()]
    return max((d if d == d else float("inf") for d in differences), default=0.0)


def _replays(architecture: Architecture, smaller: Smaller, other: Example, found: Sequence[Tensor]) -> bool:
    fresh = _built(architecture, 1)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        save(smaller.model, path, removed=smaller.removed)
        load(path, fresh)
    return all(torch.equal(a, b) for a, b in zip(_outputs(fresh, other), found, strict=True))


def _runs_backward(model: nn.Module, example: Example) -> bool:
    args, kwargs = arguments(example)
    model.train()
    with _seeded(0):
        outputs = [tensor for tensor in tensors_in(model(*args, **kwargs)) if tensor.requires_grad]
    torch.stack([tensor.square().mean() for tensor in outputs]).sum().backward()  # type: ignore[no-untyped-call]
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    return bool(gradients) and all(bool(gradient.isfinite().all()) for gradient in gradients)


def _parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _flops(model: nn.Module, example: Example) -> int:
    args, kwargs = arguments(example)
    with torch.no_grad(), FlopCounterMode(display=False) as flops:
        copy.deepcopy(model).requires_grad_(False)(*args, **kwargs)  # the counter trips over some gradients
    return int(flops.get_total_flops())


def _sentence(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]


# ---------------------------------------------------------------- beside others


def _exported(model: nn.Module, example: Example) -> dict[str, Any]:
    """Return whether ``torch.export`` takes the model, and how long that lasts."""
    args, kwargs = arguments(example)
    begin = time.perf_counter()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.export.export(copy.deepcopy(model), args, kwargs, strict=False)
        failure = ""
    except Exception as error:
        failure = _sentence(error)
    return {"export_seconds": time.perf_counter() - begin, "export_failure": failure}


@contextmanager
def _at_most(seconds: int) -> Iterator[None]:
    """Raise TimeoutError in the block once it has taken that long."""

    def stop(*_: object) -> None:
        raise TimeoutError(f"no end after {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def _by_torch_pruning(architecture: Architecture, groups: Sequence[Group], sparsity: float) -> dict[str, Any]:
    """Return what Torch-Pruning leaves of the parameters, or why it fails; nothing where it is not installed."""
    try:
        torch_pruning: Any = importlib.import_module("torch_pruning")
    except Exception:  # not installed, or one of its own requirements is missing
        return {}
    try:
        model, example = _built(architecture, 0), inputs(architecture, 1)
        before = _parameters(model)
        outputs = {member.name.rpartition(".")[0] for group in groups if "model's output" in group.reason for member in group.made_by()}
        args, kwargs = arguments(example)
        with _at_most(PATIENCE):
            pruner = torch_pruning.pruner.MagnitudePruner(
                model,
                example_inputs=kwargs or args,
                importance=torch_pruning.importance.MagnitudeImportance(p=2),
                pruning_ratio=sparsity,
                ignored_layers=[module for path, module in model.named_modules() if path in outputs],
                output_transform=lambda out: torch.stack([tensor.sum() for tensor in tensors_in(out) if tensor.requires_grad]).sum(),
            )
            pruner.step()
        _outputs(model, inputs(architecture, 2))
        return {"torch_pruning_parameters": _parameters(model) / before, "torch_pruning_failure": ""}
    except Exception as error:
        return {"torch_pruning_parameters": None, "torch_pruning_failure": _sentence(error)}


# ---------------------------------------------------------------- for people


def table(rows: Iterable[Mapping[str, Any]]) -> Table:
    """Return the rows as a table for people."""
    rows = list(rows)
    compared = any("torch_pruning_failure" in row for row in rows)
    exported = any("export_failure" in row for row in rows)
    result = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    result.add_column("architecture", no_wrap=True)
    numbers = ["sparsity", "groups", "find", "parameters", "FLOPs", "removed", "checks"]
    for header in [*numbers, *(["Torch-Pruning"] if compared else []), *(["export"] if exported else [])]:
        result.add_column(header, justify="right")
    for row in rows:
        cells = [row["architecture"], f"{row['sparsity']:.0%}", _of(row, "removable", "groups")]
        cells.append(f"{row['find_seconds']:.2f} s" if "find_seconds" in row else "-")
        for after, before in (("parameters_after", "parameters"), ("flops_after", "flops")):
            cells.append(f"{row[after] / row[before]:.0%}" if after in row and row[before] else "-")
        cells += [_of(row, "removed_units", "masked_units"), f"{sum(bool(row.get(check)) for check in CHECKS)}/{len(CHECKS)}"]
        if compared:
            left = row.get("torch_pruning_parameters")
            cells.append("fails" if left is None else f"{left:.0%}")
        if exported:
            cells.append("fails" if row.get("export_failure", "-") else f"{row['export_seconds']:.1f} s")
        result.add_row(*cells)
    return result


def _of(row: Mapping[str, Any], some: str, all_: str) -> str:
    return f"{row[some]}/{row[all_]}" if some in row and all_ in row else "-"


def summary(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return sentences: how many worked, and a line for each failure."""
    rows = list(rows)
    sentences = []
    for sparsity in sorted({row["sparsity"] for row in rows}):
        here = [row for row in rows if row["sparsity"] == sparsity]
        good = [row for row in here if not row["failure"]]
        sentence = f"{sparsity:.0%}: {len(good)} of {len(here)} architectures pass every check"
        theirs = [row for row in here if "torch_pruning_failure" in row]
        if theirs:
            running = [row for row in theirs if not row["torch_pruning_failure"]]
            changed = [row for row in running if row["torch_pruning_parameters"] < 1]
            sentence += f"; Torch-Pruning leaves {len(running)} of {len(theirs)} that run, {len(changed)} of them smaller"
        sentences.append(sentence)
    first = list({row["architecture"]: row for row in rows}.values())
    exported = [row for row in first if "export_failure" in row]
    if exported:
        good = [row for row in exported if not row["export_failure"]]
        seconds = sum(row["export_seconds"] for row in good), sum(row["find_seconds"] for row in good)
        sentences.append(
            f"torch.export: {len(good)} of {len(exported)}; there it takes {seconds[0]:.0f} s in all, and find_groups {seconds[1]:.0f} s"
        )
    for row in rows:
        if row["failure"]:
            sentences.append(f"{row['architecture']}, {row['sparsity']:.0%}: {row['failure']}")
        elif row["left"]:
            sentences.append(f"{row['architecture']}, {row['sparsity']:.0%}: left alone: {'; '.join(row['left'])}")
    return sentences
