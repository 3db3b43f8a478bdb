"""What the commands share: the group that knows near names, and options that mean the same in several of them."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterable
from contextlib import redirect_stdout
from functools import wraps
from pathlib import Path
from typing import Any

import click

from niwaki.errors import InputError, did_you_mean


class Group(click.Group):
    """A group of commands that names the nearest one when it does not have what was asked for."""

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Return a command; raise InputError for a name that is none."""
        command = super().get_command(ctx, cmd_name)
        if command is None and not ctx.resilient_parsing:
            raise InputError(f"{ctx.command_path}: there is no command {cmd_name!r}; {did_you_mean(cmd_name, self.commands)}")
        return command

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names in the order of use, not of the alphabet."""
        return list(self.commands)


STANDARD_OUTPUT = f"{__name__}.standard_output"
"""Where click's context keeps the stream that :func:`print_json` writes to."""


def json_option(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the option ``--json``; with it, what else is printed, such as by a user's own task, goes to standard error."""

    @wraps(command)
    def alone(*, as_json: bool, **given: Any) -> None:
        if not as_json:
            command(as_json=as_json, **given)
            return
        click.get_current_context().meta[STANDARD_OUTPUT] = sys.stdout
        with redirect_stdout(sys.stderr):
            command(as_json=as_json, **given)

    return click.option("--json", "as_json", is_flag=True, help="Print the result as JSON, and nothing else, on standard output.")(alone)


def print_json(data: Any) -> None:
    """Print plain data as one JSON document, in a command that has :func:`json_option`."""
    click.echo(json.dumps(data, indent=1, allow_nan=False), file=click.get_current_context().meta[STANDARD_OUTPUT])


# ---------------------------------------------------------------- what values are

PATH = click.Path(path_type=Path)

SHARE = click.FloatRange(0, 1, min_open=True, max_open=True)

UNITS = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4}
"""Letter of a unit of memory -> which power of 1000 or, with an i, 1024."""


class Memory(click.ParamType):  # type: ignore[type-arg,unused-ignore]
    """Bytes, such as 2GiB, 500MB or 1000000."""

    name = "memory"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Return a number of bytes."""
        if isinstance(value, int):
            return value
        found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(?:([KMGT]?)(i?)B?)?\s*", value, re.IGNORECASE)
        if found is None or (found[3] and not found[2]):
            self.fail(f"{value!r} is no amount of memory, such as 2GiB or 500MB", param, ctx)
        return int(float(found[1]) * (1024 if found[3] else 1000) ** UNITS[(found[2] or "").upper()])


# ---------------------------------------------------------------- options

task_option = click.option(
    "--task",
    metavar="TASK",
    help="One of digits, mnist, fashion_mnist, cifar10, characters, sst2, sentences, or your own FILE.py:OBJECT.  [required]",
)

model_option = click.option("--model", metavar="MODEL", help="Which of the task's networks, by default its first; or timm:NAME, hf:FOLDER.")

checkpoint_option = click.option(
    "--checkpoint-every",
    type=click.FloatRange(min=0),
    default=30.0,
    show_default=True,
    metavar="SECONDS",
    help="Time between checkpoints of a run.",
)

definitions_option = click.option("--definitions", is_flag=True, help="Show all numbers, and what each of them means.")

results_option = click.option("--out", type=PATH, required=True, metavar="FILE", help="JSON; what it already holds is not repeated.")

show_option = click.option("--show", is_flag=True, help="Measure nothing: show what --out holds.")


def require_known(*given: tuple[str, Iterable[str], Iterable[str]]) -> None:
    """Refuse names that an option does not have; each is given as the option, its names and those that are known."""
    for option, names, known in given:
        for name in names:
            if name not in known:
                raise InputError(f"{option}: there is no {name!r}; {did_you_mean(name, known)}")


def data_option(holds: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Return the option ``--data``, a folder that ``holds`` what the help says."""
    said = f"{holds}; by default what the variable NIWAKI_DATA says."
    return click.option("--data", type=PATH, envvar="NIWAKI_DATA", metavar="DIR", help=said)


def draws_option(default: int) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Return the option ``--seeds`` of measurements that draw calibration data."""
    number = click.IntRange(min=1)
    return click.option("--seeds", type=number, default=default, show_default=True, metavar="N", help="Draws of calibration data.")
