"""What the commands share: the group that knows near names, and the option ``--json``."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from functools import wraps
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


definitions_option = click.option("--definitions", is_flag=True, help="Show all numbers, and what each of them means.")


def print_json(data: Any) -> None:
    """Print plain data as one JSON document, in a command that has :func:`json_option`."""
    click.echo(json.dumps(data, indent=1, allow_nan=False), file=click.get_current_context().meta[STANDARD_OUTPUT])
